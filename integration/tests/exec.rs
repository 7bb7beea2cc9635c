//! Processes that joined a container by `exec` while it is checkpointed.

use std::time::Duration;

use anyhow::Result;
use phos_integration::container::Place;
use phos_integration::sandbox::sandboxed;
use phos_integration::status;
use phos_integration::tools::Tools;

fn joined(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = place.sample(&["--mib", "16"])?;
    container.start()?;
    container.steps(3)?;
    let root = place.path("root").display().to_string();
    let exec = |words: &[&str]| {
        let all = [&["--root", &root, "exec", "--detach", &container.id], words].concat();
        place.command(&container.runtime, &all, true)
    };
    let other = container.bundle.out.join("other");
    let other_command =
        ["/usr/bin/phos-sample", "--out", "/out/other", "--stop-file", "/out/stop", "--mib", "16"];
    assert_eq!(exec(&other_command)?.status, 0);
    let others = |more| status::check(&status::wait_for(&other, more, Duration::from_secs(60))?);
    others(3)?;
    // CRIU saves the first process and its descendants. What joined goes on, and the image does not promise it.
    let report = container.checkpoint_with("running", &["--leave-running"])?;
    assert_eq!(report["processes"], 1, "{report}");
    assert!(report["warnings"].to_string().contains("joined the container by exec"), "{report}");
    container.steps(3)?;
    others(3)?;
    container.checkpoint("stopped", false)?;
    for name in ["stopped", "running"] {
        container.try_verb("delete", &["--force"])?;
        let _ = std::fs::remove_file(container.status_file());
        container.restore(name)?;
        container.steps(5)?;
    }
    Ok(())
}

#[test]
fn a_process_that_joined_by_exec_is_left_out_and_says_so() {
    sandboxed("a_process_that_joined_by_exec_is_left_out_and_says_so", |tools| joined(tools).unwrap());
}
