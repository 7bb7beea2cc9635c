//! After a dead worker: brings the application back to running with what the keeper held. If the application is in the
//! lower runtime's image already and nowhere else, finishes the GPU's part of that image instead.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use phos_protocol::message::Entry;

use super::folder;
use super::save;
use super::subject::{Piece, Subject};
use super::wake::{Sleeper, wake};
use crate::copy::{self, Ledger};
use crate::device::Device;
use crate::error::EngineError;
use crate::image::ImageWriter;
use crate::job::{CheckpointJob, CheckpointReport};
use crate::keeper::wire::{Held, KeptProcess, Outcome, Packet, Phase, Wire};
use crate::lower;
use crate::peer::ControlDir;
use crate::progress::Progress;

/// What the keeper held.
#[derive(Default)]
struct Inherited {
    job: String,
    processes: Vec<KeptProcess>,
    memory: Vec<(i32, Held, OwnedFd)>,
    lower_done: bool,
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
            Packet::HandedOver => return Ok(inherited),
            Packet::JobEnd | Packet::Forget(..) | Packet::Finished(_) => {}
        }
    }
}

/// Receives the keeper's state and puts the container right.
pub fn run(device: &Arc<dyn Device>, wire: &Wire) -> Result<(), EngineError> {
    let inherited = inherit(wire)?;
    let job: CheckpointJob =
        serde_json::from_str(&inherited.job).map_err(|e| EngineError::Keeper(e.into()))?;
    let alive = inherited.processes.iter().any(KeptProcess::is_alive);
    // The lower runtime may have outlived the worker, so its success may not have been told; its inventory says it.
    let dumped = inherited.lower_done || job.image.join("inventory.img").exists();
    tracing::warn!(container = job.container, alive, dumped, "recovering");
    let outcome = if !alive && !job.leave_running && dumped {
        let report = finish(device.as_ref(), &job, inherited)?;
        Outcome { error: String::new(), report: serde_json::to_string(&report).unwrap_or_default() }
    } else {
        bring_back(device.as_ref(), &job, &inherited, wire)?;
        folder::undo(&job.image);
        let error = if alive {
            "the checkpoint worker was ended; the container runs on and no image was written"
        } else {
            "the checkpoint worker was ended and the container has ended; no image was written"
        };
        Outcome { error: error.into(), report: String::new() }
    };
    wire.finish(outcome)?;
    Ok(())
}

/// Gives every process what it lacks.
fn bring_back(
    device: &dyn Device,
    job: &CheckpointJob,
    inherited: &Inherited,
    wire: &Wire,
) -> Result<(), EngineError> {
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
    let sleepers = inherited.processes.iter().filter(away).map(sleeper).collect();
    wake(device, control.as_ref(), sleepers, &job.timeouts, &Progress::default(), || Ok(()))?;
    for process in &inherited.processes {
        let process = KeptProcess { phase: Phase::Attached, ..process.clone() };
        wire.send(&Packet::Process(process), &[])?;
    }
    if job.frozen {
        let _ = lower::run(&job.lower_pause, job.timeouts.lower());
    }
    Ok(())
}

/// Removes what the dead worker had begun to write.
fn remove_begun(image: &Path) {
    for entry in fs::read_dir(image).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().trim_start_matches('.').starts_with("phos") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The processes are gone and CRIU's image is complete: writes the memory that only the keeper has left.
fn finish(
    device: &dyn Device,
    job: &CheckpointJob,
    inherited: Inherited,
) -> Result<CheckpointReport, EngineError> {
    remove_begun(&job.image);
    let mut subjects: Vec<Subject> = inherited.processes.into_iter().map(Subject::new).collect();
    for (pid, held, fd) in inherited.memory {
        if let Some(subject) = subjects.iter_mut().find(|s| s.kept.pid == pid) {
            subject.pieces.push(Piece { held, fd, region: None });
        }
    }
    subjects.iter_mut().try_for_each(|s| s.import(device))?;
    let mut report = CheckpointReport { processes: subjects.len() as u32, ..CheckpointReport::default() };
    report.warnings.push("the checkpoint worker was ended; another one finished the image".into());
    let (lanes, progress) = (copy::lane_count(), Progress::default());
    let mut ledger = Ledger::default();
    save::update(&mut ledger, &subjects);
    let writer = ImageWriter::create(&job.image, lanes)?;
    let mut session = copy::Session::prepare(device, &progress, writer, lanes, ledger)?;
    session.quiesce()?;
    save::commit(device, session.finish(), None, job, &subjects, &mut report)?;
    folder::forget_earlier(&job.image);
    Ok(report)
}
