//! The ways in which memory can be copied, and images that build on earlier ones.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::Result;
use phos_integration::container::{Container, Place};
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

fn started<'a>(place: &'a Place, options: &[&str], strategy: &str) -> Result<Container<'a>> {
    let container = place.sample(options)?;
    container.annotate("phos.strategy", strategy)?;
    container.start()?;
    container.steps(3)?;
    Ok(container)
}

/// The way from an image back to a running program whose state is right.
fn comes_back(container: &Container<'_>, name: &str) -> Result<()> {
    container.try_verb("delete", &["--force"])?;
    let _ = fs::remove_file(container.status_file());
    container.restore(name)?;
    container.steps(5)?;
    Ok(())
}

fn each_strategy(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    for (strategy, precopied, snapshot) in
        [("precopy", true, true), ("snapshot", false, true), ("stop", false, false)]
    {
        let container = started(&place, &["--mib", "40"], strategy)?;
        let report = container.checkpoint_with("running", &["--leave-running"])?;
        assert_eq!(report["precopy_rounds"].as_u64() > Some(0), precopied, "{strategy}: {report}");
        assert_eq!(report["straight_bytes"].as_u64() == Some(0), snapshot, "{strategy}: {report}");
        // All that goes through spare memory is not looked at while the program stands still.
        assert_eq!(report["digest_ms"].as_f64() == Some(0.0), strategy == "snapshot", "{strategy}: {report}");
        container.steps(3)?;
        let report = container.checkpoint_with("stopped", &[])?;
        assert_eq!(report["precopy_rounds"].as_u64() > Some(0), precopied, "{strategy}: {report}");
        comes_back(&container, "stopped")?;
        comes_back(&container, "running")?;
        container.try_verb("delete", &["--force"])?;
    }
    Ok(())
}

#[test]
fn each_strategy_saves_the_state() {
    sandboxed("each_strategy_saves_the_state", |tools| each_strategy(tools).unwrap());
}

fn incremental(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    // A step takes long enough that nothing changes between two checkpoints, and a checkpoint without its parent can be
    // told from one with it.
    let container = started(&place, &["--mib", "40", "--step-ms", "700"], "auto")?;
    let parent = |name: &str| format!("../{}.{name}", container.id);
    let whole = container.checkpoint_with("1", &["--leave-running"])?;
    let whole = whole["written_bytes"].as_u64().unwrap_or(0);
    let (mut least, mut last) = (u64::MAX, String::from("1"));
    // On a busy machine there is a step between most of them.
    for n in 2..20 {
        if n > 4 && least * 50 < whole {
            break;
        }
        let name = n.to_string();
        let report =
            container.checkpoint_with(&name, &["--leave-running", "--parent-path", &parent(&last)])?;
        least = least.min(report["written_bytes"].as_u64().unwrap_or(u64::MAX));
        last = name;
    }
    assert!(least * 50 < whole, "at best {least} bytes of {whole}: an idle program's increment is under 2 %");
    container.steps(1)?;
    let text = container.place.command(
        &container.runtime,
        &["inspect", "--verify", &container.image(&last).display().to_string()],
        false,
    )?;
    assert!(text.text.contains("parent"), "{}", text.text);
    comes_back(&container, &last)?;
    // Without the image it builds on, it is refused, and nothing is started.
    container.try_verb("delete", &["--force"])?;
    fs::rename(container.image("2"), container.image("elsewhere"))?;
    assert_ne!(container.try_restore(&last)?.status, 0);
    let error = container.last_error()?;
    assert!(error.contains("builds on the image") && error.contains("is not there"), "{error}");
    fs::rename(container.image("elsewhere"), container.image("2"))?;
    comes_back(&container, &last)
}

#[test]
fn an_incremental_image_holds_only_what_changed() {
    sandboxed("an_incremental_image_holds_only_what_changed", |tools| incremental(tools).unwrap());
}

fn pre_dumped(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let container = started(&place, &["--mib", "40"], "auto")?;
    let report = container.checkpoint_with("base", &["--pre-dump"])?;
    // All but a few chunks that are still zero.
    assert!(report["precopied_bytes"].as_u64() >= Some(36 << 20), "{report}");
    assert_eq!(report["pause_ms"], 0.0, "a pre-dump stops nothing");
    container.steps(3)?;
    let parent = format!("../{}.base", container.id);
    let timeline = place.path("timeline.json");
    let trace = timeline.display().to_string();
    container.checkpoint_with("whole", &["--trace", &trace, "--parent-path", &parent])?;
    let events: serde_json::Value = serde_json::from_slice(&fs::read(&timeline)?)?;
    for name in ["drain", "park", "digest", "driver checkpoint", "CRIU", "commit"] {
        let named = |e: &serde_json::Value| e["name"] == name && e["dur"].as_f64().is_some();
        assert!(events.as_array().is_some_and(|a| a.iter().any(named)), "{name} is missing in {events}");
    }
    container.try_verb("delete", &["--force"])?;
    assert_ne!(container.try_restore("base")?.status, 0);
    let error = container.last_error()?;
    assert!(error.contains("is a pre-dump"), "{error}");
    comes_back(&container, "whole")
}

#[test]
fn a_pre_dump_is_completed_by_a_checkpoint() {
    sandboxed("a_pre_dump_is_completed_by_a_checkpoint", |tools| pre_dumped(tools).unwrap());
}

