//! A checkpoint, from preflight to commit. DESIGN: `Running → Draining → Parked → Detached → … → Running`.
//!
//! ```text
//! preflight   processes, blockers, folder, space; memory imported, buffers and spare memory allocated
//! pre-copy    rounds of copying, where the plan has them
//! ── the program stands still ──────────────────────────────────────────────────────────────────────
//! park        every gate closes, work drains, memory is handed over
//! detach      driver checkpoint                       ║ what differs from what is saved goes to spare memory,
//! dump        the lower runtime, CRIU                 ║ and straight to the image what finds no room there
//! wake        driver restore, then (joined) attach, gates open                     (leave-running only)
//! ── the program runs again ────────────────────────────────────────────────────────────────────────
//! drain       spare memory → image
//! commit      data synced, manifest renamed
//! ```
//!
//! Without leave-running, everything on the GPU is in the image and synced before the lower runtime is asked:
//! once it has succeeded the processes are gone, and nothing may be left that could fail.
//!
//! A pre-dump is the first two steps, the lower runtime's own pre-dump, and the commit.

mod without_room;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use phos_protocol::message::{Entry, PARK_LOW_STACK, PARK_PREFAULT, Timings};

use super::folder::ImageFolder;
use super::freeze;
use super::save;
use super::sharing;
use super::subject::{Subject, all, find};
use super::wake::{Sleeper, Woken, wake};
use crate::copy::{self, Ledger, Quiesced};
use crate::device::Device;
use crate::error::EngineError;
use crate::freezer::Freezer;
use crate::headroom;
use crate::image::{ImageWriter, ParentEntry};
use crate::job::{CheckpointJob, CheckpointReport};
use crate::keeper::wire::{Packet, Phase, Wire};
use crate::lower;
use crate::peer::{AttachListener, ControlDir};
use crate::plan::{self, CopyPlan};
use crate::progress::Progress;
use crate::service::LowerOutput;

/// GPU memory that spare memory leaves free for the application: it may allocate while a snapshot drains.
const SPARE_RESERVE: u64 = 1 << 30;

/// How long memory is watched to see how fast it changes.
const WATCH: Duration = Duration::from_millis(100);

/// Longest wait for processes that may give memory back before they are dumped.
const TRIM: Duration = Duration::from_secs(1);

/// Name of what concerns the container as a whole, in timelines.
const ENGINE: &str = "engine";

