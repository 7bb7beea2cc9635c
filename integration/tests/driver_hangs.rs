//! A call into the driver that never returns, in the program itself. Nothing outside can end it; what phos-runc adds to it must
//! not grow, and what it has taken must not be lost.

use std::fs;

use anyhow::{Result, ensure};
use phos_integration::container::{Container, Place};
use phos_integration::faults::driver;
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

/// A container that runs, for whose GPU a checkpoint waits one second.
fn impatient(place: &Place) -> Result<Container<'_>> {
    fs::write(place.path("config.toml"), "drain_timeout = 1\n")?;
    let container = place.sample(&["--mib", "16"])?;
    container.start()?;
    container.steps(3)?;
    Ok(container)
}

/// Threads of a process that wait for its GPU.
fn waiting(container: &Container<'_>) -> Result<usize> {
    let mut count = 0;
    for thread in fs::read_dir(format!("/proc/{}/task", container.pid()?))?.flatten() {
        count += usize::from(fs::read_to_string(thread.path().join("comm"))?.trim() == "phos-drain");
    }
    Ok(count)
}

/// The GPU is never idle, as far as the driver says: each checkpoint is refused, and the first one's thread is not joined by
/// others.
fn never_idle(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = impatient(&place)?;
    driver::arm(container.pid()?, "cuCtxSynchronize:1:hang")?;
    for name in ["first", "second", "third"] {
        let ended = container.try_checkpoint(name, true)?;
        ensure!(ended.status == 1 && ended.text.contains("did not finish in time"), "{ended:?}");
        ensure!(!container.image(name).exists(), "{name} left an image folder");
        container.steps(3)?;
        ensure!(waiting(&container)? == 1, "{} threads wait after {name}", waiting(&container)?);
    }
    Ok(())
}

#[test]
fn one_thread_waits_for_a_gpu_that_is_never_idle() {
    sandboxed("one_thread_waits_for_a_gpu_that_is_never_idle", |tools| never_idle(tools).unwrap());
}

/// The same, but only for longer than the limit: once the call has returned, a checkpoint is made as ever.
fn idle_at_last(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = impatient(&place)?;
    driver::arm(container.pid()?, "cuCtxSynchronize:1:hang3")?;
    let ended = container.try_checkpoint("first", true)?;
    ensure!(ended.status == 1 && ended.text.contains("did not finish in time"), "{ended:?}");
    container.steps(3)?;
    fs::write(place.path("config.toml"), "drain_timeout = 20\n")?;
    container.checkpoint("second", false)?;
    container.verb("delete", &["--force"])?;
    container.restore("second")?;
    container.steps(3)?;
    ensure!(waiting(&container)? == 0, "the thread is still there");
    Ok(())
}

#[test]
fn a_checkpoint_is_made_once_the_gpu_is_idle() {
    sandboxed("a_checkpoint_is_made_once_the_gpu_is_idle", |tools| idle_at_last(tools).unwrap());
}
