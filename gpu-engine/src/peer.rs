//! The host's side of a conversation with `libphos.so` in one process.
//!
//! Everything that comes from there is untrusted: the application owns its side of the socket. Sizes and
//! counts are bounded, the peer's identity is what the kernel says, and every wait has a limit.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::image::CHUNK;
use crate::text::plain;
use nix::fcntl::{OFlag, RenameFlags, openat, renameat2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{UnlinkatFlags, unlinkat};
use phos_protocol::message::{Entry, Message, Summary, Timings, failure};
use phos_protocol::{Connection, MAX_FDS, TransportError, VERSION, paths};
use std::os::fd::AsFd;
use thiserror::Error;

/// How long the library may take to answer what needs no GPU work.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a whole table may take.
const TABLE: Duration = Duration::from_secs(20);
/// How long a process may take to attach, and how much longer for each piece of memory (measured: 55 µs).
const ATTACH: Duration = Duration::from_secs(60);
/// See [`ATTACH`].
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

/// The container's control folder, held open: what is in it belongs to the container, so it is only ever
/// reached through this descriptor and never by a path that the container could redirect.
#[derive(Debug)]
pub struct ControlDir {
    fd: File,
    path: PathBuf,
}

impl ControlDir {
    /// Opens the folder on the host.
    pub fn open(path: &Path) -> Result<Self> {
        let fd = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)
            .map_err(|source| PeerError::Io { path: path.into(), source })?;
        Ok(ControlDir { fd, path: path.into() })
    }

    /// A short path to `name` in the folder: Unix socket addresses hold 107 bytes only.
    fn address(&self, name: &str) -> Result<UnixAddr> {
        let path = format!("{}/{name}", descriptor(&self.fd));
        UnixAddr::new(path.as_str()).map_err(|e| self.error(e))
    }

    /// The socket `name` itself, `None` if there is none. A link is none, wherever it leads.
    fn socket(&self, name: &str) -> Result<Option<File>> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(nix::Error::ENOENT) => return Ok(None),
            Err(e) => return Err(self.error(e)),
        };
        let kind = file.metadata().map_err(|e| self.error(e))?.file_type();
        Ok(kind.is_socket().then_some(file))
    }

    /// Makes room for a socket. What cannot be removed at once (a folder that somebody filled) is moved out of the way: it
    /// goes with the control folder.
    fn clear(&self, name: &str) {
        if !matches!(unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir), Err(nix::Error::EISDIR)) {
            return;
        }
        for n in 0..u32::from(u8::MAX) {
            let aside = format!(".{name}.{n}");
            let free = renameat2(&self.fd, name, &self.fd, aside.as_str(), RenameFlags::RENAME_NOREPLACE);
            if !matches!(free, Err(nix::Error::EEXIST)) {
                return;
            }
        }
    }

    fn error(&self, e: impl Into<io::Error>) -> PeerError {
        PeerError::Io { path: self.path.clone(), source: e.into() }
    }
}

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

/// A short path to what a descriptor stands for: addresses of Unix sockets hold 107 bytes only.
fn descriptor(fd: &File) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn seqpacket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
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
    pub fn taken(self) -> Result<Timings> {
        self.timeout(Duration::from_secs(60))?;
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
    pub fn attach(self, entries: &[(Entry, RawFd)]) -> Result<Timings> {
        let deadline = Instant::now() + ATTACH + ATTACH_EACH * entries.len() as u32;
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
                        if entry.size == 0 || entry.size % CHUNK as u64 != 0 || entry.size > 1 << 46 {
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

/// Where parked processes knock to be attached again. The socket is removed when this is dropped.
#[derive(Debug)]
pub struct AttachListener<'a> {
    dir: &'a ControlDir,
    socket: OwnedFd,
}

/// Guards the process-wide umask while a socket is bound.
static UMASK: Mutex<()> = Mutex::new(());

impl<'a> AttachListener<'a> {
    /// Starts to listen; every parked process of the container finds it within about a millisecond.
    pub fn bind(dir: &'a ControlDir) -> Result<Self> {
        let socket = seqpacket().map_err(|e| dir.error(e))?;
        dir.clear(paths::HOST_SOCKET);
        let address = dir.address(paths::HOST_SOCKET)?;
        {
            // The application may run as any user: connecting needs write permission on the socket file.
            let _guard = UMASK.lock();
            let before = umask(Mode::empty());
            let bound = bind(socket.as_raw_fd(), &address);
            umask(before);
            bound.map_err(|e| dir.error(e))?;
        }
        let listener = AttachListener { dir, socket };
        listen(&listener.socket, Backlog::MAXCONN).map_err(|e| dir.error(e))?;
        Ok(listener)
    }

    /// Waits for the next of `expected` (host pid, pid in its own namespace) until `deadline`. Connections of
    /// anyone else are closed.
    pub fn accept(&self, expected: &[(i32, i32)], deadline: Instant) -> Result<Library> {
        let first = expected.first().map_or(0, |e| e.0);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Also while others knock and knock.
                return Err(PeerError::Silent { pid: first, source: TransportError::Timeout });
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) | Err(nix::Error::EINTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(self.dir.error(e)),
            }
            let Ok(fd) = accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else { continue };
            // SAFETY: accept4 just returned this fd and nothing else owns it.
            let connection = Connection::new(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) });
            let Ok(peer) = connection.peer() else { continue };
            let Some((pid, own_pid)) = expected.iter().copied().find(|(pid, _)| *pid == peer.pid) else {
                continue;
            };
            let mut library = Library { connection, pid, own_pid, parked: true, driver: 0 };
            library.timeout(ANSWER)?;
            library.greet()?;
            return Ok(library);
        }
    }
}

