//! The way back to running: driver restore, attach, gate open. The same steps end a leave-running checkpoint,
//! undo a failed one, help after a dead worker and complete a restore.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use phos_protocol::TransportError;
use phos_protocol::message::{Entry, Timings};

use super::subject::all;
use crate::device::{Device, ProcessState};
use crate::error::EngineError;
use crate::fault::{self, Moment};
use crate::job::Timeouts;
use crate::keeper::wire::KeptProcess;
use crate::peer::{AttachListener, ControlDir, Library, PeerError};
use crate::processes;
use crate::progress::Progress;

/// How often it is asked whether a process that does not knock runs.
const KNOCKING: Duration = Duration::from_millis(500);

/// Beyond limits that a call has of its own.
pub(super) const GRACE: Duration = Duration::from_secs(30);

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

/// How often the driver is asked to restore a process that it has not given up. It may have lacked memory that somebody is
/// about to give back.
const ATTEMPTS: u32 = 3;
/// The time between them.
const BETWEEN: Duration = Duration::from_millis(200);

/// Gives the driver state back, whatever state the process is in.
fn restore_driver(
    device: &dyn Device,
    process: &KeptProcess,
    limit: Duration,
    progress: &Progress,
) -> Result<(), EngineError> {
    let fail = |e| process.driver_error(e);
    let _limit = progress.allow(format!("the driver's restore of process {process}"), limit);
    let mut attempt = 1;
    let state = loop {
        let state = device.process_state(process.pid).map_err(fail)?;
        if state != Some(ProcessState::Checkpointed) {
            break state;
        }
        match device.restore(process.pid) {
            Ok(()) => {}
            Err(e) if attempt == ATTEMPTS => return Err(fail(e)),
            Err(e) => {
                tracing::warn!(process = %process, error = %e, attempt, "the driver's restore failed");
                attempt += 1;
                std::thread::sleep(BETWEEN);
            }
        }
    };
    fault::at(Moment::DriverRestored)?;
    match state {
        Some(ProcessState::Locked) => device.unlock(process.pid).map_err(fail)?,
        Some(ProcessState::Failed) => {
            return Err(EngineError::Poisoned { pid: process.pid, command: process.command.clone() });
        }
        _ => {}
    }
    fault::at(Moment::Unlocked)
}

/// Ends a container that cannot go on: its first process (id and start time), and those that use the GPU.
pub fn end<'a>(first: Option<(i32, u64)>, processes: impl Iterator<Item = &'a KeptProcess>) {
    let first =
        first.filter(|(pid, start)| processes::describe(*pid).is_some_and(|p| p.start_time == *start));
    for pid in processes.filter(|p| p.is_alive()).map(|p| p.pid).chain(first.map(|(pid, _)| pid)) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
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
        restore_driver(device, &s.process, timeouts.driver(), progress)?;
        progress.span("driver restore", &s.process.to_string(), begin, begin.elapsed());
        Ok(())
    })?;
    woken.driver = begin.elapsed();
    memory_ready()?;
    let (Some(control), Some(listener)) = (control, listener) else { return Ok(woken) };
    sleepers.retain(|s| s.process.has_library);
    let deadline = Instant::now() + timeouts.attach();
    let attach_begin = Instant::now();
    let mut connected = Vec::new();
    let mut parked = sleepers;
    let _limit = progress.allow("a parked process's knock", timeouts.attach() + GRACE);
    loop {
        // One that has just been given its memory takes a moment until it listens again.
        let mut still = Vec::new();
        for sleeper in parked {
            if !is_running(control, &sleeper.process)? {
                still.push(sleeper);
            }
        }
        parked = still;
        if parked.is_empty() {
            break;
        }
        let expected: Vec<_> = parked.iter().map(|s| (s.process.pid, s.process.own_pid)).collect();
        match listener.accept(&expected, deadline.min(Instant::now() + KNOCKING)) {
            Ok(library) => {
                fault::at(Moment::Knocked)?;
                if let Some(at) = parked.iter().position(|s| s.process.pid == library.pid) {
                    connected.push((Some(library), parked.swap_remove(at)));
                }
            }
            Err(PeerError::Silent { source: TransportError::Timeout, .. }) if Instant::now() < deadline => {
                parked.retain(|s| s.process.is_alive());
            }
            Err(e) => return Err(e.into()),
        }
    }
    let _limit = progress.allow("attaching", timeouts.attach() + GRACE);
    let timings = all(&mut connected, |(library, sleeper)| match library.take() {
        Some(library) => {
            let timings = library.attach(&sleeper.memory, timeouts.attach())?;
            fault::at(Moment::Attached)?;
            progress.span("attach", &sleeper.process.to_string(), attach_begin, attach_begin.elapsed());
            Ok(timings)
        }
        None => Ok(Timings::default()),
    })?;
    woken.attach_wall = attach_begin.elapsed();
    woken.attach = timings.into_iter().max_by_key(|t| t.map_us).unwrap_or_default();
    Ok(woken)
}
