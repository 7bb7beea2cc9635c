//! Images that somebody made to do harm: refused in one line, before anything large is allocated.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::tests::{manifest, write};
use super::*;

/// An image that builds on `parent`, whatever that is; returns its manifest's digest.
fn child(folder: &Path, parent: &str, digest: &str) -> String {
    fs::create_dir_all(folder).unwrap();
    let mut m = manifest(&[1]);
    m.features.push(FEATURE_PARENT.into());
    m.parent = Some(ParentEntry { path: parent.into(), digest: digest.into() });
    let table = vec![Some((phos_digest::ZERO_CHUNK, Location::Zero))];
    ImageWriter::create(folder, 0).unwrap().commit(m, table).unwrap();
    digest_of(folder)
}

fn digest_of(folder: &Path) -> String {
    writer::hex(phos_digest::digest(&fs::read(folder.join(MANIFEST)).unwrap()))
}

fn refusal(folder: &Path) -> String {
    let error = Image::open(folder).unwrap_err().to_string();
    assert!(!error.contains(char::is_control), "not one plain line: {error:?}");
    error
}

/// Changes the manifest as text.
fn rewrite(folder: &Path, change: impl Fn(&mut Manifest)) {
    let path = folder.join(MANIFEST);
    let mut m: Manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut m);
    fs::write(path, serde_json::to_vec(&m).unwrap()).unwrap();
}

#[test]
fn a_chain_has_an_end() {
    let top = tempfile::tempdir().unwrap();
    let at = |n: usize| top.path().join(n.to_string());
    fs::create_dir(at(0)).unwrap();
    write(&at(0));
    let mut digest = digest_of(&at(0));
    for n in 1..=65 {
        digest = child(&at(n), &format!("../{}", n - 1), &digest);
    }
    Image::open(&at(64)).unwrap();
    assert!(refusal(&at(65)).contains("chain of more than 64 images"));
}

#[test]
fn a_chain_that_comes_back_is_not_followed() {
    let top = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|n| top.path().join(n));
    // No digest needs to fit: a loop is found first, under whatever name it comes back.
    child(&a, "../a", "0");
    assert!(refusal(&a).contains("builds on it in turn"));
    symlink(&a, top.path().join("alias")).unwrap();
    child(&b, "../alias", &{
        fs::remove_dir_all(&a).unwrap();
        child(&a, "../b/../b", "0")
    });
    assert!(refusal(&b).contains("builds on it in turn"));
}

#[test]
fn a_parent_is_not_looked_into_unless_it_is_the_right_one() {
    let top = tempfile::tempdir().unwrap();
    let [base, c] = ["base", "child"].map(|n| top.path().join(n));
    fs::create_dir(&base).unwrap();
    fs::write(base.join(MANIFEST), "{ not even JSON").unwrap();
    child(&c, "../base", "0");
    assert!(refusal(&c).contains("is not the one it was"));
    for path in ["", "/etc", "../base\n", "../base\0"] {
        fs::remove_dir_all(&c).unwrap();
        child(&c, "../base", "0");
        rewrite(&c, |m| m.parent.as_mut().unwrap().path = path.into());
        assert!(refusal(&c).contains("the path of its parent"), "{path:?}");
    }
}

/// Puts something else in the place of a file; what it is called.
type Replacement = (&'static str, fn(&Path));

const REPLACEMENTS: [Replacement; 6] = [
    ("a link", |p| symlink("/etc/passwd", p).unwrap()),
    ("a link to the file", |p| symlink(p.with_extension("moved"), p).unwrap()),
    ("a folder", |p| fs::create_dir(p).unwrap()),
    ("a pipe", |p| nix::unistd::mkfifo(p, Mode::S_IRWXU).unwrap()),
    ("a socket", |p| drop(UnixListener::bind(p).unwrap())),
    ("a device", |p| match mknod(p, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 5)) {
        // Not root: another kind of file will do.
        Err(Errno::EPERM) => fs::create_dir(p).unwrap(),
        other => other.unwrap(),
    }),
];

#[test]
fn what_is_no_regular_file_is_not_even_opened() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    for name in [MANIFEST, INDEX, "phos-gpu-1.img"] {
        let path = folder.path().join(name);
        let moved = path.with_extension("moved");
        for (what, replace) in REPLACEMENTS {
            fs::rename(&path, &moved).unwrap();
            replace(&path);
            let watch = Watch::on(&path);
            let error = refusal(folder.path());
            assert!(
                error.contains("not a regular file") && error.contains(name),
                "{name} as {what}: {error}"
            );
            assert!(!watch.was_opened(), "{name} as {what} was opened");
            drop(watch);
            fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
            fs::rename(&moved, &path).unwrap();
        }
        let watch = Watch::on(&path);
        Image::open(folder.path()).unwrap();
        assert!(watch.was_opened(), "the watch works");
    }
}

