//! What the benchmarks have in common.

use std::process::Command;

use anyhow::{Context, Result};

/// The median of at least one value; sorts them.
pub fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// What a command prints, without the space around it.
pub fn output(command: &str, args: &[&str]) -> Result<String> {
    let done = Command::new(command).args(args).output().context(command.to_string())?;
    Ok(String::from_utf8(done.stdout)?.trim().to_string())
}
