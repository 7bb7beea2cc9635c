//! The keeper's own life.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};
use phos_protocol::{Connection, TransportError};
use thiserror::Error;

use super::start::WorkerRole;
use super::wire::{Held, KeptProcess, Outcome, Packet, Phase, Wire, WireError};
use crate::job::CheckpointJob;
use crate::privilege;

/// How often a dead worker is replaced. Each attempt starts from what is known; a fourth would not differ.
const RECOVERIES: u32 = 3;

/// The keeper cannot go on.
#[derive(Debug, Error)]
pub enum KeeperError {
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The worker's connection failed in another way than by its end.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// The command line is not the one `start` writes.
    #[error("the keeper is started by phos-runc itself, not by hand")]
    Usage,
}

/// Everything that must survive the worker.
#[derive(Default)]
struct Kept {
    job: String,
    job_complete: bool,
    processes: BTreeMap<i32, KeptProcess>,
    memory: BTreeMap<i32, Vec<(Held, OwnedFd)>>,
    lower_done: bool,
    outcome: Option<Outcome>,
}

impl Kept {
    fn apply(&mut self, packet: Packet, fds: Vec<OwnedFd>) {
        match packet {
            Packet::Job(text) => self.job.push_str(&text),
            Packet::JobEnd => self.job_complete = true,
            Packet::Process(p) => {
                if p.phase == Phase::Attached {
                    self.memory.remove(&p.pid);
                }
                self.processes.insert(p.pid, p);
            }
            Packet::Hold(pid, held) => {
                self.memory.entry(pid).or_default().extend(held.into_iter().zip(fds));
            }
            Packet::Forget(pid, ids) => {
                if let Some(memory) = self.memory.get_mut(&pid) {
                    memory.retain(|(h, _)| !ids.contains(&h.id));
                }
            }
            Packet::LowerDone => self.lower_done = true,
            Packet::Finished(outcome) => self.outcome = Some(outcome),
            Packet::HandedOver => {}
        }
    }

    /// Whether a process may be in need of help.
    fn anything_to_recover(&self) -> bool {
        self.job_complete
            && self.processes.values().any(|p| matches!(p.phase, Phase::Parking | Phase::Detaching))
    }

    fn hand_over(&self, wire: &Wire) -> Result<(), WireError> {
        let job: CheckpointJob = serde_json::from_str(&self.job)?;
        wire.send_job(&job)?;
        for process in self.processes.values() {
            wire.send(&Packet::Process(process.clone()), &[])?;
        }
        for (pid, memory) in &self.memory {
            wire.hold(*pid, memory)?;
        }
        if self.lower_done {
            wire.send(&Packet::LowerDone, &[])?;
        }
        wire.send(&Packet::HandedOver, &[])
    }
}

