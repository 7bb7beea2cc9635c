//! A container with a GPU is checkpointed and restored; its program goes on with the right values.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use phos_integration::container::Place;
use phos_integration::sandbox::sandboxed;
use phos_integration::status;
use phos_integration::tools::Tools;

fn run(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let box1 = place.sample(&["--mib", "24"])?;
    box1.start()?;
    box1.steps(5)?;
    // A second container of the same name is refused and harms nothing.
    let bundle = box1.bundle.path.display().to_string();
    assert_ne!(box1.try_verb("create", &["--bundle", &bundle])?.status, 0);
    let mut after_first = 0;
    let seen: serde_json::Value = serde_json::from_str(&box1.verb("gpu", &["--json"])?)?;
    let process = &seen["processes"][0];
    assert_eq!((&process["driverState"], &process["library"]), (&"running".into(), &true.into()), "{seen}");
    for class in ["plain", "small", "virtual", "pool"] {
        assert!(process["parkedBytes"][class].as_u64().is_some_and(|b| b > 0), "{class}: {seen}");
    }
    assert!(process["launches"].as_u64().is_some_and(|n| n > 5), "{seen}");
    assert_eq!(
        (&process["driverBytes"], &process["blockers"]),
        (&0.into(), &serde_json::json!([])),
        "{seen}"
    );
    assert!(box1.verb("gpu", &[])?.contains("MiB in "));
    for name in ["running-1", "running-2"] {
        box1.checkpoint(name, true)?;
        // CRIU's pages came through the worker, and their room was there before.
        let report = place.report()?;
        let bytes = |name: &str| report[name].as_u64().unwrap_or(0);
        assert!(bytes("host_bytes") > 1 << 20, "{report}");
        assert!(bytes("host_ready_bytes") > bytes("host_bytes") / 10 * 9, "{report}");
        let lines = box1.steps(5)?;
        assert_eq!(box1.state()?, "running");
        if after_first == 0 {
            after_first = lines[lines.len() - 1].step;
        }
    }
    box1.checkpoint("stopped", false)?;
    assert_ne!(box1.state()?, "running");
    box1.try_verb("delete", &["--force"])?;
    box1.restore("stopped")?;
    box1.steps(10)?;
    assert_eq!(box1.state()?, "running");
    // An image taken while it ran holds the state of that moment.
    box1.try_verb("delete", &["--force"])?;
    std::fs::remove_file(box1.status_file())?;
    box1.restore("running-1")?;
    let again = box1.steps(10)?;
    let first = again[0].step;
    assert!(
        first > 5 && first < after_first,
        "it goes on at step {first}, and had come to {after_first} afterwards"
    );
    Ok(())
}

#[test]
fn a_gpu_container_survives_checkpoint_and_restore() {
    sandboxed("a_gpu_container_survives_checkpoint_and_restore", |tools| run(tools).unwrap());
}

fn several(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let script = "/usr/bin/phos-sample --out /out/other --stop-file /out/stop --mib 16 & exec /usr/bin/phos-sample --out /out/status --stop-file /out/stop --mib 24";
    let container = place.container(&["/bin/sh", "-c", script], &place.gpu)?;
    let other = container.bundle.out.join("other");
    let both = || -> Result<()> {
        container.steps(5)?;
        status::check(&status::wait_for(&other, 5, Duration::from_secs(60))?)
    };
    container.start()?;
    both()?;
    container.checkpoint("running", true)?;
    assert_eq!(place.report()?["processes"], 2);
    both()?;
    container.stop_and_restore("stopped")?;
    both()
}

#[test]
fn all_gpu_processes_of_a_container_are_saved() {
    sandboxed("all_gpu_processes_of_a_container_are_saved", |tools| several(tools).unwrap());
}

