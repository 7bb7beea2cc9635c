//! `create` and `run`: the configuration is edited, the lower runtime does the rest.

use std::env;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use phos_engine::started::remove_cgroup;
use phos_engine::{lower, processes};
use phos_hooks::{Host, Injection, detect, inject, plan};

use crate::context::Context as Run;
use crate::state::{StateDir, lower_folder, read_spec, write_spec};
use crate::{log, privilege};

/// How long a job may take to end whose container is gone.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the last thread of a program that was killed may take to end.
const LAST_THREAD: Duration = Duration::from_secs(10);

/// The bundle a command line names.
pub fn bundle(run: &Run) -> Result<PathBuf> {
    let named = run.args.value("bundle").or(run.args.value("b")).map(Path::new).unwrap_or(Path::new("."));
    Ok(env::current_dir().context("no working folder")?.join(named))
}

/// What there is to put into a container.
pub fn host(run: &Run, state: &StateDir) -> Result<Host> {
    Ok(Host {
        library: run.config.library(),
        hook: run.config.hook(),
        control_dir: state.control_dir(),
        default_mode: run.config.inject()?,
        toolkit_below: detect::is_toolkits(&run.lower.path.to_string_lossy()),
    })
}

/// Edits the bundle's configuration if its container uses a GPU; returns its state folder then.
fn prepare(run: &Run, id: &str) -> Result<Option<StateDir>> {
    let bundle = bundle(run)?;
    // What is wrong with a configuration that cannot be read, the lower runtime says.
    let Ok(mut spec) = read_spec(&bundle) else { return Ok(None) };
    let state = StateDir::of(&run.args, &run.config, id)?;
    if state.exists() && run.lower.state(&run.args, id)?.is_some() {
        // The id is taken: the lower runtime says so, and nothing of the container that has it is touched.
        return Ok(None);
    }
    let host = host(run, &state)?;
    let mut injection = inject(&spec, &bundle, &host);
    if let Some(reason) = privilege::lacking().filter(|_| !injection.edits.is_empty()) {
        // It runs as it would without phos-runc.
        let note =
            format!("libphos.so is not put into this container, which cannot be checkpointed: {reason}");
        injection = Injection { edits: Vec::new(), notes: vec![note] };
    }
    injection.notes.iter().for_each(|n| log::warn(&run.args, n));
    if injection.edits.is_empty() {
        return Ok(None);
    }
    plan::apply(&mut spec, &injection.edits);
    // Of a container that is gone another job may still hold it for a moment.
    let _lock = state.lock_within(PATIENCE)?;
    state.create()?;
    state.save_spec(&spec)?;
    write_spec(&bundle, &spec).inspect_err(|_| state.remove())?;
    Ok(Some(state))
}

/// `create`.
pub fn create(run: &Run) -> Result<i32> {
    let Some(id) = run.args.id() else { return Err(run.lower.exec(&run.args)) };
    let Some(state) = prepare(run, id)? else { return Err(run.lower.exec(&run.args)) };
    let status = run.lower.run(&run.args)?;
    if status != 0 {
        state.remove();
    }
    Ok(status)
}

/// `run`: in the foreground the lower runtime owns terminal and signals, so it takes this process's place.
pub fn run(run: &Run) -> Result<i32> {
    if let Some(id) = run.args.id() {
        prepare(run, id)?;
    }
    Err(run.lower.exec(&run.args))
}

/// `delete`. Deleting ends a checkpoint or restore that is under way, which then has to put away what it has made.
pub fn delete(run: &Run) -> Result<i32> {
    let Some(id) = run.args.id() else { return Err(run.lower.exec(&run.args)) };
    let state = StateDir::of(&run.args, &run.config, id)?;
    if !state.exists() {
        return Err(run.lower.exec(&run.args));
    }
    if !(run.args.switch("force") || run.args.switch("f")) {
        // Not before a job is at its end: the lower runtime would take the container's state away under its hands.
        let _lock = state.lock_within(PATIENCE)?;
    }
    let mut cgroups = Vec::new();
    if run.args.switch("force") || run.args.switch("f") {
        lower::release(&lower_folder(&run.args, id));
        // The lower runtime takes a program whose first thread has ended for one that is gone. A driver takes longer to take the
        // others down than it tries to remove their cgroup.
        if let Some(container) = run.lower.state(&run.args, id)?.filter(|c| c.pid > 0) {
            cgroups = processes::cgroups_beyond_own(container.pid);
        }
    }
    let status = run.lower.run(&run.args)?;
    if status == 0 {
        cgroups.iter().for_each(|cgroup| remove_cgroup(cgroup, Instant::now() + LAST_THREAD));
        let _lock = state.lock_within(PATIENCE)?;
        state.remove();
    }
    Ok(status)
}
