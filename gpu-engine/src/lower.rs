//! Running the lower runtime.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgid};
use thiserror::Error;

use crate::job::CommandLine;
use crate::processes;
use crate::service::LowerOutput;
use crate::started::Started;

/// Most bytes of each output stream that are kept for the person who asked.
const OUTPUT_LIMIT: u64 = 64 * 1024;

/// How often there is a look at what the lower runtime does.
const LOOK: Duration = Duration::from_millis(250);

/// Why the lower runtime gave no result.
#[derive(Debug, Error)]
pub enum LowerError {
    /// It could not be started.
    #[error("cannot run {program}: {source}")]
    Start {
        /// Its path.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It did not end in time and was killed with everything it had started.
    #[error("{program} did not finish within {seconds} s and was ended")]
    Timeout {
        /// Its path.
        program: String,
        /// The limit.
        seconds: u64,
    },
}

fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut kept = Vec::new();
        let _ = (&mut from).take(OUTPUT_LIMIT).read_to_end(&mut kept);
        // What is beyond the limit is read too, so that the writer is never stopped by a full pipe.
        let _ = io::copy(&mut from, &mut io::sink());
        kept
    })
}

/// A path as `mountinfo` has it: blanks and the like are octal there.
fn unescaped(text: &str) -> PathBuf {
    let mut parts = text.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at_checked(3).unwrap_or((part, ""));
        bytes.extend(u8::from_str_radix(code, 8));
        bytes.extend(rest.as_bytes());
    }
    OsString::from_vec(bytes).into()
}

/// The mounts below `folder`, the last one first.
fn mounts_below(folder: &Path, mountinfo: &str) -> Vec<PathBuf> {
    let points = mountinfo.lines().filter_map(|l| l.split(' ').nth(4));
    // There are no links in there. Without a folder, nothing is below it.
    let folder = &fs::canonicalize(folder).unwrap_or(folder.into());
    let below =
        points.map(unescaped).filter(|p| folder.is_absolute() && p != folder && p.starts_with(folder));
    let mut below: Vec<_> = below.collect();
    below.reverse();
    below
}

/// Unmounts what a killed lower runtime or CRIU has left mounted in its own folder of a container. runc binds the container's
/// root file system there for a restore, and its `delete` removes the folder with all that is in it: the root file system's
/// files would go with it. CRIU mounts the host's cgroups: each that is empty would go.
pub fn release(folder: &Path) {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for point in mounts_below(folder, &mountinfo) {
        if let Err(e) = umount2(&point, MntFlags::MNT_DETACH) {
            tracing::error!(mount = %point.display(), error = %e, "left mounted");
        }
    }
}

/// Removes a folder with all that is in it, but nothing of what was mounted there. A folder that a mount cannot be taken out of
/// stays.
pub fn remove_folder(folder: &Path) {
    release(folder);
    if !is_mounted(folder) {
        let _ = fs::remove_dir_all(folder);
    }
}

/// Whether the lower runtime has something mounted in its folder of a container.
pub fn is_mounted(folder: &Path) -> bool {
    !mounts_below(folder, &fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()).is_empty()
}

