//! Processes of phos-runc are killed in the middle of a checkpoint: the program goes on with the right values, or its
//! image is complete.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use phos_integration::container::{Ended, Place};
use phos_integration::faults::driver;
use phos_integration::processes::{process_with, wait_until};
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

/// A place whose lower runtime stops for a second before each checkpoint (and says so in a file), and then makes it
/// or fails.
fn slow_place(tools: &Tools, fails: bool) -> Result<Place> {
    let mut place = Place::new(tools)?;
    let path = place.path("slow-runc");
    let then = if fails { "exit 1" } else { "exec" };
    let mark = place.path("dumping");
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' checkpoint '*) touch {}; sleep 1; [ '{then}' = exec ] || exit 1 ;; esac\nexec {} \"$@\"\n",
        mark.display(),
        tools.runc.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    place.env.insert("PHOS_LOWER_RUNTIME".into(), path.into());
    Ok(place)
}

fn worker(tools: &Tools) -> Result<()> {
    for fails in [true, false] {
        let place = slow_place(tools, fails)?;
        // Once with memory that two processes share.
        let container = place.sample(if fails { &["--mib", "24"] } else { &["--pair"] })?;
        container.start()?;
        let before = container.steps(3)?.len();
        thread::scope(|scope| {
            let checkpoint = scope.spawn(|| container.try_checkpoint("image", true));
            wait_until("the dump", || place.path("dumping").exists().then_some(()))?;
            let pid = process_with(&["__worker", "checkpoint"]).context("there is a worker")?;
            kill(Pid::from_raw(pid), Signal::SIGKILL)?;
            let ended = checkpoint.join().expect("the thread ends")?;
            ensure!(ended.status == 1, "{ended:?}");
            ensure!(ended.text.contains("runs on"), "{}", ended.text);
            anyhow::Ok(())
        })?;
        ensure!(container.steps(5)?.len() > before);
        ensure!(!container.image("image").join("phos.json").exists(), "no partial image");
        // And a second attempt works.
        if !fails {
            fs::remove_file(place.path("dumping"))?;
            container.checkpoint("second", true)?;
            container.steps(3)?;
        }
    }
    Ok(())
}

#[test]
fn the_program_goes_on_when_the_worker_is_killed() {
    sandboxed("the_program_goes_on_when_the_worker_is_killed", |tools| worker(tools).unwrap());
}

