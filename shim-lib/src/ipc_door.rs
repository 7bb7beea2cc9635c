//! Where the libraries of one container give each other memory that their processes share by CUDA IPC.
//!
//! A thread listens at `<control folder>/<pid>.ipc` from the first handle that was given out until the process is parked, and
//! again afterwards. One packet is asked: magic, identity of the process, id of the allocation. The answer is its size and
//! its device's UUID, with the fd beside it, or an empty one.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use phos_protocol::{Connection, TransportError, paths};

use crate::control::{address, listen, may_command, reachable, seqpacket, spawn};
use crate::cuda::{INVALID_HANDLE, Status};
use crate::fds::{self, Kept};
use crate::ipc::{Name, forget_after_fork, identity};
use crate::table;

/// The first bytes of a question.
const MAGIC: &[u8; 8] = b"PHOSASK1";
/// Longest wait for the other side in one exchange.
const SILENCE: Duration = Duration::from_secs(5);
/// How long a process that lives may keep its door closed: it is about to be attached again.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often its door is tried.
const KNOCK: Duration = Duration::from_millis(1);

/// Memory that another process gave.
pub struct Given {
    /// Keeps it alive.
    pub fd: OwnedFd,
    /// Bytes.
    pub size: u64,
    /// UUID of its device.
    pub uuid: [u8; 16],
}

struct Door {
    listener: Kept,
    thread: JoinHandle<()>,
}

static DOOR: Mutex<Option<Door>> = Mutex::new(None);
/// Something was given out: the door is opened again after an attach.
static WANTED: AtomicBool = AtomicBool::new(false);

/// Opens the door, if it is not. Whether it is now.
pub fn open() -> bool {
    let Some(folder) = reachable() else { return false };
    WANTED.store(true, Ordering::Relaxed);
    let mut door = DOOR.lock().unwrap_or_else(PoisonError::into_inner);
    if door.as_ref().is_some_and(|d| !d.thread.is_finished()) {
        return true;
    }
    let path = folder.join(paths::sharing_socket(std::process::id() as i32));
    let Some(listener) = listen(&path).map(Kept::new) else { return false };
    match spawn("phos-ipc", move || serve(listener)) {
        Ok(thread) => *door = Some(Door { listener, thread }),
        Err(_) => {
            let mut listener = listener;
            listener.close();
            return false;
        }
    }
    true
}

/// Closes the door and waits for its thread: nothing of it is left for whoever looks at the process next.
pub fn close() {
    let door = DOOR.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(mut door) = door else { return };
    if let Some(fd) = door.listener.get() {
        // SAFETY: a plain system call; it ends the thread's wait.
        unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
    }
    let _ = door.thread.join();
    door.listener.close();
    if let Some(folder) = reachable() {
        let _ = std::fs::remove_file(folder.join(paths::sharing_socket(std::process::id() as i32)));
    }
}

/// Opens it again after an attach, if it was open.
pub fn reopen() {
    if WANTED.load(Ordering::Relaxed) {
        open();
    }
}

/// In a child after `fork`, which has neither the thread nor a use for the socket.
pub fn close_after_fork() {
    WANTED.store(false, Ordering::Relaxed);
    if let Ok(mut door) = DOOR.try_lock()
        && let Some(mut door) = door.take()
    {
        door.listener.close();
        // There is no such thread here that could be detached.
        std::mem::forget(door.thread);
    }
    forget_after_fork();
}

fn serve(listener: Kept) {
    // A program may have closed it, and use its number for something else.
    while let Some(fd) = listener.get() {
        // SAFETY: a plain system call on a socket of this library.
        let fd = unsafe { libc::accept4(fd, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
        if fd < 0 {
            match std::io::Error::last_os_error().raw_os_error() {
                // The door was closed.
                Some(libc::EINVAL | libc::EBADF | libc::ENOTSOCK) => return,
                _ => thread::sleep(KNOCK),
            }
            continue;
        }
        // SAFETY: accept4 just returned this fd, whatever its number is now.
        let connection = Connection::new(unsafe { OwnedFd::from_raw_fd(fds::raise(fd)) });
        if may_command(&connection)
            && let Err(e) = answer(&connection)
        {
            crate::log!("giving memory: {e}");
        }
    }
}

fn answer(connection: &Connection) -> Result<(), TransportError> {
    connection.set_timeout(Some(SILENCE))?;
    let (question, _) = connection.receive_bytes()?;
    match asked(&question).and_then(give) {
        Some(Given { fd, size, uuid }) => {
            let text = [size.to_le_bytes().as_slice(), &uuid].concat();
            connection.send_bytes(&text, &[fd.as_raw_fd()])
        }
        None => connection.send_bytes(b"none", &[]),
    }
}

/// The allocation that is asked for, if the question is meant for this process.
fn asked(question: &[u8]) -> Option<u64> {
    let (magic, rest) = question.split_first_chunk::<8>()?;
    let (who, rest) = rest.split_first_chunk::<8>()?;
    let id = rest.try_into().ok()?;
    (magic == MAGIC && u64::from_le_bytes(*who) == identity()).then(|| u64::from_le_bytes(id))
}

/// Only what the application has given a handle of.
fn give(id: u64) -> Option<Given> {
    let table = table::lock();
    let physical = table.physical.get(&id).filter(|p| p.shared)?;
    let fd = physical.fd.get()?;
    // SAFETY: a copy of an fd this library owns; the copy is owned by what is returned.
    let copy = unsafe {
        let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, fd);
        (copy >= 0).then(|| OwnedFd::from_raw_fd(copy))
    };
    Some(Given { fd: copy?, size: physical.size, uuid: physical.uuid })
}

/// Asks another process of the container for memory.
pub fn ask(name: &Name) -> Result<Given, Status> {
    let folder = reachable().ok_or(INVALID_HANDLE)?;
    let connection = knock(folder, name.pid).ok_or(INVALID_HANDLE)?;
    let exchange = || {
        connection.set_timeout(Some(SILENCE))?;
        let words = [name.identity.to_le_bytes(), name.id.to_le_bytes()];
        connection.send_bytes(&[MAGIC.as_slice(), words.as_flattened()].concat(), &[])?;
        connection.receive_bytes()
    };
    let (text, fds) = exchange().map_err(|e| {
        crate::log!("asking process {} for memory: {e}", name.pid);
        INVALID_HANDLE
    })?;
    let given = || {
        let (size, uuid) = text.split_first_chunk::<8>()?;
        let [fd] = <[OwnedFd; 1]>::try_from(fds).ok()?;
        Some(Given { fd, size: u64::from_le_bytes(*size), uuid: uuid.try_into().ok()? })
    };
    given().ok_or(INVALID_HANDLE)
}

/// Connects to the door of a process. A process that is parked opens it again soon; one that has ended never does.
fn knock(folder: &Path, pid: i32) -> Option<Connection> {
    let address = address(&folder.join(paths::sharing_socket(pid)))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let fd = seqpacket()?;
        // SAFETY: `address` is valid for the call; the fd is owned by the connection from here on.
        let (connected, connection) = unsafe {
            let r = libc::connect(fd, (&raw const address).cast(), size_of_val(&address) as u32);
            (r == 0, Connection::new(OwnedFd::from_raw_fd(fd)))
        };
        if connected {
            return Some(connection);
        }
        // SAFETY: signal 0 only asks whether the process is there.
        let gone = unsafe { libc::kill(pid, 0) } < 0
            && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
        if gone || Instant::now() > deadline {
            return None;
        }
        drop(connection);
        thread::sleep(KNOCK);
    }
}