/// Waits for what an ended child has left of its process group, as far as it is this process's to wait for (which it is for a
/// child subreaper); from `deadline` on it is ended.
fn end_group(group: i32, deadline: Instant) {
    loop {
        if Instant::now() >= deadline {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        match waitpid(Pid::from_raw(-group), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => thread::sleep(Duration::from_millis(1)),
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

/// What has come from an ended process of a child's process group to this process, a child subreaper.
fn orphans(group: i32) -> Vec<i32> {
    let mut found = processes::children(std::process::id() as i32);
    found.retain(|pid| *pid != group && getpgid(Some(Pid::from_raw(*pid))) == Ok(Pid::from_raw(group)));
    found
}

/// What a command gets besides its words.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extra<'a> {
    /// A variable of its environment.
    pub variable: Option<(&'a OsStr, &'a OsStr)>,
    /// Descriptors that it inherits, under the numbers they have here.
    pub descriptors: &'a [BorrowedFd<'a>],
}

/// Has `command` inherit a descriptor, under the number it has here. It must be open until the command is started, which fails
/// otherwise.
pub fn inherit(command: &mut Command, descriptor: BorrowedFd<'_>) {
    let number = descriptor.as_raw_fd();
    // SAFETY: between fork and exec only `fcntl` is called, which may be.
    unsafe {
        command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
}

/// Runs a command to its end, in a process group of its own.
pub fn run(command: &CommandLine, limit: Duration) -> Result<LowerOutput, LowerError> {
    run_with(command, limit, Extra::default())
}

/// The same, with something extra.
pub fn run_with(command: &CommandLine, limit: Duration, extra: Extra<'_>) -> Result<LowerOutput, LowerError> {
    let program = command.program();
    let name = program.to_string_lossy().into_owned();
    let mut lower = Command::new(&program);
    lower
        .args(command.args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    lower.envs(extra.variable);
    extra.descriptors.iter().for_each(|d| inherit(&mut lower, *d));
    let mut child = lower.spawn().map_err(|source| LowerError::Start { program: name.clone(), source })?;
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_micros(200);
    let group = child.id() as i32;
    let (mut started, mut looked) = (Started::nothing(), Instant::now());
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => {}
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                end_group(group, Instant::now());
                return Err(LowerError::Timeout { program: name, seconds: limit.as_secs() });
            }
            Err(source) => return Err(LowerError::Start { program: name, source }),
        }
        if looked.elapsed() > LOOK {
            looked = Instant::now();
            if started.look(group) {
                // It waits for a CRIU that was killed. Without what that has left it notices, and fails.
                orphans(group).into_iter().for_each(|pid| started.note(pid));
                started.end();
            }
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    };
    if !status.success() {
        // It may have been killed and CRIU not: nobody may touch the processes while that is at work.
        end_group(group, deadline);
    }
    let output =
        |thread: Option<thread::JoinHandle<Vec<u8>>>| thread.and_then(|t| t.join().ok()).unwrap_or_default();
    let status = std::os::unix::process::ExitStatusExt::signal(&status)
        .map_or_else(|| status.code().unwrap_or(255), |signal| 128 + signal);
    Ok(LowerOutput { status, stdout: output(stdout), stderr: output(stderr) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> CommandLine {
        CommandLine::new(["/bin/sh".into(), "-c".into(), script.into()])
    }

    #[test]
    fn output_and_status_come_back() {
        let out = run(&sh("echo a; echo b >&2; exit 3"), Duration::from_secs(10)).unwrap();
        assert_eq!(out, LowerOutput { status: 3, stdout: b"a\n".to_vec(), stderr: b"b\n".to_vec() });
        assert_eq!(run(&sh("kill -9 $$"), Duration::from_secs(10)).unwrap().status, 137);
    }

    #[test]
    fn only_mounts_inside_the_folder_are_found_and_the_last_comes_first() {
        let mountinfo = "1 0 8:1 / / rw - ext4 a rw\n2 1 8:1 /x /run/runc/c rw - ext4 a rw\n\
                         3 1 8:1 /r /run/runc/c/criu-root rw - ext4 a rw\n4 3 0:9 / /run/runc/c/criu-root/dev rw - tmpfs t rw\n\
                         5 1 8:1 /r /run/runc/cc/criu-root rw - ext4 a rw\n\
                         6 1 8:1 /r /run/runc/a\\040b\\134/x rw - ext4 a rw\n";
        let below = mounts_below(Path::new("/run/runc/c"), mountinfo);
        assert_eq!(below, ["/run/runc/c/criu-root/dev", "/run/runc/c/criu-root"].map(PathBuf::from));
        assert_eq!(
            mounts_below(Path::new("/run/runc/a b\\"), mountinfo),
            [PathBuf::from("/run/runc/a b\\/x")]
        );
    }

    #[test]
    fn what_hangs_is_ended_and_what_floods_is_cut() {
        let begin = Instant::now();
        let hung = run(&sh("sleep 60"), Duration::from_millis(50));
        assert!(matches!(hung, Err(LowerError::Timeout { .. })));
        assert!(begin.elapsed() < Duration::from_secs(30));
        let out = run(&sh("head -c 1000000 /dev/zero"), Duration::from_secs(30)).unwrap();
        assert_eq!(out.stdout.len() as u64, OUTPUT_LIMIT);
    }
}
