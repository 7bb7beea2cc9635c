//! A checkpoint, from preflight to commit. DESIGN: `Running → Draining → Parked → Detached → … → Running`.
//!
//! ```text
//! preflight   processes, blockers, folder, space; memory imported, ring and snapshot memory allocated
//! ── the program stands still ──────────────────────────────────────────────────────────────────────
//! park        every gate closes, work drains, memory is handed over
//! detach      driver checkpoint            ║ snapshot inside the GPU (or copy out, if there is no room)
//! dump        the lower runtime, CRIU      ║ … still going on
//! wake        driver restore, attach, gates open                                   (leave-running only)
//! ── the program runs again ────────────────────────────────────────────────────────────────────────
//! drain       snapshot → image
//! commit      data synced, manifest renamed
//! ```
//!
//! Without leave-running, everything on the GPU is in the image and synced before the lower runtime is asked:
//! once it has succeeded the processes are gone, and nothing may be left that could fail.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use phos_protocol::message::{Entry, PARK_LOW_STACK, PARK_PREFAULT, Timings};

use super::folder::ImageFolder;
use super::save::{self, Saver};
use super::subject::{Subject, all, find};
use super::wake::{Sleeper, Woken, wake};
use crate::device::{Device, GpuId};
use crate::error::EngineError;
use crate::job::{CheckpointJob, CheckpointReport, Strategy};
use crate::keeper::wire::{Packet, Phase, Wire};
use crate::lower;
use crate::peer::ControlDir;
use crate::plan;
use crate::progress::Progress;
use crate::service::LowerOutput;

/// GPU memory that a snapshot leaves free for the application: it may allocate while the snapshot drains.
const SNAPSHOT_RESERVE: u64 = 1 << 30;

/// How often the freezer is asked.
const FREEZER_ATTEMPTS: u32 = 10;

/// A checkpoint under way.
pub struct Checkpoint<'a> {
    device: Arc<dyn Device>,
    job: &'a CheckpointJob,
    wire: &'a Wire,
    progress: &'a Progress,
    control: Option<ControlDir>,
    subjects: Vec<Subject>,
    report: CheckpointReport,
    lower: LowerOutput,
    /// The container's freezer, as this job has last set it.
    frozen: bool,
    /// The processes are in the lower runtime's image and nowhere else.
    gone: bool,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// Runs the job. The lower runtime's output is returned whatever happened.
pub fn run(
    device: Arc<dyn Device>,
    job: &CheckpointJob,
    wire: &Wire,
    progress: &Progress,
) -> (Result<CheckpointReport, EngineError>, LowerOutput) {
    let mut checkpoint = Checkpoint {
        device,
        job,
        wire,
        progress,
        control: None,
        subjects: Vec::new(),
        report: CheckpointReport::default(),
        lower: LowerOutput::default(),
        frozen: job.frozen,
        gone: false,
    };
    let result = checkpoint.run();
    let Checkpoint { mut report, lower, .. } = checkpoint;
    report.total_ms = ms(progress.began().elapsed());
    (result.map(|()| report), lower)
}

