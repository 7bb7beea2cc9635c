//! `checkpoint`: hands the work to a keeper and its worker, and tells the engine how it ended.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};
use std::{env, fs, io};

use anyhow::{Context as _, Result, anyhow};
use phos_engine::fault::{self, Moment};
use phos_engine::image::Image;
use phos_engine::job::{CheckpointJob, CheckpointReport};
use phos_engine::keeper::{self, Keeper, Undo, WorkerRole};
use phos_engine::processes;
use phos_engine::service::{Client, ClientError, LowerOutput};
use phos_hooks::{late, locate, plan};

use crate::args::{Args, TRACE};
use crate::config::{Config, find_criu};
use crate::context::Context;
use crate::lower::State;
use crate::state::{Lock, StateDir, read_spec};
use crate::{criu_log, log, privilege, progress, trace};

/// How long a worker may take until it can be spoken to. It does not touch the GPU before that.
const START: Duration = Duration::from_secs(20);

/// The image folder a command line names, absolute. runc's default is `checkpoint` in the working folder.
pub fn image_path(run: &Context) -> Result<PathBuf> {
    let named = run.args.value("image-path").filter(|p| !p.is_empty());
    Ok(env::current_dir()?.join(named.unwrap_or("checkpoint".as_ref())))
}

/// Puts CRIU where the lower runtime looks for it, and keeps CRIU from loading NVIDIA's plugin: the GPU is taken
/// care of here.
///
/// Returns CRIU's version.
pub fn prepare_environment(run: &Context, state: &StateDir) -> Result<String> {
    let (criu, version) = find_criu(&run.config)?;
    let mut folders: Vec<PathBuf> = criu.parent().map(Into::into).into_iter().collect();
    let listed = env::var_os("PATH")
        .unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    folders.extend(env::split_paths(&listed));
    // SAFETY: this program has one thread so far.
    unsafe {
        env::set_var("PATH", env::join_paths(folders)?);
        env::set_var("CRIU_LIBS_DIR", state.no_plugins());
        if env::var_os("CRIU_CONFIG_FILE").is_none() {
            env::set_var("CRIU_CONFIG_FILE", state.criu_options());
        }
    }
    choose_driver(&run.config);
    Ok(version)
}

/// Has the driver library used that the configuration names.
pub fn choose_driver(config: &Config) {
    if let Some(libcuda) = &config.libcuda
        && env::var_os("PHOS_LIBCUDA").is_none()
    {
        // SAFETY: this program has one thread so far.
        unsafe { env::set_var("PHOS_LIBCUDA", libcuda) };
    }
}

/// Runs `future` in a runtime of its own.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

/// The image to build on, relative to `image`, and the lower runtime's command line.
///
/// CRIU can build on a pre-dump only, and only where there is one of the CPU side; the GPU's side builds on any image.
fn parent(args: &Args, image: &Path) -> Result<(Option<String>, Args)> {
    let lower = args.without(TRACE);
    let Some(named) = args.value("parent-path").filter(|p| !p.is_empty()) else { return Ok((None, lower)) };
    // The image's folder need not exist yet, so `..` is resolved by name, as the lower runtime does.
    let mut folder = image.to_path_buf();
    for part in Path::new(named).components() {
        match part {
            Component::ParentDir => drop(folder.pop()),
            part => folder.push(part),
        }
    }
    if Path::new(named).is_absolute() || !Image::exists(&folder) {
        // The lower runtime's to judge: it knows the flag's rules, and such a folder may be its own pre-dump.
        return Ok((None, lower));
    }
    let parent = Image::open(&folder)?;
    let cpu_side = parent.manifest.is_pre_dump() && folder.join("inventory.img").exists();
    let lower = if cpu_side { lower } else { lower.without("parent-path") };
    let named = named.to_str().context("--parent-path is not text")?;
    Ok((Some(named.to_string()), lower))
}

/// Finds the mounts that hooks have made, declares them to CRIU and adds them to what a restore will need.
fn declare_late_mounts(
    spec: &mut serde_json::Value,
    container: &State,
    state: &StateDir,
    criu_timeout: u64,
) -> Result<()> {
    let (bundle, pid) = (&container.bundle, container.pid);
    let read = |path: String| fs::read_to_string(&path).with_context(|| path);
    let inside = late::parse(&read(format!("/proc/{pid}/mountinfo"))?);
    let host = late::parse(&read("/proc/self/mountinfo".into())?);
    let root = locate::root_path(spec, bundle);
    let mounts = late::mounts(&inside, &host, spec, &fs::canonicalize(&root).unwrap_or(root));
    state.write_criu_options(criu_timeout, &late::criu_options(&mounts))?;
    late::remember(spec, &mounts, |path| {
        let meta = fs::metadata(path).ok().filter(|m| m.file_type().is_char_device())?;
        Some((nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev())))
    });
    Ok(())
}

/// The configuration that the container runs with. A GPU toolkit's runtime below this one has edited the bundle's in its turn.
fn effective_spec(state: &StateDir, bundle: &Path) -> serde_json::Value {
    let bundles = read_spec(bundle).ok();
    let ours = |spec: &serde_json::Value| plan::control_dir(spec) == Some(&state.control_dir());
    match (state.spec(), bundles) {
        (Some(_), Some(spec)) if ours(&spec) => spec,
        (Some(spec), _) => spec,
        (None, bundles) => bundles.unwrap_or_default(),
    }
}

/// An annotation of the container.
fn annotation<'a>(spec: &'a serde_json::Value, name: &str) -> Option<&'a str> {
    spec.get("annotations")?.get(name)?.as_str()
}

