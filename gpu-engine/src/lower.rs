//! Running the lower runtime.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use thiserror::Error;

use crate::job::CommandLine;
use crate::service::LowerOutput;

/// Most bytes of each output stream that are kept for the person who asked.
const OUTPUT_LIMIT: u64 = 64 * 1024;

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

/// Runs a command to its end, in a process group of its own.
pub fn run(command: &CommandLine, limit: Duration) -> Result<LowerOutput, LowerError> {
    let program = command.program();
    let name = program.to_string_lossy().into_owned();
    let mut child = Command::new(&program)
        .args(command.args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|source| LowerError::Start { program: name.clone(), source })?;
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_micros(200);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => {}
            Ok(None) => {
                let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
                let _ = child.wait();
                return Err(LowerError::Timeout { program: name, seconds: limit.as_secs() });
            }
            Err(source) => return Err(LowerError::Start { program: name, source }),
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    };
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
    fn what_hangs_is_ended_and_what_floods_is_cut() {
        let begin = Instant::now();
        let hung = run(&sh("sleep 60"), Duration::from_millis(50));
        assert!(matches!(hung, Err(LowerError::Timeout { .. })));
        assert!(begin.elapsed() < Duration::from_secs(30));
        let out = run(&sh("head -c 1000000 /dev/zero"), Duration::from_secs(30)).unwrap();
        assert_eq!(out.stdout.len() as u64, OUTPUT_LIMIT);
    }
}