/// The worker dies when the processes are already in CRIU's image and nowhere else: another one finishes it.
fn after_the_dump(tools: &Tools, options: &[&str]) -> Result<()> {
    let mut place = Place::new(tools)?;
    let (path, mark) = (place.path("lingering-runc"), place.path("dumped"));
    let script = format!(
        "#!/bin/sh\n{} \"$@\" || exit $?\ncase \" $* \" in *' checkpoint '*) touch {}; sleep 1 ;; esac\n",
        tools.runc.display(),
        mark.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    place.env.insert("PHOS_LOWER_RUNTIME".into(), path.into());
    let container = place.sample(options)?;
    container.start()?;
    container.steps(3)?;
    thread::scope(|scope| {
        let checkpoint = scope.spawn(|| container.try_checkpoint("image", false));
        wait_until("the dump", || place.path("dumped").exists().then_some(()))?;
        let pid = process_with(&["__worker", "checkpoint"]).context("there is a worker")?;
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        let ended = checkpoint.join().expect("the thread ends")?;
        ensure!(ended.status == 0, "{ended:?}");
        anyhow::Ok(())
    })?;
    container.try_verb("delete", &["--force"])?;
    container.restore("image")?;
    container.steps(5)?;
    Ok(())
}

#[test]
fn the_image_is_finished_when_the_worker_is_killed_after_the_dump() {
    sandboxed("the_image_is_finished_when_the_worker_is_killed_after_the_dump", |tools| {
        after_the_dump(tools, &["--mib", "24"]).unwrap();
        after_the_dump(tools, &["--pair"]).unwrap();
    });
}

fn foreground(tools: &Tools) -> Result<()> {
    let place = slow_place(tools, false)?;
    let container = place.sample(&["--mib", "24"])?;
    container.start()?;
    container.steps(3)?;
    let id = container.id.clone();
    thread::scope(|scope| {
        let checkpoint = scope.spawn(|| container.try_checkpoint("image", false));
        wait_until("the dump", || place.path("dumping").exists().then_some(()))?;
        let pid = process_with(&["checkpoint", "--image-path", &id, "--log-format"])
            .context("there is a foreground")?;
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        checkpoint.join().expect("the thread ends")?;
        // The job goes on, so no other may begin.
        let second = container.try_checkpoint("second", false)?;
        ensure!(second.status == 1 && second.text.contains("under way"), "{second:?}");
        anyhow::Ok(())
    })?;
    // Nobody waits for the worker any more; it finishes all the same.
    wait_until("the image", || container.image("image").join("phos.json").exists().then_some(()))?;
    wait_until("the keeper's end", || process_with(&["__keeper"]).is_none().then_some(()))?;
    container.try_verb("delete", &["--force"])?;
    container.restore("image")?;
    container.steps(5)?;
    Ok(())
}

#[test]
fn the_image_is_finished_when_the_foreground_is_killed() {
    sandboxed("the_image_is_finished_when_the_foreground_is_killed", |tools| foreground(tools).unwrap());
}

fn twice(tools: &Tools) -> Result<()> {
    let place = slow_place(tools, false)?;
    let container = place.sample(&["--mib", "24"])?;
    container.start()?;
    container.steps(3)?;
    thread::scope(|scope| {
        let first = scope.spawn(|| container.try_checkpoint("first", true));
        wait_until("the dump", || place.path("dumping").exists().then_some(()))?;
        let second = container.try_checkpoint("second", true)?;
        ensure!(second.status == 1 && second.text.contains("under way"), "{second:?}");
        let first = first.join().expect("the thread ends")?;
        ensure!(first.status == 0, "{first:?}");
        anyhow::Ok(())
    })?;
    ensure!(container.image("first").join("phos.json").exists() && !container.image("second").exists());
    container.steps(3)?;
    Ok(())
}

#[test]
fn a_second_checkpoint_at_the_same_time_is_refused() {
    sandboxed("a_second_checkpoint_at_the_same_time_is_refused", |tools| twice(tools).unwrap());
}

/// A CRIU that is killed and leaves a process of its own behind, with everything open that it had, and a tmpfs: as it does when it
/// has just begun to look at the kernel.
fn probing(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let (path, probe) = (place.path("killed/criu"), Path::new("/tmp/.criu.move_mount_set_group.aaaaaa"));
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' swrk '*) mkdir {probe}; mount -t tmpfs none {probe}; ( while sleep 1; do :; done ) & kill -9 $$ ;; esac\nexec {} \"$@\"\n",
        tools.criu.display(),
        probe = probe.display(),
    );
    fs::create_dir(place.path("killed"))?;
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    let container = place.sample(&["--mib", "16"])?;
    container.start()?;
    container.steps(3)?;
    container.checkpoint("image", true)?;
    let failing = |command: &dyn Fn() -> Result<Ended>, what: &str| {
        let begun = Instant::now();
        place.overlay([("PHOS_CRIU", path.clone().into())]);
        let ended = command();
        place.overlay([]);
        let ended = ended?;
        ensure!(
            ended.status == 1 && begun.elapsed() < Duration::from_secs(20),
            "{what}: {ended:?} after {:?}",
            begun.elapsed()
        );
        ensure!(!probe.exists(), "{what} left a folder behind");
        let left = process_with(&[path.to_str().context("path")?]);
        ensure!(left.is_none(), "{what} left process {left:?} behind");
        anyhow::Ok(())
    };
    failing(&|| container.try_checkpoint("other", true), "checkpoint")?;
    container.steps(3)?;
    ensure!(!container.image("other").join("phos.json").exists(), "no partial image");
    container.verb("delete", &["--force"])?;
    failing(&|| container.try_restore("image"), "restore")?;
    fs::write(container.status_file(), "")?;
    container.restore("image")?;
    container.steps(3)?;
    Ok(())
}

#[test]
fn what_a_killed_criu_leaves_is_ended_and_removed() {
    sandboxed("what_a_killed_criu_leaves_is_ended_and_removed", |tools| probing(tools).unwrap());
}

/// The driver does not lock the process, and its memory cannot be mapped again at the first attempt.
fn not_at_once(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = place.sample(&["--mib", "24"])?;
    container.start()?;
    container.steps(3)?;
    driver::arm(container.pid()?, "cuMemImportFromShareableHandle:1:2")?;
    place.overlay([("SIMCUDA_FAIL", "cuCheckpointProcessLock:1:600".into())]);
    let ended = container.try_checkpoint("image", true)?;
    place.overlay([]);
    ensure!(ended.status == 1 && ended.text.contains("the container runs on"), "{ended:?}");
    container.steps(5)?;
    ensure!(!container.image("image").join("phos.json").exists(), "no partial image");
    container.checkpoint("second", true)?;
    container.steps(3)?;
    Ok(())
}

#[test]
fn a_container_that_is_not_woken_at_once_is_woken_by_another_worker() {
    sandboxed("a_container_that_is_not_woken_at_once_is_woken_by_another_worker", |tools| {
        not_at_once(tools).unwrap()
    });
}

/// The dump is made, the memory could not be saved, and the driver brings nothing back: another worker saves the memory.
fn saved_by_another(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = place.sample(&["--mib", "24"])?;
    container.start()?;
    container.steps(3)?;
    let faults = place.path("fault");
    fs::create_dir(&faults)?;
    place.overlay([
        ("PHOS_FAULT", format!("at.memory-saved={}", libc::EIO).into()),
        ("PHOS_FAULT_DIR", faults.into()),
        ("SIMCUDA_FAIL", "cuCheckpointProcessRestore:*:999".into()),
    ]);
    let ended = container.try_checkpoint("image", true)?;
    place.overlay([]);
    ensure!(ended.text.contains("is complete: restore it"), "{ended:?}");
    container.verb("delete", &["--force"])?;
    container.restore("image")?;
    container.steps(3)?;
    Ok(())
}

#[test]
fn a_dump_stays_until_another_worker_has_completed_the_image() {
    sandboxed("a_dump_stays_until_another_worker_has_completed_the_image", |tools| {
        saved_by_another(tools).unwrap()
    });
}
