//! GPU → image: several threads, each with its stream, its pinned buffers and its data file.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{fs, io};

use super::subject::Subject;
use crate::device::{Device, GpuId, Pinned};
use crate::error::EngineError;
use crate::image::{
    Allocation, CHUNK, DriverEntry, GpuEntry, ImageWriter, IndexEntry, Lane, LibraryEntry, Manifest,
    ProcessEntry, VERSION,
};
use crate::job::{CheckpointJob, CheckpointReport};
use crate::progress::Progress;

/// Bytes moved by one copy. Two buffers of this size per thread keep link and file busy at the same time.
pub(super) const PIECE: usize = 8 << 20;
/// More threads than this no longer raise the rate (FACTS: a file system's own limit comes first).
const MOST_LANES: usize = 12;

/// Threads that move data on this machine.
pub(super) fn lanes() -> usize {
    thread::available_parallelism().map_or(2, |n| n.get()).clamp(1, MOST_LANES)
}

/// Page-locked buffers for one thread.
pub(super) struct Ring(pub [Box<dyn Pinned>; 2]);

impl Ring {
    pub(super) fn allocate(device: &dyn Device) -> Result<Self, EngineError> {
        Ok(Ring([device.pinned(PIECE)?, device.pinned(PIECE)?]))
    }
}

/// An image being filled. Everything slow to set up exists before the program is stopped.
pub struct Saver<'a> {
    device: &'a dyn Device,
    writer: ImageWriter,
    rings: Vec<Ring>,
}

/// A stretch of memory to be saved.
#[derive(Clone, Copy)]
struct Source {
    gpu: GpuId,
    address: u64,
    len: usize,
    first_chunk: u64,
}

/// Cuts all memory into pieces, in the order of the manifest's allocations.
fn sources(subjects: &[Subject]) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut chunk = 0;
    for piece in subjects.iter().flat_map(|s| &s.pieces) {
        if let Some(region) = piece.snapshot.as_ref().or(piece.region.as_ref()) {
            for at in (0..piece.held.size).step_by(PIECE) {
                sources.push(Source {
                    gpu: region.gpu,
                    address: region.address + at,
                    len: (piece.held.size - at).min(PIECE as u64) as usize,
                    first_chunk: chunk + at / CHUNK as u64,
                });
            }
        }
        chunk += piece.held.size / CHUNK as u64;
    }
    sources
}

impl<'a> Saver<'a> {
    /// Creates the data files and the buffers.
    pub fn prepare(device: &'a dyn Device, folder: &Path) -> Result<Self, EngineError> {
        let lanes = lanes();
        let rings = (0..lanes).map(|_| Ring::allocate(device)).collect::<Result<_, _>>()?;
        Ok(Saver { device, writer: ImageWriter::create(folder, lanes)?, rings })
    }

    /// Copies every piece of `subjects` into the image: its snapshot if it has one, else the memory itself.
    pub fn copy(&mut self, subjects: &[Subject], progress: &Progress) -> Result<Duration, EngineError> {
        let begin = Instant::now();
        let sources = sources(subjects);
        progress.step("copy", sources.iter().map(|s| s.len as u64).sum());
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let device = self.device;
        thread::scope(|scope| {
            let threads: Vec<_> = self
                .writer
                .lanes()
                .iter_mut()
                .zip(&mut self.rings)
                .map(|(lane, ring)| {
                    let take = || match failed.load(Ordering::Relaxed) {
                        true => None,
                        false => sources.get(next.fetch_add(1, Ordering::Relaxed)).copied(),
                    };
                    let failed = &failed;
                    scope.spawn(move || {
                        let result = drive(device, lane, ring, take, progress);
                        if result.is_err() {
                            failed.store(true, Ordering::Relaxed);
                        }
                        result
                    })
                })
                .collect();
            threads
                .into_iter()
                .try_for_each(|t| t.join().unwrap_or(Err(EngineError::Order("a copy thread panicked"))))
        })?;
        Ok(begin.elapsed())
    }

    /// Makes what was copied durable.
    pub fn sync(&self) -> Result<(), EngineError> {
        Ok(self.writer.sync()?)
    }
}

