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
//! Without leave-running the GPU's side of the image is committed before the lower runtime is asked: once that has succeeded
//! the processes are gone, and nothing may be left that could fail. With it, a wake that fails (the driver may give a process
//! up for good) comes before drain and commit all the same: the image is completed first then, and the processes are woken
//! again with all the memory that frees. Only if that fails too are they lost, and the image says all there was.
//!
//! A pre-dump is the first two steps, the lower runtime's own pre-dump, and the commit.

mod steps;
mod without_room;

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::folder::ImageFolder;
use super::freeze;
use super::save;
use super::sharing;
use super::subject::{Subject, find};
use super::wake::{GRACE, end};
use crate::copy::{self, Ledger, Quiesced};
use crate::device::Device;
use crate::error::EngineError;
use crate::fault::{self, Moment};
use crate::headroom;
use crate::image::{Image, ImageWriter, ParentEntry};
use crate::job::{CheckpointJob, CheckpointReport};
use crate::keeper::wire::{Packet, Wire};
use crate::lower;
use crate::pages::{Received, Socket};
use crate::peer::ControlDir;
use crate::plan::{self, CopyPlan};
use crate::probes;
use crate::processes;
use crate::progress::{Progress, State};
use crate::service::LowerOutput;

/// GPU memory that spare memory leaves free for the application: it may allocate while a snapshot drains.
const SPARE_RESERVE: u64 = 1 << 30;

/// How long memory is watched to see how fast it changes.
const WATCH: Duration = Duration::from_millis(100);

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
    /// The lower runtime's part of the image is complete.
    dumped: bool,
    /// Start time of the container's first process.
    init_start: Option<u64>,
    /// The GPU has no room for this process beside the container's.
    no_room: bool,
    /// Waits for the host memory that CRIU dumps.
    pages: Option<steps::Pages>,
    /// The way it comes, until that is prepared.
    socket: Option<Socket>,
    /// What has come.
    received: Option<Received>,
}

/// What a person is told when a container is lost and its image is not.
pub(super) fn lost(why: &dyn Display, image: &Path) -> String {
    format!(
        "the container could not be brought back to running and was ended ({why}); its image {} is complete: restore it",
        image.display()
    )
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// Runs the job. The lower runtime's output is returned whatever happened. `socket` is for the host memory that CRIU dumps.
pub fn run(
    device: Arc<dyn Device>,
    socket: Option<Socket>,
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
        dumped: false,
        init_start: processes::describe(job.init_pid).map(|p| p.start_time),
        no_room: false,
        pages: None,
        socket,
        received: None,
    };
    let begun = SystemTime::now();
    let result = match checkpoint.run() {
        // Whatever has gone wrong then is what came of that. What the lower runtime says, it says itself.
        Err(e) if !checkpoint.first_lives() && !matches!(e, EngineError::LowerFailed(_)) => {
            Err(EngineError::Ended(Box::new(e)))
        }
        result => result,
    };
    if result.is_err() {
        probes::clear(begun);
    }
    let Checkpoint { mut report, mut lower, .. } = checkpoint;
    // Only where it is all there is to say does the lower runtime speak for itself.
    if !matches!(result, Err(EngineError::LowerFailed(status)) if status < 128) {
        lower.status = 0;
    }
    report.total_ms = ms(progress.began().elapsed());
    report.spans = progress.spans();
    (result.map(|()| report), lower)
}

