//! Ends a worker that waits for what does not end: a driver call, a file system. Nothing inside the process can end such a
//! wait; the keeper can put everything right once the process is gone.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::keeper::wire::{Packet, Wire};
use crate::progress::Progress;

/// How often it looks.
const INTERVAL: Duration = Duration::from_millis(50);

/// Watches `progress` as long as this process lives.
pub fn start(progress: Arc<Progress>, wire: Arc<Wire>, stall: Duration) {
    thread::spawn(move || {
        let what = loop {
            match progress.overdue(stall) {
                Some(what) => break what,
                None => thread::sleep(INTERVAL),
            }
        };
        let _ = wire.send(&Packet::Stuck(what.clone()), &[]);
        end(&what);
    });
}

/// Ends this process at once, with its reason as the log's last line.
pub fn end(reason: &str) -> ! {
    tracing::error!("{reason}");
    // SAFETY: always allowed. Destructors are not run: they would wait for what hangs.
    unsafe { libc::_exit(1) }
}

/// Has a panic in any thread end the process: half of a worker helps nobody, and its keeper only acts when it is gone.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|info| end(&format!("a bug: {}", info.to_string().replace('\n', " ")))));
}
