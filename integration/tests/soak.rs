//! Several containers at the same time, with checkpoints, restores and faults at random times: each runs on with every byte right
//! or is stopped and restored from a complete image, and nothing is left behind.
//!
//! `PHOS_SOAK_SEED`: the seed that a failure names, for the same events again. `PHOS_SOAK_CYCLES`: how many events; otherwise as
//! many as there is time for.

use std::env;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use phos_integration::bundle::Gpu;
use phos_integration::faults::soak::{self, Length};
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

/// How long new events begin, unless their number is given.
const TIME: Duration = Duration::from_secs(30);

fn given(name: &str) -> Result<Option<u64>> {
    let value = env::var(name).ok().filter(|v| !v.is_empty());
    value.map(|v| v.parse().with_context(|| format!("{name}={v} is no number"))).transpose()
}

fn soak(tools: &Tools) -> Result<()> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64 % 1_000_000);
    let seed = given("PHOS_SOAK_SEED")?.unwrap_or_else(now);
    let length = given("PHOS_SOAK_CYCLES")?.map_or(Length::Time(TIME), |n| Length::Events(n as usize));
    eprintln!("PHOS_SOAK_SEED={seed}");
    let done =
        soak::run(tools, &Gpu::Simulated, seed, length).with_context(|| format!("PHOS_SOAK_SEED={seed}"))?;
    ensure!(done.wrong.is_empty(), "PHOS_SOAK_SEED={seed}: {}", done.wrong.join("\n"));
    eprintln!("{done:?}, nothing lost, nothing left");
    // Otherwise it tries nothing.
    ensure!(done.events < 20 || (done.struck > 4 && done.restored > 1), "{done:?}");
    Ok(())
}

#[test]
fn several_containers_outlive_faults_at_random_times() {
    sandboxed("several_containers_outlive_faults_at_random_times", |tools| soak(tools).unwrap());
}
