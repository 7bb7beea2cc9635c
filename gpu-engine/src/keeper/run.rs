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
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};
use phos_protocol::{Connection, TransportError};
use thiserror::Error;

use super::start::{BORROWED, WorkerRole};
use super::undo::{Undo, remove};
use super::wire::{FolderBefore, Held, KeptProcess, Outcome, Packet, Phase, Wire, WireError};
use super::words::{Word, Words};
use crate::fault::{self, Moment};
use crate::job::CheckpointJob;
use crate::{privilege, processes};

/// After so many attempts to bring the container back whoever waits is told that it does not work. The attempts go on, as
/// long as one of its processes lives: what prevents them (a stopped process, a frozen cgroup, a full GPU) may end.
const RECOVERIES: u32 = 3;
/// The time between those that follow.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a worker may take to die.
const DEATH: Duration = Duration::from_secs(10);

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
    /// How the image folder was, once it may have been touched.
    folder: Option<FolderBefore>,
    complete: bool,
    /// What the last worker waited for in vain.
    stuck: Option<String>,
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
            Packet::Folder(before) => self.folder = Some(before),
            Packet::Complete => self.complete = true,
            Packet::Stuck(what) => self.stuck = Some(what),
            Packet::Finished(outcome) => self.outcome = Some(outcome),
            Packet::HandedOver => {}
        }
    }

    /// Whether a process may be in need of help.
    fn any_away(&self) -> bool {
        self.processes.values().any(|p| matches!(p.phase, Phase::Parking | Phase::Detaching))
    }

    /// Whether one of those still lives.
    fn any_waits(&self) -> bool {
        self.processes.values().any(|p| matches!(p.phase, Phase::Parking | Phase::Detaching) && p.is_alive())
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
        if let Some(before) = self.folder {
            wire.send(&Packet::Folder(before), &[])?;
        }
        if self.complete {
            wire.send(&Packet::Complete, &[])?;
        }
        if let Some(what) = &self.stuck {
            wire.send(&Packet::Stuck(what.clone()), &[])?;
        }
        wire.send(&Packet::HandedOver, &[])?;
        // What is made to fail here ends this process; nothing else can.
        let _ = fault::at(Moment::HandedOver);
        Ok(())
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

/// The last line that the worker wrote to its log, if that says why it ended: one that was killed was in the middle of something.
fn last_words(state_dir: &Path) -> String {
    let log = std::fs::read(state_dir.join("engine.log")).unwrap_or_default();
    let text = String::from_utf8_lossy(&log);
    let in_the_middle =
        |line: &str| [" INFO ", " DEBUG ", " TRACE "].iter().any(|level| line.contains(level));
    let line =
        text.lines().last().filter(|line| !in_the_middle(line)).unwrap_or("killed, or out of memory").trim();
    line.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// Waits for the end of everything the dead worker had started (the lower runtime above all: it must not be half way through
/// a dump when the processes are woken). What does not end in `limit` is ended.
fn wait_for_orphans(limit: Duration) {
    let deadline = Instant::now() + limit;
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if Instant::now() < deadline => {}
            Ok(WaitStatus::StillAlive) if Instant::now() < deadline + DEATH => {
                for child in processes::children(std::process::id() as i32) {
                    let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
                }
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return,
            Ok(_) => continue,
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends a worker that has nothing more to say. One that hangs in the kernel is left there.
fn reap(child: &mut Child, end_it: bool) {
    if end_it {
        let _ = child.kill();
    }
    let deadline = Instant::now() + DEATH;
    while end_it && Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    if !end_it {
        let _ = child.wait();
    }
}

/// The foreground: the pipe that it reads the outcome from, and what it says.
struct Foreground<'a> {
    outcome: &'a OwnedFd,
    words: &'a mut Words,
}

/// Waits until the worker has said something. `false`: the foreground is gone or done, and so is the need for a worker.
fn worth_listening(wire: &Wire, Foreground { outcome, words }: &mut Foreground<'_>) -> bool {
    loop {
        // A pipe whose reader is gone reports an error to its writer, whatever is asked for.
        let mut fds = [
            PollFd::new(wire.0.as_fd(), PollFlags::POLLIN),
            PollFd::new(outcome.as_fd(), PollFlags::empty()),
            PollFd::new(words.as_fd(), PollFlags::POLLIN),
        ];
        if matches!(poll(&mut fds, PollTimeout::NONE), Err(nix::Error::EINTR)) {
            continue;
        }
        let unread = fds[1].revents().is_some_and(|r| r.contains(PollFlags::POLLERR));
        // What the worker has said comes first.
        let said = fds[0].any().unwrap_or(false);
        words.hear();
        if said || unread || words.are_over() {
            return said;
        }
    }
}

/// How long somebody must wait for the outcome.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// Until the worker has the job: one that nobody can send any more never comes.
    UntilBegun,
    /// Until the end: the foreground runs the lower runtime, and a worker without it holds GPU memory for nobody.
    UntilDone,
    /// Not at all.
    Never,
}

/// Listens to a worker until it ends, is stuck, or is no longer wanted.
fn listen(
    kept: &mut Kept,
    wire: &Wire,
    mut foreground: Option<Foreground<'_>>,
    wanted: Wanted,
) -> Result<(), WireError> {
    loop {
        let must_be_read = match wanted {
            Wanted::UntilBegun => kept.job.is_empty(),
            Wanted::UntilDone => kept.outcome.is_none(),
            Wanted::Never => false,
        };
        let unread = must_be_read && foreground.as_mut().is_some_and(|f| !worth_listening(wire, f));
        if kept.stuck.is_some() || unread {
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

/// The keeper's life. `args`: role, state folder, numbers of the fds of the outcome pipe, the lock and the pipe that tells
/// who is still at work; then how a restore is undone.
pub fn run(args: &[OsString]) -> Result<(), KeeperError> {
    let [role, state_dir, outcome, lock, alive, undo @ ..] = args else {
        return Err(KeeperError::Usage);
    };
    let role: WorkerRole = role.to_str().and_then(|r| r.parse().ok()).ok_or(KeeperError::Usage)?;
    let mut outcome_pipe = inherited(outcome)?;
    // Held until this process ends.
    let _lock = inherited(lock)?;
    let mut words = Words::new(inherited(alive)?);
    let undo = Undo::from_words(undo).ok_or(KeeperError::Usage)?;
    // SAFETY: this process has one thread.
    if let ForkResult::Parent { .. } = unsafe { fork() }.map_err(io::Error::from)? {
        return Ok(());
    }
    setsid().map_err(io::Error::from)?;
    // Less is safer, but no reason not to hold what must be held.
    let needed = if role == WorkerRole::Restore { privilege::RESTORE_KEEPER } else { privilege::KEEPER };
    let _ = privilege::keep(needed);
    // A worker's orphans (the lower runtime, CRIU) must end where they can be waited for.
    nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)?;
    let folder = Path::new(state_dir);
    let mut kept = Kept::default();
    let (mut child, wire) = spawn(role, folder)?;
    let _ = fault::at(Moment::WorkerStarted);
    let wanted = if role == WorkerRole::Restore { Wanted::UntilDone } else { Wanted::UntilBegun };
    let result = {
        let foreground = Foreground { outcome: &outcome_pipe, words: &mut words };
        listen(&mut kept, &wire, Some(foreground), wanted)
    };
    reap(&mut child, kept.outcome.is_none());
    drop(wire);
    if role != WorkerRole::Restore {
        outcome_pipe = match recover(&mut kept, folder, outcome_pipe) {
            Some(pipe) => pipe,
            None => return Ok(()),
        };
    }
    let came_true = kept.outcome.as_ref().is_some_and(|o| o.error.is_empty());
    let outcome = kept.outcome.take().unwrap_or_else(|| {
        let reason = match (kept.stuck, result) {
            (Some(what), _) => what,
            (None, Ok(())) => last_words(folder),
            (None, Err(e)) => e.to_string(),
        };
        let left = if role == WorkerRole::Restore { "" } else { "; the container was left as it was" };
        Outcome { error: format!("the checkpoint worker ended ({reason}){left}"), report: String::new() }
    });
    // A worker that was ended has not removed it.
    for name in ["engine.sock", "engine.new"] {
        let _ = std::fs::remove_file(folder.join(name));
    }
    tell(&outcome_pipe, &outcome);
    // The foreground deletes what it has begun to restore. One that was killed cannot.
    if role == WorkerRole::Restore && !came_true {
        wait_for_last_word(&outcome_pipe, &mut words);
        if words.last != Some(Word::Done) {
            undo.carry_out(&mut words, folder);
        }
    }
    if folder.join(BORROWED).exists() && !is_read(&outcome_pipe) {
        // The foreground was to remove it.
        remove(folder);
    }
    Ok(())
}

/// Says how the job ended. The foreground may be gone; then nobody reads it, and that is fine.
fn tell(pipe: &OwnedFd, outcome: &Outcome) {
    if let Ok(mut text) = serde_json::to_vec(outcome) {
        // JSON has no line feed of its own.
        text.push(b'\n');
        let _ = nix::unistd::write(pipe, &text);
    }
}

/// Whether somebody may still read what is written.
fn is_read(pipe: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    !fds[0].revents().is_some_and(|r| r.contains(PollFlags::POLLERR))
}

/// Has new workers put right what a dead one left, until one of them has. `None`: that took so long that whoever waited was
/// told before.
fn recover(kept: &mut Kept, folder: &Path, pipe: OwnedFd) -> Option<OwnedFd> {
    let mut pipe = Some(pipe);
    // Without a job nothing was begun.
    let job: Option<CheckpointJob> = serde_json::from_str(&kept.job).ok().filter(|_| kept.job_complete);
    let Some(job) = job else { return pipe };
    let mut attempts = 0;
    while kept.outcome.is_none() {
        attempts += 1;
        if attempts > RECOVERIES {
            if !kept.any_waits() {
                break;
            }
            std::thread::sleep(PATIENCE);
        }
        wait_for_orphans(job.timeouts.lower());
        let reason = attempt(kept, folder).unwrap_or_else(|e| e.to_string());
        if attempts == RECOVERIES && kept.outcome.is_none() && kept.any_away() {
            let error = format!(
                "the checkpoint worker ended ({reason}) and the container could not be brought back to running; its memory is kept, and the attempts go on as long as it lives"
            );
            if let Some(pipe) = pipe.take() {
                tell(&pipe, &Outcome { error, report: String::new() });
            }
        }
    }
    pipe
}

/// One attempt; why it came to nothing, if it did.
fn attempt(kept: &mut Kept, folder: &Path) -> Result<String, KeeperError> {
    let (mut child, wire) = spawn(WorkerRole::Recover, folder)?;
    let _ = fault::at(Moment::WorkerStarted);
    let told = kept.hand_over(&wire);
    kept.stuck = None;
    let heard = told.and_then(|()| listen(kept, &wire, None, Wanted::Never));
    reap(&mut child, kept.outcome.is_none());
    heard?;
    Ok(kept.stuck.clone().unwrap_or_else(|| last_words(folder)))
}

/// Waits until the foreground has said its last word, or was killed.
fn wait_for_last_word(outcome: &OwnedFd, words: &mut Words) {
    loop {
        let mut fds =
            [PollFd::new(outcome.as_fd(), PollFlags::empty()), PollFd::new(words.as_fd(), PollFlags::POLLIN)];
        if matches!(poll(&mut fds, PollTimeout::NONE), Err(nix::Error::EINTR)) {
            continue;
        }
        // The other end of its words may be held by the lower runtime, for longer than the foreground has lived.
        let unread = fds[0].any().unwrap_or(false);
        words.hear();
        if unread || words.are_over() {
            return;
        }
    }
}
