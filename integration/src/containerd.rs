//! A containerd with everything of its own, and its client `ctr`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bundle::Bundle;
use crate::container::{Ended, Place};
use crate::engine::{cgroup_parent, own_run, remove_cgroup_parent, runtime, succeeded};
use crate::image::Layout;

/// A running containerd.
pub struct Containerd<'a> {
    place: &'a Place,
    daemon: Child,
    /// Where it listens.
    pub(crate) socket: String,
    runtime: String,
}

impl<'a> Containerd<'a> {
    /// Starts one without the CRI.
    pub fn start(place: &'a Place) -> Result<Self> {
        Self::configured(place, "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n")
    }

    /// Starts one with this configuration, which says nothing of where it has its files.
    pub fn configured(place: &'a Place, config: &str) -> Result<Self> {
        let at = |name: &str| place.path(name).display().to_string();
        let socket = at("containerd.sock");
        let (root, state) = (at("containerd"), at("containerd-state"));
        let files = format!("root = \"{root}\"\nstate = \"{state}\"\n");
        let config = format!("{files}{config}\n[grpc]\n  address = \"{socket}\"\n");
        fs::write(place.path("containerd.toml"), config)?;
        let log = fs::File::create(place.path("containerd.log"))?;
        let daemon = Command::new("/usr/bin/containerd")
            .args(["--config", &at("containerd.toml")])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            // Where checkpoints are written that go into images.
            .env("XDG_RUNTIME_DIR", own_run(place)?)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("containerd")?;
        let containerd = Containerd { place, daemon, socket, runtime: runtime(place)?.display().to_string() };
        let deadline = Instant::now() + Duration::from_secs(60);
        while containerd.try_run(&["version"])?.status != 0 {
            if Instant::now() > deadline {
                bail!("containerd did not come up: {}", fs::read_to_string(place.path("containerd.log"))?);
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(containerd)
    }

    /// Makes an image of a bundle's root file system.
    pub fn import(&self, bundle: &Bundle, name: &str) -> Result<()> {
        let into = self.place.path("image.tar");
        let layout = Layout::new(self.place.path("layout"))?;
        let manifest = layout.add(&bundle.path.join("rootfs"), &[], &[])?;
        layout.archive(manifest, name, &into)?;
        self.run(&["image", "import", into.to_str().context("path")?]).map(|_| ())
    }

    /// The file of the stored archive that has a file of this name in it.
    pub fn blob_with(&self, name: &str) -> Result<PathBuf> {
        let blobs = self.place.path("containerd/io.containerd.content.v1.content/blobs/sha256");
        let has = |blob: &Path| {
            let listed = Command::new("tar").arg("-tf").arg(blob).stderr(Stdio::null()).output();
            listed.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).lines().any(|l| l == name))
        };
        let mut found = fs::read_dir(blobs)?.flatten().map(|e| e.path());
        found.find(|blob| has(blob)).with_context(|| format!("no archive with {name}"))
    }

    /// Runs a container of an image under phos-runc.
    pub fn run_container(&self, options: &[&str], image: &str, name: &str, command: &[&str]) -> Result<()> {
        // Containers' cgroups lie below one named like the namespace; it is this place's own.
        let io = if options.contains(&"--log-uri") { [].as_slice() } else { &["--null-io"] };
        let run = ["run", "-d", "--snapshotter", "native", "--runc-binary", &self.runtime];
        self.run(&[&run[..], io, options, &[image, name], command].concat()).map(|_| ())
    }

    /// All tasks: container, host process id of its first process, `RUNNING`, `PAUSED` and so on.
    fn tasks(&self) -> Result<Vec<(String, i32, String)>> {
        let listed = self.run(&["task", "ls"])?;
        let task = |line: &str| {
            let mut words = line.split_whitespace();
            Some((words.next()?.into(), words.next()?.parse().ok()?, words.next()?.into()))
        };
        Ok(listed.lines().filter_map(task).collect())
    }

    /// Host process id of a container's first process, and its state.
    pub fn task(&self, name: &str) -> Result<(i32, String)> {
        let found = self.tasks()?.into_iter().find(|(container, ..)| container == name);
        found.map(|(_, pid, state)| (pid, state)).with_context(|| format!("{name} has no task"))
    }

    /// Ends a container's first process, and removes the container. A clone is in its original's cgroup, all of whose
    /// processes [`Self::remove`] ends.
    pub fn end(&self, name: &str) -> Result<()> {
        self.run(&["task", "kill", "--signal", "KILL", name])?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.task(name)?.1 != "STOPPED" {
            ensure!(Instant::now() < deadline, "{name} does not end");
            thread::sleep(Duration::from_millis(20));
        }
        self.run(&["task", "rm", name])?;
        self.run(&["container", "rm", name]).map(|_| ())
    }

    /// Ends a container and removes it.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.try_run(&["task", "rm", "--force", name])?;
        self.try_run(&["container", "rm", name]).map(|_| ())
    }

    /// Runs a command of `ctr` that must succeed.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        succeeded(words, self.try_run(words)?)
    }

    /// Runs a command of `ctr`, whatever comes of it.
    pub fn try_run(&self, words: &[&str]) -> Result<Ended> {
        let parent = cgroup_parent(self.place);
        let all = [&["-a", &self.socket, "-n", parent.trim_start_matches('/')], words].concat();
        self.place.command(Path::new("/usr/bin/ctr"), &all, false)
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        // What never ran, version 1.6 never removes.
        for (name, _, state) in self.tasks().unwrap_or_default() {
            if matches!(state.as_str(), "RUNNING" | "PAUSED") {
                let _ = self.remove(&name);
            }
        }
        let _ = kill(Pid::from_raw(self.daemon.id() as i32), Signal::SIGTERM);
        let _ = self.daemon.wait();
        remove_cgroup_parent(self.place);
    }
}
