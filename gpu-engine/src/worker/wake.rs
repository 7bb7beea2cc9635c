//! The way back to running: driver restore, attach, gate open. The same steps end a leave-running checkpoint,
//! undo a failed one, help after a dead worker and complete a restore.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use phos_protocol::TransportError;
use phos_protocol::message::{Entry, Timings};

use super::subject::all;
use crate::device::{Device, ProcessState};
use crate::error::EngineError;
use crate::job::Timeouts;
use crate::keeper::wire::KeptProcess;
use crate::peer::{AttachListener, ControlDir, Library, PeerError};
use crate::progress::Progress;

/// A process to bring back and the memory to give it.
pub struct Sleeper {
    /// The process.
    pub process: KeptProcess,
    /// All its entries that were alive at park, with fds that stay open until it is awake.
    pub memory: Vec<(Entry, RawFd)>,
}

/// What waking took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Woken {
    /// The driver's restore and unlock.
    pub driver: Duration,
    /// Import, map and access, slowest process.
    pub attach: Timings,
    /// From the first attach request to the last answer.
    pub attach_wall: Duration,
}

/// Gives the driver state back, whatever state the process is in.
fn restore_driver(device: &dyn Device, process: &KeptProcess) -> Result<(), EngineError> {
    let fail = |e| process.driver_error(e);
    let state = device.process_state(process.pid).map_err(fail)?;
    if state == Some(ProcessState::Checkpointed) {
        device.restore(process.pid).map_err(fail)?;
    }
    if matches!(state, Some(ProcessState::Checkpointed | ProcessState::Locked)) {
        device.unlock(process.pid).map_err(fail)?;
    }
    Ok(())
}

/// Whether the library is in its running state: then the process was never parked, or woke up by itself.
fn is_running(control: &ControlDir, process: &KeptProcess) -> Result<bool, EngineError> {
    match Library::connect(control, process.pid, process.own_pid) {
        Ok(library) => Ok(library.is_some()),
        // It was about to close its listener: parked.
        Err(PeerError::Silent { source: TransportError::Closed, .. }) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Brings every process back. Processes that have ended are passed over. `memory_ready` is called once, between
/// the driver's part and the attach: whatever has to fill the memory has until then.
pub fn wake(
    device: &dyn Device,
    control: Option<&ControlDir>,
    mut sleepers: Vec<Sleeper>,
    timeouts: &Timeouts,
    progress: &Progress,
    memory_ready: impl FnOnce() -> Result<(), EngineError>,
) -> Result<Woken, EngineError> {
    let begin = Instant::now();
    sleepers.retain(|s| s.process.is_alive());
    let mut woken = Woken::default();
    // The listener stands before the driver is done, so that no process waits for it.
    let listener = control.map(AttachListener::bind).transpose()?;
    all(&mut sleepers, |s| {
        restore_driver(device, &s.process)?;
        progress.span("driver restore", &s.process.to_string(), begin, begin.elapsed());
        Ok(())
    })?;
    woken.driver = begin.elapsed();
    memory_ready()?;
    let (Some(control), Some(listener)) = (control, listener) else { return Ok(woken) };
    sleepers.retain(|s| s.process.has_library);
    let mut parked = Vec::new();
    for sleeper in sleepers {
        if !is_running(control, &sleeper.process)? {
            parked.push(sleeper);
        }
    }
    let deadline = Instant::now() + timeouts.attach();
    let attach_begin = Instant::now();
    let mut connected = Vec::new();
    while !parked.is_empty() {
        let expected: Vec<_> = parked.iter().map(|s| (s.process.pid, s.process.own_pid)).collect();
        let library = listener.accept(&expected, deadline)?;
        if let Some(at) = parked.iter().position(|s| s.process.pid == library.pid) {
            connected.push((Some(library), parked.swap_remove(at)));
        }
    }
    let timings = all(&mut connected, |(library, sleeper)| match library.take() {
        Some(library) => {
            let timings = library.attach(&sleeper.memory)?;
            progress.span("attach", &sleeper.process.to_string(), attach_begin, attach_begin.elapsed());
            Ok(timings)
        }
        None => Ok(Timings::default()),
    })?;
    woken.attach_wall = attach_begin.elapsed();
    woken.attach = timings.into_iter().max_by_key(|t| t.map_us).unwrap_or_default();
    Ok(woken)
}