fn without_the_library(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let mut container = place.sample(&["--mib", "24"])?;
    let mut spec = container.bundle.read_spec()?;
    spec["annotations"]["phos.inject"] = "off".into();
    container.bundle.write_spec(&spec)?;
    container.start()?;
    container.steps(3)?;
    // The driver holds its device node: CRIU alone cannot dump the process.
    container.runtime = tools.runc.clone();
    ensure!(container.try_checkpoint("criu-alone", true)?.status != 0);
    container.steps(3)?;
    // The driver saves everything, with a warning.
    container.runtime = tools.program("phos-runc");
    container.checkpoint("running", true)?;
    let warnings = place.report()?["warnings"].to_string();
    ensure!(warnings.contains("without libphos.so"), "{warnings}");
    container.steps(3)?;
    container.stop_and_restore("stopped")?;
    container.steps(3)?;
    Ok(())
}

#[test]
fn a_process_without_the_library_is_saved_by_the_driver_alone() {
    sandboxed("a_process_without_the_library_is_saved_by_the_driver_alone", |tools| {
        without_the_library(tools).unwrap()
    });
}

/// The library's memory is exported: the driver alone would save it and could not bring the process back.
fn without_its_socket(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    for whole_folder in [false, true] {
        let container = place.sample(&["--mib", "24"])?;
        container.start()?;
        container.steps(3)?;
        let states = std::fs::read_dir(place.path("state"))?.flatten().map(|e| e.path().join("ctl"));
        let control = states.into_iter().find(|p| p.is_dir()).context("there is a control folder")?;
        if whole_folder {
            std::fs::rename(&control, place.path("elsewhere"))?;
        } else {
            for entry in std::fs::read_dir(&control)?.flatten() {
                if entry.file_name().to_string_lossy().ends_with(".sock") {
                    std::fs::remove_file(entry.path())?;
                }
            }
        }
        let ended = container.try_checkpoint("image", true)?;
        ensure!(ended.status == 1 && ended.text.contains("no control socket any more"), "{ended:?}");
        ensure!(!container.image("image").exists(), "an image was left");
        container.steps(3)?;
    }
    Ok(())
}

#[test]
fn a_library_whose_socket_is_gone_is_not_left_to_the_driver() {
    sandboxed("a_library_whose_socket_is_gone_is_not_left_to_the_driver", |tools| {
        without_its_socket(tools).unwrap()
    });
}

/// Whether this process may look at other users' resource limits, as CRIU must.
fn has_sys_resource() -> bool {
    const CAP_SYS_RESOURCE: u64 = 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok());
    mask.is_some_and(|m| m >> CAP_SYS_RESOURCE & 1 == 1)
}

/// A read-only root file system, an ordinary user, few fds, the library preloaded instead of mounted.
fn other_shapes(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    for shape in ["read-only", "user", "preload", "few-fds"] {
        if shape == "user" && !has_sys_resource() {
            eprintln!("skipped: without CAP_SYS_RESOURCE, CRIU cannot dump another user's process");
            continue;
        }
        let container = place.sample(&["--mib", "24"])?;
        let mut spec = container.bundle.read_spec()?;
        match shape {
            "read-only" => {
                spec["root"]["readonly"] = true.into();
            }
            "user" => {
                spec["process"]["user"] = serde_json::json!({"uid": 1000, "gid": 1000});
                std::os::unix::fs::chown(&container.bundle.out, Some(1000), Some(1000))?;
            }
            "few-fds" => spec["process"]["rlimits"][0]["soft"] = 40.into(),
            _ => spec["annotations"]["phos.inject"] = shape.into(),
        }
        container.bundle.write_spec(&spec)?;
        container.start()?;
        container.steps(3)?;
        container.checkpoint("running", true)?;
        assert_eq!(place.report()?["warnings"], serde_json::json!([]), "{shape}");
        assert!(place.report()?["gpu_bytes"].as_u64() > Some(20 << 20), "{shape}");
        container.steps(3)?;
        container.stop_and_restore("stopped")?;
        container.steps(3)?;
    }
    Ok(())
}

#[test]
fn containers_of_other_shapes_are_saved_too() {
    sandboxed("containers_of_other_shapes_are_saved_too", |tools| other_shapes(tools).unwrap());
}
