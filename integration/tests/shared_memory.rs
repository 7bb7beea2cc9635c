//! Two processes of a container share GPU memory: it is saved once and comes back as one.

use anyhow::{Result, ensure};
use phos_integration::container::Place;
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

/// Bytes that the two processes share: one piece by CUDA IPC, one by descriptor.
const SHARED: u64 = 8 << 20;

fn run(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = place.sample(&["--pair"])?;
    container.start()?;
    container.steps(5)?;
    let seen: serde_json::Value = serde_json::from_str(&container.verb("gpu", &["--json"])?)?;
    let processes = seen["processes"].as_array().cloned().unwrap_or_default();
    ensure!(processes.len() == 2, "{seen}");
    for process in &processes {
        ensure!(process["blockers"] == serde_json::json!([]), "{seen}");
    }
    for name in ["running-1", "running-2"] {
        container.checkpoint(name, true)?;
        container.steps(5)?;
        let report = place.report()?;
        ensure!(report["processes"] == 2 && report["written_bytes"] == SHARED, "saved once: {report}");
        ensure!(report["warnings"] == serde_json::json!([]), "{report}");
    }
    let shown = container.place.command(
        &tools.program("phos-runc"),
        &["inspect", "--json", &container.image("running-1").display().to_string()],
        false,
    )?;
    let manifest: serde_json::Value = serde_json::from_str(&shown.text)?;
    ensure!(manifest["features"] == serde_json::json!(["shared"]), "{manifest}");
    ensure!(manifest["shared"].as_array().is_some_and(|s| s.len() == 2), "{manifest}");
    // Both ends of it come back, again and again: each verifies what the other one writes.
    for name in ["stopped-1", "stopped-2"] {
        container.stop_and_restore(name)?;
        container.steps(5)?;
    }
    // From an image of the running container, with one that builds on it.
    container.checkpoint_with("increment", &["--parent-path", &format!("../{}.running-2", container.id)])?;
    container.try_verb("delete", &["--force"])?;
    std::fs::remove_file(container.status_file())?;
    container.restore("running-2")?;
    container.steps(5)?;
    container.try_verb("delete", &["--force"])?;
    std::fs::remove_file(container.status_file())?;
    container.restore("increment")?;
    container.steps(5)?;
    Ok(())
}

#[test]
fn memory_shared_by_two_processes_comes_back_as_one() {
    sandboxed("memory_shared_by_two_processes_comes_back_as_one", |tools| run(tools).unwrap());
}

fn churning(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = place.sample(&["--mib", "16", "--churn", "2"])?;
    container.start()?;
    container.steps(3)?;
    for n in 0..5 {
        container.checkpoint(&format!("running-{n}"), true)?;
        container.steps(3)?;
    }
    container.stop_and_restore("stopped")?;
    container.steps(3)?;
    Ok(())
}

#[test]
fn threads_that_make_no_cuda_call_go_on_while_the_driver_is_away() {
    sandboxed("threads_that_make_no_cuda_call_go_on_while_the_driver_is_away", |tools| {
        churning(tools).unwrap()
    });
}
