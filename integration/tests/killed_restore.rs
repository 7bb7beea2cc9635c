//! CRIU is killed in the middle of a restore, alone or together with those who would put that right: the image can be restored
//! again, and nothing is left. CRIU mounts the cgroups of the whole host in its working folder; whoever removes that folder with
//! all that is in it would remove every cgroup that is empty.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount, umount};
use phos_engine::lower;
use phos_integration::container::{Container, Place};
use phos_integration::faults::leaks::wait_until_quiet;
use phos_integration::faults::wrappers::{self, When, With};
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

/// CRIU's folders in `/tmp` are the machine's: those of another test's would be taken for left ones.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// How long it may take until all is undone.
const PROMPT: Duration = Duration::from_secs(15);

/// A container of the sample that was stopped by a checkpoint to `image`.
fn stopped(place: &Place) -> Result<Container<'_>> {
    let container = place.sample(&["--mib", "16"])?;
    container.start()?;
    container.steps(3)?;
    container.checkpoint("image", false)?;
    container.verb("delete", &["--force"])?;
    Ok(container)
}

/// What could be left: mounts, files where phos-runc, runc and CRIU have theirs, and cgroups.
fn present(container: &Container<'_>) -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: BTreeSet<_> = mounts.lines().filter_map(|l| l.split(' ').nth(4)).map(Into::into).collect();
    let mut list = |folder: &Path, prefix: &str| {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                found.insert(entry.path().display().to_string());
            }
        }
    };
    for folder in ["state", "root"] {
        list(&container.place.path(folder), &container.id);
    }
    for folder in [container.image("image"), container.image("image.work"), "/tmp".into()] {
        list(&folder, ".criu");
    }
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        list(&hierarchy.path(), &container.id);
    }
    found
}

/// A restore in which CRIU is killed; phos-runc's exit status, and how long it took until nothing was at work any more.
fn killed(container: &Container<'_>, flags: &[String], action: &str, with: With) -> Result<(i32, Duration)> {
    let place = container.place;
    let faults = place.path("fault");
    let _ = fs::remove_dir_all(&faults);
    fs::create_dir_all(&faults)?;
    let mut variables = wrappers::kill_criu(place, When::At(action), with);
    variables.push(("PHOS_FAULT_DIR", faults.clone().into()));
    place.overlay(variables);
    let begun = Instant::now();
    let ended = container.try_verb("restore", &flags.iter().map(String::as_str).collect::<Vec<_>>());
    place.overlay([]);
    let left = wait_until_quiet(PROMPT);
    ensure!(left.is_empty(), "{left:?} is at work still");
    ensure!(faults.join("struck0").exists(), "{action} was not reached");
    Ok((ended?.status, begun.elapsed()))
}

/// The flags of a restore, with CRIU's working folder named or not.
fn flags(container: &Container<'_>, work: bool) -> Result<Vec<String>> {
    let mut flags = container.image_flags("image")?;
    flags.truncate(if work { 4 } else { 2 });
    let bundle = container.bundle.path.to_str().context("path")?;
    flags.extend(["--detach", "--bundle", bundle].map(String::from));
    Ok(flags)
}

fn alone(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    wrappers::install(&place)?;
    let container = stopped(&place)?;
    let before = present(&container);
    let flags = flags(&container, false)?;
    for action in ["setup-namespaces", "post-restore"] {
        let (status, _) = killed(&container, &flags, action, With::Nobody)?;
        ensure!(status == 1, "{action}: {status}");
        let said = container.last_error()?;
        // The log that it names is there to be read.
        let log = container.image("image").join("restore.log");
        ensure!(said.contains("CRIU: it was killed in the middle of the restore"), "{action}: {said}");
        ensure!(said.contains(log.to_str().context("path")?) && log.is_file(), "{action}: {said}");
        ensure!(present(&container) == before, "{action}: {:?}, before {before:?}", present(&container));
    }
    // Nor does CRIU put anything into the image that works there.
    fs::remove_file(container.image("image").join("restore.log"))?;
    container.verb("restore", &flags.iter().map(String::as_str).collect::<Vec<_>>())?;
    container.steps(3)?;
    ensure!(!container.image("image").join("restore.log").exists());
    Ok(())
}

#[test]
fn a_restore_without_a_work_path_leaves_no_mounts_where_they_would_be_removed() {
    let _alone = ONE_AT_A_TIME.lock();
    sandboxed("a_restore_without_a_work_path_leaves_no_mounts_where_they_would_be_removed", |tools| {
        alone(tools).unwrap()
    });
}

fn together(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    wrappers::install(&place)?;
    let container = stopped(&place)?;
    let before = present(&container);
    // The engine's own, which names nothing of phos-runc's.
    let mut own = container.bundle.read_spec()?;
    let mounts = own["mounts"].as_array_mut().context("mounts")?;
    mounts.retain(|m| !m["source"].as_str().is_some_and(|s| s.contains("/state/")));
    container.bundle.write_spec(&own)?;
    for with in [With::Foreground, With::All] {
        for (n, action) in ["setup-namespaces", "post-setup-namespaces", "post-restore", "pre-resume"]
            .into_iter()
            .enumerate()
        {
            let context = || format!("{action}, {with:?}");
            let flags = flags(&container, n % 2 == 0)?;
            let (_, took) = killed(&container, &flags, action, with).with_context(context)?;
            eprintln!("{}: {took:?}", context());
            let config = container.bundle.read_spec()?;
            ensure!(config == own, "{}: the bundle's configuration was left changed", context());
            let now = present(&container);
            ensure!(now == before, "{}: {now:?}, before {before:?}", context());
        }
    }
    container.restore("image")?;
    container.steps(3)?;
    Ok(())
}

#[test]
fn a_restore_that_is_killed_with_its_foreground_is_undone_at_once() {
    let _alone = ONE_AT_A_TIME.lock();
    sandboxed("a_restore_that_is_killed_with_its_foreground_is_undone_at_once", |tools| {
        together(tools).unwrap()
    });
}

fn mounted(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let precious = place.path("precious");
    fs::create_dir(&precious)?;
    fs::write(precious.join("file"), "")?;
    // The name that a mount has in `mountinfo` is neither the one with links in it nor the one with blanks.
    let folder = place.path("a folder");
    fs::create_dir_all(folder.join("inside"))?;
    std::os::unix::fs::symlink(place.path("."), place.path("link"))?;
    let link = place.path("link").join("a folder");
    let none = None::<&str>;
    mount(Some(&precious), &folder.join("inside"), none, MsFlags::MS_BIND, none)?;
    ensure!(lower::is_mounted(&link));
    lower::remove_folder(&link);
    let left = precious.join("file").exists();
    if lower::is_mounted(&folder) {
        umount(&folder.join("inside"))?;
    }
    ensure!(left, "what was mounted was removed");
    ensure!(!folder.exists(), "the folder is there still");
    Ok(())
}

#[test]
fn what_was_mounted_in_a_folder_outlives_it() {
    sandboxed("what_was_mounted_in_a_folder_outlives_it", |tools| mounted(tools).unwrap());
}
