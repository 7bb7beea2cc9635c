//! `podman container checkpoint`, `podman container restore`.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use nix::mount::{MsFlags, mount, umount};
use phos_integration::container::Place;
use phos_integration::engine::{Podman, differing, remove_cgroup_parent};
use phos_integration::root;
use phos_integration::tools::Tools;

use crate::wrong::{
    HANGING, hindrances, impatient, refused_read_only, refused_while_busy, refused_while_damaged,
    refused_while_silent, refused_without_space, restore_hindrances,
};
use crate::{
    DEVICE, SAMPLE, documented, done, generations, open_folder, refused, sample_root, steps, steps_again,
    user,
};

fn in_place(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = sample_root(&place)?;
    let engine = Podman::new(&place)?;
    documented("Podman", &engine.run(&["--version"])?)?;
    let rootfs = bundle.path.join("rootfs").display().to_string();
    let volume = format!("{}:/out", bundle.out.display());
    let options = ["--name", "box", "--network", "none", "-v", &volume];
    engine.run_container(&[&options[..], &DEVICE].concat(), &rootfs, &SAMPLE)?;
    let (status, joined) = (bundle.out.join("status"), bundle.out.join("joined"));
    steps(&status, 5)?;
    // A second program on the GPU joins. It is not the image's, and goes on.
    engine.run(&["exec", "-d", "box", "/usr/bin/phos-sample", "--out", "/out/joined", "--mib", "16"])?;
    steps(&joined, 3)?;
    engine.run(&["container", "checkpoint", "--leave-running", "box"])?;
    steps(&status, 5)?;
    steps(&joined, 3)?;
    engine.run(&["container", "checkpoint", "box"])?;
    engine.run(&["container", "restore", "--keep", "box"])?;
    steps(&status, 5)?;
    let stats = engine.run(&["container", "checkpoint", "--print-stats", "box"])?;
    ensure!(stats.contains("runtime_checkpoint_duration"), "{stats}");
    let stats = engine.run(&["container", "restore", "--print-stats", "box"])?;
    ensure!(stats.contains("runtime_restore_duration"), "{stats}");
    steps(&status, 5)?;
    // Paused by hand: Podman itself refuses.
    engine.run(&["pause", "box"])?;
    refused(&engine.try_run(&["container", "checkpoint", "--leave-running", "box"])?, &["not running"])?;
    engine.run(&["unpause", "box"])?;
    steps(&status, 3).map(|_| ())
}

generations!(checkpoints_in_place, "podman", super::in_place);

/// An archive and an image become containers of other names, of a container with limits and a terminal.
fn elsewhere(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = sample_root(&place)?;
    let engine = Podman::new(&place)?;
    engine.import(&bundle, "sample")?;
    let out = open_folder(&place, "user-out")?;
    let (volume, status) = (format!("{}:/out", out.display()), out.join("status"));
    let profile = place.path("seccomp.json");
    fs::write(&profile, crate::SECCOMP)?;
    let profile = format!("seccomp={}", profile.display());
    let options =
        ["-t", "--name", "box", "--network", "host", "--memory", "512m", "--read-only", "-v", &volume];
    let more = ["--security-opt", &profile];
    engine.run_image(&[&options[..], &more, user(), &DEVICE].concat(), "sample", &SAMPLE)?;
    steps(&status, 5)?;
    let archive = place.path("export.tar.gz").display().to_string();
    engine.run(&["container", "checkpoint", "--leave-running", "--export", &archive, "box"])?;
    steps(&status, 5)?;
    engine.run(&["container", "checkpoint", "--export", &archive, "box"])?;
    let stood_at = steps(&status, 0)?;
    engine.run(&["rm", "-f", "box"])?;
    fs::remove_file(&status)?;
    engine.run(&["container", "restore", "--import", &archive, "--name", "other"])?;
    steps_again(&status, stood_at)?;
    ensure!(engine.run(&["ps", "--format", "{{.Names}}"])?.trim() == "other");

    engine.run(&["container", "checkpoint", "--create-image", "kept", "other"])?;
    let stood_at = steps(&status, 0)?;
    engine.run(&["rm", "-f", "other"])?;
    fs::remove_file(&status)?;
    engine.run(&["container", "restore", "kept"])?;
    steps_again(&status, stood_at)
}

