//! A restore: GPU memory is allocated and loaded while the lower runtime rebuilds the processes; then the driver's
//! state comes back, the memory is attached and the gates open.

use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use phos_protocol::message::Entry;

use super::save::library_entry;
use super::wake::{Sleeper, wake};
use crate::copy::{self, Regions, Tuning};
use crate::device::{self, Device, DeviceError};
use crate::error::EngineError;
use crate::image::{Image, ImageError};
use crate::job::{RestoreJob, RestoreReport};
use crate::keeper::wire::{KeptProcess, Phase};
use crate::peer::ControlDir;
use crate::plan::{self, WantedGpu};
use crate::processes;
use crate::progress::Progress;

/// A restore whose memory is being loaded.
pub struct Restore {
    device: Arc<dyn Device>,
    job: RestoreJob,
    image: Arc<Image>,
    regions: Arc<Regions>,
    loading: JoinHandle<Result<Duration, EngineError>>,
}

/// Refuses an image that this machine cannot restore.
fn check(image: &Image, job: &RestoreJob, device: &dyn Device) -> Result<(), EngineError> {
    let manifest = &image.manifest;
    let here = device.driver();
    let made = &manifest.driver;
    if (made.version, &made.release) != (here.version, &here.release) {
        let text = |version, release: &str| match release {
            "" => format!("API {version}"),
            r => r.to_string(),
        };
        return Err(EngineError::OtherDriver {
            image: text(made.version, &made.release),
            here: text(here.version, &here.release),
        });
    }
    if let (Some(entry), Some(path)) = (&manifest.library, &job.library) {
        // CRIU maps the file again by its path: another build would be entered at the wrong addresses.
        let same = library_entry(path).is_ok_and(|e| e == *entry);
        if !same {
            return Err(EngineError::OtherLibrary { path: path.clone() });
        }
    }
    for gpu in &manifest.gpus {
        // A GPU that is not here is named below, with what is.
        match device.open(gpu.uuid) {
            Ok(()) | Err(DeviceError::NoSuchGpu(_)) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let gpus = device.gpus()?;
    let bytes_on = |gpu: usize| {
        manifest.allocations.iter().filter(|a| a.gpu as usize == gpu).map(|a| a.size).sum::<u64>()
    };
    let wanted: Vec<_> = manifest
        .gpus
        .iter()
        .enumerate()
        .map(|(i, g)| WantedGpu { id: g.uuid, name: g.name.clone(), bytes: bytes_on(i) })
        .collect();
    plan::place(&wanted, &gpus).map_err(|w| EngineError::NoGpu {
        wanted: format!("{} ({})", w.name, w.id),
        bytes: w.bytes,
        present: match gpus.as_slice() {
            [] => "no GPU".into(),
            some => some
                .iter()
                .map(|g| match g.free {
                    Some(free) => format!("{} ({}) with {free} bytes free", g.name, g.id),
                    None => format!("{} ({})", g.name, g.id),
                })
                .collect::<Vec<_>>()
                .join(", "),
        },
    })
}

/// What became of the loading.
fn joined(loading: JoinHandle<Result<Duration, EngineError>>) -> Result<Duration, EngineError> {
    loading.join().unwrap_or(Err(EngineError::Order("the load thread panicked")))
}

impl Restore {
    /// Checks everything that could make the restore impossible, begins to load, and returns once all memory is allocated.
    pub fn prepare(job: RestoreJob, progress: Arc<Progress>) -> Result<Self, EngineError> {
        let image = Arc::new(Image::open_complete(&job.image)?);
        if image.digest != job.manifest {
            return Err(ImageError::Changed(job.image).into());
        }
        let device: Arc<dyn Device> = device::cuda::open()?;
        check(&image, &job, device.as_ref())?;
        let regions: Arc<Regions> = copy::regions(&image).into();
        let (allocated, is_allocated) = mpsc::channel();
        let loading = {
            let (device, image, regions) = (device.clone(), image.clone(), regions.clone());
            thread::spawn(move || {
                let allocated = || {
                    let _ = allocated.send(());
                };
                copy::load(device.as_ref(), &image, &regions, Tuning::to_load(), &progress, allocated)
            })
        };
        match is_allocated.recv() {
            Ok(()) => Ok(Restore { device, job, image, regions, loading }),
            // It ended before that.
            Err(_) => {
                Err(joined(loading).err().unwrap_or(EngineError::Order("memory that is not allocated")))
            }
        }
    }

    /// The lower runtime has rebuilt the processes, `init_pid` first: gives them their GPU state back.
    pub fn attach(self, init_pid: i32, progress: &Progress) -> Result<RestoreReport, EngineError> {
        let manifest = &self.image.manifest;
        let restored = processes::of_container(init_pid)?;
        let mut sleepers = Vec::new();
        for (index, wanted) in manifest.processes.iter().enumerate() {
            let found = restored.iter().find(|p| p.own_pid == wanted.pid);
            let process = found.ok_or(EngineError::MissingProcess { own_pid: wanted.pid })?;
            let memory = manifest
                .allocations
                .iter()
                .zip(self.regions.iter())
                .filter(|(a, _)| a.process as usize == index)
                .map(|(a, region)| {
                    let region = region.get().ok_or(EngineError::Order("memory that is not allocated"))?;
                    let entry = Entry {
                        id: a.id,
                        device: region.gpu.0,
                        address: a.address,
                        size: a.size,
                        generation: 0,
                        class: a.class,
                        flags: a.flags,
                    };
                    let fd = region.fd.as_ref().ok_or(EngineError::Order("memory without an fd"))?;
                    Ok((entry, fd.as_raw_fd()))
                })
                .collect::<Result<_, EngineError>>()?;
            sleepers.push(Sleeper {
                process: KeptProcess {
                    pid: process.pid,
                    own_pid: process.own_pid,
                    start_time: process.start_time,
                    command: process.command.clone(),
                    has_library: wanted.has_library,
                    phase: Phase::Detaching,
                },
                memory,
            });
        }
        let control = match self.job.control_dir.exists() {
            true => Some(ControlDir::open(&self.job.control_dir)?),
            false => None,
        };
        let mut load_time = Duration::ZERO;
        let loading = self.loading;
        let woken =
            wake(self.device.as_ref(), control.as_ref(), sleepers, &self.job.timeouts, progress, || {
                load_time = joined(loading)?;
                progress.step("wake", 0);
                Ok(())
            })?;
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        Ok(RestoreReport {
            processes: manifest.processes.len() as u32,
            gpu_bytes: manifest.gpu_bytes(),
            load_ms: ms(load_time),
            driver_ms: ms(woken.driver),
            attach_ms: ms(woken.attach_wall),
            total_ms: ms(Instant::now() - progress.began()),
            warnings: manifest.warnings.clone(),
            spans: progress.spans(),
        })
    }
}