type Session<'a> = copy::Session<'a, ImageWriter>;

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
    /// The GPU has no room for this process beside the container's.
    no_room: bool,
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
        no_room: false,
    };
    let result = checkpoint.run();
    let Checkpoint { mut report, lower, .. } = checkpoint;
    report.total_ms = ms(progress.began().elapsed());
    report.spans = progress.spans();
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
        if freeze::is_to_stay(self.job) && !self.frozen && (saved.is_err() || self.job.leave_running) {
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
        if let Err(output) = freeze::set(self.job, frozen)? {
            let status = output.status;
            self.lower = output;
            return Err(EngineError::LowerFailed(status));
        }
        self.frozen = frozen;
        Ok(())
    }

    fn save(&mut self, folder: &ImageFolder) -> Result<(), EngineError> {
        self.preflight()?;
        if self.no_room {
            return self.save_without_room(folder);
        }
        let bytes: u64 = self.subjects.iter().map(Subject::bytes).sum();
        let device = self.device.clone();
        let progress = self.progress;
        let lanes = copy::lane_count();
        let mut ledger = Ledger::default();
        save::update(&mut ledger, &self.subjects);
        let parent = match &self.job.parent {
            Some(path) => {
                Some(save::assume_parent(&mut ledger, &self.subjects, &self.job.image, path, lanes)?)
            }
            None => {
                folder.require(self.job.bytes_in_files(bytes))?;
                None
            }
        };
        let writer = ImageWriter::create(&self.job.image, lanes, self.job.compression)?;
        let mut session = copy::Session::prepare(device.as_ref(), progress, writer, lanes, ledger)?;
        let plan = self.choose(&mut session, parent.as_ref())?;
        if plan.precopy {
            self.precopy(&mut session)?;
        }
        if self.job.pre_dump {
            self.lower_pre_dump()?;
            return self.commit(session, parent);
        }
        self.prepare_stop(&mut session, plan)?;
        let stopped = Instant::now();
        match self.stand_still(&mut session) {
            Ok(()) => {}
            Err(cause) => {
                drop(session);
                return Err(self.woken_after(cause));
            }
        }
        if self.job.leave_running {
            self.report.pause_ms = ms(stopped.elapsed());
            // From here on the application owns its memory alone; only spare memory is read.
            for piece in self.subjects.iter_mut().flat_map(|s| &mut s.pieces) {
                piece.region = None;
            }
            self.report.copy_ms += ms(session.drain()?);
        }
        self.commit(session, parent)
    }

    fn commit(&mut self, session: Session<'_>, parent: Option<ParentEntry>) -> Result<(), EngineError> {
        self.progress.step("commit", 0);
        let begin = Instant::now();
        let saved = session.finish();
        save::commit(self.device.as_ref(), saved, parent, self.job, &self.subjects, &mut self.report)?;
        self.progress.span("commit", ENGINE, begin, begin.elapsed());
        Ok(())
    }

    /// Finds the processes, refuses what cannot be saved and does everything that needs no standing still.
    fn preflight(&mut self) -> Result<(), EngineError> {
        if self.job.control_dir.exists() {
            let control = ControlDir::open(&self.job.control_dir)?;
            // Where the limit is not known they have nothing ready; that costs time.
            if let Err(e) = control.tell_headroom(headroom::of(self.job.init_pid)) {
                tracing::warn!(error = %e, "the memory limit could not be told");
            }
            self.control = Some(control);
        }
        let (subjects, outsiders) = find(self.device.as_ref(), self.job.init_pid, self.control.as_ref())?;
        self.subjects = subjects;
        for p in outsiders {
            self.report.warnings.push(format!(
                "process {} ({}) joined the container by exec: like the lower runtime, the checkpoint leaves it out",
                p.pid, p.command
            ));
        }
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
            self.report.driver_bytes += summary.driver_bytes;
            if let Some(reason) = summary.blockers.first() {
                return Err(EngineError::Unsupported {
                    pid: subject.kept.pid,
                    command: subject.kept.command.clone(),
                    reason: reason.clone(),
                });
            }
            let table = library.table(0)?;
            subject.apply(table, self.wire)?;
        }
        sharing::resolve(&mut self.subjects)?;
        for subject in &mut self.subjects {
            match subject.import(self.device.as_ref()) {
                Err(EngineError::Driver { source, .. }) if source.is_no_room() => self.no_room = true,
                other => other?,
            }
        }
        Ok(())
    }

    /// Brings the container back after a failure; the error to report.
    fn woken_after(&mut self, cause: EngineError) -> EngineError {
        tracing::error!(error = %cause, "checkpoint failed, waking the container");
        match self.wake(|| ()) {
            Ok(_) => cause,
            Err(rollback) => {
                EngineError::RollbackFailed { cause: Box::new(cause), rollback: Box::new(rollback) }
            }
        }
    }

    /// Decides how to copy.
    fn choose(
        &self,
        session: &mut Session<'_>,
        parent: Option<&ParentEntry>,
    ) -> Result<CopyPlan, EngineError> {
        let demand = plan::demand_by_gpu(self.subjects.iter().flat_map(Subject::owned).map(|p| &p.held));
        let bytes = demand.values().sum();
        let mut fits = plan::snapshot_fits(&demand, &self.device.gpus()?, SPARE_RESERVE);
        if parent.is_some() {
            session.prepare_scan()?;
            // What the parent has already needs no room.
            let dirty = session.dirty()?;
            let dirty = save::bytes_by_gpu(&session.ledger, &dirty);
            fits = plan::snapshot_fits(&dirty, &self.device.gpus()?, SPARE_RESERVE);
        }
        let changing = || Ok::<_, EngineError>((session.changing(WATCH)?, WATCH));
        let mut plan = plan::choose(self.job.strategy, self.job.leave_running, bytes, fits, changing)?;
        plan.precopy |= self.job.pre_dump;
        tracing::info!(?plan, bytes, fits, "how to copy");
        Ok(plan)
    }

    /// Copies while the program runs, in rounds, as long as that makes the rest smaller.
    fn precopy(&mut self, session: &mut Session<'_>) -> Result<(), EngineError> {
        session.prepare_scan()?;
        let mut chunks = session.dirty()?;
        loop {
            let (copied, time) = session.round(&chunks)?;
            self.report.precopied_bytes += copied;
            self.report.precopy_rounds += 1;
            self.report.copy_ms += ms(time);
            self.refresh()?;
            save::update(&mut session.ledger, &self.subjects);
            chunks = session.dirty()?;
            let dirty = (chunks.len() * crate::image::CHUNK) as u64;
            tracing::info!(round = self.report.precopy_rounds, copied, dirty, ms = ms(time), "pre-copy");
            if !plan::another_round(self.report.precopy_rounds, copied, dirty) {
                return Ok(());
            }
        }
    }

    /// Brings the tables up to date while the program runs.
    fn refresh(&mut self) -> Result<(), EngineError> {
        for subject in &mut self.subjects {
            if let Some(library) = &subject.library {
                let update = library.table(subject.generation)?;
                subject.apply(update, self.wire)?;
            }
        }
        sharing::resolve(&mut self.subjects)?;
        let device = self.device.clone();
        self.subjects.iter_mut().try_for_each(|s| s.import(device.as_ref()))
    }

    /// Allocates what is needed while the program stands still.
    fn prepare_stop(&mut self, session: &mut Session<'_>, plan: CopyPlan) -> Result<(), EngineError> {
        session.prepare_scan()?;
        if plan.spare {
            let dirty = if plan.precopy || self.job.parent.is_some() {
                session.dirty()?
            } else {
                session.ledger.all()
            };
            let dirty = save::bytes_by_gpu(&session.ledger, &dirty);
            let demand = save::bytes_by_gpu(&session.ledger, &session.ledger.all());
            let wanted = plan::spare_wanted(&demand, &dirty, &self.device.gpus()?, SPARE_RESERVE);
            session.allocate_spare(&wanted)?;
        }
        Ok(())
    }

    /// Everything between the first gate's closing and the last one's opening (or the processes' end).
    fn stand_still(&mut self, session: &mut Session<'_>) -> Result<(), EngineError> {
        self.park()?;
        save::update(&mut session.ledger, &self.subjects);
        let leave_running = self.job.leave_running;
        // The driver and CRIU save their parts while the memory is copied: they share no bytes. Only attaching waits,
        // and without leave-running the dump, before which everything must be safe.
        thread::scope(|scope| {
            let mut copying = Some(scope.spawn(|| {
                let quiesced = session.quiesce()?;
                if !leave_running {
                    // The last moment at which a full disk is harmless.
                    session.sink().sync()?;
                }
                Ok::<_, EngineError>(quiesced)
            }));
            let mut join = || match copying.take().map(|t| t.join()) {
                Some(Ok(result)) => result,
                _ => Err(EngineError::Order("the copy thread panicked")),
            };
            self.detach()?;
            if !leave_running {
                self.copied(join()?);
                return self.dump();
            }
            self.dump()?;
            let mut quiesced = None;
            let woken = self.wake(|| quiesced = Some(join()))?;
            self.report.driver_restore_ms = ms(woken.driver);
            self.report.attach_ms = ms(woken.attach_wall);
            self.copied(quiesced.unwrap_or(Err(EngineError::Order("the copy was not awaited")))?);
            Ok(())
        })
    }

    fn copied(&mut self, q: Quiesced) {
        self.report.digest_ms = ms(q.digest);
        self.report.snapshot_ms = ms(q.snapshot);
        self.report.copy_ms += ms(q.copy);
        self.report.dirty_bytes = q.dirty_bytes;
        self.report.straight_bytes = q.straight_bytes;
        if q.straight_bytes > 0 && self.job.leave_running {
            self.report.warnings.push(format!(
                "{} MiB found no room on the GPU and were copied out while the program stood still, in {:.0} ms",
                q.straight_bytes >> 20,
                ms(q.copy)
            ));
        }
    }

    /// The driver moves its own state into the processes' host memory.
    fn detach(&mut self) -> Result<(), EngineError> {
        self.progress.step("driver checkpoint", 0);
        let begin = Instant::now();
        let (device, wire, progress) = (self.device.clone(), self.wire, self.progress);
        let lock_timeout = self.job.timeouts.lock();
        all(&mut self.subjects, |subject| {
            subject.enter(wire, Phase::Detaching)?;
            let process = &subject.kept;
            device.lock(process.pid, lock_timeout).map_err(|e| process.driver_error(e))?;
            device.checkpoint(process.pid).map_err(|e| process.driver_error(e))?;
            progress.span("driver checkpoint", &process.to_string(), begin, begin.elapsed());
            Ok(())
        })?;
        self.report.driver_checkpoint_ms = ms(begin.elapsed());
        self.trim();
        Ok(())
    }

    /// Has the libraries give back what the driver saved as zeros. What does not work costs time, and nothing else.
    fn trim(&mut self) {
        let begin = Instant::now();
        let parked = self.subjects.iter().map(|s| &s.kept).filter(|p| p.has_library);
        let mut expected: Vec<_> = parked.map(|p| (p.pid, p.own_pid)).collect();
        let Some(listener) = self.control.as_ref().and_then(|c| AttachListener::bind(c).ok()) else { return };
        let mut libraries = Vec::new();
        while !expected.is_empty() {
            match listener.accept(&expected, begin + TRIM) {
                Ok(library) => {
                    expected.retain(|(pid, _)| *pid != library.pid);
                    libraries.push(library);
                }
                Err(e) => {
                    tracing::warn!(error = %e, "not trimmed");
                    break;
                }
            }
        }
        match all(&mut libraries, |library| Ok(library.trim()?)) {
            Ok(bytes) => self.report.trimmed_bytes = bytes.into_iter().sum(),
            Err(e) => tracing::warn!(error = %e, "not trimmed"),
        }
        // The door goes before the conversations end, so that nobody knocks again while CRIU looks.
        drop(listener);
        drop(libraries);
        self.report.trim_ms = ms(begin.elapsed());
        self.progress.span("trim", ENGINE, begin, begin.elapsed());
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
        // Refused here, nothing has been taken away yet.
        sharing::resolve(&mut self.subjects)?;
        let progress = self.progress;
        let timings = all(&mut self.subjects, |subject| match subject.library.take() {
            Some(library) => {
                let timings = library.taken()?;
                let drained = Duration::from_micros(timings.drain_us);
                let track = subject.kept.to_string();
                progress.span("drain", &track, begin, drained);
                progress.span("park", &track, begin + drained, begin.elapsed().saturating_sub(drained));
                Ok(timings)
            }
            None => Ok(Timings::default()),
        })?;
        let drain = Duration::from_micros(timings.iter().map(|t| t.drain_us).max().unwrap_or(0));
        self.report.drain_ms = ms(drain);
        self.report.park_ms = ms(begin.elapsed().saturating_sub(drain));
        if self.no_room {
            return Ok(());
        }
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
        let freezer = (!self.frozen).then(|| Freezer::of(self.job.init_pid)).flatten();
        let output = match freezer {
            Some(freezer) => {
                freezer.freeze();
                let output = lower::run(&self.job.lower_checkpoint, self.job.timeouts.lower());
                freezer.thaw();
                output
            }
            None => lower::run(&self.job.lower_checkpoint, self.job.timeouts.lower()),
        };
        self.lower = output?;
        self.report.criu_ms = ms(begin.elapsed());
        self.progress.span("CRIU", ENGINE, begin, begin.elapsed());
        if self.lower.status != 0 {
            return Err(EngineError::LowerFailed(self.lower.status));
        }
        self.gone = !self.job.leave_running;
        self.wire.send(&Packet::LowerDone, &[])?;
        Ok(())
    }

    /// Brings every process back to running. `before_attach` is called once, before any of them can touch its memory.
    fn wake(&mut self, before_attach: impl FnOnce()) -> Result<Woken, EngineError> {
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
        let ready = || {
            before_attach();
            Ok(())
        };
        let woken = wake(
            self.device.as_ref(),
            self.control.as_ref(),
            sleepers,
            &self.job.timeouts,
            self.progress,
            ready,
        )?;
        for subject in &mut self.subjects {
            subject.enter(self.wire, Phase::Attached)?;
        }
        Ok(woken)
    }

    /// The lower runtime's own pre-dump. What it cannot do, the next checkpoint does in full.
    fn lower_pre_dump(&mut self) -> Result<(), EngineError> {
        self.progress.step("dump", 0);
        let begin = Instant::now();
        let output = lower::run(&self.job.lower_checkpoint, self.job.timeouts.lower())?;
        self.report.criu_ms = ms(begin.elapsed());
        self.progress.span("CRIU pre-dump", ENGINE, begin, begin.elapsed());
        if output.status != 0 {
            // Half a pre-dump is none: the next checkpoint must not build on it.
            save::remove_criu_images(&self.job.image);
            self.report.warnings.push(
                "the lower runtime could not pre-dump the CPU side (see its log): the GPU side is saved, the next checkpoint writes the CPU side in full"
                    .into(),
            );
        }
        Ok(())
    }
}