generations!(archives_and_images, "podman", super::elsewhere);

/// What is wrong reaches the person in words, and changes nothing.
fn refusals(tools: &Tools) -> Result<()> {
    let place = impatient(tools)?;
    let bundle = sample_root(&place)?;
    let engine = Podman::new(&place)?;
    let rootfs = bundle.path.join("rootfs").display().to_string();
    let volume = format!("{}:/out", bundle.out.display());
    let options = ["-i", "--name", "box", "--network", "none", "-v", &volume];
    engine.run_container(&[&options[..], &DEVICE].concat(), &rootfs, &[&SAMPLE[..], &HANGING].concat())?;
    let status = bundle.out.join("status");
    steps(&status, 3)?;
    let leave_running = || engine.try_run(&["container", "checkpoint", "--leave-running", "box"]);
    for (name, value, words) in hindrances(&place)? {
        refused(&differing(&place, name, &value, leave_running)?, &[words])?;
        steps(&status, 3)?;
    }
    refused_while_busy(&bundle.out, leave_running)?;
    // Once for each engine: it takes long.
    if !root::entered() {
        refused_while_silent(&bundle.out, leave_running)?;
    }
    // The folder in Podman's own storage, where the runtime writes; and the one that the person names.
    let configuration = engine.run(&["inspect", "--format", "{{.OCIConfigPath}}", "box"])?;
    let folder = Path::new(configuration.trim()).with_file_name("checkpoint");
    refused_without_space(&folder, leave_running)?;
    refused_read_only(&folder, "cannot be written", leave_running)?;
    let elsewhere = place.path("elsewhere");
    let archive = elsewhere.join("checkpoint.tar").display().to_string();
    refused_read_only(&elsewhere, "read-only file system", || {
        engine.try_run(&["container", "checkpoint", "--leave-running", "--export", &archive, "box"])
    })?;
    steps(&status, 3)?;
    engine.run(&["container", "checkpoint", "box"])?;
    refused(&leave_running()?, &["not running"])?;
    let restore = || engine.try_run(&["container", "restore", "--keep", "box"]);
    for (name, value, words) in restore_hindrances(&place)? {
        refused(&differing(&place, name, &value, restore)?, &[words])?;
    }
    refused_while_damaged(&place.path("podman"), restore)?;
    done(restore()?)?;
    steps(&status, 5).map(|_| ())
}

generations!(refusals_in_words, "podman", super::refusals);

/// crun below phos-runc, as Debian 13's Podman would have it.
fn crun(tools: &Tools) -> Result<()> {
    let mut place = Place::new(tools)?;
    place.env.insert("PHOS_LOWER_RUNTIME".into(), "/usr/bin/crun".into());
    let bundle = sample_root(&place)?;
    // crun runs on either hierarchy, but not where the unified one stands beside the old ones with controllers of its own.
    let unified = Path::new("/sys/fs/cgroup/unified");
    let covered = unified.exists();
    if covered {
        mount(Some("tmpfs"), unified, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    }
    let engine = Podman::new(&place)?;
    documented("crun", &done(place.command(Path::new("/usr/bin/crun"), &["--version"], false)?)?)?;
    let rootfs = bundle.path.join("rootfs").display().to_string();
    let volume = format!("{}:/out", bundle.out.display());
    let options = ["--name", "box", "--network", "none", "-v", &volume];
    engine.run_container(&[&options[..], &DEVICE].concat(), &rootfs, &SAMPLE)?;
    let status = bundle.out.join("status");
    steps(&status, 5)?;
    engine.run(&["container", "checkpoint", "--leave-running", "box"])?;
    steps(&status, 5)?;
    engine.run(&["container", "checkpoint", "box"])?;
    engine.run(&["container", "restore", "box"])?;
    steps(&status, 5)?;
    drop(engine);
    if covered {
        // CRIU finds the covered hierarchy all the same, and makes the container's cgroup in it, with copies of all there are.
        umount(unified)?;
        remove_cgroup_parent(&place);
    }
    Ok(())
}

/// Debian 12's crun is built without CRIU.
#[test]
fn above_crun_debian_13() {
    crate::on(Some(13), concat!(module_path!(), "::above_crun_debian_13"), "crun", crun);
}
