//! The host's side of a conversation with `libphos.so` in one process.
//!
//! Everything that comes from there is untrusted: the application owns its side of the socket. Sizes and
//! counts are bounded, the peer's identity is what the kernel says, and every wait has a limit.

mod door;
mod folder;

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::socket::{UnixAddr, connect};
use phos_protocol::message::{CLASS_IMPORTED, Entry, Message, Summary, Timings, failure};
use phos_protocol::{Connection, MAX_FDS, TransportError, VERSION, paths};
use thiserror::Error;

use crate::image::CHUNK;
use crate::text::plain;

pub use door::AttachListener;
pub use folder::ControlDir;
use folder::{descriptor, seqpacket};

/// How long the library may take to answer what needs no GPU work.
const ANSWER: Duration = Duration::from_secs(10);
/// How long it may take to fault in memory for the driver (`prefault.rs` of the library): half a GiB, which a host that gives
/// its guests memory only when they touch it may take many seconds for. Nothing stands still meanwhile.
const READY: Duration = Duration::from_secs(60);
/// How long a whole table may take.
const TABLE: Duration = Duration::from_secs(20);
/// How much longer attaching may take for each allocation.
const ATTACH_EACH: Duration = Duration::from_micros(500);
/// Most allocations one process may have. A table of this length needs 60 MB here.
const MAX_ENTRIES: usize = 1 << 20;

