//! The embedded lower runtime: youki's `libcontainer` behind runc's command line, for hosts that have no runc. phos-runc runs
//! itself with [`WORD`] in front of the words that a lower runtime would get, so that the rest of the program knows one kind
//! of lower runtime. `libcontainer` restores nothing, so `checkpoint` and `restore` ask for runc.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::oci_spec::runtime::{LinuxResources, Spec};
use libcontainer::signal::Signal;
use libcontainer::syscall::syscall::SyscallType;
use liboci_cli::{CommonCmd, Create, Exec, GlobalOpts, Kill, List, Ps, Run, StandardCmd, Update};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// The hidden verb.
pub const WORD: &str = "__libcontainer";
/// What it says its version is.
pub const VERSION: &str = "libcontainer 0.7.0, embedded in phos-runc";

/// runc's command line as `liboci-cli` has it.
#[derive(Parser)]
#[command(name = "phos-runc", disable_version_flag = true, disable_help_subcommand = true)]
struct Line {
    #[command(flatten)]
    global: GlobalOpts,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    #[command(flatten)]
    Standard(Box<StandardCmd>),
    #[command(flatten)]
    Common(Box<CommonCmd>),
}

/// Runs a lower runtime's command line; returns its exit status.
pub fn run(words: &[OsString]) -> Result<i32> {
    if words.iter().any(|w| w == "--version" || w == "-v") {
        println!("{VERSION}");
        return Ok(0);
    }
    let name = OsString::from("phos-runc");
    let line = match Line::try_parse_from(std::iter::once(&name).chain(words)) {
        Ok(line) => line,
        Err(e) if e.use_stderr() => {
            let text = e.to_string();
            bail!("{}", text.lines().next().unwrap_or_default().trim_start_matches("error: "));
        }
        Err(help) => {
            print!("{help}");
            return Ok(0);
        }
    };
    let host = Host {
        root: line.global.root.unwrap_or_else(|| "/run/runc".into()),
        systemd: line.global.systemd_cgroup,
    };
    match line.verb {
        Verb::Standard(verb) => match *verb {
            StandardCmd::Create(args) => host.create(args),
            StandardCmd::Start(args) => Ok(host.container(&args.container_id)?.start()?).map(|()| 0),
            StandardCmd::State(args) => host.state(&args.container_id),
            StandardCmd::Kill(args) => host.kill(&args),
            StandardCmd::Delete(args) => host.delete(&args.container_id, args.force),
        },
        Verb::Common(verb) => match *verb {
            CommonCmd::Checkpointt(_) => bail!("not implemented by libcontainer"),
            CommonCmd::Events(args) => {
                Ok(host.container(&args.container_id)?.events(args.interval, args.stats)?).map(|()| 0)
            }
            CommonCmd::Exec(args) => host.exec(args),
            CommonCmd::Features(_) => features(),
            CommonCmd::List(args) => host.list(&args),
            CommonCmd::Pause(args) => Ok(host.container(&args.container_id)?.pause()?).map(|()| 0),
            CommonCmd::Ps(args) => host.ps(&args),
            CommonCmd::Resume(args) => Ok(host.container(&args.container_id)?.resume()?).map(|()| 0),
            CommonCmd::Run(args) => host.run(args),
            CommonCmd::Update(args) => host.update(args),
            CommonCmd::Spec(args) => spec(args.bundle.as_deref(), args.rootless),
        },
    }
}

/// Where containers are kept, and how their cgroups are made.
struct Host {
    root: PathBuf,
    systemd: bool,
}

impl Host {
    fn container(&self, id: &str) -> Result<Container> {
        ensure!(crate::state::valid_id(id), "invalid container id '{id}'");
        let folder = self.root.join(id);
        ensure!(folder.is_dir(), "container does not exist");
        Ok(Container::load(folder)?)
    }

    fn builder(
        &self,
        id: &str,
        pid_file: Option<PathBuf>,
        console: Option<PathBuf>,
        fds: i32,
    ) -> Result<ContainerBuilder> {
        Ok(ContainerBuilder::new(id.to_string(), SyscallType::default())
            .validate_id()?
            .with_root_path(&self.root)?
            .with_pid_file(pid_file)?
            .with_console_socket(console)
            .with_preserved_fds(fds))
    }

