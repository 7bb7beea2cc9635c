//! `restore`: the GPU's memory is loaded while the lower runtime rebuilds the processes.

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context as _, Result, anyhow, bail};
use phos_engine::device::cuda::LIBCUDA_ENV;
use phos_engine::fault::{self, Moment};
use phos_engine::image::Image;
use phos_engine::job::{RestoreJob, RestoreReport};
use phos_engine::keeper::{self, CONFIG_BEFORE, Keeper, Undo, WorkerRole};
use phos_engine::lower;
use phos_engine::service::{Client, ClientError};
use phos_engine::started::Started;
use phos_hooks::{Mode, again, detect, inject_as, late, merge, plan};
use serde_json::Value;

use crate::args::TRACE;
use crate::checkpoint::{block_on, image_path, prepare_environment};
use crate::context::Context;
use crate::create::{bundle, host};
use crate::state::{Lock, StateDir, config_path, lower_folder, read_spec, write_spec};
use crate::{criu_log, log, privilege, progress, trace};

/// How long a worker may take until it can be spoken to.
const START: Duration = Duration::from_secs(20);

/// CRIU's log in its working folder.
const LOG: &str = "restore.log";

/// Exit statuses from here on are those of programs that a signal has ended.
const KILLED: i32 = 128;

/// `restore`.
pub fn run(run: &Context) -> Result<i32> {
    let args = &run.args;
    let Some(id) = args.id() else { return Err(run.lower.exec(args)) };
    let image = image_path(run)?;
    if !Image::exists(&image) && !Image::is_interrupted(&image) {
        // No GPU image: the lower runtime's own, or none at all, which it says itself.
        return Err(run.lower.exec(args));
    }
    privilege::require("restore")?;
    let opened = Image::open_complete(&image)?;
    let state = StateDir::of(args, &run.config, id)?;
    let lock = state.lock()?;
    if run.lower.state(args, id)?.is_some() {
        bail!("container with id exists: {id}");
    }
    // Whatever is there is left over from a container that is gone.
    state.create()?;
    let result = with_state(run, &state, &lock, &opened, &image);
    if !matches!(result, Ok(0)) {
        state.remove();
    }
    result
}

