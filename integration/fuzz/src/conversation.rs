//! What processes say to each other: the library in a container to the host, the worker to the keeper.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use phos_engine::keeper::wire::{Packet, Wire};
use phos_engine::peer::{AttachListener, ControlDir, Library};
use phos_protocol::message::{Entry, Message, Summary, Timings};
use phos_protocol::{Connection, VERSION, paths};

/// One packet of the control protocol.
pub fn message(data: &[u8]) {
    let Ok(message) = Message::decode(data) else { return };
    let bytes = message.encode();
    // Only texts for people are cut; then the second time nothing is.
    let again = Message::decode(&bytes).expect("what was written can be read");
    assert_eq!(again.encode(), bytes);
    assert!(bytes.len() <= data.len().max(phos_protocol::MAX_PACKET));
}

fn pair() -> (Connection, Connection) {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for two; both are new and owned by nobody else.
    unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()), 0);
        (Connection::new(OwnedFd::from_raw_fd(fds[0])), Connection::new(OwnedFd::from_raw_fd(fds[1])))
    }
}

/// What a keeper receives.
pub fn keeper(data: &[u8]) {
    let (ours, theirs) = pair();
    let (sender, receiver) = (Wire(ours), Wire(theirs));
    let data = &data[..data.len().min(phos_protocol::MAX_PACKET)];
    if data.is_empty() || sender.0.send_bytes(data, &[]).is_err() {
        return;
    }
    let Ok((packet, fds)) = receiver.receive() else { return };
    assert!(fds.is_empty());
    match &packet {
        Packet::Hold(_, held) => {
            let _ = held.iter().map(Entry::from).count();
        }
        Packet::Finished(outcome) => {
            sender.finish(outcome.clone()).expect("the end of a job can always be told");
            assert!(matches!(receiver.receive(), Ok((Packet::Finished(_), _))));
        }
        _ => {}
    }
    // What was understood can be said again.
    let text = serde_json::to_vec(&packet).expect("JSON");
    if text.len() <= phos_protocol::MAX_PACKET {
        sender.send(&packet, &[]).expect("sent");
        assert_eq!(receiver.receive().expect("received").0, packet);
    }
}

/// A file descriptor of some kind.
fn fd(u: &mut Unstructured<'_>) -> Result<OwnedFd> {
    Ok(match u.int_in_range(0..=4)? {
        0 => File::open("/dev/null").expect("opened").into(),
        1 => File::open("/").expect("opened").into(),
        2 => UnixStream::pair().expect("a pair").0.into(),
        // SAFETY: memfd_create and pipe return new fds; the test is over if they do not.
        3 => unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"m".as_ptr(), libc::MFD_CLOEXEC)) },
        _ => std::io::pipe().expect("a pipe").0.into(),
    })
}

fn entry(u: &mut Unstructured<'_>) -> Result<Entry> {
    let size = if u.ratio(3, 4)? { u.int_in_range(1..=64)? << 18 } else { u.arbitrary()? };
    let id = if u.ratio(3, 4)? { u.int_in_range(0..=300)? } else { u.arbitrary()? };
    Ok(Entry { id, size, class: u.arbitrary()?, ..Entry::default() })
}

/// What a hostile library sends next.
fn packet(u: &mut Unstructured<'_>, pid: i32) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let ack = |pid, version| Message::HelloAck { version, pid, parked: false, driver: 13000, generation: 0 };
    let (message, honest) = match u.int_in_range(0..=11)? {
        0..=2 => (ack(pid, VERSION), 0),
        3 => (ack(u.arbitrary()?, u.arbitrary()?), 0),
        4 => (Message::Summary(Summary { blockers: vec![u.arbitrary::<&str>()?.into()], ..Summary::default() }), 0),
        5 | 6 => {
            let entries = (0..u.int_in_range(0..=6)?).map(|_| entry(u)).collect::<Result<Vec<_>>>()?;
            let count = entries.len();
            (Message::Entries(entries), count)
        }
        7 => (Message::Removed((0..u.int_in_range(0..=6)?).map(|_| u.arbitrary()).collect::<Result<_>>()?), 0),
        8 => (Message::TableEnd { generation: u.arbitrary()?, live: u.int_in_range(0..=8)? }, 0),
        9 => (Message::Parked(Timings::default()), 0),
        10 => (Message::Failed { code: u.int_in_range(0..=7)?, text: u.arbitrary::<&str>()?.into() }, 0),
        _ => (Message::Attached(Timings::default()), 0),
    };
    let mut bytes = message.encode();
    for _ in 0..u.int_in_range(0..=3)?.max(1) - 1 {
        let at = u.choose_index(bytes.len())?;
        bytes[at] = u.arbitrary()?;
    }
    let count = if u.ratio(7, 8)? { honest } else { u.int_in_range(0..=9)? };
    Ok((bytes, (0..count).map(|_| fd(u)).collect::<Result<_>>()?))
}

