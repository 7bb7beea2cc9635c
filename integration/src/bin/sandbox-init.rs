//! The first process of a sandbox: runs a command, reaps every orphan, ends when the command ends. With `--root FOLDER`
//! that folder is everyone's root file system first.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::wait::{WaitStatus, wait};
use phos_integration::root;

fn main() {
    let mut words = std::env::args_os().skip(1);
    let mut program = words.next();
    if program.as_deref().is_some_and(|w| w == "--root") {
        let folder = words.next().unwrap_or_default();
        if let Err(e) = root::enter(folder.as_ref()) {
            eprintln!("sandbox-init: cannot enter {}: {e:#}", folder.display());
            std::process::exit(1);
        }
        program = words.next();
    }
    let Some(program) = program else {
        eprintln!("usage: sandbox-init [--root FOLDER] PROGRAM [ARGUMENT...]");
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
