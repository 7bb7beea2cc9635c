//! `docker checkpoint create`, `docker start --checkpoint`.

use std::fs;

use anyhow::{Result, ensure};
use phos_integration::container::{Ended, Place};
use phos_integration::engine::{Docker, differing};
use phos_integration::root;
use phos_integration::status;
use phos_integration::tools::Tools;

use crate::wrong::{
    HANGING, hindrances, impatient, refused_read_only, refused_while_busy, refused_while_damaged,
    refused_while_silent, refused_without_space, restore_hindrances,
};
use crate::{
    DEVICE, SAMPLE, documented, done, generations, open_folder, patiently, refused, sample_root, steps,
    steps_again, user,
};

/// A checkpoint, whatever comes of it.
fn try_checkpoint(engine: &Docker<'_>, options: &[&str], name: &str) -> Result<Ended> {
    engine.settle()?;
    patiently(|| engine.try_run(&[&["checkpoint", "create"], options, &["box", name]].concat()))
}

fn checkpoint(engine: &Docker<'_>, options: &[&str], name: &str) -> Result<()> {
    done(try_checkpoint(engine, options, name)?).map(|_| ())
}

/// A start from a checkpoint, whatever comes of it.
fn try_start(engine: &Docker<'_>, name: &str) -> Result<Ended> {
    engine.settle()?;
    engine.try_run(&["start", "--checkpoint", name, "box"])
}

fn start(engine: &Docker<'_>, name: &str) -> Result<()> {
    done(try_start(engine, name)?).map(|_| ())
}

