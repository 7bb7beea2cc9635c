//! `make demo`: a container with a GPU, checkpointed while it runs, checkpointed and stopped, restored; its state proven.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use phos_integration::bundle::Gpu;
use phos_integration::container::Place;
use phos_integration::status::longest_gap;
use phos_integration::tools::Tools;

fn ms(report: &serde_json::Value, key: &str) -> f64 {
    report[key].as_f64().unwrap_or(0.0)
}

fn main() -> Result<()> {
    let tools = Tools::find()?;
    let gpu = Gpu::of_this_machine();
    match &gpu {
        Gpu::Real(library) => println!("GPU        the machine's, driver {}", library.display()),
        _ => println!("GPU        none here: the simulated driver stands in for it"),
    }
    let place = Place::with_gpu(&tools, gpu)?;
    let container = place.sample(&["--mib", "256", "--verify-every", "1", "--step-ms", "2"])?;
    container.start()?;
    let lines = container.steps(20)?;
    println!(
        "running    a container of phos-sample under phos-runc, {} steps, every one verified",
        lines.len()
    );

    for round in 1..=2 {
        let before = container.steps(1)?.len();
        container.checkpoint(&format!("running-{round}"), true)?;
        let report = place.report()?;
        let lines = container.steps(10)?;
        println!(
            "checkpoint {round} (leave running): {} MiB of GPU memory; the program stood still for {} ms",
            report["gpu_bytes"].as_u64().unwrap_or(0) >> 20,
            longest_gap(&lines, before),
        );
        println!(
            "             drain {:.1}, park {:.1}, snapshot {:.1}, driver {:.1} + {:.1}, CRIU {:.1}, attach {:.1} ms; then {:.0} ms of copying while it ran",
            ms(&report, "drain_ms"),
            ms(&report, "park_ms"),
            ms(&report, "snapshot_ms"),
            ms(&report, "driver_checkpoint_ms"),
            ms(&report, "driver_restore_ms"),
            ms(&report, "criu_ms"),
            ms(&report, "attach_ms"),
            ms(&report, "copy_ms"),
        );
    }

    container.checkpoint("stopped", false)?;
    let stood_at = container.steps(0)?.last().context("there are steps")?.clone();
    ensure!(container.state()? != "running", "the container still runs");
    println!("checkpoint 3 (stop): the container is gone, its last step was {}", stood_at.step);
    let image = container.image("stopped");
    let shown = place.command(
        &container.runtime,
        &["inspect", "--verify", image.to_str().context("path")?],
        false,
    )?;
    ensure!(shown.status == 0, "inspect: {}", shown.text);
    shown.text.lines().for_each(|l| println!("             {l}"));

    container.try_verb("delete", &["--force"])?;
    let begin = Instant::now();
    container.restore("stopped")?;
    let restored = begin.elapsed();
    let lines = container.steps(10)?;
    let next = lines.iter().find(|l| l.step > stood_at.step).context("it goes on")?;
    ensure!(next.step == stood_at.step + 1);
    println!("restore    in {} ms; step {} follows step {}", restored.as_millis(), next.step, stood_at.step);

    // What an uninterrupted run computes: the same program, never checkpointed.
    let reference = place.sample(&["--mib", "256", "--step-ms", "0", "--steps", &lines.len().to_string()])?;
    reference.start()?;
    let expected =
        phos_integration::status::wait_for(&reference.status_file(), lines.len(), Duration::from_secs(120))?;
    let same = lines.iter().zip(&expected).all(|(a, b)| a.step == b.step && a.digest == b.digest);
    ensure!(same, "the states differ from those of an uninterrupted run");
    println!("proof      {} steps, each state bit-identical to an uninterrupted run's", lines.len());
    Ok(())
}