/// `checkpoint`.
pub fn run(run: &Context) -> Result<i32> {
    let args = &run.args;
    let Some(id) = args.id() else { return Err(run.lower.exec(args)) };
    let state = StateDir::of(args, &run.config, id)?;
    let Some(container) = run.lower.state(args, id)?.filter(|c| c.pid > 0) else {
        return Err(run.lower.exec(args));
    };
    let alive = matches!(container.status.as_str(), "running" | "paused");
    let gpu = state.exists()
        || processes::of_container(container.pid)?.iter().any(|p| processes::has_driver_loaded(p.pid));
    if !alive || !gpu {
        return Err(run.lower.exec(args));
    }
    privilege::require("checkpoint")?;
    let image = image_path(run)?;
    let (parent, lower_args) = parent(args, &image)?;
    let asked = Asked { image, parent, lower_args };
    let lock = state.lock()?;
    // A container that was created by another runtime gets a folder for the time of the checkpoint.
    let own_state = state.is_own();
    if !own_state {
        state.borrow()?;
    }
    let result = with_state(run, &state, own_state, &container, asked, &lock);
    if !own_state {
        state.remove();
    }
    result
}

/// What a checkpoint command asks for.
struct Asked {
    image: PathBuf,
    parent: Option<String>,
    lower_args: Args,
}

fn with_state(
    run: &Context,
    state: &StateDir,
    own_state: bool,
    container: &State,
    asked: Asked,
    lock: &Lock,
) -> Result<i32> {
    let args = &run.args;
    let id = args.id().unwrap_or_default();
    let criu_version = prepare_environment(run, state)?;
    let mut effective_spec = effective_spec(state, &container.bundle);
    let timeouts = run.config.timeouts();
    declare_late_mounts(&mut effective_spec, container, state, timeouts.lower_ms / 1000)?;
    let library = run.config.library();
    let own_pid = std::process::id() as i32;
    let lower_args = state.with_criu_work(&asked.lower_args)?;
    let job = CheckpointJob {
        container: id.to_string(),
        control_dir: state.control_dir(),
        init_pid: container.pid,
        image: asked.image,
        leave_running: args.switch("leave-running") || args.switch("pre-dump"),
        pre_dump: args.switch("pre-dump"),
        parent: asked.parent,
        frozen: container.status == "paused",
        lower_checkpoint: run.lower.verbatim(&lower_args),
        lower_pause: run.lower.command_line(args, &["pause", id]),
        lower_resume: run.lower.command_line(args, &["resume", id]),
        lower_state: run.lower.command_line(args, &["state", id]),
        asked_by: processes::describe(own_pid).map_or((own_pid, 0), |p| (own_pid, p.start_time)),
        strategy: run.config.strategy(annotation(&effective_spec, "phos.strategy"))?,
        compression: run.config.compression(annotation(&effective_spec, "phos.compression"))?,
        timeouts,
        effective_spec,
        library: (own_state && library.exists()).then_some(library),
        lower_version: run.lower.version(),
        criu_version,
    };
    let begun = SystemTime::now();
    let mut keeper = keeper::start(WorkerRole::Checkpoint, &state.path, lock.as_fd(), &Undo::default())?;
    let carried = carry_out(&mut keeper, &job);
    if !own_state {
        // The folder is about to be removed.
        keeper.finish();
    }
    let (result, lower) = carried?;
    if lower.status != 0
        && let Some(cause) = criu_log::cause(&lower_args, "dump", begun, &state.lower_log())
    {
        // Engines show the first line.
        eprintln!("{cause}");
        log::explain(args, &cause);
    }
    io::stdout().write_all(&lower.stdout)?;
    io::stderr().write_all(&lower.stderr)?;
    match result {
        Ok(report) => {
            report.warnings.iter().for_each(|w| log::warn(args, w));
            // The image is all there is of the container now. An error status would have engines throw it away.
            if let Some(lost) = &report.lost {
                log::warn(args, lost);
                eprintln!("{lost}");
            }
            let text = serde_json::to_string(&report)?;
            log::debug(args, &format!("checkpoint report: {text}"));
            if let Some(path) = env::var_os("PHOS_REPORT") {
                std::fs::write(path, text)?;
            }
            if let Some(path) = args.value(TRACE) {
                trace::write(path.as_ref(), &report.spans)?;
            }
            Ok(0)
        }
        // The lower runtime has written its own error line.
        Err(_) if lower.status != 0 => Ok(lower.status),
        Err(e) => Err(e),
    }
}

/// Sends the job to the keeper's worker and waits.
fn carry_out(keeper: &mut Keeper, job: &CheckpointJob) -> Result<(Result<CheckpointReport>, LowerOutput)> {
    let answer = block_on(async {
        let client = Client::connect(keeper, START).await?;
        fault::at(Moment::Connected)?;
        tokio::select! {
            answer = client.checkpoint(job) => Ok(answer?),
            never = progress::show(client.clone()) => match never {},
        }
    });
    progress::clear();
    fault::at(Moment::Answered)?;
    match answer {
        Ok((result, lower)) => {
            let result = result.map_err(|e| match e {
                ClientError::Refused(line) => anyhow!(line),
                gone => gone.into(),
            });
            Ok((result, lower))
        }
        // Nothing was asked of a worker that cannot be reached.
        Err(e) if e.downcast_ref::<ClientError>().is_none_or(|e| matches!(e, ClientError::NeverCame(_))) => {
            Err(e)
        }
        Err(e) => match keeper.outcome() {
            // The worker is gone; the keeper has put the container right and says how it stands.
            Some(outcome) if outcome.error.is_empty() => {
                // A report that was too long for the keeper is missing; the checkpoint is none the worse.
                Ok((Ok(serde_json::from_str(&outcome.report).unwrap_or_default()), LowerOutput::default()))
            }
            Some(outcome) => Err(anyhow!(outcome.error)),
            None => Err(e),
        },
    }
}
