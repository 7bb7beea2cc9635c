//! What allocations cost with `libphos.so` and without: the sample program's benchmark on the simulated driver, alternating.
//! Prints JSON lines in the form of `integration/results/`.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use phos_integration::measure::{median, output};
use phos_integration::tools::built;
use serde_json::json;

const ROUNDS: usize = 11;
/// Launches of one run; the sample makes a hundredth as many allocations of each kind.
const LAUNCHES: &str = "400000";

/// Nanoseconds of each kind of call in one run.
fn once(folder: &Path, driver: Option<&Path>) -> Result<BTreeMap<String, f64>> {
    let mut command = Command::new(built("phos-sample")?);
    command.args(["--bench", LAUNCHES]).env_clear().env("LD_LIBRARY_PATH", folder);
    // Memory that was freed on a stream is not free at once.
    command.env("SIMCUDA_MEMORY", (64u64 << 30).to_string());
    if let Some(driver) = driver {
        command.env("PHOS_REAL_LIBCUDA", driver);
    }
    let done = command.output().context("phos-sample")?;
    ensure!(done.status.success(), "phos-sample: {}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout)?;
    let words = |line: &str| -> Result<(String, f64)> {
        let (name, value) = line.split_once(' ').context("a name and a figure")?;
        Ok((name.to_string(), value.parse()?))
    };
    text.lines().map(words).collect()
}

fn main() -> Result<()> {
    let (bare, library) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let driver = built("libsimcuda.so")?;
    symlink(&driver, bare.path().join("libcuda.so.1"))?;
    symlink(built("libphos.so")?, library.path().join("libcuda.so.1"))?;
    let mut all: BTreeMap<String, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for (name, time) in once(bare.path(), None)? {
            all.entry(name).or_default().0.push(time);
        }
        for (name, time) in once(library.path(), Some(&driver))? {
            all.entry(name).or_default().1.push(time);
        }
    }
    let commit = output("git", &["rev-parse", "--short", "HEAD"])?;
    let date = output("date", &["+%F"])?;
    for (name, (mut without, mut with)) in all {
        let (without, with) = (median(&mut without), median(&mut with));
        let workload = name.trim_end_matches("_ns").replace('_', "-");
        println!(
            "{}",
            json!({
                "bench": "overhead", "workload": workload, "system": "phos-runc", "metric": "rate_fraction",
                "value": (without / with * 1e4).round() / 1e4, "stat": "median", "n": ROUNDS, "device": "simcuda",
                "driver": "", "commit": commit, "date": date,
                "note": format!("{with:.0} ns with the library, {without:.0} without"),
            })
        );
    }
    Ok(())
}