impl Checkpoint<'_> {
    fn run(&mut self) -> Result<(), EngineError> {
        self.progress.step("preflight", 0);
        let folder = ImageFolder::prepare(&self.job.image)?;
        self.wire.send_job(self.job)?;
        if self.frozen {
            self.set_frozen(false)?;
        }
        let saved = self.save(&folder);
        // The container is left as it was found, whatever came of it; a stopped one has no freezer to set.
        if self.job.frozen && !self.frozen && (saved.is_err() || self.job.leave_running) {
            // The image does not depend on it, and the engine thaws next; what the dump said must not be lost over it.
            let lower = std::mem::take(&mut self.lower);
            if let Err(e) = self.set_frozen(true) {
                self.report.warnings.push(format!("the container could not be frozen again: {e}"));
            }
            self.lower = lower;
        }
        if saved.is_ok() || self.gone {
            folder.keep();
        }
        saved
    }

    fn set_frozen(&mut self, frozen: bool) -> Result<(), EngineError> {
        let command = if frozen { &self.job.lower_pause } else { &self.job.lower_resume };
        // The old cgroup hierarchy's freezer gives up now and then on a busy machine; asked again, it works.
        for attempt in 1.. {
            let output = lower::run(command, self.job.timeouts.lower())?;
            if output.status == 0 {
                break;
            }
            if attempt == FREEZER_ATTEMPTS {
                let status = output.status;
                self.lower = output;
                return Err(EngineError::LowerFailed(status));
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.frozen = frozen;
        Ok(())
    }

    fn save(&mut self, folder: &ImageFolder) -> Result<(), EngineError> {
        self.preflight()?;
        let bytes: u64 = self.subjects.iter().map(Subject::bytes).sum();
        folder.require(bytes + bytes / 64)?;
        let snapshot = self.prepare_snapshot()?;
        let device = self.device.clone();
        let mut saver = Saver::prepare(device.as_ref(), &self.job.image)?;
        let stopped = Instant::now();
        match self.stand_still(&mut saver, snapshot) {
            Ok(()) => {}
            Err(cause) => {
                tracing::error!(error = %cause, "checkpoint failed, waking the container");
                drop(saver);
                return Err(match self.wake() {
                    Ok(_) => cause,
                    Err(rollback) => {
                        EngineError::RollbackFailed { cause: Box::new(cause), rollback: Box::new(rollback) }
                    }
                });
            }
        }
        if self.job.leave_running {
            self.report.pause_ms = ms(stopped.elapsed());
        }
        if snapshot && self.job.leave_running {
            // From here on the application owns its memory alone; only the snapshot is read.
            for piece in self.subjects.iter_mut().flat_map(|s| &mut s.pieces) {
                piece.region = None;
            }
            self.copy_out(&mut saver)?;
        }
        self.progress.step("commit", 0);
        save::commit(saver, self.job, &self.subjects, &mut self.report)?;
        Ok(())
    }

    /// Finds the processes, refuses what cannot be saved and does everything that needs no standing still.
    fn preflight(&mut self) -> Result<(), EngineError> {
        if self.job.control_dir.exists() {
            self.control = Some(ControlDir::open(&self.job.control_dir)?);
        }
        self.subjects = find(self.device.as_ref(), self.job.init_pid, self.control.as_ref())?;
        self.report.processes = self.subjects.len() as u32;
        for subject in &mut self.subjects {
            let Some(library) = &subject.library else {
                self.report.warnings.push(format!(
                    "process {} ({}) runs without libphos.so: the driver alone saves its GPU memory, while it stands still",
                    subject.kept.pid, subject.kept.command
                ));
                continue;
            };
            let summary = library.query()?;
            if let Some(reason) = summary.blockers.first() {
                return Err(EngineError::Unsupported {
                    pid: subject.kept.pid,
                    command: subject.kept.command.clone(),
                    reason: reason.clone(),
                });
            }
            let table = library.table(0)?;
            subject.apply(table, self.wire)?;
            subject.import(self.device.as_ref())?;
        }
        Ok(())
    }

    /// Decides whether there will be a snapshot, and allocates it while the program still runs.
    fn prepare_snapshot(&mut self) -> Result<bool, EngineError> {
        let gpus = self.device.gpus()?;
        let demand = plan::demand_by_gpu(self.subjects.iter().flat_map(|s| &s.pieces).map(|p| &p.held));
        let room = plan::snapshot_fits(&demand, &gpus, SNAPSHOT_RESERVE);
        let wanted = match self.job.strategy {
            Strategy::Stop => false,
            Strategy::Snapshot => true,
            Strategy::Auto => room,
        };
        if !self.job.leave_running || !wanted {
            return Ok(false);
        }
        for subject in &mut self.subjects {
            match allocate_snapshots(self.device.as_ref(), subject) {
                Ok(()) => {}
                Err(EngineError::Driver { source, .. })
                    if source.is_out_of_memory() && self.job.strategy == Strategy::Auto =>
                {
                    self.drop_snapshots("no room for a snapshot inside the GPU");
                    return Ok(false);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    fn drop_snapshots(&mut self, why: &str) {
        self.report.warnings.push(format!("{why}: copied out while the program stood still"));
        for piece in self.subjects.iter_mut().flat_map(|s| &mut s.pieces) {
            piece.snapshot = None;
        }
    }

    /// Everything between the first gate's closing and the last one's opening (or the processes' end).
    fn stand_still(&mut self, saver: &mut Saver<'_>, snapshot: bool) -> Result<(), EngineError> {
        self.park()?;
        let device = self.device.clone();
        let mut snapshot = snapshot;
        if snapshot {
            // Allocations that appeared since preflight.
            for subject in &mut self.subjects {
                if let Err(e) = allocate_snapshots(device.as_ref(), subject) {
                    tracing::warn!(error = %e, "no room for a late part of the snapshot");
                    snapshot = false;
                }
            }
            if !snapshot {
                self.drop_snapshots("memory allocated late did not fit the snapshot");
            }
        }
        let lock_timeout = self.job.timeouts.lock();
        let wire = self.wire;
        self.progress.step("driver checkpoint", 0);
        let begin = Instant::now();
        let (subjects, report, progress) = (&mut self.subjects, &mut self.report, self.progress);
        for subject in subjects.iter_mut() {
            subject.enter(wire, Phase::Detaching)?;
        }
        let mut processes: Vec<_> = subjects.iter().map(|s| s.kept.clone()).collect();
        // The driver moves its own state to the host while the memory is copied: they share no bytes.
        let (detached, copied) = thread::scope(|scope| {
            let detach = scope.spawn(|| {
                all(&mut processes, |process| {
                    device.lock(process.pid, lock_timeout).map_err(|e| process.driver_error(e))?;
                    device.checkpoint(process.pid).map_err(|e| process.driver_error(e))
                })?;
                Ok::<_, EngineError>(begin.elapsed())
            });
            let copied = if snapshot {
                take_snapshot(device.as_ref(), subjects)
            } else {
                saver.copy(subjects, progress)
            };
            let panicked = || Err(EngineError::Order("the driver thread panicked"));
            (detach.join().unwrap_or_else(|_| panicked()), copied)
        });
        report.driver_checkpoint_ms = ms(detached?);
        let copied = copied?;
        if snapshot {
            report.snapshot_ms = ms(copied);
        } else {
            report.copy_ms = ms(copied);
        }
        if !self.job.leave_running {
            // The last moment at which a full disk is harmless.
            saver.sync()?;
        }
        self.dump()?;
        if self.job.leave_running {
            let woken = self.wake()?;
            self.report.driver_restore_ms = ms(woken.driver);
            self.report.attach_ms = ms(woken.attach_wall);
        }
        Ok(())
    }

    /// Closes every gate, then takes everything over. Until the second half, dropping the conversations
    /// undoes it all.
    fn park(&mut self) -> Result<(), EngineError> {
        self.progress.step("park", 0);
        let (wire, drain) = (self.wire, self.job.timeouts.drain());
        let begin = Instant::now();
        for subject in &mut self.subjects {
            subject.enter(wire, Phase::Parking)?;
        }
        all(&mut self.subjects, |subject| {
            let Some(library) = &subject.library else { return Ok(()) };
            let update = library.park(subject.generation, drain, PARK_LOW_STACK | PARK_PREFAULT)?;
            subject.apply(update, wire)
        })?;
        let timings = all(&mut self.subjects, |subject| match subject.library.take() {
            Some(library) => Ok(library.taken()?),
            None => Ok(Timings::default()),
        })?;
        let drain = Duration::from_micros(timings.iter().map(|t| t.drain_us).max().unwrap_or(0));
        self.report.drain_ms = ms(drain);
        self.report.park_ms = ms(begin.elapsed().saturating_sub(drain));
        // Late allocations are mapped here only now: the library was not kept waiting for it.
        let device = self.device.clone();
        self.subjects.iter_mut().try_for_each(|s| s.import(device.as_ref()))
    }

    fn dump(&mut self) -> Result<(), EngineError> {
        if self.job.frozen {
            self.set_frozen(true)?;
        }
        self.progress.step("dump", 0);
        let begin = Instant::now();
        self.lower = lower::run(&self.job.lower_checkpoint, self.job.timeouts.lower())?;
        self.report.criu_ms = ms(begin.elapsed());
        if self.lower.status != 0 {
            return Err(EngineError::LowerFailed(self.lower.status));
        }
        self.gone = !self.job.leave_running;
        self.wire.send(&Packet::LowerDone, &[])?;
        Ok(())
    }

    /// Brings every process back to running.
    fn wake(&mut self) -> Result<Woken, EngineError> {
        self.progress.step("wake", 0);
        if self.frozen {
            self.set_frozen(false)?;
        }
        // Conversations that were cut short reopen the gate by their end.
        self.subjects.iter_mut().for_each(|s| s.library = None);
        let sleeper = |s: &Subject| Sleeper {
            process: s.kept.clone(),
            memory: s.pieces.iter().map(|p| (Entry::from(&p.held), p.fd.as_raw_fd())).collect(),
        };
        let sleepers = self.subjects.iter().filter(|s| s.kept.phase != Phase::Running).map(sleeper).collect();
        let woken =
            wake(self.device.as_ref(), self.control.as_ref(), sleepers, &self.job.timeouts, || Ok(()))?;
        for subject in &mut self.subjects {
            subject.enter(self.wire, Phase::Attached)?;
        }
        Ok(woken)
    }

    fn copy_out(&mut self, saver: &mut Saver<'_>) -> Result<(), EngineError> {
        self.report.copy_ms = ms(saver.copy(&self.subjects, self.progress)?);
        Ok(())
    }
}

fn allocate_snapshots(device: &dyn Device, subject: &mut Subject) -> Result<(), EngineError> {
    for piece in subject.pieces.iter_mut().filter(|p| p.snapshot.is_none()) {
        let region = device
            .allocate(GpuId(piece.held.device), piece.held.size)
            .map_err(|e| subject.kept.driver_error(e))?;
        piece.snapshot = Some(region);
    }
    Ok(())
}

/// Copies every piece inside its GPU; all GPUs at the same time.
fn take_snapshot(device: &dyn Device, subjects: &[Subject]) -> Result<Duration, EngineError> {
    let begin = Instant::now();
    let mut streams = std::collections::BTreeMap::new();
    for piece in subjects.iter().flat_map(|s| &s.pieces) {
        let (Some(from), Some(to)) = (&piece.region, &piece.snapshot) else { continue };
        let stream = match streams.entry(from.gpu) {
            std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::btree_map::Entry::Vacant(e) => e.insert(device.stream(from.gpu)?),
        };
        stream.copy_within(to.address, from.address, from.size)?;
    }
    for stream in streams.values_mut() {
        stream.wait()?;
    }
    Ok(begin.elapsed())
}
