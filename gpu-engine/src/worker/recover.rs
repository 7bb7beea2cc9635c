//! After a dead worker: brings the application back to running with what the keeper held. If the application is in the
//! lower runtime's image already and nowhere else, or cannot be brought back, the GPU's part of that image is finished instead.

use std::cell::Cell;
use std::fmt::Display;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use phos_protocol::message::Entry;

use super::checkpoint::lost;
use super::folder;
use super::freeze;
use super::save;
use super::sharing;
use super::subject::{Piece, Subject};
use super::wake::{Sleeper, end, wake};
use super::watchdog;
use crate::copy::{self, Ledger};
use crate::device::{self, ProcessState};
use crate::error::EngineError;
use crate::fault::{self, Moment};
use crate::image::{INVENTORY, ImageWriter};
use crate::job::{CheckpointJob, CheckpointReport};
use crate::keeper::wire::{FolderBefore, Held, KeptProcess, Outcome, Packet, Phase, Wire};
use crate::lower;
use crate::peer::ControlDir;
use crate::processes;
use crate::progress::{Progress, State};

/// What the keeper held.
#[derive(Default)]
struct Inherited {
    job: String,
    processes: Vec<KeptProcess>,
    memory: Vec<(i32, Held, OwnedFd)>,
    lower_done: bool,
    folder: Option<FolderBefore>,
    complete: bool,
    /// Why the worker before was ended, if it said so.
    reason: Option<String>,
}

fn inherit(wire: &Wire) -> Result<Inherited, EngineError> {
    let mut inherited = Inherited::default();
    loop {
        let (packet, fds) = wire.receive()?;
        match packet {
            Packet::Job(text) => inherited.job.push_str(&text),
            Packet::Process(p) => inherited.processes.push(p),
            Packet::Hold(pid, held) => {
                inherited.memory.extend(held.into_iter().zip(fds).map(|(h, fd)| (pid, h, fd)));
            }
            Packet::LowerDone => inherited.lower_done = true,
            Packet::Folder(before) => inherited.folder = Some(before),
            Packet::Complete => inherited.complete = true,
            Packet::Stuck(what) => inherited.reason = Some(what),
            Packet::HandedOver => return Ok(inherited),
            Packet::JobEnd | Packet::Forget(..) | Packet::Finished(_) => {}
        }
    }
}

/// Receives the keeper's state and puts the container right.
pub fn run(wire: &Arc<Wire>) -> Result<(), EngineError> {
    let inherited = inherit(wire)?;
    let job: CheckpointJob =
        serde_json::from_str(&inherited.job).map_err(|e| EngineError::Keeper(e.into()))?;
    let progress = Arc::<Progress>::default();
    watchdog::start(progress.clone(), wire.clone(), job.timeouts.stall());
    let _busy = progress.busy();
    progress.step(State::Recover, 0)?;
    fault::at(Moment::Inherited)?;
    let outcome = match (Recovery { job: &job, inherited, wire, progress: &progress }).run()? {
        Ok(report) => {
            Outcome { error: String::new(), report: serde_json::to_string(&report).unwrap_or_default() }
        }
        Err(error) => Outcome { error, report: String::new() },
    };
    wire.finish(outcome)?;
    Ok(())
}

struct Recovery<'a> {
    job: &'a CheckpointJob,
    inherited: Inherited,
    wire: &'a Wire,
    progress: &'a Progress,
}

