//! The foreground's side: starting a keeper, and learning how it ended.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use thiserror::Error;

use super::undo::Undo;
use super::wire::Outcome;
use super::words::Word;
use crate::fault::{self, Moment};
use crate::{lower, processes};

/// What the worker is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerRole {
    /// Serves one checkpoint.
    Checkpoint,
    /// Serves one restore.
    Restore,
    /// Puts right what a dead worker left.
    Recover,
}

impl WorkerRole {
    /// As it stands on a command line.
    pub fn as_str(self) -> &'static str {
        match self {
            WorkerRole::Checkpoint => "checkpoint",
            WorkerRole::Restore => "restore",
            WorkerRole::Recover => "recover",
        }
    }
}

impl FromStr for WorkerRole {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        [WorkerRole::Checkpoint, WorkerRole::Restore, WorkerRole::Recover]
            .into_iter()
            .find(|r| r.as_str() == s)
            .ok_or_else(|| format!("unknown worker role '{s}'"))
    }
}

/// The keeper could not be started.
#[derive(Debug, Error)]
#[error("cannot start the checkpoint keeper: {0}")]
pub struct StartError(#[from] io::Error);

/// A file of this name in a state folder says that it is there for the time of one job only.
pub const BORROWED: &str = "borrowed";

/// The lock of a container whose state folder this is. It lies beside the folder, which comes and goes while the lock is
/// held.
pub fn lock_file(state_dir: &Path) -> PathBuf {
    let mut path = state_dir.as_os_str().to_os_string();
    path.push(".lock");
    path.into()
}

/// A running keeper as the foreground sees it.
#[derive(Debug)]
pub struct Keeper {
    outcome: File,
    alive: Option<OwnedFd>,
    /// Socket at which the worker serves the engine's ttrpc service.
    pub socket: PathBuf,
}

impl Drop for Keeper {
    /// This process goes its own way and leaves nothing to clean up; one that is killed cannot say so.
    fn drop(&mut self) {
        self.end(Word::Done);
    }
}

impl Keeper {
    /// Waits until the keeper knows how the job ended; `None` if the keeper itself was killed.
    pub fn outcome(&mut self) -> Option<Outcome> {
        let mut text = String::new();
        BufReader::new(&self.outcome).read_line(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Whether the keeper has said how the job ended, or is gone.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.outcome.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    fn say(&self, word: Word) {
        if let Some(alive) = &self.alive {
            let _ = nix::unistd::write(alive, &word.bytes());
        }
    }

    /// Says the last word.
    fn end(&mut self, word: Word) {
        self.say(word);
        self.alive = None;
    }

    /// Has the keeper wait for all that a killed lower runtime has started, and delete what there is of the container.
    pub fn clean_up(&mut self) {
        self.end(Word::CleanUp);
        let _ = self.outcome.read_to_end(&mut Vec::new());
    }

    /// Says that there is nothing to clean up, and waits for the keeper's end: whoever removes the state folder must be the last.
    pub fn finish(mut self) {
        self.end(Word::Done);
        let _ = self.outcome.read_to_end(&mut Vec::new());
    }

    /// Has the keeper know the lower runtime, which `lower` starts, and how long it and all it has started are at work.
    pub fn introduce(&self, lower: &mut Command) {
        let Some(alive) = &self.alive else { return };
        lower::inherit(lower, alive.as_fd());
        let number = alive.as_raw_fd();
        // SAFETY: between fork and exec only `getpid`, `signal` and `write` are called, which may be; the fd is open until then.
        unsafe {
            lower.pre_exec(move || {
                let word = Word::Lower(libc::getpid()).bytes();
                // A keeper that was killed is no reason to end like this.
                libc::signal(libc::SIGPIPE, libc::SIG_IGN);
                libc::write(number, word.as_ptr().cast(), word.len());
                libc::signal(libc::SIGPIPE, libc::SIG_DFL);
                Ok(())
            })
        };
    }

    /// What the lower runtime has started and is not its own any more.
    pub fn strays(&self) -> Vec<i32> {
        let mut found =
            self.alive.as_ref().map(|pipe| processes::writing_to(pipe.as_fd())).unwrap_or_default();
        let own = processes::descendants(std::process::id() as i32);
        found.retain(|pid| !own.contains(pid));
        found
    }

    /// Has the keeper know a process that the lower runtime has started.
    pub fn tell_of(&self, pid: i32) {
        self.say(Word::Started(pid));
    }
}

/// Starts a keeper in a session of its own, which starts a worker for `role` that serves at
/// `state_dir/engine.sock`. Returns at once.
///
/// The keeper survives this process: engines kill the runtime whenever they like. It holds the file lock `lock` as long
/// as it lives, so that no second job begins while the first one goes on without its foreground. A restore whose foreground
/// is killed is undone as `undo` says.
pub fn start(
    role: WorkerRole,
    state_dir: &Path,
    lock: BorrowedFd<'_>,
    undo: &Undo,
) -> Result<Keeper, StartError> {
    let socket = state_dir.join("engine.sock");
    let _ = std::fs::remove_file(&socket);
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
    let (watched, alive) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(io::Error::from)?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("__keeper")
        .args([OsString::from(role.as_str()), state_dir.into()])
        .args([write.as_raw_fd(), lock.as_raw_fd(), watched.as_raw_fd()].map(|fd| fd.to_string()))
        .args(undo.words())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let inherited = [write.as_raw_fd(), lock.as_raw_fd(), watched.as_raw_fd()];
    // SAFETY: between fork and exec only async-signal-safe calls are made: fcntl. The fds are open until then.
    unsafe {
        command.pre_exec(move || {
            for fd in inherited {
                fcntl(BorrowedFd::borrow_raw(fd), FcntlArg::F_SETFD(FdFlag::empty()))
                    .map_err(io::Error::from)?;
            }
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    drop(write);
    // The child forks the real keeper and ends at once.
    child.wait()?;
    let _ = fault::at(Moment::KeeperStarted);
    Ok(Keeper { outcome: File::from(read), alive: Some(alive), socket })
}