    fn create(&self, args: Create) -> Result<i32> {
        check(&args.bundle)?;
        ensure!(
            !self.root.join(&args.container_id).exists(),
            "container with id exists: {}",
            args.container_id
        );
        self.builder(&args.container_id, args.pid_file, args.console_socket, args.preserve_fds)?
            .as_init(args.bundle)
            .with_systemd(self.systemd)
            .with_detach(true)
            .with_no_pivot(args.no_pivot)
            .build()?;
        Ok(0)
    }

    fn run(&self, args: Run) -> Result<i32> {
        check(&args.bundle)?;
        ensure!(
            !self.root.join(&args.container_id).exists(),
            "container with id exists: {}",
            args.container_id
        );
        if !args.no_subreaper && !args.detach {
            nix::sys::prctl::set_child_subreaper(true).context("becoming a subreaper")?;
        }
        let mut container = self
            .builder(&args.container_id, args.pid_file, args.console_socket, args.preserve_fds)?
            .as_init(args.bundle)
            .with_systemd(self.systemd)
            .with_detach(args.detach)
            .with_no_pivot(args.no_pivot)
            .build()?;
        container.start().inspect_err(|_| drop(container.delete(true)))?;
        if args.detach {
            return Ok(0);
        }
        let status = container.pid().map_or(Ok(255), |pid| wait(pid.as_raw()));
        if !args.keep {
            container.delete(true)?;
        }
        status
    }

    fn state(&self, id: &str) -> Result<i32> {
        println!("{}", serde_json::to_string_pretty(&describe(&self.container(id)?)?)?);
        Ok(0)
    }

    fn kill(&self, args: &Kill) -> Result<i32> {
        let mut container = self.container(&args.container_id)?;
        if args.signal == "0" {
            // Asks whether it lives, which the library's signals cannot.
            ensure!(container.status() != ContainerStatus::Stopped, "container not running");
            return Ok(0);
        }
        let signal = Signal::try_from(args.signal.as_str())
            .map_err(|_| anyhow::anyhow!("unknown signal \"{}\"", args.signal))?;
        let before = container.status();
        ensure!(before != ContainerStatus::Stopped || args.all, "container not running");
        container.kill(signal, args.all)?;
        // The library takes the container for stopped now, whatever the signal was.
        container.set_status(before).refresh_status()?;
        Ok(container.save()?).map(|()| 0)
    }

    fn delete(&self, id: &str, force: bool) -> Result<i32> {
        if force && !self.root.join(id).is_dir() {
            return Ok(0);
        }
        let mut container = self.container(id)?;
        let deletable = matches!(container.status(), ContainerStatus::Stopped | ContainerStatus::Created);
        ensure!(
            force || deletable,
            "cannot delete container {id} that is not stopped: {}",
            container.status()
        );
        Ok(container.delete(force)?).map(|()| 0)
    }

    fn exec(&self, args: Exec) -> Result<i32> {
        self.container(&args.container_id)?;
        // The library would pass over the one and make cgroups of that name for the other.
        ensure!(
            !args.tty,
            "exec --tty is not in the embedded libcontainer: name a process.json with a terminal"
        );
        let named = args.cgroup.as_deref().is_some_and(|c| c.contains(':'));
        ensure!(!named, "exec --cgroup: the embedded libcontainer takes a path and no controller");
        let (user, group) = args.user.map_or((None, None), |(user, group)| (Some(user), group));
        let pid = self
            .builder(&args.container_id, args.pid_file, args.console_socket, args.preserve_fds)?
            .as_tenant()
            .with_detach(args.detach)
            .with_cwd(args.cwd)
            .with_env(args.env.into_iter().collect::<HashMap<_, _>>())
            .with_process(args.process)
            .with_no_new_privs(args.no_new_privs)
            .with_process_label(args.process_label)
            .with_apparmor(args.apparmor)
            .with_additional_gids(args.additional_gids)
            .with_user(user)
            .with_group(group)
            .with_capabilities(args.cap)
            .with_ignore_paused(args.ignore_paused)
            .with_sub_cgroup(args.cgroup)
            .with_container_args(args.command)
            .build()?;
        if args.detach { Ok(0) } else { wait(pid.as_raw()) }
    }

