//! `ctr task checkpoint`, `ctr container checkpoint`, `ctr container restore`.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use phos_integration::container::{Ended, Place};
use phos_integration::containerd::Containerd;
use phos_integration::engine::differing;
use phos_integration::processes::{process_with, wait_until};
use phos_integration::root;
use phos_integration::tools::Tools;

use crate::wrong::{
    HANGING, hindrances, impatient, refused_read_only, refused_while_busy, refused_while_damaged,
    refused_while_silent, refused_without_space, restore_hindrances,
};
use crate::{
    SAMPLE, SECCOMP, documented, done, generations, open_folder, patiently, refused, sample_root,
    slow_runtime, steps, steps_again, user,
};

/// `ctr` gives a device its own path only, so the annotation says that this is a container with a GPU.
const DEVICE: [&str; 4] = ["--annotation", "phos.inject=mount", "--device", "/dev/fuse"];
/// The sample with its lines in the container's memory, so that a clone has them of its own.
const INSIDE: [&str; 5] = ["/usr/bin/phos-sample", "--out", "/run/status", "--mib", "16"];
const IMAGE: &str = "local/sample:1";

/// The status lines of a container that keeps them in its memory.
fn inside(engine: &Containerd<'_>, name: &str) -> Result<PathBuf> {
    Ok(format!("/proc/{}/root/run/status", engine.task(name)?.0).into())
}

fn try_checkpoint(engine: &Containerd<'_>, container: &str, image: &str) -> Result<Ended> {
    patiently(|| engine.try_run(&["container", "checkpoint", "--task", "--image", "--rw", container, image]))
}

fn clones(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = sample_root(&place)?;
    let engine = Containerd::start(&place)?;
    documented("containerd", &engine.run(&["version"])?)?;
    engine.import(&bundle, IMAGE)?;
    engine.run_container(&DEVICE, IMAGE, "box", &INSIDE)?;
    let original = inside(&engine, "box")?;
    steps(&original, 5)?;
    done(try_checkpoint(&engine, "box", "local/checkpoint:1")?)?;
    // The clone brings the lines so far with it, and goes on from there.
    let before = steps(&original, 5)?;
    let restore =
        || engine.try_run(&["container", "restore", "--live", "--rw", "clone", "local/checkpoint:1"]);
    let runc = done(place.command(&tools.runc, &["--version"], false)?)?;
    let original = if runc.starts_with("runc version 1.1.") {
        done(restore()?)?;
        steps(&inside(&engine, "clone")?, 5)?;
        ensure!(steps(&original, 5)? > before);
        engine.end("clone")?;
        original
    } else {
        // The clone's cgroup is the original's, and a newer runc wants it empty.
        refused(&restore()?, &["cgroup is not empty"])?;
        steps(&original, 5)?;
        engine.end("box")?;
        engine.try_run(&["container", "rm", "clone"])?;
        done(restore()?)?;
        steps(&inside(&engine, "clone")?, 5)?;
        engine.end("clone")?;
        engine.run_container(&DEVICE, IMAGE, "box", &INSIDE)?;
        inside(&engine, "box")?
    };
    steps(&original, 5)?;
    // Paused by hand, which `ctr` refuses to checkpoint: it stays so.
    engine.run(&["task", "pause", "box"])?;
    refused(&try_checkpoint(&engine, "box", "local/checkpoint:2")?, &["paused"])?;
    ensure!(engine.task("box")?.1 == "PAUSED");
    engine.run(&["task", "resume", "box"])?;
    steps(&original, 5)?;
    // Images in folders: of one that runs on, and of one that is ended.
    let folder = |name: &str| place.path(name).display().to_string();
    let (running, ended) = (folder("running"), folder("ended"));
    let checkpoint =
        |words: &[&str]| patiently(|| engine.try_run(&[&["task", "checkpoint"], words, &["box"]].concat()));
    done(checkpoint(&["--image-path", &running])?)?;
    steps(&original, 5)?;
    done(checkpoint(&["--image-path", &ended, "--exit"])?)?;
    ensure!(engine.task("box")?.1 == "STOPPED");
    let phos = tools.program("phos-runc");
    for image in [&running, &ended] {
        done(place.command(&phos, &["inspect", "--verify", image], false)?)?;
    }
    Ok(())
}

generations!(checkpoints, "containerd", super::clones);

