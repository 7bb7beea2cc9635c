//! What phos-runc adds to a verb that it only hands on: `state` of a container that does not exist, through phos-runc
//! and directly, alternating. Prints JSON lines in the form of `integration/results/`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;

const ROUNDS: usize = 300;

fn once(program: &Path, runc: &Path) -> Result<f64> {
    let begin = Instant::now();
    Command::new(program)
        .args(["--root", "/run/phos-exec-cost", "state", "none"])
        .env("PHOS_LOWER_RUNTIME", runc)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .with_context(|| program.display().to_string())?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> Result<()> {
    let folder = std::env::current_exe()?.parent().context("a program has a folder")?.to_path_buf();
    let runc = std::env::args().nth(1).unwrap_or_else(|| "/usr/sbin/runc".into());
    let (runc, phos) = (Path::new(&runc), folder.join("phos-runc"));
    let (mut direct, mut through) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS + 10 {
        let (a, b) = (once(runc, runc)?, once(&phos, runc)?);
        if round >= 10 {
            direct.push(a);
            through.push(b);
        }
    }
    let output = |command: &str, args: &[&str]| -> Result<String> {
        Ok(String::from_utf8(Command::new(command).args(args).output()?.stdout)?.trim().to_string())
    };
    let commit = output("git", &["rev-parse", "--short", "HEAD"])?;
    let date = output("date", &["+%F"])?;
    for (system, times) in [("runc", direct), ("phos-runc", through)] {
        let line = json!({
            "bench": "start", "workload": "state-verb", "system": system, "metric": "start_ms",
            "value": (median(times) * 1000.0).round() / 1000.0, "stat": "median", "n": ROUNDS,
            "device": "simcuda", "driver": "", "commit": commit, "date": date, "note": "state of an unknown container",
        });
        println!("{line}");
    }
    Ok(())
}
