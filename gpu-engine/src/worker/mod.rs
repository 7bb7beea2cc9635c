//! The worker: the one process with a GPU context of its own. It copies, digests, drives the driver's checkpoint
//! calls and the lower runtime, and writes the image. It may crash at any point: the keeper holds what matters.

mod checkpoint;
mod folder;
mod freeze;
mod recover;
mod restore;
mod save;
mod sharing;
mod subject;
mod wake;
mod watchdog;

use std::ffi::OsString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use phos_protocol::Connection;
use thiserror::Error;
use tokio::sync::Notify;

use crate::device;
use crate::error::EngineError;
use crate::fault::{self, Moment};
use crate::job::{CheckpointJob, CheckpointReport, RestoreJob, RestoreReport, Timeouts};
use crate::keeper::WorkerRole;
use crate::keeper::wire::{Outcome, Packet, Wire};
use crate::pages::Socket;
use crate::privilege;
use crate::progress::Progress;
use crate::service::{self, Handler, LowerOutput};

/// The fd at which the keeper leaves a worker its connection.
const KEEPER_FD: i32 = 3;

/// The worker cannot work.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The command line is not the one the keeper writes.
    #[error("the worker is started by phos-runc itself, not by hand")]
    Usage,
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The service could not be offered.
    #[error("{0}")]
    Service(#[from] ttrpc::Error),
    /// The recovery failed.
    #[error("{0}")]
    Engine(#[from] EngineError),
}

/// What the service's requests act on.
struct Worker {
    wire: Arc<Wire>,
    progress: Arc<Progress>,
    restore: Mutex<Option<restore::Restore>>,
    /// For a checkpoint's host memory.
    socket: Mutex<Option<Socket>>,
    /// The foreground has its answer.
    answered: Notify,
    /// The job is over, whether or not anybody can still be told.
    over: Notify,
}

/// How long the answer may take to reach a foreground that is alive.
const LAST_WORDS: Duration = Duration::from_secs(2);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Worker {
    /// A request has come whose waits have these limits.
    fn begin(&self, timeouts: &Timeouts) {
        watchdog::start(self.progress.clone(), self.wire.clone(), timeouts.stall());
    }

    fn finished<R: serde::Serialize>(&self, result: &Result<R, EngineError>) {
        self.progress.finish();
        // Whatever is made to fail here: the job is over, and its end must be told.
        let _ = fault::at(Moment::Done);
        let outcome = match result {
            Ok(report) => {
                Outcome { error: String::new(), report: serde_json::to_string(report).unwrap_or_default() }
            }
            Err(e) => Outcome { error: e.to_string(), report: String::new() },
        };
        if let Err(e) = self.wire.finish(outcome) {
            tracing::warn!(error = %e, "the keeper is gone");
        }
        let _ = fault::at(Moment::DoneTold);
        self.over.notify_one();
    }
}

impl Handler for Worker {
    fn checkpoint(&self, job: CheckpointJob) -> (Result<CheckpointReport, String>, LowerOutput) {
        tracing::info!(container = job.container, image = %job.image.display(), "checkpoint");
        self.begin(&job.timeouts);
        let _busy = self.progress.busy();
        let (result, lower) = match device::cuda::open() {
            Ok(device) => {
                checkpoint::run(device, lock(&self.socket).take(), &job, &self.wire, &self.progress)
            }
            Err(e) => (Err(e.into()), LowerOutput::default()),
        };
        match &result {
            Ok(report) => tracing::info!(?report, "checkpoint done"),
            Err(e) => tracing::error!(error = %e, "checkpoint failed"),
        }
        if let Err(e @ EngineError::RollbackFailed { .. }) = &result {
            // The keeper has the memory, and has other workers try.
            let _ = self.wire.send(&Packet::Stuck(e.to_string()), &[]);
            watchdog::end(&e.to_string());
        }
        self.finished(&result);
        (result.map_err(|e| e.to_string()), lower)
    }

    fn restore(&self, job: RestoreJob) -> Result<(), String> {
        tracing::info!(container = job.container, image = %job.image.display(), "restore");
        self.begin(&job.timeouts);
        let _busy = self.progress.busy();
        let result = restore::Restore::prepare(job, self.progress.clone()).map(|prepared| {
            *lock(&self.restore) = Some(prepared);
        });
        if let Err(e) = &result {
            tracing::error!(error = %e, "restore refused");
            self.finished(&result);
        }
        result.map_err(|e| e.to_string())
    }

    fn attach(&self, init_pid: i32) -> Result<RestoreReport, String> {
        let _busy = self.progress.busy();
        let prepared = lock(&self.restore).take();
        let result = match prepared {
            Some(prepared) => prepared.attach(init_pid, &self.progress),
            None => Err(EngineError::Order("attach was asked for before restore")),
        };
        self.finished(&result);
        result.map_err(|e| e.to_string())
    }

    fn progress(&self) -> &Progress {
        &self.progress
    }

    fn answered(&self) {
        self.answered.notify_one();
    }
}

fn start_log() {
    // The keeper appends the worker's standard error to `engine.log` in the container's state folder.
    let _ = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::INFO)
        .try_init();
}

/// The worker's life. `args`: role, state folder.
pub fn run(args: &[OsString]) -> Result<(), WorkerError> {
    let [role, state_dir] = args else { return Err(WorkerError::Usage) };
    let role: WorkerRole = role.to_str().and_then(|r| r.parse().ok()).ok_or(WorkerError::Usage)?;
    start_log();
    // Its size takes a capability that nothing else needs.
    let socket = Socket::pair().ok().filter(|_| role == WorkerRole::Checkpoint);
    // Before there is a second thread: capabilities are each thread's own.
    if let Err(e) = privilege::keep(privilege::WORKER) {
        tracing::warn!(error = %e, "capabilities were not given up");
    }
    watchdog::end_on_panic();
    // What the lower runtime leaves behind when it is killed (CRIU above all) ends where it can be waited for.
    nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)?;
    // SAFETY: the keeper left its connection at this fd for us; nothing else in this process knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(KEEPER_FD) };
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .map_err(io::Error::from)?;
    let wire = Arc::new(Wire(Connection::new(fd)));
    if role == WorkerRole::Recover {
        // The dead worker's.
        let _ = std::fs::remove_file(Path::new(state_dir).join("engine.sock"));
        return Ok(recover::run(&wire)?);
    }
    let worker = Arc::new(Worker {
        wire,
        progress: Arc::default(),
        restore: Mutex::new(None),
        socket: Mutex::new(socket),
        answered: Notify::new(),
        over: Notify::new(),
    });
    let idle = worker.clone();
    thread::spawn(move || {
        // The keeper says nothing: this returns when it is gone. A job under way is brought to its end all the same; for
        // one that has not come nothing could be kept.
        let _ = idle.wire.receive();
        while idle.progress.is_busy() {
            thread::sleep(LAST_WORDS);
        }
        idle.over.notify_one();
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = worker.clone();
    runtime.block_on(async move {
        let socket = Path::new(state_dir).join("engine.sock");
        let finished = async move {
            tokio::select! {
                () = done.answered.notified() => {}
                () = async { done.over.notified().await; tokio::time::sleep(LAST_WORDS).await } => {}
            }
        };
        service::serve(worker, &socket, finished).await
    })?;
    Ok(())
}
