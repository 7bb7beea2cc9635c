//! The lower runtime: runc, or whatever the owner of the host names.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Error, Result, bail};
use phos_engine::job::CommandLine;
use serde::Deserialize;

use crate::args::{Args, TRACE};
use crate::config::{Config, PATH};

/// Where runc usually is. Engines run some verbs without a `PATH`.
const FALLBACK: &[&str] = &[
    "/usr/local/sbin/runc",
    "/usr/local/bin/runc",
    "/usr/sbin/runc",
    "/usr/bin/runc",
    "/usr/lib/cri-o-runc/sbin/runc",
    "/usr/bin/crun",
];

/// Set in the environment of the lower runtime: phos-runc below phos-runc would never end.
const GUARD: &str = "PHOS_RUNC_DEPTH";
/// What `lower_runtime` says for the embedded one.
const EMBEDDED: &str = "libcontainer";

/// A found lower runtime.
#[derive(Debug, Clone)]
pub struct Lower {
    /// Its absolute path.
    pub path: PathBuf,
    /// The word in front of its command line: this program's hidden verb, if the embedded one is meant.
    word: Option<&'static str>,
}

/// The state of a container as the lower runtime's `state` prints it.
#[derive(Debug, Clone, Deserialize)]
pub struct State {
    /// Host process id of the container's first process, 0 if there is none.
    #[serde(default)]
    pub pid: i32,
    /// `created`, `running`, `paused` or `stopped`.
    pub status: String,
    /// The bundle.
    #[serde(default)]
    pub bundle: PathBuf,
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

impl Lower {
    /// Finds it. The environment and the configuration file are asked first, then the usual places.
    pub fn find(config: &Config) -> Result<Self> {
        let own = Path::new("/proc/self/exe");
        if env::var_os(GUARD).is_some() {
            bail!("the lower runtime is phos-runc itself: set lower_runtime in {PATH} to the real runc");
        }
        if let Some(path) = config.lower_runtime() {
            if path.as_os_str() == EMBEDDED {
                return Self::embedded().context(
                    "this build has no embedded libcontainer: build it with that feature, or name a runc",
                );
            }
            if !path.is_absolute() {
                bail!("lower runtime {}: the path must be absolute", path.display());
            }
            if same_file(&path, own) {
                bail!("lower runtime {} is phos-runc itself: name the real runc", path.display());
            }
            if !path.is_file() {
                bail!("lower runtime {} does not exist", path.display());
            }
            return Ok(Lower { path, word: None });
        }
        let beside = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("runc")));
        let mut candidates = beside.into_iter().chain(FALLBACK.iter().map(PathBuf::from));
        let found = candidates.find(|p| p.is_file() && !same_file(p, own));
        match found.map(|path| Lower { path, word: None }).or_else(Self::embedded) {
            Some(lower) => Ok(lower),
            None => bail!("no runc found: install it, or set lower_runtime in {PATH} or PHOS_LOWER_RUNTIME"),
        }
    }

    /// The one in this program.
    #[cfg(feature = "libcontainer")]
    fn embedded() -> Option<Self> {
        Some(Lower { path: env::current_exe().ok()?, word: Some(crate::embedded::WORD) })
    }

    #[cfg(not(feature = "libcontainer"))]
    fn embedded() -> Option<Self> {
        None
    }

    /// Why it cannot checkpoint, if it cannot.
    pub fn no_checkpoint(&self) -> Option<&'static str> {
        self.word.map(|_| {
            "the embedded libcontainer cannot checkpoint or restore: install runc, or name one in lower_runtime"
        })
    }

    /// The program, to be given a command line.
    pub fn program(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.args(self.word).env(GUARD, "1");
        command
    }

    /// Becomes the lower runtime. Returns only if that fails.
    pub fn exec(&self, args: &Args) -> Error {
        let words = args.without(TRACE).all;
        let error = self.program().args(words).exec();
        Error::from(error).context(format!("cannot run {}", self.path.display()))
    }

    /// Runs the same command line as a child with this process's streams; returns its exit status.
    pub fn run(&self, args: &Args) -> Result<i32> {
        let status = self
            .program()
            .args(&args.all)
            .status()
            .with_context(|| format!("cannot run {}", self.path.display()))?;
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        Ok(status.code().unwrap_or_else(|| 128 + signal.unwrap_or(0)))
    }

    /// A command line of the lower runtime with this container's root and cgroup driver but no log file.
    fn words(&self, args: &Args, verb: &[&str]) -> Vec<OsString> {
        let mut words = Vec::new();
        for (name, value) in &args.global {
            match name.as_str() {
                "root" | "rootless" | "cgroup-manager" => {
                    words.push(format!("--{name}").into());
                    words.push(value.clone());
                }
                "systemd-cgroup" => words.push("--systemd-cgroup".into()),
                _ => {}
            }
        }
        words.extend(verb.iter().map(OsString::from));
        words
    }

    /// The same with the program in front, for the worker.
    pub fn command_line(&self, args: &Args, verb: &[&str]) -> CommandLine {
        CommandLine::new(std::iter::once(self.path.clone().into()).chain(self.words(args, verb)))
    }

    /// The engine's own words with the program in front, for the worker.
    pub fn verbatim(&self, args: &Args) -> CommandLine {
        CommandLine::new(std::iter::once(self.path.clone().into()).chain(args.all.iter().cloned()))
    }

    /// Asks for a container's state; `None` if the lower runtime does not know it.
    pub fn state(&self, args: &Args, id: &str) -> Result<Option<State>> {
        let output = self
            .program()
            .args(self.words(args, &["state", id]))
            .output()
            .with_context(|| format!("cannot run {}", self.path.display()))?;
        if !output.status.success() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&output.stdout).context("the lower runtime's state is not JSON")?))
    }

    /// Runs a quiet command on the container; whether it succeeded.
    pub fn quietly(&self, args: &Args, verb: &[&str]) -> bool {
        let output = self.program().args(self.words(args, verb)).output();
        output.is_ok_and(|o| o.status.success())
    }

    /// First line of its `--version`.
    pub fn version(&self) -> String {
        let output = self.program().arg("--version").output();
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        text.lines().next().unwrap_or_default().to_string()
    }
}