fn full_gpu(tools: &Tools) -> Result<()> {
    let mut place = Place::new(tools)?;
    // The worker's first context is refused, as on a GPU that is full (2) or in exclusive mode and taken (46).
    for code in [2, 46] {
        place.env.insert("SIMCUDA_FAIL".into(), format!("cuDevicePrimaryCtxRetain:1:{code}").into());
        let container = started(&place, &["--mib", "24"], "auto")?;
        let report = container.checkpoint_with("running", &["--leave-running"])?;
        let warnings = report["warnings"].to_string();
        assert!(warnings.contains("no room for a second process"), "{warnings}");
        container.steps(3)?;
        assert_ne!(container.try_checkpoint_with("pre", &["--pre-dump"])?.status, 0);
        let error = container.last_error()?;
        assert!(error.contains("without --pre-dump"), "{error}");
        container.steps(3)?;
        container.checkpoint_with("stopped", &[])?;
        container.try_verb("delete", &["--force"])?;
        let id = container.id.clone();
        drop(container);
        place.env.remove("SIMCUDA_FAIL");
        let again = Container {
            place: &place,
            id: id.clone(),
            bundle: place.bundle(&id),
            runtime: place.tools.program("phos-runc"),
        };
        comes_back(&again, "stopped")?;
        comes_back(&again, "running")?;
        again.try_verb("delete", &["--force"])?;
    }
    Ok(())
}

#[test]
fn a_gpu_without_room_for_the_worker_is_saved_too() {
    sandboxed("a_gpu_without_room_for_the_worker_is_saved_too", |tools| full_gpu(tools).unwrap());
}

fn packed(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    for codec in ["lz4", "zstd"] {
        let container = place.sample(&["--mib", "40"])?;
        container.annotate("phos.compression", codec)?;
        container.start()?;
        container.steps(3)?;
        container.checkpoint_with("running", &["--leave-running"])?;
        let text = container.place.command(
            &container.runtime,
            &["inspect", "--verify", &container.image("running").display().to_string()],
            false,
        )?;
        assert!(text.text.contains(&format!("packed by {codec}")), "{}", text.text);
        container.steps(3)?;
        let parent = format!("../{}.running", container.id);
        container.checkpoint_with("stopped", &["--parent-path", &parent])?;
        comes_back(&container, "stopped")?;
        comes_back(&container, "running")?;
        container.try_verb("delete", &["--force"])?;
    }
    let container = place.sample(&["--mib", "8"])?;
    container.annotate("phos.compression", "gzip")?;
    container.start()?;
    container.steps(1)?;
    assert_ne!(container.try_checkpoint_with("no", &["--leave-running"])?.status, 0);
    let error = container.last_error()?;
    assert!(error.contains("gzip") && error.contains("use none, lz4 or zstd"), "{error}");
    container.steps(1)?;
    container.try_verb("delete", &["--force"])?;
    Ok(())
}

#[test]
fn packed_images_are_restored_and_built_upon() {
    sandboxed("packed_images_are_restored_and_built_upon", |tools| packed(tools).unwrap());
}

fn on_a_terminal(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let mut container = started(&place, &["--mib", "300"], "stop")?;
    let phos_runc = container.runtime.clone();
    // Without a terminal nothing is said.
    let ended = container.try_checkpoint_with("silent", &["--leave-running"])?;
    assert_eq!((ended.status, ended.text.as_str()), (0, ""));
    // `script` gives its command a terminal and shows what is written there.
    let wrapper = place.path("on-a-terminal");
    let command = format!("#!/bin/sh\nexec script -qefc \"{} $*\" /dev/null\n", phos_runc.display());
    fs::write(&wrapper, command)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    container.runtime = wrapper;
    let ended = container.try_checkpoint_with("seen", &[])?;
    assert_eq!(ended.status, 0, "{}", ended.text);
    let shown: Vec<_> = ended.text.split('\r').collect();
    // Which of them are caught depends on how long each takes.
    let steps = ["preflight", "pre-copy", "park", "driver checkpoint", "copy", "dump", "commit"];
    assert!(shown.iter().any(|line| steps.iter().any(|step| line.starts_with(step))), "{shown:?}");
    assert_eq!(shown.last(), Some(&"\u{1b}[K"), "the line is taken away: {shown:?}");
    container.runtime = phos_runc;
    let timeline = place.path("restore.json");
    container.try_verb("delete", &["--force"])?;
    let _ = fs::remove_file(container.status_file());
    let flags = ["--trace", timeline.to_str().unwrap_or_default()];
    assert_eq!(container.try_restore_with("seen", &flags)?.status, 0, "{}", container.logs());
    container.steps(3)?;
    let events: serde_json::Value = serde_json::from_slice(&fs::read(&timeline)?)?;
    for name in ["load", "digest", "driver restore", "attach"] {
        let named = |e: &serde_json::Value| e["name"] == name && e["dur"].as_f64().is_some();
        assert!(events.as_array().is_some_and(|a| a.iter().any(named)), "{name} is missing in {events}");
    }
    container.try_verb("delete", &["--force"])?;
    Ok(())
}

#[test]
fn a_person_at_a_terminal_sees_what_is_being_done() {
    sandboxed("a_person_at_a_terminal_sees_what_is_being_done", |tools| on_a_terminal(tools).unwrap());
}