fn script(data: &[u8], pid: i32) -> (u8, Vec<(Vec<u8>, Vec<OwnedFd>)>) {
    let mut u = Unstructured::new(data);
    let what = u.int_in_range(0..=3).unwrap_or(0);
    let mut packets = Vec::new();
    while packets.len() < 24 && !u.is_empty() {
        match packet(&mut u, pid) {
            Ok(packet) => packets.push(packet),
            Err(_) => break,
        }
    }
    (what, packets)
}

/// Says everything at once, then nothing more.
fn recite(socket: OwnedFd, packets: &[(Vec<u8>, Vec<OwnedFd>)]) -> OwnedFd {
    let fd = socket.as_raw_fd();
    let peer = Connection::new(socket);
    let _ = peer.set_timeout(Some(Duration::from_secs(1)));
    for (bytes, fds) in packets {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        if peer.send_bytes(bytes, &raw).is_err() {
            break;
        }
    }
    // SAFETY: the descriptor is open; it is duplicated so that it outlives this function and the host can still write.
    unsafe {
        libc::shutdown(fd, libc::SHUT_WR);
        OwnedFd::from_raw_fd(libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0))
    }
}

fn socket_at(path: &Path, call: unsafe extern "C" fn(RawFd, *const libc::sockaddr, u32) -> i32) -> Option<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: an all-zero address is valid; it is filled within its bounds before it is used.
    unsafe {
        let fd = OwnedFd::from_raw_fd(libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0));
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::AF_UNIX as _;
        for (to, from) in address.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
            *to = *from as _;
        }
        (call(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) == 0).then_some(fd)
    }
}

struct Place {
    folder: tempfile::TempDir,
    control: ControlDir,
    listener: OwnedFd,
}

fn place(pid: i32) -> Place {
    let folder = tempfile::tempdir().expect("a folder");
    let listener = socket_at(&folder.path().join(paths::library_socket(pid)), libc::bind).expect("bound");
    // SAFETY: a plain system call.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 4) }, 0);
    let control = ControlDir::open(folder.path()).expect("opened");
    Place { folder, control, listener }
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// A conversation: what the host does, then what the other side says, whatever it was asked.
pub fn peer(data: &[u8]) {
    thread_local! {
        static PLACE: RefCell<Option<Place>> = const { RefCell::new(None) };
    }
    let pid = std::process::id() as i32;
    PLACE.with_borrow_mut(|slot| {
        let place = slot.get_or_insert_with(|| place(pid));
        let before = open_files();
        let (what, packets) = script(data, pid);
        let begin = Instant::now();
        let result = if what == 3 { attach(place, pid, &packets) } else { ask(place, pid, what, &packets) };
        drop(packets);
        if let Err(e) = result {
            let line = e.to_string();
            assert!(!line.contains(|c: char| c.is_control()), "not one plain line: {line:?}");
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        // Other threads of a test program open files too.
        assert!(!cfg!(fuzzing) || open_files() == before, "a descriptor is left");
    });
}

type Told<T> = std::result::Result<T, phos_engine::peer::PeerError>;

fn ask(place: &Place, pid: i32, what: u8, packets: &[(Vec<u8>, Vec<OwnedFd>)]) -> Told<()> {
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            // SAFETY: accept returns a new fd or -1; the host always connects first.
            let fd = unsafe { libc::accept(place.listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
            assert!(fd >= 0);
            // SAFETY: just returned.
            recite(unsafe { OwnedFd::from_raw_fd(fd) }, packets)
        });
        let told = (|| {
            let Some(library) = Library::connect(&place.control, pid, pid)? else { return Ok(()) };
            library.query()?;
            let update = match what {
                0 => return Ok(()),
                1 => library.table(0)?,
                _ => library.park(0, Duration::ZERO, 0)?,
            };
            assert!(update.added.iter().all(|(e, _)| e.size > 0 && e.size <= 1 << 46));
            if what == 2 {
                library.taken()?;
            }
            Ok(())
        })();
        let _ = other.join();
        told
    })
}

fn attach(place: &Place, pid: i32, packets: &[(Vec<u8>, Vec<OwnedFd>)]) -> Told<()> {
    let listener = AttachListener::bind(&place.control)?;
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            let door = socket_at(&place.folder.path().join(paths::HOST_SOCKET), libc::connect).expect("connected");
            recite(door, packets)
        });
        let told = (|| {
            let library = listener.accept(&[(pid, pid)], Instant::now() + Duration::from_secs(2))?;
            let file = File::open("/dev/null").expect("opened");
            library.attach(&[(Entry::default(), file.as_raw_fd())])?;
            Ok(())
        })();
        let _ = other.join();
        told
    })
}