/// One thread: while one buffer is filled by the GPU, the other goes to the file.
fn drive(
    device: &dyn Device,
    lane: &mut Lane,
    ring: &mut Ring,
    take: impl Fn() -> Option<Source>,
    progress: &Progress,
) -> Result<(), EngineError> {
    let mut streams = std::collections::BTreeMap::new();
    let mut filling: Option<Source> = None;
    loop {
        let source = take();
        // Buffer 1 holds what the previous round started to fill; buffer 0 is free.
        if let Some(done) = filling.take() {
            let stream: &mut Box<dyn crate::device::Stream> =
                streams.get_mut(&done.gpu).ok_or(EngineError::Order("no stream"))?;
            stream.wait()?;
            ring.0.swap(0, 1);
            if let Some(s) = source {
                start(device, &mut streams, ring, s)?;
            }
            // After the swap the filled buffer is number 1 and the one being filled number 0.
            lane.put(done.first_chunk, &ring.0[1].bytes()[..done.len])?;
            progress.add(done.len as u64);
        } else if let Some(s) = source {
            start(device, &mut streams, ring, s)?;
        }
        match source {
            Some(s) => filling = Some(s),
            None => return Ok(()),
        }
    }
}

fn start(
    device: &dyn Device,
    streams: &mut std::collections::BTreeMap<GpuId, Box<dyn crate::device::Stream>>,
    ring: &mut Ring,
    source: Source,
) -> Result<(), EngineError> {
    let stream = match streams.entry(source.gpu) {
        std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
        std::collections::btree_map::Entry::Vacant(e) => e.insert(device.stream(source.gpu)?),
    };
    Ok(stream.copy_out(source.address, ring.0[0].as_mut(), 0, source.len)?)
}

/// Size and digest of the `libphos.so` that the container's processes have mapped.
pub(super) fn library_entry(path: &Path) -> io::Result<LibraryEntry> {
    let bytes = fs::read(path)?;
    let digest = phos_digest::digest(&bytes).to_bytes().iter().map(|b| format!("{b:02x}")).collect();
    Ok(LibraryEntry { size: bytes.len() as u64, digest })
}

/// Completes the image.
pub fn commit(
    saver: Saver<'_>,
    job: &CheckpointJob,
    subjects: &[Subject],
    report: &mut CheckpointReport,
) -> Result<(), EngineError> {
    let known = saver.device.gpus()?;
    let mut gpus: Vec<GpuEntry> = Vec::new();
    let (mut allocations, mut processes) = (Vec::new(), Vec::new());
    let mut first_chunk = 0;
    for (process, subject) in subjects.iter().enumerate() {
        processes.push(ProcessEntry {
            pid: subject.kept.own_pid,
            command: subject.kept.command.clone(),
            has_library: subject.kept.has_library,
        });
        for piece in &subject.pieces {
            let uuid = GpuId(piece.held.device);
            let gpu = match gpus.iter().position(|g| g.uuid == uuid) {
                Some(i) => i,
                None => {
                    let info = known
                        .iter()
                        .find(|g| g.id == uuid)
                        .ok_or(EngineError::HiddenGpu { pid: subject.kept.pid, gpu: uuid })?;
                    gpus.push(GpuEntry { uuid, name: info.name.clone(), total_bytes: info.total });
                    gpus.len() - 1
                }
            };
            allocations.push(Allocation {
                process: process as u32,
                id: piece.held.id,
                gpu: gpu as u32,
                address: piece.held.address,
                size: piece.held.size,
                class: piece.held.class,
                flags: piece.held.flags,
                first_chunk,
            });
            first_chunk += piece.held.size / CHUNK as u64;
        }
    }
    let library = match &job.library {
        Some(path) => Some(
            library_entry(path).map_err(|source| EngineError::Io { what: "reading libphos.so", source })?,
        ),
        None => None,
    };
    let driver = saver.device.driver();
    let manifest = Manifest {
        version: VERSION,
        features: Vec::new(),
        made_by: format!("phos-runc {}", env!("CARGO_PKG_VERSION")),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        container: job.container.clone(),
        driver: DriverEntry { version: driver.version, release: driver.release },
        lower_runtime: job.lower_version.clone(),
        criu: job.criu_version.clone(),
        chunk_size: CHUNK as u64,
        digest: phos_digest::NAME.to_string(),
        gpus,
        processes,
        allocations,
        files: Vec::new(),
        index: IndexEntry { size: 0, digest: String::new() },
        library,
        warnings: report.warnings.clone(),
        effective_spec: job.effective_spec.clone(),
    };
    report.gpu_bytes = manifest.gpu_bytes();
    report.written_bytes = saver.writer.written();
    saver.writer.commit(manifest)?;
    Ok(())
}