/// Starts a worker with one end of a new connection as its fd 3.
fn spawn(role: WorkerRole, state_dir: &Path) -> io::Result<(Child, Wire)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let log = std::fs::File::options().create(true).append(true).open(state_dir.join("engine.log"))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("__worker").arg(role.as_str()).arg(state_dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let fd = theirs.as_raw_fd();
    // SAFETY: between fork and exec only async-signal-safe calls are made: dup2 and fcntl.
    unsafe {
        command.pre_exec(move || {
            if fd == 3 {
                let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map_err(io::Error::from)?;
            } else if libc::dup2(fd, 3) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    Ok((child, Wire(Connection::new(ours))))
}

/// The last line that the worker wrote to its log.
fn last_words(state_dir: &Path) -> String {
    let log = std::fs::read(state_dir.join("engine.log")).unwrap_or_default();
    let text = String::from_utf8_lossy(&log);
    let line = text.lines().last().unwrap_or("killed, or out of memory").trim();
    line.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// Waits for the end of everything the dead worker had started (the lower runtime above all: it must not be
/// half way through a dump when the processes are woken).
fn wait_for_orphans() {
    let deadline = Instant::now() + Duration::from_secs(600);
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

/// Waits until the worker has said something. `false`: whoever reads `outcome` is gone, and so is the need for a worker.
fn worth_listening(wire: &Wire, outcome: &OwnedFd) -> bool {
    loop {
        // A pipe whose reader is gone reports an error to its writer, whatever is asked for.
        let mut fds = [
            PollFd::new(wire.0.as_fd(), PollFlags::POLLIN),
            PollFd::new(outcome.as_fd(), PollFlags::empty()),
        ];
        if !matches!(poll(&mut fds, PollTimeout::NONE), Err(nix::Error::EINTR)) {
            return !fds[1].revents().is_some_and(|r| r.contains(PollFlags::POLLERR));
        }
    }
}

/// Listens to a worker until it ends.
fn listen(kept: &mut Kept, wire: &Wire, outcome: Option<&OwnedFd>) -> Result<(), WireError> {
    loop {
        if outcome.is_some_and(|o| !worth_listening(wire, o)) {
            return Ok(());
        }
        match wire.receive() {
            Ok((packet, fds)) => kept.apply(packet, fds),
            Err(WireError::Transport(TransportError::Closed)) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

/// Takes over an fd that `start` left open under the number that stands in `word`.
fn inherited(word: &OsStr) -> Result<OwnedFd, KeeperError> {
    let fd: RawFd = word.to_str().and_then(|f| f.parse().ok()).ok_or(KeeperError::Usage)?;
    // SAFETY: `start` left exactly this fd open for us; nothing else in this process knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(io::Error::from)?;
    Ok(fd)
}

/// The keeper's life. `args`: role, state folder, numbers of the outcome pipe's and the lock's fd.
pub fn run(args: &[OsString]) -> Result<(), KeeperError> {
    let [role, state_dir, outcome, lock] = args else { return Err(KeeperError::Usage) };
    let role: WorkerRole = role.to_str().and_then(|r| r.parse().ok()).ok_or(KeeperError::Usage)?;
    let outcome_pipe = inherited(outcome)?;
    // Held until this process ends.
    let _lock = inherited(lock)?;
    // SAFETY: this process has one thread.
    if let ForkResult::Parent { .. } = unsafe { fork() }.map_err(io::Error::from)? {
        return Ok(());
    }
    setsid().map_err(io::Error::from)?;
    // Less is safer, but no reason not to hold what must be held.
    let _ = privilege::keep(privilege::KEEPER);
    // A worker's orphans (the lower runtime, CRIU) must end where they can be waited for.
    nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)?;
    let mut kept = Kept::default();
    let (mut child, wire) = spawn(role, Path::new(state_dir))?;
    // A checkpoint is finished whether or not somebody waits for it. A restore without the foreground, which runs the
    // lower runtime, has no end: its worker holds GPU memory for nobody.
    let only_while_wanted = (role == WorkerRole::Restore).then_some(&outcome_pipe);
    let mut result = listen(&mut kept, &wire, only_while_wanted);
    if only_while_wanted.is_some() && kept.outcome.is_none() {
        let _ = child.kill();
    }
    let _ = child.wait();
    drop(wire);
    let mut recoveries = 0;
    while kept.outcome.is_none() && kept.anything_to_recover() && recoveries < RECOVERIES {
        recoveries += 1;
        wait_for_orphans();
        let (mut child, wire) = spawn(WorkerRole::Recover, Path::new(state_dir))?;
        result = kept.hand_over(&wire).and_then(|()| listen(&mut kept, &wire, None));
        let _ = child.wait();
    }
    let outcome = kept.outcome.take().unwrap_or_else(|| {
        let reason = match result {
            Ok(()) => last_words(Path::new(state_dir)),
            Err(e) => e.to_string(),
        };
        let error = if kept.anything_to_recover() {
            format!("the checkpoint worker ended ({reason}) and the container could not be brought back to running")
        } else {
            format!("the checkpoint worker ended ({reason}); the container was left as it was")
        };
        Outcome { error, report: String::new() }
    });
    if let Ok(text) = serde_json::to_vec(&outcome) {
        // The foreground may be gone; then nobody reads it, and that is fine.
        let _ = nix::unistd::write(&outcome_pipe, &text);
    }
    Ok(())
}
