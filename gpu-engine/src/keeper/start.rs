//! The foreground's side: starting a keeper, and learning how it ended.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::unistd::pipe2;
use thiserror::Error;

use super::wire::Outcome;

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

/// A running keeper as the foreground sees it.
#[derive(Debug)]
pub struct Keeper {
    outcome: File,
    /// Socket at which the worker serves the engine's ttrpc service.
    pub socket: PathBuf,
}

impl Keeper {
    /// Waits for the keeper's end and returns how the job ended; `None` if the keeper itself was killed.
    pub fn outcome(mut self) -> Option<Outcome> {
        let mut text = String::new();
        self.outcome.read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }
}

/// Starts a keeper in a session of its own, which starts a worker for `role` that serves at
/// `state_dir/engine.sock`. Returns at once.
///
/// The keeper survives this process: engines kill the runtime whenever they like. It holds the file lock `lock` as long
/// as it lives, so that no second job begins while the first one goes on without its foreground.
pub fn start(role: WorkerRole, state_dir: &Path, lock: BorrowedFd<'_>) -> Result<Keeper, StartError> {
    let socket = state_dir.join("engine.sock");
    let _ = std::fs::remove_file(&socket);
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("__keeper")
        .args([OsString::from(role.as_str()), state_dir.into()])
        .args([write.as_raw_fd(), lock.as_raw_fd()].map(|fd| fd.to_string()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let inherited = [write.as_raw_fd(), lock.as_raw_fd()];
    // SAFETY: between fork and exec only async-signal-safe calls are made: fcntl. Both fds are open until then.
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
    Ok(Keeper { outcome: File::from(read), socket })
}
