//! Many checkpoints and restores of one container, its state verified after each. Prints JSON lines in the form of
//! `integration/results/`; ends with an error at the first wrong step.
//!
//! `soak CYCLES [OPTION…]`: every fifth cycle stops and restores, the others leave the container running. The options are
//! the sample program's: `--churn 4` has threads that change the address space all the time, `--pair` two processes that share
//! memory.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use phos_integration::bundle::Gpu;
use phos_integration::container::{Container, Place};
use phos_integration::tools::Tools;
use serde_json::json;

/// Resident memory of the container's first process, bytes.
fn resident(container: &Container<'_>) -> Result<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", container.pid()?))?;
    let pages: u64 = statm.split_whitespace().nth(1).context("statm")?.parse()?;
    Ok(pages * 4096)
}

fn main() -> Result<()> {
    let cycles: u32 = std::env::args().nth(1).unwrap_or_else(|| "50".into()).parse()?;
    let tools = Tools::find()?;
    let gpu = Gpu::of_this_machine();
    let named = std::env::var("PHOS_DEVICE").unwrap_or_else(|_| "GPU".into());
    let device = if gpu == Gpu::Simulated { "simcuda".to_string() } else { named };
    let more: Vec<String> = std::env::args().skip(2).collect();
    let place = Place::with_gpu(&tools, gpu)?;
    let mut options = vec!["--mib", "16", "--step-ms", "1"];
    options.extend(more.iter().map(String::as_str));
    let container = place.sample(&options)?;
    container.start()?;
    container.steps(5)?;
    let (begin, mut first) = (Instant::now(), None);
    for cycle in 1..=cycles {
        let stop = cycle % 5 == 0;
        let result = (|| {
            container.checkpoint("image", !stop)?;
            if stop {
                container.try_verb("delete", &["--force"])?;
                container.restore("image")?;
            }
            // Not always the same moment of a step.
            std::thread::sleep(std::time::Duration::from_millis(u64::from(cycle * 7 % 23)));
            container.steps(3)
        })();
        result.with_context(|| format!("cycle {cycle}"))?;
        if cycle == 10.min(cycles) {
            first = Some(resident(&container)?);
        }
    }
    let growth = resident(&container)? as i64 - first.unwrap_or(0) as i64;
    ensure!(container.state()? == "running");
    eprintln!("{cycles} cycles in {:.0} s", begin.elapsed().as_secs_f64());
    let word = |command: &str, args: &[&str]| -> Result<String> {
        Ok(String::from_utf8(std::process::Command::new(command).args(args).output()?.stdout)?
            .trim()
            .to_string())
    };
    let commit = match std::env::var("PHOS_COMMIT") {
        Ok(commit) => commit,
        Err(_) => word("git", &["rev-parse", "--short", "HEAD"])?,
    };
    let date = word("date", &["+%F"])?;
    let note = [&["every fifth cycle stops and restores".to_string()], more.as_slice()].concat().join(" ");
    for (metric, value) in [("cycles", i64::from(cycles)), ("failures", 0), ("rss_growth_bytes", growth)] {
        let line = json!({
            "bench": "soak", "workload": "sample", "system": "phos-runc", "metric": metric, "value": value,
            "stat": "single", "n": 1, "device": device, "driver": "", "commit": commit, "date": date,
            "note": note,
        });
        println!("{line}");
    }
    Ok(())
}
