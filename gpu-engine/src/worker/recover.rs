//! After a dead worker: brings the application back to running with what the keeper held.

use std::os::fd::{AsRawFd, OwnedFd};

use phos_protocol::message::Entry;

use super::folder;
use super::wake::{Sleeper, wake};
use crate::device::Device;
use crate::error::EngineError;
use crate::job::CheckpointJob;
use crate::keeper::wire::{Held, KeptProcess, Outcome, Packet, Phase, Wire};
use crate::lower;
use crate::peer::ControlDir;

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
pub fn run(device: &dyn Device, wire: &Wire) -> Result<(), EngineError> {
    let inherited = inherit(wire)?;
    let job: CheckpointJob =
        serde_json::from_str(&inherited.job).map_err(|e| EngineError::Keeper(e.into()))?;
    tracing::warn!(container = job.container, lower_done = inherited.lower_done, "recovering");
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
    let alive = inherited.processes.iter().any(|p| p.is_alive());
    let away = |p: &&KeptProcess| matches!(p.phase, Phase::Parking | Phase::Detaching);
    let sleepers = inherited.processes.iter().filter(away).map(sleeper).collect();
    wake(device, control.as_ref(), sleepers, &job.timeouts, || Ok(()))?;
    for process in &inherited.processes {
        let process = KeptProcess { phase: Phase::Attached, ..process.clone() };
        wire.send(&Packet::Process(process), &[])?;
    }
    if alive {
        if job.frozen {
            let _ = lower::run(&job.lower_pause, job.timeouts.lower());
        }
        folder::empty(&job.image);
    }
    let error = match alive {
        true => "the checkpoint worker was ended; the container runs on and no image was written",
        false => {
            "the checkpoint worker was ended after the container had been stopped; what there is of the image was kept"
        }
    };
    wire.send(&Packet::Finished(Outcome { error: error.into(), report: String::new() }), &[])?;
    Ok(())
}
