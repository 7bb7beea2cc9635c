//! Waiting for the GPU, with a limit that the driver's own wait does not have.

use std::mem;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use phos_protocol::message::failure;

use crate::contexts;
use crate::cuda::{SUCCESS, Status};
use crate::park::{Failure, cuda, relax_capture};
use crate::real::api;

/// What the threads answer that were left behind inside the driver.
static LEFT_BEHIND: Mutex<Vec<Receiver<Status>>> = Mutex::new(Vec::new());

fn left_behind() -> MutexGuard<'static, Vec<Receiver<Status>>> {
    LEFT_BEHIND.lock().unwrap_or_else(|e| e.into_inner())
}

/// Waits until no thread is left behind; `false` if that takes until `deadline`.
fn gather(deadline: Instant) -> bool {
    let mut threads = mem::take(&mut *left_behind());
    threads.retain(|t| {
        let patience = deadline.saturating_duration_since(Instant::now());
        matches!(t.recv_timeout(patience), Err(RecvTimeoutError::Timeout))
    });
    let gathered = threads.is_empty();
    left_behind().extend(threads);
    gathered
}

/// Waits until every context is idle; `false` if that takes longer than `patience`.
pub fn drain(patience: Duration) -> Result<bool, Failure> {
    let deadline = Instant::now() + patience;
    // A driver that keeps one for ever gets no second one.
    if !gather(deadline) {
        return Ok(false);
    }
    let (done, result) = mpsc::channel();
    // The driver's wait has no limit, so it happens in a thread that can be left behind.
    let spawned = thread::Builder::new().name("phos-drain".into()).spawn(move || {
        relax_capture();
        let all = contexts::all();
        let mut status = SUCCESS;
        for context in &all.contexts {
            // SAFETY: `all` keeps the contexts alive.
            unsafe {
                if (api().ctx_set)(*context) == SUCCESS {
                    status = status.max((api().ctx_synchronize)());
                }
            }
        }
        // SAFETY: no context is current afterwards.
        unsafe { (api().ctx_set)(std::ptr::null_mut()) };
        // Whoever hears of it may count on this thread to be out of the driver.
        drop(all);
        let _ = done.send(status);
    });
    if let Err(e) = spawned {
        return Err(Failure::Answer(failure::SYSTEM, format!("no thread to wait for the GPU: {e}")));
    }
    match result.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(SUCCESS) => Ok(true),
        Ok(status) => Err(cuda("cuCtxSynchronize", status)),
        Err(_) => {
            left_behind().push(result);
            Ok(false)
        }
    }
}
