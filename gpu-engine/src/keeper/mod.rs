//! The keeper: a tiny process of its own session that holds every parked piece of memory by its fd, and with
//! them the way back. It uses no GPU library. If the worker dies it starts another one to bring the
//! application back to running, or to finish the image if the application is already in it.
//!
//! ```text
//! foreground ── starts ──► keeper ── starts ──► worker (checkpoint)
//!     ▲                      │  ◄── Job, Process, Hold, Forget, LowerDone, Finished ──┘
//!     └── outcome (pipe) ────┤
//!                            └── if the worker ends without Finished ──► worker (recover) ◄── all of it back
//! ```

mod run;
mod start;
mod undo;
pub mod wire;
mod words;

pub use run::{KeeperError, run};
pub use start::{BORROWED, Keeper, StartError, WorkerRole, lock_file, start};
pub use undo::{CONFIG_BEFORE, Undo};
