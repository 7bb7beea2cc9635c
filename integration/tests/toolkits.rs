//! Containers whose GPU comes from a toolkit: CDI specifications, NVIDIA's runtime in front of phos-runc and behind it, its
//! legacy hook; and what a restore makes of what such a toolkit had added.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use phos_integration::bundle::{Bundle, Gpu};
use phos_integration::container::{Container, Place};
use phos_integration::engine::{Docker, Podman, present};
use phos_integration::root::debian;
use phos_integration::sandbox::{sandboxed, sandboxed_in};
use phos_integration::status;
use phos_integration::toolkit::{CdiFolder, DRIVER, LIBRARIES, Toolkit};
use phos_integration::tools::Tools;
use serde_json::{Value, json};

const SAMPLE: [&str; 7] =
    ["/usr/bin/phos-sample", "--out", "/out/status", "--stop-file", "/out/stop", "--mib", "24"];

/// A container that asks the toolkit for all GPUs.
fn asking(place: &Place) -> Result<Container<'_>> {
    let container = place.container(&SAMPLE, &Gpu::No)?;
    let mut spec = container.bundle.read_spec()?;
    if let Some(env) = spec["process"]["env"].as_array_mut() {
        env.push(json!("NVIDIA_VISIBLE_DEVICES=all"));
    }
    container.bundle.write_spec(&spec)?;
    Ok(container)
}

/// Fails unless the library stood in front of the driver and the memory was saved.
fn saved(report: &Value) -> Result<()> {
    ensure!(report["warnings"] == json!([]), "{report}");
    ensure!(report["gpu_bytes"].as_u64() >= Some(24 << 20), "{report}");
    Ok(())
}

/// What the toolkit has given to a container is there: sockets, the GPU's node and its rule, files of /proc.
fn complete(container: &Container<'_>, tests: &[&str]) -> Result<()> {
    let root = container.place.path("root").display().to_string();
    let usual = ["-S /run/nvidia-persistenced/socket", "-e /tmp/nvidia-mps/control.pid", "-c /dev/simgpu0"];
    for test in usual.iter().chain(tests) {
        let words =
            ["--root", &root, "exec", &container.id, "/bin/busybox", "sh", "-c", &format!("test {test}")];
        let ended = container.place.command(&container.runtime, &words, false)?;
        ensure!(ended.status == 0, "{test}: {ended:?}");
    }
    let rules = Path::new("/sys/fs/cgroup/devices").join(&container.id).join("devices.list");
    if let Ok(rules) = fs::read_to_string(rules) {
        ensure!(rules.lines().any(|l| l.starts_with("c 10:229 ")), "{rules}");
    }
    Ok(())
}

/// Checkpointed running and stopped, restored from both with the configuration that an engine would write anew, and
/// checkpointed again.
fn round_trip(container: &Container<'_>, tests: &[&str]) -> Result<()> {
    let engines = container.bundle.read_spec()?;
    container.start()?;
    container.steps(3)?;
    complete(container, tests)?;
    saved(&container.checkpoint_with("running", &["--leave-running"])?)?;
    container.steps(3)?;
    container.checkpoint("stopped", false)?;
    // The last one is an image of a restored container.
    for name in ["stopped", "running", "again-running"] {
        container.try_verb("delete", &["--force"])?;
        container.bundle.write_spec(&engines)?;
        let _ = fs::remove_file(container.status_file());
        container.restore(name).with_context(|| format!("restore of {name}"))?;
        container.steps(5)?;
        complete(container, tests)?;
        saved(&container.checkpoint_with(&format!("again-{name}"), &["--leave-running"])?)?;
        container.steps(3)?;
    }
    Ok(())
}

/// What the legacy mode shows below /proc.
const IN_PROC: [&str; 2] =
    ["-e /proc/driver/nvidia/gpus/0000:01:00.0/information", "-e /proc/driver/nvidia/params"];

fn in_front(tools: &Tools, mode: &str, tests: &[&str]) -> Result<()> {
    let place = Place::new(tools)?;
    let toolkit = Toolkit::install(&place)?;
    let mut container = asking(&place)?;
    container.runtime = toolkit.runtime(mode, &tools.program("phos-runc"))?;
    round_trip(&container, tests)
}

fn behind(tools: &Tools, mode: &str, tests: &[&str]) -> Result<()> {
    let mut place = Place::new(tools)?;
    let toolkit = Toolkit::install(&place)?;
    // In front the hooks are those of a newer version.
    fs::create_dir(toolkit.folder.join("older"))?;
    let runtime = toolkit.runtime(mode, &tools.runc)?;
    place.env.insert("PHOS_LOWER_RUNTIME".into(), runtime.into());
    let container = asking(&place)?;
    round_trip(&container, tests)
}