/// Why a conversation with a process failed.
#[derive(Debug, Error)]
pub enum PeerError {
    /// The process does not answer.
    #[error("process {pid} does not answer its control socket: {source}")]
    Silent {
        /// Host process id.
        pid: i32,
        /// What went wrong.
        source: TransportError,
    },
    /// GPU work did not end in time; nothing was changed.
    #[error("process {pid}: its GPU work did not finish in time ({text}); try again or raise drain_timeout")]
    Busy {
        /// Host process id.
        pid: i32,
        /// The library's own words.
        text: String,
    },
    /// The library refused.
    #[error("process {pid}: {text}")]
    Refused {
        /// Host process id.
        pid: i32,
        /// The library's own words.
        text: String,
    },
    /// Something that the protocol does not allow.
    #[error("process {pid} broke the control protocol: {what}")]
    Protocol {
        /// Host process id.
        pid: i32,
        /// What.
        what: String,
    },
    /// A system call failed.
    #[error("control folder {path}: {source}")]
    Io {
        /// The folder.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, PeerError>;

/// What changed in a process's table since the generation that was asked for.
#[derive(Debug, Default)]
pub struct TableUpdate {
    /// New entries with their fds.
    pub added: Vec<(Entry, OwnedFd)>,
    /// Ids that are gone.
    pub removed: Vec<u64>,
    /// The generation the table stands at now.
    pub generation: u64,
    /// Entries alive now.
    pub live: u64,
}

/// A running or parked process that answers.
#[derive(Debug)]
pub struct Library {
    connection: Connection,
    /// Host process id.
    pub pid: i32,
    /// Process id in its own namespace.
    pub own_pid: i32,
    /// Whether it is parked.
    pub parked: bool,
    /// `cuDriverGetVersion` as the process sees it.
    pub driver: i32,
}

impl Library {
    /// Connects to the library in process `pid`, whose id in its own namespace is `own_pid`. `None` if nothing
    /// listens there: the process has no library, has not initialised CUDA or is parked.
    pub fn connect(dir: &ControlDir, pid: i32, own_pid: i32) -> Result<Option<Library>> {
        let Some(socket) = dir.socket(&paths::library_socket(own_pid))? else { return Ok(None) };
        let connection = Connection::new(seqpacket().map_err(|e| dir.error(e))?);
        // The limit stands before the first step: whoever does not accept can make that one wait, too.
        let silent = |source| PeerError::Silent { pid, source };
        connection.set_timeout(Some(ANSWER)).map_err(silent)?;
        let address = UnixAddr::new(descriptor(&socket).as_str()).map_err(|e| dir.error(e))?;
        match connect(connection.as_fd().as_raw_fd(), &address) {
            Ok(()) => {}
            Err(nix::Error::ECONNREFUSED) => return Ok(None),
            Err(nix::Error::EPROTOTYPE) => {
                return Err(PeerError::Protocol { pid, what: "its socket is of another kind".into() });
            }
            Err(nix::Error::EAGAIN) => return Err(silent(TransportError::Timeout)),
            Err(e) => return Err(dir.error(e)),
        }
        // Before a word is said, the kernel must confirm who is at the other end.
        let peer = connection.peer().map_err(|source| PeerError::Silent { pid, source })?;
        if peer.pid != pid {
            let what = format!("its socket is held by process {}", peer.pid);
            return Err(PeerError::Protocol { pid, what });
        }
        let mut library = Library { connection, pid, own_pid, parked: false, driver: 0 };
        library.send(&Message::Hello { version: VERSION }, &[])?;
        library.greet()?;
        Ok(Some(library))
    }

    fn greet(&mut self) -> Result<()> {
        match self.receive()?.0 {
            Message::HelloAck { version: VERSION, pid, parked, driver, .. } => {
                if pid != self.own_pid {
                    return Err(self.broke(format!("it says it is process {pid}, not {}", self.own_pid)));
                }
                self.parked = parked;
                self.driver = driver;
                Ok(())
            }
            Message::HelloAck { version, .. } => Err(PeerError::Refused {
                pid: self.pid,
                text: format!(
                    "its libphos.so speaks protocol {version}, this phos-runc {VERSION}: restart the container"
                ),
            }),
            other => Err(self.unexpected(&other)),
        }
    }

    fn timeout(&self, t: Duration) -> Result<()> {
        self.connection.set_timeout(Some(t)).map_err(|source| PeerError::Silent { pid: self.pid, source })
    }

    /// Has the next step fail at `deadline`, however little it may be that keeps coming until then.
    fn until(&self, deadline: Instant) -> Result<()> {
        match deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(PeerError::Silent { pid: self.pid, source: TransportError::Timeout }),
            left => self.timeout(left.max(Duration::from_millis(1))),
        }
    }

    fn send(&self, message: &Message, fds: &[RawFd]) -> Result<()> {
        self.connection.send(message, fds).map_err(|source| PeerError::Silent { pid: self.pid, source })
    }

    fn receive(&self) -> Result<(Message, Vec<OwnedFd>)> {
        match self.connection.receive() {
            Ok((Message::Failed { code: failure::BUSY, text }, _)) => {
                Err(PeerError::Busy { pid: self.pid, text: plain(&text) })
            }
            Ok((Message::Failed { text, .. }, _)) => {
                Err(PeerError::Refused { pid: self.pid, text: plain(&text) })
            }
            Ok(packet) => Ok(packet),
            Err(TransportError::Decode(e)) => Err(self.broke(e.to_string())),
            Err(source) => Err(PeerError::Silent { pid: self.pid, source }),
        }
    }

    fn broke(&self, what: String) -> PeerError {
        PeerError::Protocol { pid: self.pid, what }
    }

    fn unexpected(&self, message: &Message) -> PeerError {
        let text = format!("{message:?}");
        self.broke(format!("unexpected {}", text.split([' ', '(']).next().unwrap_or_default()))
    }

    /// What the process holds, and what would prevent its checkpoint.
    pub fn query(&self) -> Result<Summary> {
        self.send(&Message::Query, &[])?;
        match self.receive()?.0 {
            Message::Summary(mut s) => {
                s.blockers.iter_mut().for_each(|b| *b = plain(b));
                Ok(s)
            }
            other => Err(self.unexpected(&other)),
        }
    }

    /// Waits until the process has done what it does beforehand once its table has been asked for.
    pub fn wait_until_ready(&self) -> Result<()> {
        self.timeout(READY)?;
        self.query()?;
        self.timeout(ANSWER)
    }

    /// The table's changes since generation `since`; the application runs on.
    pub fn table(&self, since: u64) -> Result<TableUpdate> {
        self.send(&Message::Table { since }, &[])?;
        self.receive_table(TABLE)
    }

    /// Stops the process's GPU work. When this returns, nothing is running and the table is complete; the
    /// process waits for [`Library::taken`] and goes on as before if `self` is dropped instead.
    pub fn park(&self, since: u64, drain: Duration, flags: u32) -> Result<TableUpdate> {
        let drain_timeout_ms = u32::try_from(drain.as_millis()).unwrap_or(u32::MAX);
        self.timeout(drain + ANSWER)?;
        self.send(&Message::Park { since, drain_timeout_ms, flags }, &[])?;
        let update = self.receive_table(drain + TABLE)?;
        self.timeout(ANSWER)?;
        Ok(update)
    }

    /// Every fd is held: the library lets go of the memory. After this the process is parked.
    pub fn taken(self, limit: Duration) -> Result<Timings> {
        self.timeout(limit)?;
        self.send(&Message::Taken, &[])?;
        match self.receive()?.0 {
            Message::Parked(t) => Ok(t),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has a parked process, whose driver state is saved, give back what of it is zeros. Returns the bytes.
    pub fn trim(&self) -> Result<u64> {
        self.send(&Message::Trim, &[])?;
        match self.receive()?.0 {
            Message::Trimmed { bytes } => Ok(bytes),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Gives a parked process its memory back. `entries` must be all that were alive at park.
    pub fn attach(self, entries: &[(Entry, RawFd)], limit: Duration) -> Result<Timings> {
        let deadline = Instant::now() + limit + ATTACH_EACH * entries.len() as u32;
        self.attach_until(entries, deadline)
    }

    fn attach_until(self, entries: &[(Entry, RawFd)], deadline: Instant) -> Result<Timings> {
        self.until(deadline)?;
        self.send(&Message::Attach { handles: entries.len() as u64 }, &[])?;
        for batch in entries.chunks(MAX_FDS) {
            let (entries, fds): (Vec<_>, Vec<_>) = batch.iter().copied().unzip();
            self.until(deadline)?;
            self.send(&Message::Entries(entries), &fds)?;
        }
        self.until(deadline)?;
        match self.receive()?.0 {
            Message::Attached(t) => Ok(t),
            other => Err(self.unexpected(&other)),
        }
    }

    fn receive_table(&self, limit: Duration) -> Result<TableUpdate> {
        let mut update = TableUpdate::default();
        let mut ids = HashSet::new();
        let deadline = Instant::now() + limit;
        loop {
            if Instant::now() > deadline {
                return Err(self.broke("its table does not end".into()));
            }
            match self.receive()? {
                (Message::Entries(entries), fds) => {
                    if entries.len() != fds.len() {
                        return Err(self.broke("as many fds as entries must come".into()));
                    }
                    if update.added.len() + entries.len() > MAX_ENTRIES {
                        return Err(self.broke(format!("more than {MAX_ENTRIES} allocations")));
                    }
                    for (entry, fd) in entries.into_iter().zip(fds) {
                        // What was imported and not mapped has no size of its own.
                        let unmapped = entry.class == CLASS_IMPORTED && entry.size == 0;
                        if entry.size == 0 && !unmapped
                            || entry.size % CHUNK as u64 != 0
                            || entry.size > 1 << 46
                        {
                            return Err(self.broke(format!("an allocation of {} bytes", entry.size)));
                        }
                        if !ids.insert(entry.id) {
                            return Err(self.broke(format!("entry {} came twice", entry.id)));
                        }
                        update.added.push((entry, fd));
                    }
                }
                (Message::Removed(removed), _) => {
                    if update.removed.len() + removed.len() > MAX_ENTRIES {
                        return Err(self.broke("too many removed entries".into()));
                    }
                    update.removed.extend(removed);
                }
                (Message::TableEnd { generation, live }, _) => {
                    (update.generation, update.live) = (generation, live);
                    return Ok(update);
                }
                (other, _) => return Err(self.unexpected(&other)),
            }
        }
    }
}

#[cfg(test)]
mod tests;
