//! Containers whose driver stands in no configuration: a GPU toolkit's hook mounts it while they are created.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use phos_integration::bundle::{Gpu, LIBCUDA};
use phos_integration::container::{Container, Place};
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;
use serde_json::json;

const SAMPLE: [&str; 7] =
    ["/usr/bin/phos-sample", "--out", "/out/status", "--stop-file", "/out/stop", "--mib", "24"];

/// Writes a toolkit's hook that mounts the simulated driver at LIBCUDA. A `prestart` hook runs outside of the container's
/// mount namespace and enters it, a `createContainer` hook runs inside.
fn toolkit(place: &Place, driver: &Path, root: &Path, kind: &str) -> Result<PathBuf> {
    let target = root.join(LIBCUDA.trim_start_matches('/'));
    let enter = if kind == "prestart" { "nsenter -t $pid -m --" } else { "" };
    let script = format!(
        "#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\nset -e\npid=$(sed -n 's/.*\"pid\": *\\([0-9]*\\).*/\\1/p')\n\
         touch {0}\n{enter} mount --bind {1} {0}\n",
        target.display(),
        driver.display(),
    );
    let path = place.path(&format!("{kind}-nvidia-container-runtime-hook"));
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn container<'a>(place: &'a Place, kind: &str) -> Result<Container<'a>> {
    let container = place.container(&SAMPLE, &Gpu::No)?;
    let mut spec = container.bundle.read_spec()?;
    let driver = place.tools.program("libsimcuda.so");
    let hook = toolkit(place, &driver, &container.bundle.path.join("rootfs"), kind)?;
    spec["hooks"] = json!({ kind: [{"path": hook}] });
    if let Some(env) = spec["process"]["env"].as_array_mut() {
        env.push(json!("NVIDIA_VISIBLE_DEVICES=all"));
    }
    container.bundle.write_spec(&spec)?;
    Ok(container)
}

fn round_trip(tools: &Tools, kind: &str) -> Result<()> {
    let place = Place::new(tools)?;
    let container = container(&place, kind)?;
    let before = container.bundle.read_spec()?;
    container.start()?;
    container.steps(3)?;
    let report = container.checkpoint_with("running", &["--leave-running"])?;
    assert_eq!(
        report["warnings"],
        json!([]),
        "the library is in front of the driver, or this would say otherwise"
    );
    assert!(report["gpu_bytes"].as_u64() >= Some(24 << 20), "{report}");
    container.steps(3)?;
    container.checkpoint("stopped", false)?;
    container.try_verb("delete", &["--force"])?;
    // An engine writes the configuration anew for a restore, and its toolkit adds its hook again.
    container.bundle.write_spec(&before)?;
    for name in ["stopped", "running"] {
        let _ = fs::remove_file(container.status_file());
        container.restore(name)?;
        container.steps(5)?;
        // A restored container can be checkpointed like any other.
        let report = container.checkpoint_with(&format!("again-{name}"), &["--leave-running"])?;
        assert_eq!(report["warnings"], json!([]));
        container.steps(3)?;
        container.try_verb("delete", &["--force"])?;
        container.bundle.write_spec(&before)?;
    }
    Ok(())
}

#[test]
fn a_driver_mounted_by_a_prestart_hook_is_found() {
    sandboxed("a_driver_mounted_by_a_prestart_hook_is_found", |tools| round_trip(tools, "prestart").unwrap());
}

#[test]
fn a_driver_mounted_by_a_create_container_hook_is_found() {
    sandboxed("a_driver_mounted_by_a_create_container_hook_is_found", |tools| {
        round_trip(tools, "createContainer").unwrap();
    });
}

fn nothing_mounted(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = place.container(&["/bin/sh", "-c", "echo ran > /out/said"], &Gpu::No)?;
    let mut spec = container.bundle.read_spec()?;
    // The hook of a toolkit that finds no driver.
    let hook = place.path("nvidia-container-runtime-hook");
    fs::write(&hook, "#!/bin/sh\n")?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    spec["hooks"] = json!({"prestart": [{"path": hook}]});
    if let Some(env) = spec["process"]["env"].as_array_mut() {
        env.push(json!("NVIDIA_VISIBLE_DEVICES=all"));
    }
    container.bundle.write_spec(&spec)?;
    container.start()?;
    for _ in 0..200 {
        if container.state()? == "stopped" {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(fs::read_to_string(container.bundle.out.join("said"))?, "ran\n");
    Ok(())
}

#[test]
fn a_container_without_a_driver_runs_all_the_same() {
    sandboxed("a_container_without_a_driver_runs_all_the_same", |tools| nothing_mounted(tools).unwrap());
}
