//! Processes of a sandbox, and waiting for them.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// A process of this sandbox with all these words on its command line.
pub fn process_with(words: &[&str]) -> Option<i32> {
    let pids =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.into_iter().find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let have: Vec<_> = line.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
        !have.is_empty() && words.iter().all(|w| have.iter().any(|h| h == w))
    })
}

/// Waits until `f` has an answer, at most a minute.
pub fn wait_until<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(t) = f() {
            return Ok(t);
        }
        ensure!(Instant::now() < deadline, "{what} did not happen");
        thread::sleep(Duration::from_millis(2));
    }
}
