//! The control thread: starts with `cuInit`, listens for the host, and while parked knocks at its door.

#![allow(non_snake_case)]

use std::env;
use std::ffi::CString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, Once, OnceLock};
use std::thread;
use std::time::Duration;

use phos_protocol::message::{Message, Timings, failure};
use phos_protocol::{Connection, TransportError, VERSION, paths};

use crate::cuda::{SUCCESS, Status};
use crate::fds::Kept;
use crate::park::{Failure, attach, park, send_table, summary};
use crate::real::api;
use crate::{fds, gate, ipc_door, prefault, table};

/// How long a host may be silent in the middle of a conversation.
const SILENCE: Duration = Duration::from_secs(60);
/// How often a parked process looks for the host.
const KNOCK: Duration = Duration::from_millis(1);

/// The listening socket, for the child of a `fork` to close.
static LISTENER: Mutex<Kept> = Mutex::new(Kept::NONE);

/// Closes the listening socket, unless the program has done so already.
fn close_listener() {
    if let Ok(mut listener) = LISTENER.try_lock() {
        listener.close();
    }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(flags: u32) -> Status {
    if !crate::real::present() {
        return crate::cuda::NO_DEVICE;
    }
    // SAFETY: the argument is the caller's.
    let result = unsafe { (api().init)(flags) };
    if result == SUCCESS {
        static ONCE: Once = Once::new();
        ONCE.call_once(start);
    }
    result
}

/// The conversation under way, likewise.
static CONVERSATION: AtomicI32 = AtomicI32::new(-1);

extern "C" fn in_child() {
    fds::close(CONVERSATION.swap(-1, Ordering::Relaxed));
    close_listener();
    ipc_door::close_after_fork();
    table::close_after_fork();
    gate::reset_after_fork();
}

/// The control folder, if this process is meant to be reachable.
pub fn folder() -> Option<PathBuf> {
    let folder = match env::var_os(paths::CONTROL_DIR_ENV).filter(|v| !v.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(paths::CONTROL_DIR),
    };
    folder.is_dir().then_some(folder)
}

/// The control folder as it was found by `cuInit`.
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// The control folder of a process that phos-runc can checkpoint; none if it is on its own.
pub fn reachable() -> Option<&'static Path> {
    FOLDER.get().map(PathBuf::as_path)
}

fn start() {
    let Some(folder) = folder() else { return };
    let folder = FOLDER.get_or_init(|| folder);
    // SAFETY: the handler only closes fds and writes atomics.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    if let Err(e) = spawn("phos-ctl", move || run(folder)) {
        crate::log!("no control thread: {e}");
    }
}

/// A thread of this library's own: it inherits a mask in which every signal is blocked, so that none of the application's
/// handlers runs in it.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<thread::JoinHandle<()>> {
    // SAFETY: the sets are initialised before use and belong to this frame.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let thread = thread::Builder::new().name(name.into()).stack_size(256 << 10).spawn(work);
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        thread
    }
}

/// The address of a socket in the file system.
pub fn address(path: &Path) -> Option<libc::sockaddr_un> {
    // SAFETY: an all-zero address is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as _;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return None;
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as _;
    }
    Some(address)
}

/// A new socket, out of the application's way.
pub fn seqpacket() -> Option<RawFd> {
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    (fd >= 0).then(|| fds::raise(fd))
}

/// Listens at a path that only root and this user can connect to.
pub fn listen(path: &Path) -> Option<RawFd> {
    let address = address(path)?;
    let name = CString::new(path.as_os_str().as_bytes()).ok()?;
    let fd = seqpacket()?;
    // SAFETY: `address` and `name` are valid for the calls; the mode keeps other users of the container away.
    let listening = unsafe {
        libc::unlink(name.as_ptr());
        libc::fchmod(fd, 0o600);
        libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) == 0
            && libc::listen(fd, 4) == 0
    };
    if !listening {
        crate::log!("cannot listen at {}: {}", path.display(), std::io::Error::last_os_error());
        fds::close(fd);
        return None;
    }
    Some(fd)
}

/// Only root on the host or the process's own user may give orders. In a user namespace the host's root is seen as
/// the overflow user.
pub fn may_command(connection: &Connection) -> bool {
    const OVERFLOW: u32 = 65534;
    // SAFETY: always succeeds.
    let own = unsafe { libc::geteuid() };
    connection.peer().is_ok_and(|p| p.uid == 0 || p.uid == own || p.uid == OVERFLOW)
}

fn greeting(parked: bool) -> Message {
    let mut driver = 0;
    // While parked the driver is not asked: its state may be away.
    if !parked {
        // SAFETY: `driver` is valid for writing.
        unsafe { (api().driver_version)(&mut driver) };
    }
    let generation = table::lock().generation;
    Message::HelloAck { version: VERSION, pid: std::process::id() as i32, parked, driver, generation }
}

