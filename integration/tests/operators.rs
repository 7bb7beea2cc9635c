//! Several people, or engines, want something of one container or of one image at the same time: each gets what it asked for or
//! one clear line, and nothing is lost or left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use phos_engine::image::Image;
use phos_integration::container::{Container, Ended, Place};
use phos_integration::faults::leaks::wait_until_quiet;
use phos_integration::processes::wait_until;
use phos_integration::sandbox::sandboxed;
use phos_integration::status;
use phos_integration::tools::Tools;

/// How long what a command leaves at work may take.
const QUIET: Duration = Duration::from_secs(30);

/// Runs `first`, and `then` while one of its processes waits at a point of the engine. Both answers come back.
fn while_it_waits<T: Send>(
    place: &Place,
    point: &str,
    first: impl FnOnce() -> Result<Ended> + Send,
    then: impl FnOnce() -> Result<T>,
) -> Result<(Ended, T)> {
    let folder = place.path("fault");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    place.overlay([
        ("PHOS_FAULT", format!("{point}=wait").into()),
        ("PHOS_FAULT_DIR", folder.clone().into_os_string()),
    ]);
    thread::scope(|scope| {
        let first = scope.spawn(first);
        let reached = wait_until(point, || {
            (folder.join("struck0").exists() || first.is_finished()).then(|| folder.join("struck0").exists())
        });
        place.overlay([]);
        let then = match reached {
            Ok(true) => then(),
            other => Err(anyhow::anyhow!("{point} was not reached: {other:?}")),
        };
        fs::write(folder.join("go"), "")?;
        let first = first.join().map_err(|_| anyhow::anyhow!("the first command's thread panicked"))?;
        let then = then?;
        Ok((first?, then))
    })
}

/// Restores an image as `container`, which need not be the one that it was made of.
fn restore_as(container: &Container<'_>, image: &Path) -> Result<Ended> {
    let work = container.place.path(&format!("{}.work", container.id));
    fs::create_dir_all(&work)?;
    let words = [image, &work, &container.bundle.path].map(|p| p.to_str().unwrap_or_default());
    let [image, work, bundle] = words;
    container
        .try_verb("restore", &["--image-path", image, "--work-path", work, "--detach", "--bundle", bundle])
}

/// Removes a container. Nothing of phos-runc is left of it: no process, no file, no cgroup.
fn removed(container: &Container<'_>) -> Result<()> {
    container.verb("delete", &["--force"])?;
    nothing_left(container)
}

fn nothing_left(container: &Container<'_>) -> Result<()> {
    let left = wait_until_quiet(QUIET);
    ensure!(left.is_empty(), "{left:?} is at work still");
    for folder in ["state", "root"] {
        for entry in fs::read_dir(container.place.path(folder)).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            ensure!(!name.starts_with(&container.id), "{} was left", entry.path().display());
        }
    }
    Ok(())
}

/// The one line that a command which could not have its way gives.
fn line(container: &Container<'_>, ended: &Ended) -> Result<String> {
    ensure!(ended.status == 1, "{ended:?}");
    let logged = container.last_error()?;
    ensure!(!logged.is_empty() && !logged.contains('\n'), "{logged:?}");
    Ok(logged)
}

fn two_ids(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let original = place.sample(&["--mib", "24"])?;
    original.start()?;
    original.steps(3)?;
    original.checkpoint("image", false)?;
    removed(&original)?;
    let last = status::read(&original.status_file())?.last().context("it made steps")?.step;
    let image = original.image("image");
    let copies = [place.sample(&["--mib", "24"])?, place.sample(&["--mib", "24"])?];
    thread::scope(|scope| {
        let restores = copies.each_ref().map(|copy| scope.spawn(|| restore_as(copy, &image)));
        for (restore, copy) in restores.into_iter().zip(&copies) {
            let ended = restore.join().map_err(|_| anyhow::anyhow!("a restore's thread panicked"))??;
            ensure!(ended.status == 0, "{ended:?}: {:?}\n{}", copy.last_error(), copy.logs());
        }
        anyhow::Ok(())
    })?;
    // Each has memory of its own, and goes on where the original was.
    for copy in &copies {
        let first = copy.steps(20)?[0].step;
        ensure!((last..=last + 1).contains(&first), "it was at step {last} and goes on at {first}");
        ensure!(copy.state()? == "running");
    }
    // What one of them goes through is nothing to the other, nor to the image.
    copies[0].checkpoint("of-a-copy", true)?;
    removed(&copies[0])?;
    copies[1].steps(20)?;
    Image::open_complete(&image)?.verify()?;
    let ended = restore_as(&original, &image)?;
    ensure!(ended.status == 0, "{ended:?}: {:?}", original.last_error());
    original.steps(3)?;
    copies[1].steps(3)?;
    removed(&original)?;
    removed(&copies[1])
}