impl Checkpoint<'_> {
    fn run(&mut self) -> Result<(), EngineError> {
        self.wire.send_job(self.job)?;
        fault::at(Moment::JobKept)?;
        self.progress.step(State::Preflight, 0)?;
        let folder = ImageFolder::prepare(&self.job.image, |before| {
            Ok(self.wire.send(&Packet::Folder(before), &[])?)
        })?;
        fault::at(Moment::FolderReady)?;
        if self.frozen {
            self.set_frozen(false)?;
        }
        let saved = self.save(&folder);
        // The container is left as it was found, whatever came of it; a stopped one has no freezer to set.
        let stopped = self.gone || self.report.lost.is_some();
        if freeze::is_to_stay(self.job) && !self.frozen && !stopped {
            // The image does not depend on it, and the engine thaws next; what the dump said must not be lost over it.
            let lower = std::mem::take(&mut self.lower);
            if let Err(e) = self.set_frozen(true) {
                self.report.warnings.push(format!("the container could not be frozen again: {e}"));
            }
            self.lower = lower;
        }
        if saved.is_ok() || self.gone {
            folder.keep();
        } else if self.dumped && matches!(saved, Err(EngineError::RollbackFailed { .. })) {
            // The next worker may find no other way out than to complete this image.
            folder.leave();
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
        self.prepare_pages(bytes);
        fault::at(Moment::BuffersReady)?;
        let stopped = Instant::now();
        if !self.job.leave_running {
            return self.stop(session, parent).map_err(|cause| self.woken_after(cause));
        }
        match self.stand_still(&mut session) {
            Ok(None) => {}
            Ok(Some(cause)) => return self.rescue(cause, |c| c.complete(session, parent)),
            Err(cause) => {
                drop(session);
                return Err(self.woken_after(cause));
            }
        }
        self.report.pause_ms = ms(stopped.elapsed());
        self.complete(session, parent)
    }

    /// From spare memory to a complete image.
    fn complete(&mut self, mut session: Session<'_>, parent: Option<ParentEntry>) -> Result<(), EngineError> {
        // From here on the application owns its memory alone; only spare memory is read.
        for piece in self.subjects.iter_mut().flat_map(|s| &mut s.pieces) {
            piece.region = None;
        }
        self.report.copy_ms += ms(session.drain()?);
        fault::at(Moment::SnapshotDrained)?;
        self.commit(session, parent)
    }

    /// The dump is made, the memory saved, and the processes cannot be woken: completes the image, which gives all memory
    /// back that this process has, and tries again. If that fails too they are lost, and ended: the image has them.
    fn rescue(
        &mut self,
        cause: EngineError,
        complete: impl FnOnce(&mut Self) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        tracing::error!(error = %cause, "the container cannot be woken, completing the image first");
        let saved = complete(self);
        let woken = self.wake(|| ());
        match (saved, woken) {
            (Ok(()), Ok(_)) => {
                self.report.warnings.push(format!(
                    "the container stood still until its image was complete, because it could not be woken before: {cause}"
                ));
                Ok(())
            }
            (Ok(()), Err(rollback)) => {
                let first = self.init_start.map(|start| (self.job.init_pid, start));
                end(first, self.subjects.iter().map(|s| &s.kept));
                self.report.lost = Some(lost(&rollback, &self.job.image));
                Ok(())
            }
            (Err(e), Ok(_)) => Err(e),
            (Err(e), Err(rollback)) => {
                Err(EngineError::RollbackFailed { cause: Box::new(e), rollback: Box::new(rollback) })
            }
        }
    }

    /// Whether the container's first process or one that uses the GPU lives.
    fn anyone_left(&self) -> bool {
        self.first_lives() || self.subjects.iter().any(|s| s.kept.is_alive())
    }

    /// Whether the container's first process lives.
    fn first_lives(&self) -> bool {
        let first = processes::describe(self.job.init_pid);
        first.is_some_and(|p| Some(p.start_time) == self.init_start)
    }

    fn commit(&mut self, session: Session<'_>, parent: Option<ParentEntry>) -> Result<(), EngineError> {
        self.progress.step(State::Commit, 0)?;
        let begin = Instant::now();
        self.trim_pages();
        let saved = session.finish();
        save::commit(self.device.as_ref(), saved, parent, self.job, &self.subjects, &mut self.report)?;
        self.progress.span("commit", ENGINE, begin, begin.elapsed());
        self.image_is_complete()
    }

    /// Tells the keeper, if nothing more belongs to it.
    fn image_is_complete(&self) -> Result<(), EngineError> {
        if self.job.leave_running
            && let Err(e) = self.wire.send(&Packet::Complete, &[])
        {
            // There is nothing left that it would have to keep.
            tracing::warn!(error = %e, "the keeper is gone");
        }
        fault::at(Moment::Committed)
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
        fault::at(Moment::ProcessesFound)?;
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
        fault::at(Moment::TablesTaken)
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
        if parent.is_some() || !fits {
            session.prepare_scan()?;
            // What the parent has already needs no room, nor does what is zero.
            let (zero, others) = session.dirty_by_zero()?;
            let others = save::bytes_by_gpu(&session.ledger, &others);
            fits = plan::snapshot_fits(&others, &self.device.gpus()?, SPARE_RESERVE);
            if fits {
                session.ledger.note_zeros(&zero);
            }
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
        let (zero, mut chunks) = session.dirty_by_zero()?;
        session.ledger.note_zeros(&zero);
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
        // A library that was asked for its table faults memory in for the driver, and answers when it is done: that is no
        // part of the pause.
        for subject in &self.subjects {
            if let Some(library) = &subject.library {
                library.wait_until_ready().map_err(|e| subject.kept.peer_error(e))?;
            }
        }
        session.prepare_scan()?;
        if plan.spare {
            let dirty =
                if session.ledger.is_blank() { session.ledger.all() } else { session.dirty_by_zero()?.1 };
            let dirty = save::bytes_by_gpu(&session.ledger, &dirty);
            let demand = save::bytes_by_gpu(&session.ledger, &session.ledger.all());
            let wanted = plan::spare_wanted(&demand, &dirty, &self.device.gpus()?, SPARE_RESERVE);
            session.allocate_spare(&wanted)?;
        }
        Ok(())
    }

    /// Everything between the first gate's closing and the last one's opening. Returns why the container could not be woken
    /// although all of it is saved.
    fn stand_still(&mut self, session: &mut Session<'_>) -> Result<Option<EngineError>, EngineError> {
        self.park()?;
        save::update(&mut session.ledger, &self.subjects);
        let progress = self.progress;
        // The driver and CRIU save their parts while the memory is copied: they share no bytes. Only attaching waits.
        thread::scope(|scope| {
            let mut copying = Some(scope.spawn(|| {
                let _busy = progress.busy();
                let quiesced = session.quiesce()?;
                fault::at(Moment::MemorySaved)?;
                Ok(quiesced)
            }));
            let mut join = || match copying.take().map(|t| t.join()) {
                Some(Ok(result)) => result,
                _ => Err(EngineError::Order("the copy thread panicked")),
            };
            self.detach()?;
            self.dump()?;
            let mut quiesced = None;
            let woken = self.wake(|| quiesced = Some(join()));
            self.copied(quiesced.unwrap_or_else(join)?);
            match woken {
                Ok(woken) => {
                    self.report.driver_restore_ms = ms(woken.driver);
                    self.report.attach_ms = ms(woken.attach_wall);
                    Ok(None)
                }
                Err(cause) => Ok(Some(cause)),
            }
        })
    }

    /// A checkpoint that ends the container, from the first gate's closing on.
    fn stop(&mut self, mut session: Session<'_>, parent: Option<ParentEntry>) -> Result<(), EngineError> {
        self.park()?;
        save::update(&mut session.ledger, &self.subjects);
        let progress = self.progress;
        let quiesced = thread::scope(|scope| {
            let copying = scope.spawn(|| {
                let _busy = progress.busy();
                let quiesced = session.quiesce()?;
                fault::at(Moment::MemorySaved)?;
                Ok::<_, EngineError>(quiesced)
            });
            let detached = self.detach();
            let quiesced = copying.join().unwrap_or(Err(EngineError::Order("the copy thread panicked")));
            detached.and(quiesced)
        })?;
        self.copied(quiesced);
        // The last moment at which a full disk is harmless.
        self.commit(session, parent)?;
        self.dump()?;
        if Image::open_complete(&self.job.image).is_err() {
            // The lower runtime has made its part, the processes are gone, and the GPU's part was taken away.
            self.write_again()?;
        }
        Ok(())
    }

    /// Writes the GPU's part of the image once more, from the memory that is still held.
    fn write_again(&mut self) -> Result<(), EngineError> {
        save::remove_begun(&self.job.image);
        let (device, lanes) = (self.device.clone(), copy::lane_count());
        let mut ledger = Ledger::default();
        save::update(&mut ledger, &self.subjects);
        let writer = ImageWriter::create(&self.job.image, lanes, self.job.compression)?;
        let mut session = copy::Session::prepare(device.as_ref(), self.progress, writer, lanes, ledger)?;
        session.quiesce()?;
        self.report.warnings.push("the image folder was changed by somebody else meanwhile".into());
        self.commit(session, None)
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

    /// The lower runtime's own pre-dump. What it cannot do, the next checkpoint does in full.
    fn lower_pre_dump(&mut self) -> Result<(), EngineError> {
        self.progress.step(State::Dump, 0)?;
        let begin = Instant::now();
        let limit = self.job.timeouts.lower();
        let _limit = self.progress.allow("the lower runtime's pre-dump", limit + GRACE);
        let output = lower::run(&self.job.lower_checkpoint, limit)?;
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
