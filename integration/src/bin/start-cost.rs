//! What starting a container costs: `create` and `start` through phos-runc and through the lower runtime alone, alternating,
//! with and without a (simulated) GPU. Run it in `integration/scripts/sandbox.sh`. Prints JSON lines in the form of
//! `integration/results/`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use phos_integration::bundle::Gpu;
use phos_integration::container::Place;
use phos_integration::measure::{median, output};
use phos_integration::tools::Tools;
use serde_json::json;

const ROUNDS: usize = 30;
/// Rounds before those that count.
const WARM: usize = 3;

/// Milliseconds until the container's program runs.
fn once(place: &Place, runtime: &PathBuf, gpu: &Gpu) -> Result<f64> {
    let mut container = place.container(&["/bin/busybox", "sleep", "1000"], gpu)?;
    container.runtime.clone_from(runtime);
    let begin = Instant::now();
    container.start()?;
    let spent = begin.elapsed().as_secs_f64() * 1e3;
    container.verb("delete", &["--force"])?;
    Ok(spent)
}

fn main() -> Result<()> {
    let tools = Tools::find()?;
    let place = Place::new(&tools)?;
    let commit = output("git", &["rev-parse", "--short", "HEAD"])?;
    let date = output("date", &["+%F"])?;
    let systems = [("runc", tools.runc.clone()), ("phos-runc", tools.program("phos-runc"))];
    for (workload, gpu) in [("sleep", Gpu::No), ("sleep-gpu", Gpu::Simulated)] {
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..ROUNDS + WARM {
            for ((_, runtime), times) in systems.iter().zip(&mut times) {
                let spent = once(&place, runtime, &gpu)?;
                if round >= WARM {
                    times.push(spent);
                }
            }
        }
        for ((system, _), times) in systems.iter().zip(&mut times) {
            let line = json!({
                "bench": "start", "workload": workload, "system": system, "metric": "start_ms",
                "value": (median(times) * 1000.0).round() / 1000.0, "stat": "median", "n": ROUNDS,
                "device": "simcuda", "driver": "", "commit": commit, "date": date, "note": "create and start",
            });
            println!("{line}");
        }
    }
    Ok(())
}
