//! Programs that fork, execute others, and close descriptors that are not theirs.

use std::fs;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;
use std::time::Duration;

use phos_integration::application::Application;

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

#[test]
fn a_program_that_closes_everything_is_parked_all_the_same() {
    let app = Application::start().unwrap();
    let held: Vec<_> = (1..=3u32).map(|n| (app.alloc((16 + n as usize) * MIB), n)).collect();
    held.iter().for_each(|(address, n)| app.fill(*address, *n, 1000));
    assert!(app.listens().unwrap());
    // The library closes its end of that conversation; only its listener stays.
    for _ in 0..1000 {
        if high("self").iter().filter(|n| is_socket(**n)).count() <= 1 {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
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