/// A network with which this version restores: 28 looks for the namespace of one of its own in a process that is not there yet,
/// with any runtime.
fn network(engine: &Docker<'_>) -> Result<&'static str> {
    let version = engine.run(&["version", "--format", "{{.Server.Version}}"])?;
    let major: u32 = version.split('.').next().and_then(|v| v.parse().ok()).unwrap_or(0);
    Ok(if major < 28 { "none" } else { "host" })
}

fn round_trips(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = sample_root(&place)?;
    let engine = Docker::start(&place)?;
    documented("Docker", &engine.run(&["version", "--format", "{{.Server.Version}}"])?)?;
    engine.import(&bundle, "sample")?;
    let volume = format!("{}:/out", bundle.out.display());
    let run =
        ["run", "-d", "--name", "box", "--runtime", "phos", "--network", network(&engine)?, "-v", &volume];
    engine.run(&[&run[..], &DEVICE, &["sample"], &SAMPLE].concat())?;
    let (status, joined) = (bundle.out.join("status"), bundle.out.join("joined"));
    steps(&status, 5)?;
    // A second program on the GPU joins. It is not the image's, and goes on.
    engine.run(&["exec", "-d", "box", "/usr/bin/phos-sample", "--out", "/out/joined", "--mib", "16"])?;
    steps(&joined, 3)?;
    checkpoint(&engine, &["--leave-running"], "first")?;
    let after_first = steps(&status, 0)?;
    steps(&status, 5)?;
    steps(&joined, 3)?;
    checkpoint(&engine, &[], "second")?;
    let listed = engine.run(&["checkpoint", "ls", "box"])?;
    ensure!(listed.contains("first") && listed.contains("second"), "{listed}");
    ensure!(engine.run(&["ps", "-q"])?.trim().is_empty(), "the container still runs");
    start(&engine, "second")?;
    steps(&status, 10)?;
    // A name that is taken.
    refused(&try_checkpoint(&engine, &["--leave-running"], "first")?, &["first", "exists"])?;
    steps(&status, 3)?;
    // The earlier of two checkpoints: the program goes on from where it was then.
    engine.run(&["kill", "box"])?;
    engine.run(&["wait", "box"])?;
    fs::remove_file(&status)?;
    start(&engine, "first")?;
    steps_again(&status, after_first)?;
    // Paused by hand: it is paused afterwards too.
    engine.run(&["pause", "box"])?;
    checkpoint(&engine, &["--leave-running"], "paused")?;
    ensure!(engine.run(&["inspect", "--format", "{{.State.Status}}", "box"])?.trim() == "paused");
    let stands = steps(&status, 0)?;
    ensure!(steps(&status, 0)? == stands, "it runs");
    engine.run(&["unpause", "box"])?;
    steps(&status, 5).map(|_| ())
}

generations!(checkpoints, "dockerd", super::round_trips);

/// With a terminal, a user, limits, a seccomp profile, a root file system that cannot be written, the host's network; and
/// with pipes.
fn shapes(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = sample_root(&place)?;
    let engine = Docker::start(&place)?;
    engine.import(&bundle, "sample")?;
    let out = open_folder(&place, "user-out")?;
    let volume = format!("{}:/out", out.display());
    let profile = place.path("seccomp.json");
    fs::write(&profile, crate::SECCOMP)?;
    let profile = format!("seccomp={}", profile.display());
    let read_only = format!("{}:/in:ro", place.tools.built.display());
    let run = [
        "run",
        "-d",
        "-t",
        "--name",
        "box",
        "--runtime",
        "phos",
        "--network",
        "host",
        "--read-only",
        "--memory",
        "512m",
    ];
    let more = ["--security-opt", &profile, "-v", &volume, "-v", &read_only];
    engine.run(&[&run[..], &more, user(), &DEVICE, &["sample"], &SAMPLE].concat())?;
    let status = out.join("status");
    steps(&status, 5)?;
    checkpoint(&engine, &["--leave-running"], "first")?;
    steps(&status, 5)?;
    checkpoint(&engine, &[], "second")?;
    start(&engine, "second")?;
    steps(&status, 5)?;
    engine.run(&["rm", "-f", "box"])?;

    // What it prints goes through pipes to the engine's log, before and after.
    let run = ["run", "-d", "-i", "--name", "box", "--runtime", "phos", "--network", network(&engine)?];
    let sample = ["/usr/bin/phos-sample", "--out", "/dev/stdout", "--mib", "16"];
    engine.run(&[&run[..], &DEVICE, &["sample"], &sample].concat())?;
    let printed = place.path("printed");
    let logged = |wanted: usize| -> Result<()> {
        for _ in 0..200 {
            fs::write(&printed, engine.run(&["logs", "box"])?)?;
            let lines = status::read(&printed)?;
            status::check(&lines)?;
            if lines.len() >= wanted {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        anyhow::bail!("{}", fs::read_to_string(&printed)?)
    };
    logged(5)?;
    checkpoint(&engine, &[], "first")?;
    start(&engine, "first")?;
    let before = status::read(&printed)?.len();
    logged(before + 20)
}

generations!(shapes_of_containers, "dockerd", super::shapes);

/// What is wrong reaches the person in words, and changes nothing.
fn refusals(tools: &Tools) -> Result<()> {
    let place = impatient(tools)?;
    let bundle = sample_root(&place)?;
    let engine = Docker::start(&place)?;
    engine.import(&bundle, "sample")?;
    let volume = format!("{}:/out", bundle.out.display());
    let run =
        ["run", "-d", "--name", "box", "--runtime", "phos", "--network", network(&engine)?, "-v", &volume];
    engine.run(&[&run[..], &DEVICE, &["sample"], &SAMPLE, &HANGING].concat())?;
    let status = bundle.out.join("status");
    steps(&status, 3)?;
    let leave_running = || try_checkpoint(&engine, &["--leave-running"], "bad");
    for (name, value, words) in hindrances(&place)? {
        refused(&differing(&place, name, &value, leave_running)?, &[words])?;
        steps(&status, 3)?;
    }
    refused_while_busy(&bundle.out, leave_running)?;
    // Once for each engine: it takes long.
    if !root::entered() {
        refused_while_silent(&bundle.out, leave_running)?;
    }
    // The folder of Docker's containerd, where the runtime writes; and the one that the person names.
    refused_without_space(&place.path("run"), leave_running)?;
    refused_read_only(&place.path("run"), "read-only file system", leave_running)?;
    let elsewhere = place.path("elsewhere");
    let folder = elsewhere.display().to_string();
    refused_read_only(&elsewhere, "read-only file system", || {
        try_checkpoint(&engine, &["--leave-running", "--checkpoint-dir", &folder], "bad")
    })?;
    steps(&status, 3)?;
    checkpoint(&engine, &[], "good")?;
    refused(&leave_running()?, &["not running"])?;
    let restart = || try_start(&engine, "good");
    for (name, value, words) in restore_hindrances(&place)? {
        refused(&differing(&place, name, &value, restart)?, &[words])?;
    }
    refused_while_damaged(&place.path("docker"), restart)?;
    done(restart()?)?;
    steps(&status, 5).map(|_| ())
}

generations!(refusals_in_words, "dockerd", super::refusals);
