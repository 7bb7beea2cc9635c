//! Several containers at the same time that go through checkpoints, restores and faults at random times, for as long as is asked, on
//! the machine's GPU or on the simulated driver. Run it in a sandbox:
//! `integration/scripts/sandbox.sh target/debug/fault-soak SECONDS [SEED]`.
//!
//! Prints JSON lines in the form of `integration/results/`; ends with an error if something was lost or left behind. Faults at the
//! engine's own points need a `phos-runc` with debug assertions (`--profile faults`).

use std::env;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use phos_integration::bundle::Gpu;
use phos_integration::faults::soak::{self, Length};
use phos_integration::tools::{Tools, word};
use serde_json::json;

fn main() -> Result<()> {
    let mut words = env::args().skip(1);
    let seconds = words.next().context("usage: fault-soak SECONDS [SEED]")?.parse()?;
    let seed = words.next().map_or(Ok(1), |s| s.parse())?;
    let tools = Tools::find()?;
    let gpu = Gpu::of_this_machine();
    let named = env::var("PHOS_DEVICE").unwrap_or_else(|_| "GPU".into());
    let device = if gpu == Gpu::Simulated { "simcuda".to_string() } else { named };
    let commit = match env::var("PHOS_COMMIT") {
        Ok(commit) => commit,
        Err(_) => word("git", &["rev-parse", "--short", "HEAD"])?,
    };
    let date = word("date", &["+%F"])?;
    let done = soak::run(&tools, &gpu, seed, Length::Time(Duration::from_secs(seconds)))?;
    done.wrong.iter().for_each(|w| eprintln!("WRONG {w}"));
    let note = format!(
        "three containers at a time, seed {seed}: {} faults reached, {} restores, {} containers deleted or their program killed",
        done.struck, done.restored, done.gone
    );
    for (metric, value) in [("cycles", done.events), ("failures", done.wrong.len())] {
        let line = json!({
            "bench": "soak", "workload": "sample-faults", "system": "phos-runc", "metric": metric, "value": value,
            "stat": "single", "n": 1, "device": device, "driver": "", "commit": commit, "date": date, "note": note,
        });
        println!("{line}");
    }
    ensure!(done.wrong.is_empty(), "{} of {} events went wrong", done.wrong.len(), done.events);
    Ok(())
}
