//! Faults of the simulated driver in another process, through its control block. See `integration/simcuda/src/fault.rs`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

/// Where the block's parts are, bytes.
const ASKED: u64 = 28;
const RULES: u64 = 32;
const TEXT: usize = 1024;
const CALLED: u64 = RULES + TEXT as u64;

fn block(pid: i32) -> Result<File> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        if fs::read_link(entry.path()).is_ok_and(|l| l.to_string_lossy().starts_with("/memfd:simcuda-ctl")) {
            return Ok(File::options().read(true).write(true).open(entry.path())?);
        }
    }
    anyhow::bail!("process {pid} has no simulated driver")
}

/// Replaces the rules of a process, and has it write down its calls from now on.
pub fn arm(pid: i32, rules: &str) -> Result<()> {
    ensure!(rules.len() < TEXT);
    let block = block(pid)?;
    let mut text = [0; TEXT];
    text[..rules.len()].copy_from_slice(rules.as_bytes());
    block.write_all_at(&text, RULES)?;
    let mut asked = [0; 4];
    block.read_exact_at(&mut asked, ASKED)?;
    let asked = u32::from_le_bytes(asked).wrapping_add(1);
    block.write_all_at(&asked.to_le_bytes(), ASKED).context("simulated driver")
}

/// The calls since the last [`arm`].
pub fn called(pid: i32) -> Result<Vec<String>> {
    let mut text = [0; 2 * TEXT];
    block(pid)?.read_exact_at(&mut text, CALLED)?;
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).split_whitespace().map(Into::into).collect())
}