    fn list(&self, args: &List) -> Result<i32> {
        let mut containers = Vec::new();
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if let Ok(container) = Container::load(entry.path()) {
                containers.push(container);
            }
        }
        containers.sort_by(|a, b| a.id().cmp(b.id()));
        if args.quiet {
            containers.iter().for_each(|c| println!("{}", c.id()));
            return Ok(0);
        }
        match args.format.as_str() {
            "json" => {
                let all = containers.iter().map(describe).collect::<Result<Vec<_>>>()?;
                println!("{}", if all.is_empty() { "null".into() } else { Value::from(all).to_string() });
            }
            "table" => {
                println!("{:<12}{:<12}{:<12}{:<12}CREATED", "ID", "PID", "STATUS", "BUNDLE");
                for c in &containers {
                    let v = describe(c)?;
                    let text = |key: &str| v[key].as_str().unwrap_or_default().to_string();
                    println!(
                        "{:<12}{:<12}{:<12}{:<12}{}",
                        c.id(),
                        v["pid"],
                        text("status"),
                        text("bundle"),
                        text("created")
                    );
                }
            }
            _ => bail!("invalid format option"),
        }
        Ok(0)
    }

    fn cgroup(&self, container: &Container) -> Result<AnyCgroupManager> {
        Ok(create_cgroup_manager(CgroupConfig {
            cgroup_path: container.spec()?.cgroup_path,
            systemd_cgroup: container.systemd(),
            container_name: container.id().to_string(),
        })?)
    }

    fn ps(&self, args: &Ps) -> Result<i32> {
        let container = self.container(&args.container_id)?;
        let pids = self.cgroup(&container)?.get_all_pids()?;
        let pids: Vec<i32> = pids.into_iter().map(|p| p.as_raw()).collect();
        match args.format.as_str() {
            "json" => println!("{}", json!(pids)),
            "table" => {
                let options =
                    if args.ps_options.is_empty() { vec!["-ef".into()] } else { args.ps_options.clone() };
                let output = std::process::Command::new("ps").args(options).output().context("ps")?;
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let title = text.lines().next().unwrap_or_default();
                let column = title.split_whitespace().position(|w| w == "PID").context("ps shows no PID")?;
                println!("{title}");
                let pid = |l: &str| l.split_whitespace().nth(column)?.parse().ok();
                text.lines()
                    .skip(1)
                    .filter(|l| pid(l).is_some_and(|p| pids.contains(&p)))
                    .for_each(|l| println!("{l}"));
            }
            _ => bail!("invalid format option"),
        }
        Ok(0)
    }

    fn update(&self, args: Update) -> Result<i32> {
        let container = self.container(&args.container_id)?;
        ensure!(container.status() != ContainerStatus::Stopped, "container not running");
        let rdt = args.l3_cache_schema.is_some() || args.mem_bw_schema.is_some();
        ensure!(!rdt, "update: the embedded libcontainer does not change Intel RDT's schemata");
        let resources = resources(&args)?;
        let options = ControllerOpt {
            resources: &resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        self.cgroup(&container)?.apply(&options)?;
        Ok(0)
    }
}

