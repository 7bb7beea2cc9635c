use std::fs::File;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::thread;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket, socketpair};

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
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let library = Library { connection: Connection::new(ours), pid: 1, own_pid: 1, parked: true, driver: 0 };
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
                let socket =
                    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_NONBLOCK, None).unwrap();
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
