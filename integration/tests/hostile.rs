//! The application owns its end of the control socket: whatever it says, a checkpoint is refused in one line and in bounded
//! time, the container stays as it was, and another one beside it is none the worse.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use phos_integration::container::{Container, Place};
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;
use serde_json::json;

/// Modes of `hostile-peer`, and a part of the line that its checkpoint is refused with.
const MODES: [(&str, &str); 16] = [
    ("silent", "does not answer"),
    ("garbage", "broke the control protocol"),
    ("identity", "it says it is process 4242"),
    ("flood", "broke the control protocol"),
    ("size", "an allocation of 1125899906842624 bytes"),
    ("device", "this machine has no GPU-00000000"),
    ("fds", "cuMemImportFromShareableHandle"),
    ("count", "its table has 18446744073709551615 entries"),
    ("endless", "its table does not end"),
    ("full", "does not answer"),
    ("stream", "its socket is of another kind"),
    ("short", "cuMemMap"),
    ("regular", "cuMemImportFromShareableHandle"),
    ("folder", "cuMemImportFromShareableHandle"),
    ("socket", "cuMemImportFromShareableHandle"),
    ("foreign", "not mine"),
];

/// More than any limit on a conversation.
const PATIENCE: Duration = Duration::from_secs(60);

/// A container of `hostile-peer`, not started. What its neighbours show in their `/out` it sees at `/other`.
fn hostile<'a>(place: &'a Place, mode: &str, other: Option<&PathBuf>) -> Result<Container<'a>> {
    let command = format!("PHOS_CONTROL_DIR=/none exec /usr/bin/hostile-peer {mode}");
    let container = place.container(&["/bin/sh", "-c", &command], &place.gpu)?;
    let program = container.bundle.path.join("rootfs/usr/bin/hostile-peer");
    fs::copy(place.tools.program("hostile-peer"), program)?;
    if let Some(other) = other {
        let mut spec = container.bundle.read_spec()?;
        let mount =
            json!({"destination": "/other", "type": "bind", "source": other, "options": ["bind", "rw"]});
        spec["mounts"].as_array_mut().context("mounts")?.push(mount);
        container.bundle.write_spec(&spec)?;
    }
    Ok(container)
}

fn start(container: &Container<'_>) -> Result<()> {
    container.start()?;
    let begin = Instant::now();
    while !container.bundle.out.join("ready").exists() {
        ensure!(begin.elapsed() < PATIENCE, "not ready; {}", container.state()?);
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Its checkpoint is refused with these words in bounded time, and nothing comes of it.
fn refused(container: &Container<'_>, mode: &str, expected: &str) -> Result<()> {
    let begin = Instant::now();
    let ended = container.try_checkpoint("image", true)?;
    ensure!(ended.status == 1, "{mode}: {}", ended.text);
    ensure!(begin.elapsed() < PATIENCE, "{mode}: {:?}", begin.elapsed());
    let error = container.last_error()?;
    ensure!(error.contains(expected) && !error.contains('\n'), "{mode}: {error}");
    ensure!(!container.image("image").exists(), "{mode}: an image was left");
    ensure!(container.state()? == "running", "{mode}");
    Ok(())
}

fn lies(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let neighbour = place.sample(&["--mib", "16"])?;
    neighbour.start()?;
    let lender = hostile(&place, "lend", None)?;
    start(&lender)?;
    for (mode, expected) in MODES {
        let container = hostile(&place, mode, Some(&lender.bundle.out))?;
        start(&container)?;
        refused(&container, mode, expected)?;
        container.try_verb("delete", &["--force"])?;
    }
    neighbour.checkpoint("beside", true)?;
    neighbour.steps(2)?;
    ensure!(fs::read_to_string(lender.bundle.out.join("memory"))? == "same", "another container's memory");
    Ok(())
}

#[test]
fn a_process_that_lies_is_refused_and_harms_nobody() {
    sandboxed("a_process_that_lies_is_refused_and_harms_nobody", |tools| lies(tools).unwrap());
}

/// The container's control folder on the host.
fn control(place: &Place, container: &Container<'_>) -> Result<PathBuf> {
    let folders = fs::read_dir(place.path("state"))?.flatten();
    let own = folders.map(|e| e.path()).find(|p| p.to_string_lossy().contains(&container.id));
    Ok(own.context("a state folder")?.join("ctl"))
}

fn neighbours(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let good: Vec<_> = (0..2).map(|_| place.sample(&["--mib", "16"])).collect::<Result<_>>()?;
    let bad = [("flood", "broke the control protocol"), ("endless", "its table does not end")];
    let hostile: Vec<_> = bad.iter().map(|(mode, _)| hostile(&place, mode, None)).collect::<Result<_>>()?;
    good.iter().try_for_each(Container::start)?;
    hostile.iter().try_for_each(start)?;
    thread::scope(|scope| {
        let refusals: Vec<_> = hostile
            .iter()
            .zip(bad)
            .map(|(container, (mode, words))| scope.spawn(move || refused(container, mode, words)))
            .collect();
        let saved: Vec<_> = good
            .iter()
            .map(|container| {
                scope.spawn(move || {
                    container.checkpoint("running", true)?;
                    container.steps(2)?;
                    container.checkpoint("stopped", false)
                })
            })
            .collect();
        let all = refusals.into_iter().chain(saved);
        all.map(|t| t.join().expect("the thread ends")).collect::<Result<Vec<()>>>()
    })?;
    for container in &good {
        container.try_verb("delete", &["--force"])?;
        container.restore("stopped")?;
        container.steps(2)?;
    }
    Ok(())
}

#[test]
fn two_containers_and_two_hostile_neighbours() {
    sandboxed("two_containers_and_two_hostile_neighbours", |tools| neighbours(tools).unwrap());
}

/// Another process of the container fills the control folder and knocks at the host's door without end.
fn door(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = place.sample(&["--mib", "16"])?;
    container.start()?;
    container.steps(2)?;
    let folder = control(&place, &container)?;
    let door = folder.join("host.sock");
    for round in ["once", "again"] {
        fs::create_dir(&door)?;
        fs::write(door.join("full"), "")?;
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let _ = UnixStream::connect(&door);
                    let _ = socket(&door);
                }
            });
            let result = container.checkpoint(round, true).and_then(|()| container.steps(2));
            over.store(true, Ordering::Relaxed);
            result
        })?;
        ensure!(!door.exists(), "the door is closed behind the last one");
    }
    Ok(())
}

