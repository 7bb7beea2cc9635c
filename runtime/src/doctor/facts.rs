//! Everything `doctor` knows about a host, gathered without changing it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access, geteuid};
use phos_engine::device::cuda;
use phos_hooks::locate;

use super::engines::{self, Engine};
use super::kernel::Kernel;
use crate::checkpoint::choose_driver;
use crate::config::{Config, find_criu};
use crate::lower::Lower;

/// The driver as its library answers.
#[derive(Debug, Clone)]
pub struct Driver {
    /// The kernel module's release, empty if there is none (the simulated driver).
    pub release: String,
    /// `cuDriverGetVersion`.
    pub api: i32,
    /// Each GPU in words.
    pub gpus: Vec<String>,
}

/// One of the product's own files: where it is, or where it was looked for and why it will not do.
pub type Installed = Result<PathBuf, (PathBuf, String)>;

/// A host.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Whether this program runs as root.
    pub root: bool,
    /// The configuration file's mistake.
    pub configuration: Result<(), String>,
    /// The kernel.
    pub kernel: Kernel,
    /// CRIU's path and version.
    pub criu: Result<(PathBuf, String), String>,
    /// What CRIU says of the kernel.
    pub criu_check: Result<(), String>,
    /// The lower runtime's path and what it says its version is.
    pub lower: Result<(PathBuf, String), String>,
    /// `libphos.so`.
    pub library: Installed,
    /// `phos-hook`.
    pub hook: Installed,
    /// The CUDA driver.
    pub driver: Result<Driver, String>,
    /// The kernel module's release by /proc, whatever the library says.
    pub module: Option<String>,
    /// Of /dev/nvidiactl, /dev/nvidia-uvm and /dev/nvidia0, those that are missing.
    pub missing_nodes: Vec<String>,
    /// The state folder, free bytes of its file system, and whether it can be written.
    pub state: (PathBuf, u64, bool),
    /// Hard limit of open files.
    pub open_files: u64,
    /// Hard limit of locked memory, bytes.
    pub locked_memory: u64,
    /// Engines that are installed.
    pub engines: Vec<Engine>,
}

impl Facts {
    /// Looks at this host.
    pub fn gather() -> Self {
        let (config, configuration) = match Config::load() {
            Ok(config) => {
                let strategy = config.strategy(None).and(config.compression(None)).map(drop);
                (config.clone(), strategy.and(config.inject().map(drop)).map_err(|e| format!("{e:#}")))
            }
            Err(e) => (Config::default(), Err(format!("{e:#}"))),
        };
        let nodes = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0"];
        let limit = |which| getrlimit(which).map_or(0, |(_, hard)| hard);
        choose_driver(&config);
        let criu = find_criu(&config).map_err(|e| format!("{e:#}"));
        Facts {
            root: geteuid().is_root(),
            configuration,
            kernel: Kernel::probe(),
            criu_check: criu.as_ref().map_or(Ok(()), |(path, _)| criu_check(path)),
            criu,
            lower: Lower::find(&config).map_err(|e| format!("{e:#}")).and_then(|l| match l.no_checkpoint() {
                Some(why) => Err(why.into()),
                None => Ok((l.path.clone(), l.version())),
            }),
            library: installed(config.library()),
            hook: installed(config.hook()),
            driver: driver(),
            module: fs::read_to_string("/proc/driver/nvidia/version")
                .ok()
                .as_deref()
                .and_then(module_release),
            missing_nodes: nodes.iter().filter(|n| !Path::new(n).exists()).map(ToString::to_string).collect(),
            state: state(config.state_dir()),
            open_files: limit(Resource::RLIMIT_NOFILE),
            locked_memory: limit(Resource::RLIMIT_MEMLOCK),
            engines: engines::find(Path::new("/")),
        }
    }
}

fn installed(path: PathBuf) -> Installed {
    if !path.is_file() {
        return Err((path, "is missing".into()));
    }
    match locate::can_load(&path, Path::new("/")) {
        Ok(()) => Ok(path),
        Err(why) => Err((path, format!("cannot be loaded on this host: {why}"))),
    }
}

/// `criu check`: its first complaint, if it has any.
fn criu_check(criu: &Path) -> Result<(), String> {
    let output = Command::new(criu).arg("check").stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let complaint = text.lines().find(|l| l.contains("Error")).or(text.lines().last());
    Err(complaint.unwrap_or("it fails and does not say why").trim().to_string())
}

fn driver() -> Result<Driver, String> {
    let device = cuda::open().map_err(|e| e.to_string())?;
    let info = device.driver();
    let words = |g: phos_engine::device::GpuInfo| format!("{} {} ({} MiB)", g.name, g.id, g.total >> 20);
    let gpus = device.gpus().map_err(|e| e.to_string())?.into_iter().map(words).collect();
    Ok(Driver { release: info.release.clone(), api: info.version, gpus })
}

/// The release in the first line of /proc/driver/nvidia/version.
fn module_release(text: &str) -> Option<String> {
    let number = |w: &&str| w.contains('.') && w.split('.').all(|n| n.parse::<u32>().is_ok());
    text.lines().next()?.split_whitespace().find(number).map(Into::into)
}

/// The state folder as it is, or the nearest folder above it, in which it would be made.
fn state(path: PathBuf) -> (PathBuf, u64, bool) {
    let there = path.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("/"));
    let free = statvfs(there).map_or(0, |s| s.blocks_available() * s.fragment_size());
    let writable = access(there, AccessFlags::W_OK).is_ok();
    (path, free, writable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modules_release_is_the_first_number_with_dots() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC";
        assert_eq!(module_release(open).as_deref(), Some("580.159.04"));
        assert_eq!(module_release("NVRM version: x86_64"), None);
        assert_eq!(module_release(""), None);
    }

    #[test]
    fn a_state_folder_that_does_not_exist_is_judged_by_the_one_above() {
        let base = tempfile::tempdir().unwrap();
        let (path, free, writable) = state(base.path().join("a/b"));
        assert!(path.ends_with("a/b") && free > 0 && writable && !path.exists());
    }
}
