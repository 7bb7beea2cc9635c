//! The commands people type, on real engines: Docker, Podman and containerd with their daemons and monitors.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use phos_integration::bundle::{Bundle, Gpu};
use phos_integration::container::Place;
use phos_integration::containerd::Containerd;
use phos_integration::engine::{Docker, Podman, present};
use phos_integration::sandbox::sandboxed;
use phos_integration::status;
use phos_integration::tools::Tools;

/// The sample in any engine: its GPU, its output folder.
const DEVICE: [&str; 2] = ["--device", "/dev/fuse:/dev/simgpu0"];
const SAMPLE: [&str; 5] = ["/usr/bin/phos-sample", "--out", "/out/status", "--mib", "24"];

/// A root file system with the sample in it.
fn root(place: &Place) -> Result<Bundle> {
    Bundle::make(&place.tools, &place.path("engine"), "unused", &[], &Gpu::Simulated)
}

/// Waits for further steps; every line so far must be right.
fn steps(out: &Path, more: usize) -> Result<u64> {
    let lines = status::wait_for(&out.join("status"), more, Duration::from_secs(60))?;
    status::check(&lines)?;
    Ok(lines.last().map_or(0, |l| l.step))
}

/// containerd and Docker freeze a container before its checkpoint, with runc's own `pause`. On a busy machine with the
/// old cgroup hierarchy runc gives that up («unable to freeze»); a person would try again.
fn frozen_first(checkpoint: impl Fn() -> Result<String>) -> Result<String> {
    for _ in 0..5 {
        match checkpoint() {
            Err(e) if e.to_string().contains("unable to freeze") => eprintln!("again: {e}"),
            other => return other,
        }
    }
    checkpoint()
}

fn docker(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = root(&place)?;
    let engine = Docker::start(&place)?;
    engine.import(&bundle, "sample")?;
    let volume = format!("{}:/out", bundle.out.display());
    let run = ["run", "-d", "--name", "box", "--runtime", "phos", "--network", "none", "-v", &volume];
    engine.run(&[&run[..], &DEVICE, &["sample"], &SAMPLE].concat())?;
    steps(&bundle.out, 5)?;
    frozen_first(|| engine.run(&["checkpoint", "create", "--leave-running", "box", "first"]))?;
    let after_first = steps(&bundle.out, 0)?;
    steps(&bundle.out, 5)?;
    frozen_first(|| engine.run(&["checkpoint", "create", "box", "second"]))?;
    let listed = engine.run(&["checkpoint", "ls", "box"])?;
    ensure!(listed.contains("first") && listed.contains("second"), "{listed}");
    ensure!(engine.run(&["ps", "-q"])?.trim().is_empty(), "the container still runs");
    engine.run(&["start", "--checkpoint", "second", "box"])?;
    steps(&bundle.out, 10)?;
    // An error reaches the person as a sentence.
    let refused = engine.try_run(&["checkpoint", "create", "--leave-running", "box", "first"])?;
    ensure!(refused.status != 0);
    steps(&bundle.out, 3)?;
    // The earlier of two checkpoints: the program goes on from where it was then.
    engine.run(&["kill", "box"])?;
    engine.run(&["wait", "box"])?;
    fs::remove_file(bundle.out.join("status"))?;
    engine.run(&["start", "--checkpoint", "first", "box"])?;
    let lines = status::wait_for(&bundle.out.join("status"), 5, Duration::from_secs(60))?;
    status::check(&lines)?;
    let again = lines[0].step;
    ensure!(
        again > 1 && again <= after_first + 1,
        "from the first checkpoint, before {after_first}: {again}"
    );
    Ok(())
}

#[test]
fn docker_checkpoint_create_and_start() {
    sandboxed("docker_checkpoint_create_and_start", |tools| {
        if present("dockerd") {
            docker(tools).unwrap();
        }
    });
}