/// What is wrong reaches the person in words, and changes nothing: of a container with limits, a seccomp profile, a root
/// file system that cannot be written, the host's network and pipes to a log.
fn refusals(tools: &Tools) -> Result<()> {
    let place = impatient(tools)?;
    let bundle = sample_root(&place)?;
    let engine = Containerd::start(&place)?;
    engine.import(&bundle, IMAGE)?;
    let out = open_folder(&place, "user-out")?;
    let volume = format!("type=bind,src={},dst=/out,options=rbind:rw", out.display());
    let profile = place.path("seccomp.json");
    fs::write(&profile, SECCOMP)?;
    let profile = profile.display().to_string();
    let log = format!("file://{}", place.path("box.log").display());
    let shape = ["--net-host", "--read-only", "--memory-limit", "536870912", "--log-uri", &log];
    let more = ["--seccomp", "--seccomp-profile", &profile, "--mount", &volume];
    let options = [&DEVICE[..], &shape, &more, user()].concat();
    engine.run_container(&options, IMAGE, "box", &[&SAMPLE[..], &HANGING].concat())?;
    let status = out.join("status");
    steps(&status, 5)?;
    let leave_running = || try_checkpoint(&engine, "box", "local/bad:1");
    for (name, value, words) in hindrances(&place)? {
        refused(&differing(&place, name, &value, leave_running)?, &[words])?;
        steps(&status, 3)?;
    }
    refused_while_busy(&out, leave_running)?;
    // Once for each engine: it takes long.
    if !root::entered() {
        refused_while_silent(&out, leave_running)?;
    }
    let folder = place.path("images");
    let image = folder.join("image").display().to_string();
    let into_folder = || patiently(|| engine.try_run(&["task", "checkpoint", "--image-path", &image, "box"]));
    refused_without_space(&folder, into_folder)?;
    refused_read_only(&folder, "name a folder that can be written", into_folder)?;
    fs::create_dir_all(&image)?;
    fs::write(Path::new(&image).join("mine"), "")?;
    refused(&into_folder()?, &["is not empty"])?;
    // containerd's own folder, if none is named.
    refused_without_space(&place.path("run"), leave_running)?;
    refused_read_only(&place.path("run"), "read-only file system", leave_running)?;
    steps(&status, 3)?;
    done(try_checkpoint(&engine, "box", "local/checkpoint:1")?)?;
    let stood_at = steps(&status, 5)?;
    engine.remove("box")?;
    refused(&leave_running()?, &["not found"])?;
    fs::remove_file(&status)?;
    // A restore that fails leaves its file system behind, by the clone's name.
    let tries = Cell::new(0);
    let restore = || {
        tries.set(tries.get() + 1);
        let clone = format!("clone-{}", tries.get());
        engine.try_run(&["container", "restore", "--live", "--rw", &clone, "local/checkpoint:1"])
    };
    for (name, value, words) in restore_hindrances(&place)? {
        refused(&differing(&place, name, &value, restore)?, &[words])?;
    }
    // containerd keeps the image as an archive.
    let blob = engine.blob_with("phos.json")?.display().to_string();
    let unpacked = open_folder(&place, "unpacked")?;
    let folder = unpacked.display().to_string();
    let tar = |words: &[&str]| done(place.command(Path::new("/usr/bin/tar"), words, false)?);
    tar(&["-C", &folder, "-xf", &blob])?;
    refused_while_damaged(&unpacked, || {
        tar(&["-C", &folder, "-cf", &blob, "."])?;
        restore()
    })?;
    tar(&["-C", &folder, "-cf", &blob, "."])?;
    done(restore()?)?;
    steps_again(&status, stood_at)
}

generations!(refusals_in_words, "containerd", super::refusals);

/// The runtime is killed in the middle of a checkpoint, first alone, then with containerd's shim: the keeper finishes.
fn killed(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = sample_root(&place)?;
    let engine = Containerd::start(&place)?;
    engine.import(&bundle, IMAGE)?;
    engine.run_container(&DEVICE, IMAGE, "box", &INSIDE)?;
    let status = inside(&engine, "box")?;
    steps(&status, 3)?;
    let slow = slow_runtime(&place)?;
    let dumping = place.path("dumping");
    // Kills a process while the lower runtime is at work; returns how `ctr` ended.
    let while_dumping = |image: &str, words: &[&str]| -> Result<Ended> {
        let _ = fs::remove_file(&dumping);
        differing(&place, "PHOS_LOWER_RUNTIME", &slow, || {
            std::thread::scope(|scope| {
                let checkpoint =
                    scope.spawn(|| engine.try_run(&["task", "checkpoint", "--image-path", image, "box"]));
                wait_until("the dump", || dumping.exists().then_some(()))?;
                let pid = process_with(words).context("the process to kill")?;
                kill(Pid::from_raw(pid), Signal::SIGKILL)?;
                checkpoint.join().expect("the thread ends")
            })
        })
    };
    let keeper_ends =
        || wait_until("the keeper's end", || process_with(&["__keeper"]).is_none().then_some(()));

    let image = place.path("first");
    let ended = while_dumping(&image.display().to_string(), &["checkpoint", "--image-path", "--log-format"])?;
    refused(&ended, &["137"])?;
    keeper_ends()?;
    ensure!(engine.task("box")?.1 == "RUNNING");
    done(place.command(
        &tools.program("phos-runc"),
        &["inspect", "--verify", &image.display().to_string()],
        false,
    )?)?;
    steps(&status, 5)?;

    let image = place.path("second");
    let ended = while_dumping(&image.display().to_string(), &["-id", "box", "-namespace"])?;
    ensure!(ended.status != 0, "{ended:?}");
    keeper_ends()?;
    // containerd takes a container without a shim for dead and removes it; nothing of it is left.
    wait_until("the container's end", || engine.task("box").is_err().then_some(()))?;
    wait_until("its folder's end", || {
        fs::read_dir(place.path("state")).ok()?.next().is_none().then_some(())
    })?;
    ensure!(process_with(&["/usr/bin/phos-sample"]).is_none());
    engine.try_run(&["container", "rm", "box"])?;
    engine.run_container(&DEVICE, IMAGE, "box", &INSIDE)?;
    steps(&inside(&engine, "box")?, 3)?;
    done(try_checkpoint(&engine, "box", "local/checkpoint:1")?)?;
    steps(&inside(&engine, "box")?, 3).map(|_| ())
}

generations!(killed_in_mid_checkpoint, "containerd", super::killed);
