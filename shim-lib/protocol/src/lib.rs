//! The wire protocol between `libphos.so` (the *library*, inside the application) and the checkpoint
//! engine (the *host*).
//!
//! One Unix `SOCK_SEQPACKET` connection carries one conversation. A packet is one [`Message`]; file
//! descriptors travel beside it as `SCM_RIGHTS`. All integers are little-endian.
//!
//! ```text
//! while the application runs: the library listens on  <control dir>/<pid in its own namespace>.sock
//!
//!   host                                     library
//!   Hello                          ───────►
//!                                  ◄───────  HelloAck
//!   Query                          ───────►
//!                                  ◄───────  Summary
//!   Table { since }                ───────►                      (copies fds, the application runs on)
//!                                  ◄───────  Entries* Removed* TableEnd
//!   Park { since, … }              ───────►                      gate closes, work drains
//!                                  ◄───────  Entries* Removed* TableEnd
//!   Taken                          ───────►                      every fd is held by the host
//!                                  ◄───────  Parked              unmapped, released, fds closed
//!   (both sides close; the library closes its listener too: nothing is left for CRIU to object to)
//!
//! while parked: the host listens on  <control dir>/host.sock, the library tries to connect every millisecond
//!
//!                                  ◄───────  HelloAck
//!   Trim                           ───────►                      the driver has saved its state
//!                                  ◄───────  Trimmed             (both sides close; the library knocks again)
//!
//!                                  ◄───────  HelloAck
//!   Attach { handles }             ───────►
//!   Entries* (id and fd)           ───────►
//!                                  ◄───────  Attached            mapped again, gate open, listener back
//! ```
//!
//! Instead of any answer either side may send [`Message::Failed`] and close. If the connection ends before
//! `Taken` arrives, the library opens its gate and goes on as if nothing had been asked.

pub mod message;
pub mod paths;
pub mod transport;

pub use message::{Entry, Message, Summary, Timings};
pub use transport::{Connection, TransportError};

/// Version of this protocol. Both sides refuse any other.
pub const VERSION: u16 = 3;

/// Largest packet in bytes that either side sends or accepts.
pub const MAX_PACKET: usize = 32 * 1024;

/// Most file descriptors in one packet. The kernel's own limit is 253 (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 128;