/// Knocks as a process would.
fn socket(door: &std::path::Path) -> Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    use std::os::fd::AsRawFd;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    Ok(connect(socket.as_raw_fd(), &UnixAddr::new(door)?)?)
}

#[test]
fn who_holds_the_door_shut_or_knocks_without_end_stops_nobody() {
    sandboxed("who_holds_the_door_shut_or_knocks_without_end_stops_nobody", |tools| door(tools).unwrap());
}

/// What a container sees of the control folders.
fn reach(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let other = place.sample(&["--mib", "8"])?;
    other.start()?;
    other.steps(1)?;
    let script = "ls -a /run/phos >/out/own; ls -a /run/phos/.. >/out/above; cat /proc/self/mountinfo >/out/mounts; \
                  find / -xdev -type s >/out/sockets; touch /out/ready; exec sleep 3600";
    let container = place.container(&["/bin/sh", "-c", script], &place.gpu)?;
    let mut spec = container.bundle.read_spec()?;
    spec["process"]["env"] = json!(["PATH=/bin:/busy"]);
    container.bundle.write_spec(&spec)?;
    let bin = container.bundle.path.join("rootfs/bin");
    for name in ["ls", "cat", "find", "touch", "sleep"] {
        std::os::unix::fs::symlink("busybox", bin.join(name))?;
    }
    start(&container)?;
    let read = |name: &str| fs::read_to_string(container.bundle.out.join(name));
    let own: Vec<_> = read("own")?.lines().map(String::from).collect();
    ensure!(own == [".", "..", "libcuda.so.real", "libphos.so"], "{own:?}");
    ensure!(!read("above")?.contains("ctl"), "{}", read("above")?);
    ensure!(read("sockets")?.is_empty(), "{}", read("sockets")?);
    let (theirs, ours) = (control(&place, &other)?, control(&place, &container)?);
    let name = |p: &PathBuf| p.parent().and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned());
    let (theirs_name, ours_name) = (name(&theirs).context("name")?, name(&ours).context("name")?);
    let mounts = read("mounts")?;
    ensure!(mounts.contains(&ours_name) && !mounts.contains(&theirs_name), "{mounts}");
    ensure!(theirs.read_dir()?.flatten().any(|e| e.file_name().to_string_lossy().ends_with(".sock")));
    // On the host nobody but root gets there.
    for folder in [&theirs, &ours] {
        let state = folder.parent().context("a parent")?;
        ensure!(fs::metadata(state)?.permissions().mode() & 0o7777 == 0o700);
        ensure!(fs::metadata(folder)?.permissions().mode() & 0o7777 == 0o1777);
    }
    Ok(())
}

#[test]
fn no_container_reaches_anothers_control_folder() {
    sandboxed("no_container_reaches_anothers_control_folder", |tools| reach(tools).unwrap());
}