fn with_state(run: &Context, state: &StateDir, lock: &Lock, image: &Image, path: &Path) -> Result<i32> {
    let timeouts = run.config.timeouts();
    let own_work = state.criu_work();
    let run = &Context { args: state.with_criu_work(&run.args)?, ..run.clone() };
    let options = late::restore_options(&image.manifest.effective_spec);
    state.write_criu_options(timeouts.lower_ms / 1000, &options)?;
    prepare_environment(run, state)?;
    let bundle = bundle(run)?;
    let mut spec = read_spec(&bundle)?;
    let before = spec.clone();
    let effective = effective_spec(run, image, &spec)?;
    merge::merge(&mut spec, &effective);
    let host = host(run, state)?;
    let mode = detect::injected(&image.manifest.effective_spec);
    let injection = inject_as(mode, &spec, &bundle, &host);
    if mode != Mode::Off && injection.edits.is_empty() {
        bail!(
            "cannot put libphos.so into the container as it was when the image was made: {}",
            injection.notes.join("; ")
        );
    }
    injection.notes.iter().for_each(|n| log::warn(&run.args, n));
    plan::apply(&mut spec, &injection.edits);
    state.save_spec(&spec)?;
    let job = RestoreJob {
        container: run.args.id().unwrap_or_default().to_string(),
        control_dir: state.control_dir(),
        image: path.to_path_buf(),
        manifest: image.digest.clone(),
        timeouts,
        library: Some(host.library),
    };
    let work = env::current_dir()?.join(criu_log::folder(&run.args).unwrap_or_default());
    let undo = Undo {
        limit: Duration::from_millis(timeouts.lower_ms),
        config: config_path(&bundle),
        folder: lower_folder(&run.args, &job.container),
        work: work.clone(),
        delete: run.lower.command_line(&run.args, &["delete", "--force", &job.container]),
    };
    let mut started = Started::nothing();
    let mut keeper = keeper::start(WorkerRole::Restore, &state.path, lock.as_fd(), &undo)?;
    let change = || {
        if spec == before {
            return Ok(());
        }
        // If this process is killed, the keeper puts it back.
        let kept = state.path.join(CONFIG_BEFORE);
        fs::copy(config_path(&bundle), &kept).with_context(|| kept.display().to_string())?;
        write_spec(&bundle, &spec)
    };
    let mut restored = || {
        block_on(async {
            let client = Client::connect(&keeper, START).await?;
            fault::at(Moment::Connected)?;
            client.restore(&job).await?;
            let limit = Duration::from_millis(timeouts.lower_ms);
            rebuild(run, state, &client, &keeper, limit, &mut started).await
        })
    };
    // From here on whatever fails is cleaned up below.
    let result = change().and_then(|()| restored());
    // A worker that is gone could not say why; its keeper can.
    let result = match result {
        Err(e) if matches!(e.downcast_ref(), Some(ClientError::Gone(_))) => match keeper.outcome() {
            Some(outcome) if !outcome.error.is_empty() => Err(anyhow!(outcome.error)),
            _ => Err(e),
        },
        other => other,
    };
    if let Ok((status, None)) = &result
        && *status >= KILLED
    {
        // The lower runtime was killed. What it has started may be at work still, and must not meet a second attempt.
        keeper.clean_up();
    }
    if !matches!(&result, Ok((_, Some(_)))) {
        // The state folder is about to be removed.
        keeper.finish();
    }
    let mut logged = run.args.clone();
    if !matches!(&result, Ok((_, Some(_)))) {
        started.clear(&work);
        // The state folder goes; CRIU's log must not.
        if work == own_work && fs::copy(work.join(LOG), path.join(LOG)).is_ok() {
            logged = logged.with("work-path", path.as_os_str());
        }
    }
    match result {
        Ok((status, report)) => {
            if report.is_none() && spec != before {
                let _ = write_spec(&bundle, &before);
            }
            if report.is_none()
                && let Some(cause) = criu_log::cause(&logged, "restore", started.begun, &state.lower_log())
            {
                eprintln!("{cause}");
                log::explain(&run.args, &cause);
            }
            if let Some(report) = report {
                let text = serde_json::to_string(&report)?;
                log::debug(&run.args, &format!("restore report: {text}"));
                if let Some(path) = env::var_os("PHOS_REPORT") {
                    std::fs::write(path, text)?;
                }
                if let Some(path) = run.args.value(TRACE) {
                    trace::write(path.as_ref(), &report.spans)?;
                }
            }
            Ok(status)
        }
        Err(e) => {
            if spec != before {
                // The engine's configuration, as it was: a second attempt starts from the same.
                let _ = write_spec(&bundle, &before);
            }
            Err(e)
        }
    }
}

/// The configuration that the container ran with, its files where this host has them.
fn effective_spec(run: &Context, image: &Image, spec: &Value) -> Result<Value> {
    let mut effective = image.manifest.effective_spec.clone();
    let library = env::var_os(LIBCUDA_ENV).and_then(|p| fs::canonicalize(p).ok());
    let driver = library.as_deref().and_then(Path::parent);
    let (moved, missing) = again::find(&mut effective, spec, driver, Path::new("/"));
    moved.iter().for_each(|line| log::warn(&run.args, line));
    if let Some(first) = missing.first() {
        let driver = match image.manifest.driver.release.as_str() {
            "" => format!("API {}", image.manifest.driver.version),
            release => release.into(),
        };
        bail!(
            "the container had {} mounted from {}, which this host lacks: the image was made with driver {driver}; install what \
             it belongs to",
            first.destination,
            first.source
        );
    }
    Ok(effective)
}