impl Drop for AttachListener<'_> {
    fn drop(&mut self) {
        let _ = unlinkat(&self.dir.fd, paths::HOST_SOCKET, UnlinkatFlags::NoRemoveDir);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn only_a_socket_of_the_folder_itself_is_connected_to() {
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let dir = ControlDir::open(folder.path()).unwrap();
        let pid = std::process::id() as i32;
        let at = folder.path().join(paths::library_socket(pid));
        let listener = UnixListener::bind(elsewhere.path().join("s")).unwrap();
        symlink(elsewhere.path().join("s"), &at).unwrap();
        assert!(Library::connect(&dir, pid, pid).unwrap().is_none(), "a link");
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "nobody knocked");
        std::fs::remove_file(&at).unwrap();
        std::fs::write(&at, "").unwrap();
        assert!(Library::connect(&dir, pid, pid).unwrap().is_none(), "a file");
        std::fs::remove_file(&at).unwrap();
        let _stream = UnixListener::bind(&at).unwrap();
        let error = Library::connect(&dir, pid, pid).unwrap_err().to_string();
        assert!(error.contains("another kind"), "{error}");
    }

    /// Reads one packet now and then, and so never lets a wait run into its own limit.
    #[test]
    fn who_takes_one_piece_at_a_time_has_no_more_time_than_others() {
        let (ours, theirs) = nix::sys::socket::socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let library =
            Library { connection: Connection::new(ours), pid: 1, own_pid: 1, parked: true, driver: 0 };
        let slow = thread::spawn(move || {
            let peer = Connection::new(theirs);
            while peer.receive().is_ok() {
                thread::sleep(Duration::from_millis(50));
            }
        });
        let file = File::open("/dev/null").unwrap();
        let entries = vec![(Entry::default(), file.as_raw_fd()); MAX_FDS * 200];
        let begin = Instant::now();
        let error = library.attach_until(&entries, begin + Duration::from_millis(500)).unwrap_err();
        assert!(matches!(error, PeerError::Silent { source: TransportError::Timeout, .. }), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        slow.join().unwrap();
    }

    #[test]
    fn a_folder_in_the_doors_place_is_moved_away() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::open(folder.path()).unwrap();
        let door = folder.path().join(paths::HOST_SOCKET);
        for _ in 0..3 {
            std::fs::create_dir(&door).unwrap();
            std::fs::write(door.join("x"), "").unwrap();
            drop(AttachListener::bind(&dir).unwrap());
            assert!(!door.exists());
        }
    }

    #[test]
    fn waiting_ends_although_strangers_knock() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::open(folder.path()).unwrap();
        let listener = AttachListener::bind(&dir).unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let socket = seqpacket().unwrap();
                    let _ = connect(socket.as_raw_fd(), &dir.address(paths::HOST_SOCKET).unwrap());
                }
            });
            let begin = Instant::now();
            let error = listener.accept(&[(-1, 1)], begin + Duration::from_millis(300)).unwrap_err();
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(matches!(error, PeerError::Silent { .. }), "{error}");
            assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        });
    }
}