/// Notices when a file is opened.
struct Watch(OwnedFd);

impl Watch {
    fn on(path: &Path) -> Self {
        let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: plain system calls; the name is NUL-terminated, the descriptor is new.
        unsafe {
            let fd = libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC);
            assert!(
                fd >= 0
                    && libc::inotify_add_watch(fd, name.as_ptr(), libc::IN_OPEN | libc::IN_DONT_FOLLOW) >= 0
            );
            Watch(OwnedFd::from_raw_fd(fd))
        }
    }

    fn was_opened(&self) -> bool {
        let mut buffer = [0u8; 4096];
        // SAFETY: the buffer is valid for its length.
        unsafe { libc::read(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) > 0 }
    }
}

#[test]
fn what_changes_while_it_is_read_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let image = Image::open(folder.path()).unwrap();
    let path = folder.path().join("phos-gpu-0.img");
    let good = fs::read(&path).unwrap();
    // Another file under its name changes nothing: the first one is open.
    fs::rename(&path, path.with_extension("moved")).unwrap();
    fs::write(&path, "x").unwrap();
    image.verify().unwrap();
    fs::rename(path.with_extension("moved"), &path).unwrap();
    // The file itself: shorter, then other bytes.
    File::options().write(true).open(&path).unwrap().set_len(CHUNK as u64).unwrap();
    assert!(matches!(image.verify(), Err(ImageError::Io { .. })));
    fs::write(&path, vec![1; good.len()]).unwrap();
    assert!(matches!(image.verify(), Err(ImageError::Damaged { .. })));
    fs::write(&path, good).unwrap();
    image.verify().unwrap();
}

#[test]
fn a_small_file_makes_nothing_large() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let path: PathBuf = folder.path().join(MANIFEST);
    let good = fs::read_to_string(&path).unwrap();
    let many = |item: &str, n: usize| vec![item; n].join(",");
    for (from, to, expected) in [
        ("\"features\": []", format!("\"features\": [{}]", many("\"\"", 1000)), "at most 64 items"),
        ("\"warnings\": []", format!("\"warnings\": [{}]", many("\"\"", 10_000)), "at most 4096 items"),
        (
            "\"files\": [",
            format!("\"files\": [{},", many("{\"name\":\"\",\"size\":0}", 5000)),
            "at most 4096 items",
        ),
        (
            "\"effective_spec\": {}",
            format!("\"effective_spec\": [{}]", many("0", 3 << 20)),
            "a configuration of 6291457 bytes",
        ),
        ("\"version\": 1", format!("\"version\": {}1", "[".repeat(100_000)), "damaged"),
    ] {
        assert!(good.contains(from), "{from}");
        fs::write(&path, good.replacen(from, &to, 1)).unwrap();
        let error = refusal(folder.path());
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // A file with nothing in it that says it is long.
    let file = File::create(&path).unwrap();
    file.set_len((256 << 20) + 1).unwrap();
    assert!(refusal(folder.path()).contains("it has 268435457 bytes"));
    rewrite_from(&path, &good, |m| m.files.iter_mut().for_each(|f| f.size = u64::MAX / 2));
    assert!(refusal(folder.path()).contains("data file 0 has 9223372036854775807 bytes"));
    rewrite_from(&path, &good, |m| m.gpus.push(m.gpus[0].clone()));
    assert!(refusal(folder.path()).contains("is listed twice"));
    rewrite_from(&path, &good, |m| m.digest = "x\u{1b}[2J".into());
    assert!(refusal(folder.path()).contains("unknown digest"));
}

fn rewrite_from(path: &Path, text: &str, change: impl Fn(&mut Manifest)) {
    fs::write(path, text).unwrap();
    rewrite(path.parent().unwrap(), change);
}

#[test]
fn texts_of_an_image_give_a_terminal_no_orders() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    rewrite(folder.path(), |m| {
        m.container = "c\u{1b}[2J".into();
        m.warnings.push("one\ntwo\u{7}".into());
        m.processes[0].command = "x\r".into();
    });
    let m = Image::open(folder.path()).unwrap().manifest;
    assert_eq!((m.container.as_str(), m.warnings[0].as_str()), ("c [2J", "one two "));
    assert_eq!(m.processes[0].command, "x ");
}
