//! Programs that fork, execute others, and close descriptors that are not theirs, and libraries that are preloaded beside.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use phos_engine::peer::{AttachListener, ControlDir, Library};
use phos_integration::application::Application;
use phos_integration::status;
use phos_integration::tools::built;

const MIB: usize = 1 << 20;

/// Numbers of a process's open files that are out of a program's way.
fn high(pid: &str) -> Vec<i32> {
    let all = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let numbers = all.filter_map(|e| e.file_name().to_string_lossy().parse().ok());
    numbers.filter(|n| *n > 1000).collect()
}

fn is_socket(fd: i32) -> bool {
    fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|l| l.to_string_lossy().starts_with("socket:"))
}

/// Waits until the library has closed its end of every conversation, and only its listener stays.
fn conversations_end() {
    for _ in 0..1000 {
        if high("self").iter().filter(|n| is_socket(**n)).count() <= 1 {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_program_that_closes_everything_is_parked_all_the_same() {
    let app = Application::start().unwrap();
    let held: Vec<_> = (1..=3u32).map(|n| (app.alloc((16 + n as usize) * MIB), n)).collect();
    held.iter().for_each(|(address, n)| app.fill(*address, *n, 1000));
    assert!(app.listens().unwrap());
    conversations_end();
    // As a daemon does; the numbers are used again at once. The simulated driver holds its memory by low numbers.
    let ours = high("self");
    assert!(ours.len() >= 4, "the library keeps its descriptors out of the way: {ours:?}");
    let file = fs::File::open("/dev/null").unwrap();
    for fd in &ours {
        // SAFETY: the numbers are the library's; /dev/null takes their place.
        unsafe { libc::dup2(file.as_raw_fd(), *fd) };
    }
    let parked = app.round_trip().unwrap();
    assert_eq!(parked.pieces(), 3);
    for (address, n) in &held {
        assert_eq!(app.read(*address, 1000), [*n; 1000]);
    }
    for fd in &ours {
        // SAFETY: still the numbers of this test.
        assert_eq!(unsafe { libc::close(*fd) }, 0, "the library closed a file of the program");
    }
    // After an attach the driver exports nothing again: then the checkpoint is refused with the reason.
    conversations_end();
    for fd in high("self") {
        // SAFETY: the numbers are the library's.
        unsafe { libc::close(fd) };
    }
    let blockers = app.library().unwrap().query().unwrap().blockers;
    assert!(blockers.iter().any(|b| b.contains("closed file descriptors")), "{blockers:?}");
    held.into_iter().for_each(|(address, _)| app.free(address));
    assert!(app.library().unwrap().query().unwrap().blockers.is_empty());
}

#[test]
fn children_hold_no_memory_and_no_socket() {
    let app = Application::start().unwrap();
    let address = app.alloc(4 * MIB);
    app.fill(address, 7, 1000);
    let (mut ready, mut go_on) = ([0; 2], [0; 2]);
    // SAFETY: plain system calls; the child makes only such.
    let child = unsafe {
        libc::pipe2(ready.as_mut_ptr(), libc::O_CLOEXEC);
        libc::pipe2(go_on.as_mut_ptr(), libc::O_CLOEXEC);
        let child = libc::fork();
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::close(go_on[1]);
            libc::write(ready[1], b"x".as_ptr().cast(), 1);
            libc::read(go_on[0], [0u8].as_mut_ptr().cast(), 1);
            libc::_exit(0);
        }
        libc::read(ready[0], [0u8].as_mut_ptr().cast(), 1);
        child
    };
    assert!(high("self").len() >= 2);
    assert!(high(&child.to_string()).is_empty(), "a forked child keeps the parent's memory alive");
    app.round_trip().unwrap();
    assert_eq!(app.read(address, 1000), [7; 1000]);
    // SAFETY: as above.
    unsafe {
        libc::write(go_on[1], b"x".as_ptr().cast(), 1);
        libc::waitpid(child, &mut 0, 0);
    }
    let output = Command::new("ls").arg("-l").arg("/proc/self/fd").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("simgpu") && !text.contains("socket"), "{text}");
    app.free(address);
}

/// The sample program with libraries loaded in front of everything, parked and attached while it runs.
fn beside(preload: &str, by_preload: bool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (own, driver) = (built("libphos.so")?, built("libsimcuda.so")?);
    let (control, status_file) = (folder.path().join("control"), folder.path().join("status"));
    fs::create_dir(&control)?;
    // Either the library is what the program finds as its driver, or it is preloaded behind its neighbour.
    let (found, preload) = match by_preload {
        true => (&driver, format!("{preload}:{}", own.display())),
        false => (&own, preload.to_string()),
    };
    symlink(found, folder.path().join("libcuda.so.1"))?;
    let mut program = Command::new(built("phos-sample")?)
        .args(["--mib", "16", "--stop-file"])
        .arg(folder.path().join("stop"))
        .arg("--out")
        .arg(&status_file)
        .env("LD_LIBRARY_PATH", folder.path())
        .env("LD_PRELOAD", &preload)
        .env("PHOS_REAL_LIBCUDA", &driver)
        .env("PHOS_CONTROL_DIR", &control)
        // What the driver keeps for ever is no business of this test.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .spawn()?;
    let run = || -> Result<()> {
        let pid = program.id() as i32;
        let limit = Duration::from_secs(60);
        status::check(&status::wait_for(&status_file, 3, limit)?)?;
        let control = ControlDir::open(&control)?;
        let library = Library::connect(&control, pid, pid)?.context("the library listens")?;
        let update = library.park(0, limit, 0)?;
        library.taken(Duration::from_secs(10))?;
        ensure!(!update.added.is_empty(), "nothing was parked");
        let listener = AttachListener::bind(&control)?;
        let library = listener.accept(&[(pid, pid)], Instant::now() + limit)?;
        let entries: Vec<_> = update.added.iter().map(|(e, fd)| (*e, fd.as_raw_fd())).collect();
        library.attach(&entries, Duration::from_secs(10))?;
        status::check(&status::wait_for(&status_file, 3, limit)?)
    };
    let result = run();
    fs::write(folder.path().join("stop"), "")?;
    let ended = program.wait()?;
    result.with_context(|| format!("beside {preload}"))?;
    ensure!(ended.success(), "beside {preload}: {ended}");
    Ok(())
}

#[test]
fn allocators_and_sanitizers_that_are_preloaded_do_no_harm() {
    let asan = Command::new("cc").arg("-print-file-name=libasan.so").output().unwrap();
    let asan = String::from_utf8(asan.stdout).unwrap().trim().to_string();
    let jemalloc = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2";
    for neighbour in [asan.as_str(), jemalloc] {
        assert!(Path::new(neighbour).exists(), "{neighbour} is missing: run integration/scripts/setup.sh");
        for by_preload in [false, true] {
            beside(neighbour, by_preload).unwrap();
        }
    }
}