#[test]
fn one_image_is_restored_under_two_ids_at_once() {
    sandboxed("one_image_is_restored_under_two_ids_at_once", |tools| two_ids(tools).unwrap());
}

fn one_id(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = place.sample(&["--mib", "24"])?;
    container.start()?;
    container.steps(3)?;
    container.checkpoint("image", false)?;
    let config = container.bundle.path.join("config.json");
    for point in ["at.connected", "at.allocated", "at.rebuilt", "state.wake"] {
        let _ = container.try_verb("delete", &["--force"])?;
        let _ = fs::remove_file(container.status_file());
        let (first, (said, before)) = while_it_waits(
            &place,
            point,
            || container.try_restore("image"),
            || {
                let before = fs::read(&config)?;
                let second = container.try_restore("image")?;
                Ok((line(&container, &second)?, before))
            },
        )?;
        ensure!(said.contains("another checkpoint or restore of this container is under way"), "{said}");
        ensure!(first.status == 0, "{point}: {first:?}: {:?}\n{}", container.last_error(), container.logs());
        ensure!(fs::read(&config)? == before, "{point}: the second changed the bundle");
        container.steps(5)?;
    }
    // And when it runs.
    let third = container.try_restore("image")?;
    let said = line(&container, &third)?;
    ensure!(said.contains("container with id exists"), "{said}");
    container.steps(5)?;
    removed(&container)
}

#[test]
fn a_second_restore_under_the_same_id_is_refused_and_the_first_succeeds() {
    sandboxed("a_second_restore_under_the_same_id_is_refused_and_the_first_succeeds", |tools| {
        one_id(tools).unwrap()
    });
}

/// The container's first process ends by itself, and so do all others of its PID namespace.
fn ends_by_itself(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let script = "/usr/bin/phos-sample --out /out/status --mib 24 & while [ ! -e /out/quit ]; do sleep 0.01; done; exit 0";
    for (point, leave_running) in
        [("at.tables-taken", true), ("at.held", true), ("at.taken", false), ("at.unlocked", true)]
    {
        let container = place.container(&["/bin/sh", "-c", script], &place.gpu)?;
        container.start()?;
        container.steps(3)?;
        let pid = container.pid()?;
        let checkpoint = || container.try_checkpoint("image", leave_running);
        let (ended, ()) = while_it_waits(&place, point, checkpoint, || {
            fs::write(container.bundle.out.join("quit"), "")?;
            let gone = || (!Path::new(&format!("/proc/{pid}/root/out")).exists()).then_some(());
            wait_until("the container's end", gone)
        })
        .with_context(|| point.to_string())?;
        ensure!(container.state()? == "stopped", "{point}: it is {:?}", container.state());
        let image = container.image("image");
        if ended.status == 0 {
            // It ended after it was dumped: the image is good.
            Image::open_complete(&image).with_context(|| point.to_string())?.verify()?;
        } else {
            let said = line(&container, &ended).with_context(|| format!("{point}: {}", ended.text))?;
            ensure!(said.contains("ended in the middle of the checkpoint"), "{point}: {said}");
            ensure!(!image.exists(), "{point}: a partial image was left");
        }
        // It can be deleted as any container that has ended.
        container.verb("delete", &[]).with_context(|| point.to_string())?;
        nothing_left(&container).with_context(|| point.to_string())?;
    }
    Ok(())
}

#[test]
fn a_container_that_ends_by_itself_in_a_checkpoint_has_ended() {
    sandboxed("a_container_that_ends_by_itself_in_a_checkpoint_has_ended", |tools| {
        ends_by_itself(tools).unwrap()
    });
}