/// Talks to a host while the application runs. Returns whether the process is parked now.
fn converse(connection: &Connection) -> Result<bool, Failure> {
    connection.set_timeout(Some(SILENCE))?;
    loop {
        let message = match connection.receive() {
            Ok((message, _)) => message,
            Err(TransportError::Closed) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        match message {
            // The greeting names this side's version; a host of another one says so and hangs up.
            Message::Hello { .. } => connection.send(&greeting(false), &[])?,
            Message::Query => connection.send(&Message::Summary(summary()), &[])?,
            Message::Table { since } => {
                send_table(connection, since)?;
                // A host that asks for the memory is about to make a checkpoint.
                prefault::prepare();
            }
            Message::Park { since, drain_timeout_ms, flags } => {
                let timings = park(connection, since, Duration::from_millis(drain_timeout_ms.into()), flags)?;
                // If the host does not hear this it finds out by itself; the process is parked either way.
                let _ = connection.send(&Message::Parked(timings), &[]);
                return Ok(true);
            }
            _ => return Err(Failure::Answer(failure::PROTOCOL, "unexpected message".into())),
        }
    }
}

fn report(connection: &Connection, failure: Failure) {
    match failure {
        Failure::Answer(code, text) | Failure::Parked(code, text) => {
            crate::log!("{text}");
            let _ = connection.send(&Message::Failed { code, text }, &[]);
        }
        Failure::Connection(e) => crate::log!("control connection: {e}"),
    }
}

/// Talks to a host while parked. `None`: it hung up, and the process is parked as before.
fn asleep(connection: &Connection) -> Result<Option<Timings>, Failure> {
    loop {
        match connection.receive() {
            Ok((Message::Trim, _)) => {
                let bytes = prefault::trim();
                connection.send(&Message::Trimmed { bytes }, &[])?;
            }
            Ok((Message::Attach { handles }, _)) => return attach(connection, handles).map(Some),
            Ok(_) => return Err(Failure::Answer(failure::PROTOCOL, "unexpected message".into())),
            Err(TransportError::Closed) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Knocks until the host has given everything back. It has yet to be told so.
fn wait_for_host(folder: &Path) -> Option<(Connection, Timings)> {
    let door = folder.join(paths::HOST_SOCKET);
    let address = address(&door)?;
    loop {
        thread::sleep(KNOCK);
        // CRIU may look at this process at any moment: no socket is opened before there is a door.
        if !door.exists() {
            continue;
        }
        let Some(fd) = seqpacket() else { continue };
        // SAFETY: `address` is valid for the call; the fd is owned by `connection` from here on.
        let (connected, connection) = unsafe {
            let r = libc::connect(fd, (&raw const address).cast(), size_of_val(&address) as u32);
            (r == 0, Connection::new(OwnedFd::from_raw_fd(fd)))
        };
        if !connected || !may_command(&connection) {
            continue;
        }
        CONVERSATION.store(fd, Ordering::Relaxed);
        let result = (|| {
            connection.set_timeout(Some(SILENCE))?;
            connection.send(&greeting(true), &[])?;
            asleep(&connection)
        })();
        match result {
            Ok(Some(timings)) => return Some((connection, timings)),
            Ok(None) => {}
            Err(failure) => report(&connection, failure),
        }
        CONVERSATION.store(-1, Ordering::Relaxed);
    }
}

fn run(folder: &Path) {
    // SAFETY: always succeeds.
    let pid = unsafe { libc::getpid() };
    let path = folder.join(paths::library_socket(pid));
    let mut attached: Option<(Connection, Timings)> = None;
    loop {
        let listener = listen(&path).map(Kept::new);
        *LISTENER.lock().unwrap_or_else(|e| e.into_inner()) = listener.unwrap_or(Kept::NONE);
        // Only now may the host begin another checkpoint: it must not take this for a process without the library.
        if let Some((connection, timings)) = attached.take() {
            let _ = connection.send(&Message::Attached(timings), &[]);
            CONVERSATION.store(-1, Ordering::Relaxed);
        }
        let Some(listener) = listener else { return };
        let parked = loop {
            // A program may have closed it, and use its number for something else.
            let Some(listener) = listener.get() else { break false };
            // SAFETY: a plain system call on a socket this thread owns.
            let fd = unsafe {
                libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
            };
            if fd < 0 {
                thread::sleep(KNOCK);
                continue;
            }
            let fd = fds::raise(fd);
            // SAFETY: accept4 just returned this fd, whatever its number is now.
            let connection = Connection::new(unsafe { OwnedFd::from_raw_fd(fd) });
            if !may_command(&connection) {
                continue;
            }
            CONVERSATION.store(fd, Ordering::Relaxed);
            let outcome = converse(&connection);
            CONVERSATION.store(-1, Ordering::Relaxed);
            match outcome {
                Ok(true) => break true,
                Ok(false) => {}
                Err(failure) => {
                    let parked = matches!(failure, Failure::Parked(..));
                    report(&connection, failure);
                    if parked {
                        break true;
                    }
                }
            }
            prefault::disarm();
        };
        // Nothing may be left open that the host's checkpoint of this process would stumble over.
        close_listener();
        let _ = std::fs::remove_file(&path);
        if parked {
            ipc_door::close();
            attached = wait_for_host(folder);
            ipc_door::reopen();
            prefault::disarm();
        }
    }
}
