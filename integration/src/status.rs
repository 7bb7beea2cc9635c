//! The sample program's status lines.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// One verified step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Its number.
    pub step: u64,
    /// Digest of the whole state.
    pub digest: String,
    /// Whether every word was right.
    pub ok: bool,
    /// When, milliseconds on the machine's monotonic clock.
    pub t_ms: u64,
}

/// All complete lines of a status file; none if it does not exist yet.
pub fn read(path: &Path) -> Result<Vec<Status>> {
    let Ok(text) = fs::read_to_string(path) else { return Ok(Vec::new()) };
    let complete = text.rfind('\n').map_or("", |at| &text[..at]);
    complete.lines().map(parse).collect()
}

fn parse(line: &str) -> Result<Status> {
    let field = |name: &str| line.split(' ').find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
    match (field("step"), field("digest"), field("ok"), field("t_ms")) {
        (Some(step), Some(digest), Some(ok), Some(t)) => {
            Ok(Status { step: step.parse()?, digest: digest.into(), ok: ok == "1", t_ms: t.parse()? })
        }
        _ => bail!("not a status line: {line}"),
    }
}

/// Waits until `more` further lines have appeared; returns all.
pub fn wait_for(path: &Path, more: usize, limit: Duration) -> Result<Vec<Status>> {
    let wanted = read(path)?.len() + more;
    let deadline = Instant::now() + limit;
    loop {
        let lines = read(path)?;
        if lines.len() >= wanted {
            return Ok(lines);
        }
        if Instant::now() > deadline {
            bail!("{} stands at {} lines, {wanted} were expected", path.display(), lines.len());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Fails unless every line is right and each step follows the one before it.
pub fn check(lines: &[Status]) -> Result<()> {
    for (i, line) in lines.iter().enumerate() {
        if !line.ok {
            bail!("step {} is wrong", line.step);
        }
        if i > 0 && line.step != lines[i - 1].step + 1 {
            bail!("step {} follows step {}", line.step, lines[i - 1].step);
        }
    }
    Ok(())
}

/// The longest time between two steps from index `from` on, milliseconds.
pub fn longest_gap(lines: &[Status], from: usize) -> u64 {
    lines[from.saturating_sub(1)..].windows(2).map(|w| w[1].t_ms - w[0].t_ms).max().unwrap_or(0)
}