/// The resources that `update` names, as the configuration has them.
fn resources(args: &Update) -> Result<LinuxResources> {
    if let Some(path) = &args.resources {
        let mut text = String::new();
        match path.as_os_str() == "-" {
            true => io::stdin().take(1 << 20).read_to_string(&mut text).map(drop)?,
            false => text = fs::read_to_string(path).with_context(|| path.display().to_string())?,
        }
        return serde_json::from_str(&text).with_context(|| path.display().to_string());
    }
    let table = |fields: &[(&str, Value)]| -> Option<Value> {
        let set: serde_json::Map<_, _> =
            fields.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.to_string(), v.clone())).collect();
        (!set.is_empty()).then(|| set.into())
    };
    let all = [
        (
            "memory",
            table(&[
                ("limit", json!(args.memory)),
                ("reservation", json!(args.memory_reservation)),
                ("swap", json!(args.memory_swap)),
            ]),
        ),
        ("pids", table(&[("limit", json!(args.pids_limit))])),
        ("blockIO", table(&[("weight", json!(args.blkio_weight))])),
        (
            "cpu",
            table(&[
                ("shares", json!(args.cpu_share)),
                ("quota", json!(args.cpu_quota)),
                ("period", json!(args.cpu_period)),
                ("realtimeRuntime", json!(args.cpu_rt_runtime)),
                ("realtimePeriod", json!(args.cpu_rt_period)),
                ("cpus", json!(args.cpuset_cpus)),
                ("mems", json!(args.cpuset_mems)),
            ]),
        ),
    ];
    let set: serde_json::Map<_, _> = all.into_iter().filter_map(|(k, v)| Some((k.to_string(), v?))).collect();
    Ok(serde_json::from_value(set.into())?)
}

/// A container as `state` and `list` show it.
fn describe(container: &Container) -> Result<Value> {
    let spec = Spec::load(container.bundle().join("config.json")).ok();
    let root = spec.as_ref().and_then(|s| s.root().as_ref()).map(|r| container.bundle().join(r.path()));
    let stopped = container.status() == ContainerStatus::Stopped;
    let owner = container.creator().map(|o| o.to_string_lossy().into_owned());
    let mut shown = json!({
        "ociVersion": spec.as_ref().map(Spec::version),
        "id": container.id(),
        "pid": container.pid().filter(|_| !stopped).map_or(0, |p| p.as_raw()),
        "status": container.status().to_string().to_lowercase(),
        "bundle": container.bundle(),
        "rootfs": root,
        "created": container.created(),
        "owner": owner.unwrap_or_default(),
    });
    if let Some(annotations) = container.state.annotations.as_ref().filter(|a| !a.is_empty()) {
        shown["annotations"] = json!(annotations);
    }
    Ok(shown)
}

/// Refuses what this build would silently leave out.
fn check(bundle: &Path) -> Result<()> {
    let path = bundle.join("config.json");
    let spec = fs::read(&path).with_context(|| path.display().to_string())?;
    let spec: Value = serde_json::from_slice(&spec).with_context(|| path.display().to_string())?;
    let profile = spec.pointer("/linux/seccomp").is_some_and(|s| !s.is_null());
    if profile && !cfg!(feature = "libcontainer-seccomp") {
        bail!(
            "the configuration has a seccomp profile, which this build of the embedded libcontainer cannot load: install runc, or \
             build with the feature libcontainer-seccomp"
        );
    }
    Ok(())
}

/// Waits for a child; returns the status a shell would.
fn wait(pid: i32) -> Result<i32> {
    loop {
        match waitpid(Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e).context("waiting for the container's process"),
        }
    }
}

/// `spec`: an example configuration.
fn spec(bundle: Option<&Path>, rootless: bool) -> Result<i32> {
    let path = bundle.map_or_else(env::current_dir, |b| Ok(b.into()))?.join("config.json");
    ensure!(!path.exists(), "File {} exists. Remove it first", path.display());
    let (user, group) = (nix::unistd::getuid(), nix::unistd::getgid());
    let spec = if rootless { Spec::rootless(user.as_raw(), group.as_raw()) } else { Spec::default() };
    fs::write(&path, serde_json::to_vec_pretty(&spec)?).with_context(|| path.display().to_string())?;
    Ok(0)
}

/// `features`: what this build can do.
fn features() -> Result<i32> {
    let seccomp = cfg!(feature = "libcontainer-seccomp");
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": {"v1": true, "v2": true, "systemd": false, "systemdUser": false},
            "seccomp": {"enabled": seccomp},
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
        },
        "annotations": {"run.oci.crun.checkpoint": "false"},
    });
    println!("{}", serde_json::to_string_pretty(&features)?);
    Ok(0)
}