/// Runs the lower runtime's restore, attaches the GPU, and waits for whatever the lower runtime waits for. The keeper gets to
/// know all that is at work.
async fn rebuild(
    run: &Context,
    state: &StateDir,
    client: &Client,
    keeper: &Keeper,
    limit: Duration,
    started: &mut Started,
) -> Result<(i32, Option<RestoreReport>)> {
    let args = &run.args;
    let id = args.id().unwrap_or_default();
    let mut command = run.lower.program();
    if !args.global.contains_key("log") {
        // Engines read standard error for the cause of a failure: warnings do not belong there. Nor do they belong into what
        // the container prints, which goes the same way.
        command.arg("--log").arg(state.lower_log());
    }
    command.args(&args.without(TRACE).all).stdin(Stdio::inherit());
    keeper.introduce(&mut command);
    let mut child = command.spawn().with_context(|| format!("cannot run {}", run.lower.path.display()))?;
    let give_up = |child: &mut Child| {
        // A program without its GPU memory must not run.
        lower::release(&lower_folder(args, id));
        run.lower.quietly(args, &["delete", "--force", id]);
        let _ = child.wait();
    };
    let pid = match wait_for_init(run, &mut child, limit, keeper, started) {
        Ok(Ok(pid)) => pid,
        // It failed, and has said why.
        Ok(Err(status)) => return Ok((status, None)),
        Err(e) => {
            let _ = child.kill();
            started.end();
            give_up(&mut child);
            return Err(e);
        }
    };
    let attached = match fault::at(Moment::Rebuilt) {
        Ok(()) => tokio::select! {
            attached = client.attach(pid) => attached.map_err(anyhow::Error::from),
            never = progress::show(client.clone()) => match never {},
        },
        Err(e) => Err(e.into()),
    };
    progress::clear();
    match attached {
        Ok(report) => {
            let status = if detached(run) { 0 } else { child.wait()?.code().unwrap_or(255) };
            Ok((status, Some(report)))
        }
        Err(e) => {
            give_up(&mut child);
            Err(e)
        }
    }
}

fn detached(run: &Context) -> bool {
    run.args.switch("detach") || run.args.switch("d")
}

/// Waits until the lower runtime has rebuilt the container. `Ok(Err(status))`: it ended without doing so.
fn wait_for_init(
    run: &Context,
    child: &mut Child,
    limit: Duration,
    keeper: &Keeper,
    started: &mut Started,
) -> Result<std::result::Result<i32, i32>> {
    fault::at(Moment::LowerStarted)?;
    let lower = child.id() as i32;
    let id = run.args.id().unwrap_or_default();
    let deadline = Instant::now() + limit;
    loop {
        let ended = child.try_wait()?;
        if let Some(status) = ended.filter(|s| !detached(run) || !s.success()) {
            return Ok(Err(status.code().unwrap_or_else(|| KILLED + status.signal().unwrap_or(0))));
        }
        if ended.is_some() || !detached(run) {
            let container = run.lower.state(&run.args, id)?.filter(|c| c.pid > 0);
            match container {
                Some(c) if ended.is_some() || c.status == "running" => {
                    if c.status == "paused" {
                        // In the freezer of an earlier attempt that was killed. A frozen process cannot run the driver's part.
                        run.lower.quietly(&run.args, &["resume", id]);
                    }
                    return Ok(Ok(c.pid));
                }
                None if ended.is_some() => {
                    bail!("the restored container ended before its GPU state was back")
                }
                _ => {}
            }
        }
        let in_vain = ended.is_none() && started.look(lower);
        started.fresh().into_iter().for_each(|pid| keeper.tell_of(pid));
        if in_vain {
            // What CRIU has left has the lower runtime wait for it. Without it, that fails and cleans up after itself.
            keeper.strays().into_iter().for_each(|pid| started.note(pid));
            started.end();
        }
        if Instant::now() > deadline {
            bail!("the lower runtime did not rebuild the container within {} s", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(if detached(run) { 1 } else { 5 }));
    }
}
