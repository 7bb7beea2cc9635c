//! A GPU program whose end of the control socket lies: `hostile-peer MODE`, in a container, with `PHOS_CONTROL_DIR` set to
//! a folder that does not exist, so that libphos.so leaves the socket to it.

use std::ffi::{CStr, c_int, c_void};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::{env, fs, mem, thread};

use anyhow::{Context, Result, bail, ensure};
use phos_protocol::message::{Entry, Message, Summary, failure};
use phos_protocol::{Connection, VERSION, paths};

/// The driver's function of this name.
fn driver(name: &CStr) -> Result<*mut c_void> {
    // SAFETY: loading the driver as any CUDA program does; the names are NUL-terminated.
    let function = unsafe {
        let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        ensure!(!library.is_null(), "no libcuda.so.1");
        libc::dlsym(library, name.as_ptr())
    };
    ensure!(!function.is_null(), "{name:?} is missing");
    Ok(function)
}

/// Becomes a process that uses the GPU; returns the GPU's UUID.
fn use_gpu() -> Result<[u8; 16]> {
    let mut uuid = [0; 16];
    let mut context: *mut c_void = std::ptr::null_mut();
    // SAFETY: the functions have the types of cuda.h; `context` is valid for writing.
    unsafe {
        let init: extern "C" fn(u32) -> c_int = mem::transmute(driver(c"cuInit")?);
        let retain: extern "C" fn(*mut *mut c_void, c_int) -> c_int =
            mem::transmute(driver(c"cuDevicePrimaryCtxRetain")?);
        let name: extern "C" fn(*mut [u8; 16], c_int) -> c_int =
            mem::transmute(driver(c"cuDeviceGetUuid_v2")?);
        ensure!(init(0) == 0 && retain(&mut context, 0) == 0 && name(&mut uuid, 0) == 0, "no context");
    }
    Ok(uuid)
}

/// `bind` or `connect`.
type Place = unsafe extern "C" fn(RawFd, *const libc::sockaddr, u32) -> c_int;

/// A socket of this kind, bound or connected to `path`.
fn socket_at(path: &str, kind: c_int, place: Place) -> Result<OwnedFd> {
    // SAFETY: an all-zero address is valid; it is filled within its bounds before it is used. The socket is new.
    unsafe {
        let fd = OwnedFd::from_raw_fd(libc::socket(libc::AF_UNIX, kind, 0));
        let mut address: libc::sockaddr_un = mem::zeroed();
        address.sun_family = libc::AF_UNIX as _;
        for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
            *to = from as _;
        }
        let len = size_of_val(&address) as u32;
        let placed = place(fd.as_raw_fd(), (&raw const address).cast(), len) == 0;
        ensure!(placed, "{path}: {}", std::io::Error::last_os_error());
        Ok(fd)
    }
}

fn listen(path: &str, kind: c_int, backlog: c_int) -> Result<OwnedFd> {
    let socket = socket_at(path, kind, libc::bind)?;
    // SAFETY: a plain system call.
    ensure!(unsafe { libc::listen(socket.as_raw_fd(), backlog) } == 0, "cannot listen");
    Ok(socket)
}

/// Memory that the simulated driver takes for a GPU's, filled with one byte.
fn memory(bytes: usize) -> Result<File> {
    // SAFETY: memfd_create returns a new fd or -1.
    let fd = unsafe { libc::memfd_create(c"like gpu memory".as_ptr(), libc::MFD_CLOEXEC) };
    ensure!(fd >= 0);
    // SAFETY: just returned.
    let file = unsafe { File::from_raw_fd(fd) };
    file.write_all_at(&vec![0x5a; bytes], 0)?;
    Ok(file)
}