impl Recovery<'_> {
    /// The inner result is what whoever waits is told.
    fn run(self) -> Result<Result<CheckpointReport, String>, EngineError> {
        let Recovery { job, inherited, .. } = &self;
        let alive = inherited.processes.iter().any(KeptProcess::is_alive);
        let ended = match &inherited.reason {
            Some(why) => format!("the checkpoint worker was ended ({why})"),
            None => "the checkpoint worker was ended".into(),
        };
        let mut complete = inherited.complete
            || inherited.folder.is_some_and(|f| folder::is_complete(&job.image, f, job.pre_dump));
        // The lower runtime may have outlived the worker, so its success may not have been told; its inventory says it.
        let dumped = inherited.lower_done || job.image.join(INVENTORY).is_file();
        let gone = !alive && !job.leave_running && dumped;
        tracing::warn!(container = job.container, alive, dumped, complete, "recovering");
        let report = |warning: String| {
            let processes = inherited.processes.len() as u32;
            CheckpointReport { processes, warnings: vec![warning], ..CheckpointReport::default() }
        };
        if gone && !complete {
            let report = report(format!("{ended}; another one finished the image"));
            return Ok(Ok(self.finish(report)?));
        }
        // A driver that does not bring a process back, and does not say so: the image is the way out, as long as nobody has his
        // memory back.
        if let Some(why) = &inherited.reason
            && inherited.lower_done
            && job.leave_running
            && self.is_one_away()?
        {
            if complete {
                return Ok(Ok(self.give_up(why, report(format!("{ended}; another one finished the image")))));
            }
            self.finish(CheckpointReport::default())?;
            complete = true;
        }
        if !gone {
            let driver_done = Cell::new(false);
            match self.bring_back(&driver_done) {
                Ok(()) => {}
                // The memory is as it was at the dump only as long as nobody has it back.
                Err(why) if inherited.lower_done && job.leave_running && !driver_done.get() => {
                    let report = report(format!("{ended}; another one finished the image"));
                    let report = match complete {
                        true => report,
                        false => self.finish(report)?,
                    };
                    return Ok(Ok(self.give_up(&why, report)));
                }
                // No further attempt can help.
                Err(e @ EngineError::Poisoned { .. }) => {
                    if let Some(before) = inherited.folder {
                        folder::undo(&job.image, before);
                    }
                    return Ok(Err(format!(
                        "{ended}, and {e}: the container is lost, restore an earlier image"
                    )));
                }
                Err(e) => return Err(e),
            }
            fault::at(Moment::BroughtBack)?;
        }
        // A stopping checkpoint whose processes are still there is none.
        if complete && (gone || job.leave_running) {
            folder::forget_earlier(&job.image);
            return Ok(Ok(report(format!("{ended} after the image was complete"))));
        }
        if let Some(before) = inherited.folder {
            folder::undo(&job.image, before);
        }
        fault::at(Moment::Undone)?;
        Ok(Err(match processes::describe(job.init_pid) {
            Some(_) => format!("{ended}; the container runs on and no image was written"),
            None => format!("{ended} and the container has ended; no image was written"),
        }))
    }

    /// Whether the driver still has the state of one of the processes, or has not let it go. None has its memory back then: that comes
    /// when the driver is done with all of them.
    fn is_one_away(&self) -> Result<bool, EngineError> {
        let device = device::cuda::open()?;
        let with_driver = [Some(ProcessState::Checkpointed), Some(ProcessState::Locked)];
        let away = |p: &KeptProcess| device.process_state(p.pid).is_ok_and(|s| with_driver.contains(&s));
        Ok(self.inherited.processes.iter().any(away))
    }

    /// Ends a container that cannot be brought back; its image is complete.
    fn give_up(&self, why: &dyn Display, report: CheckpointReport) -> CheckpointReport {
        let first = processes::describe(self.job.init_pid).map(|p| (p.pid, p.start_time));
        end(first, self.inherited.processes.iter());
        CheckpointReport { lost: Some(lost(why, &self.job.image)), ..report }
    }

    /// Gives every process what it lacks. `driver_done` is set before any of them can touch its memory.
    fn bring_back(&self, driver_done: &Cell<bool>) -> Result<(), EngineError> {
        let Recovery { job, inherited, .. } = self;
        let control = match job.control_dir.exists() {
            true => Some(ControlDir::open(&job.control_dir)?),
            false => None,
        };
        // A frozen process cannot answer the driver. Thawing one that is not frozen fails and changes nothing.
        let _ = lower::run(&job.lower_resume, job.timeouts.lower());
        let sleeper = |process: &KeptProcess| Sleeper {
            process: process.clone(),
            memory: inherited
                .memory
                .iter()
                .filter(|(pid, ..)| *pid == process.pid)
                .map(|(_, held, fd)| (Entry::from(held), fd.as_raw_fd()))
                .collect(),
        };
        let away = |p: &&KeptProcess| matches!(p.phase, Phase::Parking | Phase::Detaching);
        let sleepers: Vec<_> = inherited.processes.iter().filter(away).map(sleeper).collect();
        if !sleepers.is_empty() {
            let device = device::cuda::open()?;
            wake(device.as_ref(), control.as_ref(), sleepers, &job.timeouts, self.progress, || {
                driver_done.set(true);
                Ok(())
            })?;
        }
        for process in &inherited.processes {
            let process = KeptProcess { phase: Phase::Attached, ..process.clone() };
            // They run. A keeper that cannot be told is gone; what is left to do is done without it.
            let _ = self.wire.send(&Packet::Process(process), &[]);
        }
        if freeze::is_to_stay(job) {
            let _ = lower::run(&job.lower_pause, job.timeouts.lower());
        }
        Ok(())
    }

    /// Writes the memory that only the keeper has left. It stays there until the image is complete.
    fn finish(&self, mut report: CheckpointReport) -> Result<CheckpointReport, EngineError> {
        let Recovery { job, inherited, progress, .. } = self;
        progress.step(State::Finish, 0)?;
        let device = device::cuda::open()?;
        save::remove_begun(&job.image);
        let mut subjects: Vec<Subject> = inherited.processes.iter().cloned().map(Subject::new).collect();
        for (pid, held, fd) in &inherited.memory {
            if let Some(subject) = subjects.iter_mut().find(|s| s.kept.pid == *pid) {
                let fd =
                    fd.try_clone().map_err(|source| EngineError::Io { what: "copying an fd", source })?;
                subject.pieces.push(Piece { held: *held, fd, region: None, owner: None });
            }
        }
        sharing::resolve(&mut subjects)?;
        subjects.iter_mut().try_for_each(|s| s.import(device.as_ref()))?;
        let lanes = copy::lane_count();
        let mut ledger = Ledger::default();
        save::update(&mut ledger, &subjects);
        let writer = ImageWriter::create(&job.image, lanes, job.compression)?;
        let mut session = copy::Session::prepare(device.as_ref(), progress, writer, lanes, ledger)?;
        session.quiesce()?;
        save::commit(device.as_ref(), session.finish(), None, job, &subjects, &mut report)?;
        // A keeper that cannot be told is gone, and with it whoever could begin once more.
        let _ = self.wire.send(&Packet::Complete, &[]);
        fault::at(Moment::Committed)?;
        folder::forget_earlier(&job.image);
        Ok(report)
    }
}
