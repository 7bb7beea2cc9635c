//! Real container engines with private roots and sockets, started and stopped by the tests.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bundle::Bundle;
use crate::container::{Ended, Place};

/// Whether the engine's program is on this machine. In CI it must be.
///
/// # Panics
/// In CI, if it is missing.
pub fn present(program: &str) -> bool {
    let found =
        ["/usr/bin", "/usr/sbin", "/usr/local/bin"].iter().any(|d| Path::new(d).join(program).is_file());
    assert!(
        found || std::env::var("CI").is_err(),
        "{program} is missing: run integration/scripts/setup.sh engines"
    );
    if !found {
        eprintln!("skipped: {program} is not installed (integration/scripts/setup.sh engines)");
    }
    found
}

/// The file that [`differing`] writes.
const DIFFERING: &str = "phos-runc.env";

/// Engines run the runtime with an environment of their own: this script stands for phos-runc with the place's.
pub(crate) fn runtime(place: &Place) -> Result<PathBuf> {
    let path = place.path("phos-runc");
    let mut script = String::from("#!/bin/sh\n");
    for (name, value) in &place.env {
        script.push_str(&format!("export {name}='{}'\n", value.to_string_lossy()));
    }
    fs::write(place.path(DIFFERING), "")?;
    script.push_str(&format!(". {}\n", place.path(DIFFERING).display()));
    script.push_str(&format!("exec {} \"$@\"\n", place.tools.program("phos-runc").display()));
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// While `f` runs, the engines of this place find the runtime with another value of an environment variable.
pub fn differing<T>(place: &Place, name: &str, value: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    fs::write(place.path(DIFFERING), format!("export {name}='{value}'\n"))?;
    let result = f();
    fs::write(place.path(DIFFERING), "")?;
    result
}

/// The folder of a place in which its containerd has the runtime write checkpoints.
pub(crate) fn own_run(place: &Place) -> Result<PathBuf> {
    let path = place.path("run");
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// The cgroup below which an engine puts its containers: nothing of another engine's is in it.
pub(crate) fn cgroup_parent(place: &Place) -> String {
    let folder = place.path("");
    format!("/{}-engine", folder.file_name().unwrap_or_default().to_string_lossy())
}

/// Removes a cgroup with all below it, as far as nothing runs in them.
fn remove_cgroups(folder: &Path) {
    for child in fs::read_dir(folder).into_iter().flatten().flatten() {
        if child.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroups(&child.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

/// Removes that cgroup from every hierarchy.
pub fn remove_cgroup_parent(place: &Place) {
    let name = cgroup_parent(place);
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path());
    for hierarchy in hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]) {
        let parent = hierarchy.join(name.trim_start_matches('/'));
        // Monitors end a moment after their containers.
        for _ in 0..20 {
            remove_cgroups(&parent);
            if !parent.exists() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

pub(crate) fn succeeded(words: &[&str], ended: Ended) -> Result<String> {
    if ended.status != 0 {
        bail!("{} ended with {}: {}", words.join(" "), ended.status, ended.text);
    }
    Ok(ended.text)
}

/// Writes a bundle's root file system as an archive; returns its path.
fn root_archive(place: &Place, bundle: &Bundle) -> Result<String> {
    let archive = place.path("rootfs.tar").display().to_string();
    let root = bundle.path.join("rootfs").display().to_string();
    let words = ["-C", &root, "-cf", &archive, "."];
    succeeded(&words, place.command(Path::new("/usr/bin/tar"), &words, false)?)?;
    Ok(archive)
}

/// Podman.
pub struct Podman<'a> {
    place: &'a Place,
    before: Vec<String>,
}

impl<'a> Podman<'a> {
    /// Podman with everything of its own below the place.
    pub fn new(place: &'a Place) -> Result<Self> {
        let runtime = runtime(place)?.display().to_string();
        let at = |name: &str| -> Result<String> {
            let path = place.path(name);
            fs::create_dir_all(&path)?;
            Ok(path.display().to_string())
        };
        let (root, run, temporary) = (at("podman")?, at("podman-run")?, at("podman-tmp")?);
        // Its locks must not be left over from another boot: a file system of its own.
        mount(Some("tmpfs"), temporary.as_str(), Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        let conf = place.path("containers.conf");
        let text = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1000:1000\"]\n[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n[engine.runtimes]\nphos-runc = [\"{runtime}\"]\n"
        );
        fs::write(&conf, text)?;
        let words = [
            "CONTAINERS_CONF=",
            "PODMAN_IGNORE_CGROUPSV1_WARNING=1",
            "podman",
            "--root",
            &root,
            "--runroot",
            &run,
            "--tmpdir",
            &temporary,
            "--storage-driver",
            "vfs",
            "--cgroup-manager",
            "cgroupfs",
            "--runtime",
            &runtime,
        ];
        let mut before: Vec<String> = words.iter().map(ToString::to_string).collect();
        before[0].push_str(&conf.display().to_string());
        Ok(Podman { place, before })
    }

    /// Runs a command that must succeed.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        succeeded(words, self.try_run(words)?)
    }

    /// Makes an image of a bundle's root file system.
    pub fn import(&self, bundle: &Bundle, name: &str) -> Result<()> {
        // Trust is no matter here, and the machine's own policy may be missing.
        let policy = self.place.path("policy.json").display().to_string();
        fs::write(&policy, r#"{"default": [{"type": "insecureAcceptAnything"}]}"#)?;
        self.run(&["import", "--signature-policy", &policy, &root_archive(self.place, bundle)?, name])
            .map(|_| ())
    }

    /// Runs a container of an image, with these further options and this command.
    pub fn run_image(&self, options: &[&str], image: &str, command: &[&str]) -> Result<String> {
        let parent = cgroup_parent(self.place);
        let run = ["run", "-d", "--cgroup-parent", &parent];
        self.run(&[&run[..], options, &[image], command].concat())
    }

    /// Runs a container of the root file system `rootfs`, with these further options and this command.
    pub fn run_container(&self, options: &[&str], rootfs: &str, command: &[&str]) -> Result<String> {
        let parent = cgroup_parent(self.place);
        let run = ["run", "-d", "--cgroup-parent", &parent];
        self.run(&[&run[..], options, &["--rootfs", rootfs], command].concat())
    }

    /// Runs a command, whatever comes of it.
    pub fn try_run(&self, words: &[&str]) -> Result<Ended> {
        let all: Vec<&str> = self.before.iter().map(String::as_str).chain(words.iter().copied()).collect();
        self.place.command(Path::new("/usr/bin/env"), &all, false)
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        let _ = self.try_run(&["rm", "-f", "-a", "-t", "0"]);
        let _ = nix::mount::umount(&self.place.path("podman-tmp"));
        remove_cgroup_parent(self.place);
    }
}

/// A Docker daemon and its client.
pub struct Docker<'a> {
    place: &'a Place,
    daemon: Child,
    socket: String,
}

impl<'a> Docker<'a> {
    /// Starts a daemon with everything of its own below the place.
    pub fn start(place: &'a Place) -> Result<Self> {
        let at = |name: &str| place.path(name).display().to_string();
        let socket = format!("unix://{}", at("docker.sock"));
        let config = serde_json::json!({
            "experimental": true, "features": {"cdi": true}, "runtimes": {"phos": {"path": runtime(place)?}},
            "data-root": at("docker"), "exec-root": at("docker-exec"), "pidfile": at("docker.pid"), "hosts": [socket],
            "iptables": false, "ip6tables": false, "bridge": "none", "storage-driver": "vfs",
            "cgroup-parent": cgroup_parent(place),
        });
        fs::write(place.path("daemon.json"), config.to_string())?;
        let log = fs::File::create(place.path("dockerd.log"))?;
        let path = format!(
            "{}:/usr/sbin:/usr/bin:/sbin:/bin",
            place.tools.criu.parent().unwrap_or(Path::new("/")).display()
        );
        let daemon = Command::new("/usr/sbin/dockerd")
            .args(["--config-file", &at("daemon.json")])
            .env("PATH", path)
            // Its containerd's, too.
            .env("XDG_RUNTIME_DIR", own_run(place)?)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("dockerd")?;
        let docker = Docker { place, daemon, socket };
        let deadline = Instant::now() + Duration::from_secs(60);
        while docker.try_run(&["info"])?.status != 0 {
            if Instant::now() > deadline {
                bail!("dockerd did not come up: {}", fs::read_to_string(place.path("dockerd.log"))?);
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(docker)
    }

    /// Makes an image of a bundle's root file system.
    pub fn import(&self, bundle: &Bundle, name: &str) -> Result<()> {
        self.run(&["import", &root_archive(self.place, bundle)?, name]).map(|_| ())
    }

    /// Runs a command that must succeed.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        succeeded(words, self.try_run(words)?)
    }

    /// Waits until Docker's containerd has forgotten the checkpoints that it has handed over. Until then a further one of
    /// the same container fails in it («content … already exists»), with any runtime.
    pub fn settle(&self) -> Result<()> {
        let socket = self.place.path("docker-exec/containerd/containerd.sock").display().to_string();
        let words = ["-a", &socket, "-n", "moby", "content", "ls", "-q"];
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let kept = succeeded(&words, self.place.command(Path::new("/usr/bin/ctr"), &words, false)?)?;
            if kept.trim().is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("containerd keeps {kept}");
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs a command, whatever comes of it.
    pub fn try_run(&self, words: &[&str]) -> Result<Ended> {
        let all = [&["-H", &self.socket], words].concat();
        self.place.command(Path::new("/usr/bin/docker"), &all, false)
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        if let Ok(ids) = self.try_run(&["ps", "-aq"]) {
            for id in ids.text.split_whitespace() {
                let _ = self.try_run(&["rm", "-f", id]);
            }
        }
        let _ = kill(Pid::from_raw(self.daemon.id() as i32), Signal::SIGTERM);
        let _ = self.daemon.wait();
        remove_cgroup_parent(self.place);
    }
}
