//! A dump as CRIU makes it, without CRIU.

use std::thread;

use super::*;

const PAGE: usize = 4096;

/// CRIU's side, in its shorter layout.
struct Criu(UnixStream);

impl Criu {
    fn message(&mut self, command: u32, pages: u32, address: u64, id: u64) {
        let parts =
            [&command.to_le_bytes()[..], &pages.to_le_bytes(), &address.to_le_bytes(), &id.to_le_bytes()];
        self.0.write_all(&parts.concat()).unwrap();
    }

    fn open(&mut self, id: u64) {
        self.message(4, 0, 0, id);
        let mut answer = [7];
        self.0.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [0]);
    }

    fn add(&mut self, address: u64, content: &[u8], id: u64) {
        self.message(6 | 4 << 16, (content.len() / PAGE) as u32, address, id);
        self.0.write_all(content).unwrap();
    }

    fn close(mut self) -> i32 {
        self.message(0x1024, 0, 0, 0);
        let mut answer = [7; 4];
        self.0.read_exact(&mut answer).unwrap();
        i32::from_le_bytes(answer)
    }
}

fn content(pages: usize, seed: u8) -> Vec<u8> {
    (0..pages * PAGE).map(|i| (i / PAGE) as u8 ^ (i % 251) as u8 ^ seed).collect()
}

/// A receiver with `ready` bytes of room for process 7, and CRIU's side of it.
fn start(folder: &Path, ready: u64, copiers: usize) -> (Server, Criu) {
    let mut receiver = Receiver::prepare(Socket::pair().unwrap(), folder, &[], |_| false, 0).unwrap();
    assert!(receiver.socket.far.as_raw_fd() >= FIRST_NUMBER);
    assert!(receiver.criu_options().contains(&format!("ps-socket {}\n", receiver.socket.far.as_raw_fd())));
    if ready > 0 {
        receiver.ready.push((7, PageFile::reserve(folder, ready).unwrap()));
    }
    receiver.copiers = Copiers::with(copiers).unwrap();
    let (server, far) = receiver.split();
    (server, Criu(far.into()))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = entries.collect();
    names.sort();
    names
}

#[test]
fn pages_arrive_whether_room_was_made_or_not() {
    for (ready, copiers) in [(0, 3), (2 << 20, 0), (2 << 20, 3), (64 << 20, 0), (64 << 20, 1), (64 << 20, 3)]
    {
        let folder = tempfile::tempdir().unwrap();
        let (server, mut criu) = start(folder.path(), ready, copiers);
        let serving = thread::spawn(move || server.serve());
        let (first, second, shared) = (content(1000, 1), content(300, 2), content(5, 3));
        criu.open(7 << 8 | 1);
        criu.add(0x1000, &first, 7 << 8 | 1);
        criu.add(0x7f00_0000_0000, &second, 7 << 8 | 1);
        criu.open(99 << 8 | 2);
        criu.add(0, &shared, 99 << 8 | 2);
        assert_eq!(criu.close(), 0);
        let received = serving.join().unwrap().unwrap();
        let bytes = 1305 * PAGE as u64;
        let prepared = ready.min(1300 * PAGE as u64);
        assert_eq!((received.complete, received.bytes, received.ready), (true, bytes, prepared));
        received.trim().unwrap();
        let expected = ["pagemap-7.img", "pagemap-shmem-99.img", "pages-1.img", "pages-2.img"];
        assert_eq!(names(folder.path()), expected);
        let read = |name| fs::read(folder.path().join(name)).unwrap();
        assert!(read("pages-1.img") == [first, second].concat());
        assert!(read("pages-2.img") == shared);
        let mut map = PageMap::new(1);
        map.add(Run { address: 0x1000, pages: 1000, flags: 4 });
        map.add(Run { address: 0x7f00_0000_0000, pages: 300, flags: 4 });
        assert_eq!(read("pagemap-7.img"), map.bytes());
    }
}

#[test]
fn criu_is_told_in_the_end_what_could_not_be_saved() {
    let folder = tempfile::tempdir().unwrap();
    // In the way of the second file.
    fs::create_dir(folder.path().join("pages-2.img")).unwrap();
    let (server, mut criu) = start(folder.path(), 0, 2);
    let serving = thread::spawn(move || server.serve());
    for id in [7, 8] {
        criu.open(id << 8 | 1);
        criu.add(0x1000, &content(2000, 1), id << 8 | 1);
    }
    assert_eq!(criu.close(), -1);
    assert!(
        matches!(serving.join().unwrap(), Err(PagesError::Io(e)) if e.kind() == io::ErrorKind::AlreadyExists)
    );
}

#[test]
fn criu_is_told_what_the_helpers_could_not_copy() {
    for copiers in [0, 1, 3] {
        let folder = tempfile::tempdir().unwrap();
        let (server, mut criu) = start(folder.path(), 8 << 20, copiers);
        // As on a file system that has lost its room.
        server.ready[0].1.set_length(1 << 20).unwrap();
        let serving = thread::spawn(move || server.serve());
        criu.open(7 << 8 | 1);
        criu.add(0x1000, &content(1500, 1), 7 << 8 | 1);
        assert_eq!(criu.close(), -1);
        let failed = serving.join().unwrap();
        assert!(matches!(failed, Err(PagesError::Io(e)) if e.raw_os_error() == Some(libc::EFAULT)));
    }
}

#[test]
fn a_criu_that_ends_in_the_middle_leaves_nothing_complete() {
    let folder = tempfile::tempdir().unwrap();
    let (server, mut criu) = start(folder.path(), 2 << 20, 2);
    let serving = thread::spawn(move || server.serve());
    criu.open(7 << 8 | 1);
    criu.message(6 | 4 << 16, 100, 0x1000, 7 << 8 | 1);
    criu.0.write_all(&content(50, 1)).unwrap();
    drop(criu);
    assert!(!serving.join().unwrap().unwrap().complete);
    assert_eq!(names(folder.path()), ["pages-1.img"]);
}

#[test]
fn only_a_runtime_that_passes_descriptors_on_is_asked() {
    let command = |words: &[&str]| CommandLine::new(words.iter().map(Into::into));
    let plain = command(&["/usr/sbin/runc", "checkpoint", "--image-path", "/i", "c"]);
    assert!(is_possible("runc version 1.1.5", &plain));
    assert!(!is_possible("crun version 1.8", &plain));
    for more in
        ["--page-server", "--page-server=1:2", "--lazy-pages", "--parent-path", "--pre-dump", "--auto-dedup"]
    {
        assert!(
            !is_possible("runc version 1.1.5", &command(&["/usr/sbin/runc", "checkpoint", more, "c"])),
            "{more}"
        );
    }
}

#[test]
fn the_memory_that_criu_writes_is_counted() {
    assert_eq!(private_bytes("Name:\tx\nRssAnon:\t  12 kB\nRssFile:\t 99 kB\nRssShmem:\t 4 kB\n"), 16 << 10);
    assert_eq!(private_bytes("Name:\tkthread\n"), 0);
    assert!(available() > 0);
}