#[test]
fn nvidias_runtime_in_front_with_cdi() {
    sandboxed("nvidias_runtime_in_front_with_cdi", |tools| in_front(tools, "cdi", &[]).unwrap());
}

#[test]
fn nvidias_runtime_in_front_with_its_legacy_hook() {
    sandboxed("nvidias_runtime_in_front_with_its_legacy_hook", |tools| {
        in_front(tools, "legacy", &IN_PROC).unwrap();
    });
}

#[test]
fn nvidias_runtime_behind_with_cdi() {
    sandboxed("nvidias_runtime_behind_with_cdi", |tools| behind(tools, "cdi", &[]).unwrap());
}

#[test]
fn nvidias_runtime_behind_with_its_legacy_hook() {
    sandboxed("nvidias_runtime_behind_with_its_legacy_hook", |tools| {
        behind(tools, "legacy", &IN_PROC).unwrap();
    });
}

/// The sample of an engine's container: steps that follow each other, all verified.
fn steps(bundle: &Bundle, more: usize) -> Result<u64> {
    let lines = status::wait_for(&bundle.out.join("status"), more, Duration::from_secs(60))?;
    status::check(&lines)?;
    Ok(lines.last().map_or(0, |l| l.step))
}

/// A root file system without a driver.
fn root(place: &Place) -> Result<Bundle> {
    Bundle::make(&place.tools, &place.path("engine"), "unused", &[], &Gpu::No)
}

/// The container's memory was parked, which the driver alone cannot.
fn parked(place: &Place) -> Result<()> {
    saved(&place.report()?)
}

/// In place, or (`export`) from an archive under another name once the container is gone.
fn podman(tools: &Tools, device: &str, export: bool) -> Result<()> {
    let place = Place::new(tools)?;
    let toolkit = Toolkit::install(&place)?;
    let _folder = CdiFolder::of(&place, &toolkit)?;
    let bundle = root(&place)?;
    let engine = Podman::new(&place)?;
    engine.import(&bundle, "sample")?;
    let volume = format!("{}:/out", bundle.out.display());
    let options = ["--name", "box", "--network", "none", "--device", device, "-v", &volume];
    engine.run_image(&options, "sample", &SAMPLE[..3])?;
    steps(&bundle, 5)?;
    if export {
        let archive = place.path("export.tar.gz").display().to_string();
        engine.run(&["container", "checkpoint", "--export", &archive, "box"])?;
        parked(&place)?;
        engine.run(&["rm", "-f", "box"])?;
        engine.run(&["container", "restore", "--import", &archive, "--name", "box"])?;
    } else {
        engine.run(&["container", "checkpoint", "--leave-running", "box"])?;
        parked(&place)?;
        steps(&bundle, 3)?;
        engine.run(&["container", "checkpoint", "box"])?;
        engine.run(&["container", "restore", "box"])?;
    }
    steps(&bundle, 5)?;
    engine.run(&["exec", "box", "/bin/busybox", "test", "-c", "/dev/simgpu0"]).map(|_| ())
}

#[test]
fn podman_with_a_hand_written_cdi_specification() {
    sandboxed("podman_with_a_hand_written_cdi_specification", |tools| {
        if present("podman") {
            podman(tools, "phos.example/simgpu=0", false).unwrap();
        }
    });
}

#[test]
fn podman_with_a_generated_cdi_specification() {
    sandboxed("podman_with_a_generated_cdi_specification", |tools| {
        if present("podman") {
            podman(tools, "nvidia.com/gpu=all", true).unwrap();
        }
    });
}

/// Docker's runtime is NVIDIA's, which stands in front of phos-runc. Docker writes a container's configuration anew for a
/// restore and asks no toolkit.
fn docker(tools: &Tools) -> Result<()> {
    let mut place = Place::new(tools)?;
    let toolkit = Toolkit::install(&place)?;
    let bundle = root(&place)?;
    let front = place.path("front");
    fs::create_dir(&front)?;
    symlink(toolkit.runtime("cdi", &tools.program("phos-runc"))?, front.join("phos-runc"))?;
    place.tools.built = front;
    let engine = Docker::start(&place)?;
    engine.import(&bundle, "sample")?;
    let volume = format!("{}:/out", bundle.out.display());
    for mode in ["cdi", "legacy"] {
        toolkit.runtime(mode, &tools.program("phos-runc"))?;
        let _ = fs::remove_file(bundle.out.join("status"));
        let run = ["run", "-d", "--name", mode, "--runtime", "phos", "--network", "none", "-v", &volume];
        let gpus = ["-e", "NVIDIA_VISIBLE_DEVICES=all", "sample"];
        engine.run(&[&run[..], &gpus, &SAMPLE[..3]].concat())?;
        steps(&bundle, 5)?;
        let checkpoint = || engine.run(&["checkpoint", "create", mode, "first"]);
        // Docker freezes the container with runc's own `pause`, which gives up on a busy machine.
        checkpoint().or_else(|_| checkpoint())?;
        parked(&place)?;
        engine.run(&["start", "--checkpoint", "first", mode])?;
        steps(&bundle, 5)?;
        engine.run(&["exec", mode, "/bin/busybox", "test", "-S", "/run/nvidia-persistenced/socket"])?;
        engine.run(&["rm", "-f", mode])?;
    }
    Ok(())
}