/// The other container's side of `foreign`: hands a descriptor of its memory to whoever asks, and watches the memory.
fn lend() -> Result<()> {
    let memory = memory(2 << 20)?;
    let listener = listen("/out/lend.sock", libc::SOCK_SEQPACKET, 4)?;
    fs::write("/out/ready", "")?;
    thread::spawn(move || {
        loop {
            let Ok(peer) = accept(&listener) else { return };
            let _ = peer.send(&Message::Taken, &[memory.as_raw_fd()]);
            let mut now = vec![0; 2 << 20];
            let _ = peer.receive();
            let same = memory.read_exact_at(&mut now, 0).is_ok() && now.iter().all(|b| *b == 0x5a);
            let _ = fs::write("/out/memory", if same { "same" } else { "changed" });
        }
    });
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn accept(listener: &OwnedFd) -> Result<Connection> {
    // SAFETY: accept returns a new fd or -1.
    let fd = unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    ensure!(fd >= 0);
    // SAFETY: just returned.
    Ok(Connection::new(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn entry(id: u64, size: u64) -> Entry {
    Entry { id, size, ..Entry::default() }
}

/// One conversation.
fn converse(peer: &Connection, mode: &str, gpu: [u8; 16]) -> Result<()> {
    let nothing = File::open("/dev/null")?;
    let claim = |fd: &dyn AsRawFd, size| {
        peer.send(&Message::Entries(vec![Entry { device: gpu, ..entry(1, size) }]), &[fd.as_raw_fd()])?;
        peer.send(&Message::TableEnd { generation: 1, live: 1 }, &[])
    };
    // SAFETY: memfd_create returns a new fd or -1.
    let memory = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"not gpu memory".as_ptr(), 0)) };
    loop {
        let (message, _) = peer.receive()?;
        match (mode, message) {
            ("silent", _) => thread::sleep(Duration::from_secs(3600)),
            ("garbage", _) => peer.send_bytes(&[0xff; 4096], &[])?,
            ("identity", Message::Hello { .. }) => peer.send(&ack(4242), &[])?,
            (_, Message::Hello { .. }) => peer.send(&ack(std::process::id() as i32), &[])?,
            ("flood", Message::Query) => loop {
                peer.send(&Message::Summary(Summary::default()), &[])?;
            },
            (_, Message::Query) => peer.send(&Message::Summary(Summary::default()), &[])?,
            ("size", Message::Table { .. }) => {
                peer.send(&Message::Entries(vec![entry(1, 1 << 50)]), &[nothing.as_raw_fd()])?;
            }
            ("fds", Message::Table { .. }) => {
                let fds = [nothing.as_raw_fd(), memory.as_raw_fd()];
                let entries = [1, 2].map(|id| Entry { device: gpu, ..entry(id, 2 << 20) });
                peer.send(&Message::Entries(entries.to_vec()), &fds)?;
                peer.send(&Message::TableEnd { generation: 1, live: 2 }, &[])?;
            }
            ("device", Message::Table { .. }) => {
                peer.send(&Message::Entries(vec![entry(1, 2 << 20)]), &[memory.as_raw_fd()])?;
                peer.send(&Message::TableEnd { generation: 1, live: 1 }, &[])?;
            }
            ("short", Message::Table { .. }) => claim(&self::memory(2 << 20)?, 64 << 20)?,
            ("regular", Message::Table { .. }) => claim(&File::open("/bin/busybox")?, 1 << 20)?,
            ("folder", Message::Table { .. }) => claim(&File::open("/")?, 2 << 20)?,
            ("socket", Message::Table { .. }) => claim(&UnixStream::pair()?.0, 2 << 20)?,
            ("foreign", Message::Table { .. }) => {
                let lender =
                    Connection::new(socket_at("/other/lend.sock", libc::SOCK_SEQPACKET, libc::connect)?);
                let (_, fds) = lender.receive()?;
                claim(fds.first().context("nothing was lent")?, 2 << 20)?;
                // The host has it now, and asks for more; the lender looks at its memory when this conversation is over.
                peer.receive()?;
                peer.send(&Message::Failed { code: failure::UNSUPPORTED, text: "not mine".into() }, &[])?;
            }
            ("count", Message::Table { .. }) => {
                peer.send(&Message::TableEnd { generation: 1, live: u64::MAX }, &[])?
            }
            ("endless", Message::Table { .. }) => loop {
                peer.send(&Message::Removed(Vec::new()), &[])?;
                thread::sleep(Duration::from_millis(1));
            },
            (mode, other) => bail!("{mode}: nothing to say to {other:?}"),
        }
    }
}

fn ack(pid: i32) -> Message {
    Message::HelloAck { version: VERSION, pid, parked: false, driver: 13000, generation: 0 }
}

fn main() -> Result<()> {
    let mode = env::args().nth(1).context("usage: hostile-peer MODE")?;
    if mode == "lend" {
        return lend();
    }
    let gpu = use_gpu()?;
    let path = format!("{}/{}", paths::CONTROL_DIR, paths::library_socket(std::process::id() as i32));
    let kind = if mode == "stream" { libc::SOCK_STREAM } else { libc::SOCK_SEQPACKET };
    let listener = listen(&path, kind, if mode == "full" { 0 } else { 4 })?;
    if mode == "full" {
        // Its own queue is full: whoever knocks next waits.
        let _knock = socket_at(&path, kind, libc::connect)?;
        fs::write("/out/ready", "")?;
        thread::sleep(Duration::from_secs(3600));
    }
    fs::write("/out/ready", "")?;
    loop {
        let peer = accept(&listener)?;
        // How it ends is the host's decision; the next conversation is like this one.
        let _ = converse(&peer, &mode, gpu);
    }
}