/// A GPU program joins by `exec` while the container is checkpointed.
fn exec(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    for (n, point) in ["state.preflight", "at.taken", "at.before-dump"].into_iter().enumerate() {
        let container = place.sample(&["--mib", "16"])?;
        container.start()?;
        container.steps(3)?;
        let root = place.path("root").display().to_string();
        let out = format!("/out/other-{n}");
        let words =
            ["--root", &root, "exec", "--detach", &container.id, "/usr/bin/phos-sample", "--out", &out];
        let words = [words.as_slice(), &["--stop-file", "/out/stop", "--mib", "16"]].concat();
        let other = container.bundle.out.join(format!("other-{n}"));
        thread::scope(|scope| {
            let checkpoint = || container.try_checkpoint("image", true);
            let (ended, joining) = while_it_waits(&place, point, checkpoint, || {
                // In a frozen container it waits for the thaw.
                let joining = scope.spawn(|| place.command(&container.runtime, &words, true));
                thread::sleep(Duration::from_millis(200));
                Ok(joining)
            })?;
            ensure!(ended.status == 0, "{point}: {ended:?}\n{}", container.logs());
            let joined = joining.join().map_err(|_| anyhow::anyhow!("exec's thread panicked"))??;
            ensure!(joined.status == 0, "{point}: {joined:?}");
            anyhow::Ok(())
        })?;
        status::check(
            &status::wait_for(&other, 3, Duration::from_secs(60)).with_context(|| point.to_string())?,
        )?;
        container.steps(3)?;
        removed(&container)?;
        let _ = fs::remove_file(container.status_file());
        container.restore("image")?;
        container.steps(3)?;
        removed(&container)?;
    }
    Ok(())
}

#[test]
fn what_joins_by_exec_during_a_checkpoint_runs() {
    sandboxed("what_joins_by_exec_during_a_checkpoint_runs", |tools| exec(tools).unwrap());
}

/// A lower runtime that takes its time before it deletes, or after it has.
fn slow_delete(place: &mut Place, first: &str, then: &str) -> Result<()> {
    let path = place.path("slow-runc");
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' delete '*) {first}; {runc} \"$@\"; s=$?; {then}; exit $s ;; esac\nexec {runc} \"$@\"\n",
        runc = place.tools.runc.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    place.env.insert("PHOS_LOWER_RUNTIME".into(), path.into());
    Ok(())
}

fn deleted(tools: &Tools) -> Result<()> {
    for late in [false, true] {
        let mut place = Place::new(tools)?;
        let mark = place.path("deleting");
        let wait = format!("touch {}; sleep 1", mark.display());
        let (first, then) = if late { ("true", wait.as_str()) } else { (wait.as_str(), "true") };
        slow_delete(&mut place, first, then)?;
        let container = place.sample(&["--mib", "24"])?;
        container.start()?;
        container.steps(3)?;
        let checkpoint = thread::scope(|scope| {
            let delete = scope.spawn(|| container.try_verb("delete", &["--force"]));
            wait_until("the delete", || mark.exists().then_some(()))?;
            let checkpoint = container.try_checkpoint("image", true)?;
            let delete = delete.join().map_err(|_| anyhow::anyhow!("the delete's thread panicked"))??;
            ensure!(delete.status == 0, "{delete:?}");
            anyhow::Ok(checkpoint)
        })?;
        ensure!(container.state()?.is_empty(), "it was deleted");
        nothing_left(&container)?;
        if checkpoint.status == 0 {
            Image::open_complete(&container.image("image"))?.verify()?;
            let _ = fs::remove_file(container.status_file());
            container.restore("image")?;
            container.steps(3)?;
            removed(&container)?;
        } else {
            let said = line(&container, &checkpoint)?;
            ensure!(!container.image("image").join("phos.json").exists(), "{said}, and an image");
        }
        ensure!(!late || checkpoint.status != 0, "a container that is gone was checkpointed");
    }
    Ok(())
}

#[test]
fn a_checkpoint_during_a_delete_is_whole_or_refused() {
    sandboxed("a_checkpoint_during_a_delete_is_whole_or_refused", |tools| deleted(tools).unwrap());
}