#[test]
fn docker_with_nvidias_runtime() {
    sandboxed("docker_with_nvidias_runtime", |tools| {
        if present("dockerd") {
            docker(tools).unwrap();
        }
    });
}

/// Docker itself makes the edits of a CDI specification, from version 25 on.
fn docker_cdi(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let toolkit = Toolkit::install(&place)?;
    let _folder = CdiFolder::of(&place, &toolkit)?;
    let bundle = root(&place)?;
    let engine = Docker::start(&place)?;
    engine.import(&bundle, "sample")?;
    let volume = format!("{}:/out", bundle.out.display());
    let run = ["run", "-d", "--name", "box", "--runtime", "phos", "--network", "none", "-v", &volume];
    let gpus = ["--device", "nvidia.com/gpu=all", "--security-opt", "seccomp=unconfined", "sample"];
    engine.run(&[&run[..], &gpus, &SAMPLE[..3]].concat())?;
    steps(&bundle, 5)?;
    let checkpoint = || engine.run(&["checkpoint", "create", "box", "first"]);
    checkpoint().or_else(|_| checkpoint())?;
    parked(&place)?;
    engine.run(&["start", "--checkpoint", "first", "box"])?;
    steps(&bundle, 5)?;
    engine.run(&["exec", "box", "/bin/busybox", "test", "-S", "/run/nvidia-persistenced/socket"])?;
    engine.run(&["rm", "-f", "box"]).map(|_| ())
}

#[test]
fn docker_of_debian_13_with_a_generated_cdi_specification() {
    const NAME: &str = "docker_of_debian_13_with_a_generated_cdi_specification";
    let debian = debian(13);
    if !debian.join(".packages").exists() {
        assert!(
            std::env::var("CI").is_err(),
            "no engines of Debian 13: run integration/scripts/setup.sh engines"
        );
        eprintln!("skipped {NAME}: no engines of Debian 13 (integration/scripts/setup.sh engines)");
        return;
    }
    sandboxed_in(Some(&debian), NAME, |tools| docker_cdi(tools).unwrap());
}

/// The same driver's files elsewhere are found by their names; one that is not there is named, and nothing is begun.
fn moved(tools: &Tools) -> Result<()> {
    let mut place = Place::new(tools)?;
    let toolkit = Toolkit::install(&place)?;
    let (driver, elsewhere) = (toolkit.folder.join("driver"), toolkit.folder.join("elsewhere"));
    let library = place.path("libcuda.so.1");
    symlink(driver.join(DRIVER), &library)?;
    place.env.insert("PHOS_LIBCUDA".into(), library.clone().into());
    let mut container = asking(&place)?;
    container.runtime = toolkit.runtime("cdi", &tools.program("phos-runc"))?;
    let engines = container.bundle.read_spec()?;
    container.start()?;
    container.steps(3)?;
    container.checkpoint("first", false)?;
    container.verb("delete", &["--force"])?;
    container.bundle.write_spec(&engines)?;

    fs::rename(&driver, &elsewhere)?;
    fs::remove_file(&library)?;
    symlink(elsewhere.join(DRIVER), &library)?;
    let other = elsewhere.join("libnvidia-ml.so.580.159.04");
    fs::remove_file(&other)?;
    let refused = container.try_restore("first")?;
    let mounted = format!("{LIBRARIES}/libnvidia-ml.so.580.159.04");
    let said = container.last_error()?;
    ensure!(refused.status == 1 && said.lines().count() == 1, "{said}");
    ensure!(said.contains(&mounted) && said.contains("which this host lacks"), "{said}");
    ensure!(container.bundle.read_spec()? == engines, "the engine's configuration is as it was");
    ensure!(fs::read_dir(place.path("state"))?.count() == 0, "nothing is left of it");

    fs::write(&other, "")?;
    container.restore("first")?;
    container.steps(5)?;
    complete(&container, &[])
}

#[test]
fn a_driver_that_has_moved_is_found_again_or_refused() {
    sandboxed("a_driver_that_has_moved_is_found_again_or_refused", |tools| moved(tools).unwrap());
}
