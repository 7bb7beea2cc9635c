//! `restore`: the GPU's memory is loaded while the lower runtime rebuilds the processes.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context as _, Result, anyhow, bail};
use phos_engine::image::Image;
use phos_engine::job::{RestoreJob, RestoreReport};
use phos_engine::keeper::{self, WorkerRole};
use phos_engine::service::Client;
use phos_hooks::{Host, Mode, detect, inject_as, merge, plan};

use crate::args::TRACE;
use crate::checkpoint::{block_on, image_path, prepare_environment};
use crate::context::Context;
use crate::create::bundle;
use crate::state::{StateDir, read_spec, write_spec};
use crate::{log, trace};

/// How long a worker may take until it can be spoken to.
const START: Duration = Duration::from_secs(20);

/// `restore`.
pub fn run(run: &Context) -> Result<i32> {
    let args = &run.args;
    let Some(id) = args.id() else { return Err(run.lower.exec(args)) };
    let image = image_path(run)?;
    if !Image::exists(&image) {
        // No GPU image: the lower runtime's own, or none at all, which it says itself.
        return Err(run.lower.exec(args));
    }
    let opened = Image::open_complete(&image)?;
    let state = StateDir::of(args, &run.config, id)?;
    if run.lower.state(args, id)?.is_some() {
        bail!("container with id exists: {id}");
    }
    if state.exists() {
        // Left over from a container that is gone, unless another restore is making it now.
        state.lock()?;
    }
    state.create()?;
    let result = with_state(run, &state, &opened, &image);
    if !matches!(result, Ok(0)) {
        state.remove();
    }
    result
}

fn with_state(run: &Context, state: &StateDir, image: &Image, path: &Path) -> Result<i32> {
    let lock = state.lock()?;
    prepare_environment(run, state)?;
    let bundle = bundle(run)?;
    let mut spec = read_spec(&bundle)?;
    let before = spec.clone();
    merge::merge(&mut spec, &image.manifest.effective_spec);
    let library = run.config.library();
    let host = Host {
        library: library.clone(),
        hook: run.config.hook(),
        control_dir: state.control_dir(),
        default_mode: run.config.inject()?,
    };
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
    if spec != before {
        write_spec(&bundle, &spec)?;
    }
    let job = RestoreJob {
        container: run.args.id().unwrap_or_default().to_string(),
        control_dir: state.control_dir(),
        image: path.to_path_buf(),
        manifest: image.digest.clone(),
        timeouts: run.config.timeouts(),
        library: Some(library),
    };
    let keeper = keeper::start(WorkerRole::Restore, &state.path, lock.as_fd())?;
    let socket = keeper.socket.clone();
    let result = block_on(async {
        let client = Client::connect(&socket, START).await?;
        client.restore(&job).await?;
        rebuild(run, &client).await
    });
    match result {
        Ok((status, report)) => {
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

/// Runs the lower runtime's restore, attaches the GPU, and waits for whatever the lower runtime waits for.
async fn rebuild(run: &Context, client: &Client) -> Result<(i32, Option<RestoreReport>)> {
    let args = &run.args;
    let mut child = Command::new(&run.lower.path)
        .args(&args.without(TRACE).all)
        .stdin(Stdio::inherit())
        .spawn()
        .with_context(|| format!("cannot run {}", run.lower.path.display()))?;
    let id = args.id().unwrap_or_default();
    let pid = match wait_for_init(run, &mut child, id)? {
        Ok(pid) => pid,
        // It failed, and has said why.
        Err(status) => return Ok((status, None)),
    };
    match client.attach(pid).await {
        Ok(report) => {
            let status = if detached(run) { 0 } else { child.wait()?.code().unwrap_or(255) };
            Ok((status, Some(report)))
        }
        Err(e) => {
            // A program without its GPU memory must not run.
            run.lower.quietly(args, &["delete", "--force", id]);
            let _ = child.wait();
            Err(anyhow!(e))
        }
    }
}

fn detached(run: &Context) -> bool {
    run.args.switch("detach") || run.args.switch("d")
}

/// Waits until the lower runtime has rebuilt the container. `Ok(Err(status))`: it ended without doing so.
fn wait_for_init(run: &Context, child: &mut Child, id: &str) -> Result<std::result::Result<i32, i32>> {
    if detached(run) {
        let status = child.wait()?;
        if !status.success() {
            return Ok(Err(status.code().unwrap_or(255)));
        }
        return match run.lower.state(&run.args, id)?.filter(|c| c.pid > 0) {
            Some(container) => Ok(Ok(container.pid)),
            None => bail!("the restored container ended before its GPU state was back"),
        };
    }
    let deadline = Instant::now() + Duration::from_secs(600);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Err(status.code().unwrap_or(255)));
        }
        if let Some(container) =
            run.lower.state(&run.args, id)?.filter(|c| c.status == "running" && c.pid > 0)
        {
            return Ok(Ok(container.pid));
        }
        if Instant::now() > deadline {
            bail!("the lower runtime did not rebuild the container within 600 s");
        }
        thread::sleep(Duration::from_millis(5));
    }
}
