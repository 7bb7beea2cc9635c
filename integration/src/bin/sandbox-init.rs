//! The first process of a sandbox: runs a command, reaps every orphan, ends when the command ends.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::wait::{WaitStatus, wait};

fn main() {
    let mut words = std::env::args_os().skip(1);
    let Some(program) = words.next() else {
        eprintln!("usage: sandbox-init PROGRAM [ARGUMENT...]");
        std::process::exit(2);
    };
    let child = match Command::new(&program).args(words).process_group(0).spawn() {
        Ok(child) => child.id() as i32,
        Err(e) => {
            eprintln!("sandbox-init: {}: {e}", program.display());
            std::process::exit(127);
        }
    };
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() == child => std::process::exit(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() == child => {
                std::process::exit(128 + signal as i32)
            }
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => std::process::exit(1),
        }
    }
}
