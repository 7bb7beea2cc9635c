//! What loading `libphos.so` costs a program that never calls CUDA: `/bin/true`, with it preloaded and without, alternating.
//! Prints JSON lines in the form of `integration/results/`.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use phos_integration::measure::{median, output};
use phos_integration::tools::built;
use serde_json::json;

const ROUNDS: usize = 1000;

/// Milliseconds that one run takes.
fn once(preload: Option<&str>) -> Result<f64> {
    let mut command = Command::new("/bin/true");
    command.env_clear();
    if let Some(library) = preload {
        command.env("LD_PRELOAD", library);
    }
    let begin = Instant::now();
    let status = command.status().context("/bin/true")?;
    let time = begin.elapsed().as_secs_f64() * 1e3;
    ensure!(status.success(), "/bin/true ended with {status}");
    Ok(time)
}

fn main() -> Result<()> {
    let library = built("libphos.so")?;
    let library = library.to_str().context("path")?;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        without.push(once(None)?);
        with.push(once(Some(library))?);
    }
    let (without, with) = (median(&mut without), median(&mut with));
    let commit = output("git", &["rev-parse", "--short", "HEAD"])?;
    let date = output("date", &["+%F"])?;
    let line = |metric: &str, value: f64, note: &str| {
        println!(
            "{}",
            json!({
                "bench": "start", "workload": "no-cuda", "system": "phos-runc", "metric": metric,
                "value": (value * 1e4).round() / 1e4, "stat": "median", "n": ROUNDS, "device": "simcuda", "driver": "",
                "commit": commit, "date": date, "note": note,
            })
        );
    };
    line("load_ms", with - without, "/bin/true with libphos.so preloaded, less without");
    line("load_fraction", with / without, &format!("of {without:.3} ms"));
    Ok(())
}