fn podman(tools: &Tools) -> Result<()> {
    let mut place = Place::new(tools)?;
    let bundle = root(&place)?;
    let rootfs = bundle.path.join("rootfs").display().to_string();
    let volume = format!("{}:/out", bundle.out.display());
    {
        let engine = Podman::new(&place)?;
        let options = ["--name", "box", "--network", "none", "-v", &volume];
        engine.run_container(&[&options[..], &DEVICE].concat(), &rootfs, &SAMPLE)?;
        steps(&bundle.out, 5)?;
        engine.run(&["container", "checkpoint", "--leave-running", "box"])?;
        steps(&bundle.out, 5)?;
        engine.run(&["container", "checkpoint", "box"])?;
        engine.run(&["container", "restore", "--keep", "box"])?;
        steps(&bundle.out, 5)?;
        engine.run(&["container", "checkpoint", "--print-stats", "box"])?;
        engine.run(&["container", "restore", "box"])?;
        steps(&bundle.out, 5)?;
        let archive = place.path("export.tar.gz").display().to_string();
        engine.run(&["container", "checkpoint", "--leave-running", "--export", &archive, "box"])?;
        ensure!(fs::metadata(&archive)?.len() > 0);
        steps(&bundle.out, 5)?;
    }
    // What is wrong is said in words that come through Podman.
    place.env.insert("PHOS_CRIU".into(), "/does/not/exist".into());
    let engine = Podman::new(&place)?;
    fs::remove_file(bundle.out.join("status"))?;
    let options = ["--name", "other", "--network", "none", "-v", &volume];
    engine.run_container(&[&options[..], &DEVICE].concat(), &rootfs, &SAMPLE)?;
    steps(&bundle.out, 3)?;
    let refused = engine.try_run(&["container", "checkpoint", "other"])?;
    ensure!(refused.status != 0 && refused.text.contains("no CRIU found"), "{refused:?}");
    steps(&bundle.out, 3)?;
    Ok(())
}

/// From an archive under another name, once the container it was made of is gone, and of a container with limits.
fn podman_import(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = root(&place)?;
    let engine = Podman::new(&place)?;
    engine.import(&bundle, "sample")?;
    let volume = format!("{}:/out", bundle.out.display());
    let options = ["--name", "box", "--network", "none", "--memory", "512m", "--read-only", "-v", &volume];
    engine.run_image(&[&options[..], &DEVICE].concat(), "sample", &SAMPLE)?;
    steps(&bundle.out, 5)?;
    let archive = place.path("export.tar.gz").display().to_string();
    engine.run(&["container", "checkpoint", "--export", &archive, "box"])?;
    let stood_at = steps(&bundle.out, 0)?;
    engine.run(&["rm", "-f", "box"])?;
    engine.run(&["container", "restore", "--import", &archive, "--name", "other"])?;
    let again = steps(&bundle.out, 5)?;
    ensure!(again >= stood_at + 5, "{again} after {stood_at}");
    ensure!(engine.run(&["ps", "--format", "{{.Names}}"])?.trim() == "other");
    Ok(())
}

#[test]
fn podman_import_under_another_name() {
    sandboxed("podman_import_under_another_name", |tools| {
        if present("podman") {
            podman_import(tools).unwrap();
        }
    });
}

#[test]
fn podman_container_checkpoint_and_restore() {
    sandboxed("podman_container_checkpoint_and_restore", |tools| {
        if present("podman") {
            podman(tools).unwrap();
        }
    });
}

fn containerd(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = root(&place)?;
    let engine = Containerd::start(&place)?;
    engine.import(&bundle, "local/sample:1")?;
    let volume = format!("type=bind,src={},dst=/out,options=rbind:rw", bundle.out.display());
    // `ctr` gives a device its own path only, so the annotation says that this is a container with a GPU.
    let options = ["--annotation", "phos.inject=mount", "--device", "/dev/fuse", "--mount", &volume];
    engine.run_container(&options, "local/sample:1", "box", &SAMPLE)?;
    steps(&bundle.out, 5)?;
    let words = ["container", "checkpoint", "--task", "--image", "--rw", "box", "local/checkpoint:1"];
    frozen_first(|| engine.run(&words))?;
    let stood_at = steps(&bundle.out, 5)?;
    engine.remove("box")?;
    fs::remove_file(bundle.out.join("status"))?;
    engine.run(&["container", "restore", "--live", "--rw", "clone", "local/checkpoint:1"])?;
    let again = steps(&bundle.out, 1)?;
    ensure!(again > 1 && again < stood_at + 5, "the clone goes on at step {again}");
    engine.remove("clone")?;
    Ok(())
}

#[test]
fn containerd_checkpoint_and_restore_as_another_container() {
    sandboxed("containerd_checkpoint_and_restore_as_another_container", |tools| {
        if present("containerd") {
            containerd(tools).unwrap();
        }
    });
}
