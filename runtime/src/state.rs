//! A container's folder on the host: its control folder and what phos-runc must remember about it.

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use phos_protocol::paths;
use serde_json::Value;

use crate::args::Args;
use crate::config::Config;

/// Whether an id is one that runc accepts: such an id can be part of a path.
pub fn valid_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 1024
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-.".contains(&b))
        && id != "."
        && id != ".."
}

/// The root folder of the lower runtime, which tells containers of different engines apart.
fn root(args: &Args) -> PathBuf {
    let default = || PathBuf::from("/run/runc");
    args.global.get("root").filter(|r| !r.is_empty()).map_or_else(default, PathBuf::from)
}

/// FNV-1a: stable, and only needs to tell a handful of roots apart.
fn short_hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193))
}

/// One container's folder. It need not exist.
#[derive(Debug, Clone)]
pub struct StateDir {
    /// The folder.
    pub path: PathBuf,
}

impl StateDir {
    /// The folder of container `id` under the root that `args` name.
    pub fn of(args: &Args, config: &Config, id: &str) -> Result<Self> {
        if !valid_id(id) {
            bail!("invalid container id '{id}'");
        }
        let hash = short_hash(root(args).as_os_str().as_bytes());
        Ok(StateDir { path: config.state_dir().join(format!("{id}-{hash:08x}")) })
    }

    /// Whether phos-runc knows the container.
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// What the container sees as `/run/phos`.
    pub fn control_dir(&self) -> PathBuf {
        self.path.join("ctl")
    }

    /// An empty folder.
    pub fn no_plugins(&self) -> PathBuf {
        self.path.join("no-plugins")
    }

    /// Options for CRIU that the lower runtime does not set.
    pub fn criu_options(&self) -> PathBuf {
        self.path.join("criu.conf")
    }

    /// Makes the folder anew.
    pub fn create(&self) -> Result<()> {
        self.remove();
        let context = || format!("cannot make the state folder {}", self.path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path).with_context(context)?;
        let control = self.control_dir();
        fs::create_dir(&control).with_context(context)?;
        // Files are mounted inside the control folder. Where `/run` is a tmpfs of the container, neither the lower
        // runtime nor CRIU makes the places for them on restore.
        for inside in [paths::REAL_LIBCUDA, paths::PRELOAD_LIBRARY] {
            if let Some(name) = Path::new(inside).file_name() {
                fs::write(control.join(name), "").with_context(context)?;
            }
        }
        fs::create_dir(self.no_plugins()).with_context(context)?;
        self.write_criu_options("")?;
        // Processes of any user of the container listen here; none may remove another's socket.
        fs::set_permissions(&control, fs::Permissions::from_mode(0o1777)).with_context(context)
    }

    /// Writes the options for CRIU, `more` among them, one a line.
    pub fn write_criu_options(&self, more: &str) -> Result<()> {
        let path = self.criu_options();
        // CRIU gives up after 10 s by default, which a large process on a slow disk can take.
        fs::write(&path, format!("timeout 600\n{more}")).with_context(|| path.display().to_string())
    }

    /// Removes the folder, if it exists.
    pub fn remove(&self) {
        let _ = fs::remove_dir_all(&self.path);
    }

    /// Remembers the configuration the container really runs with.
    pub fn save_spec(&self, spec: &Value) -> Result<()> {
        let path = self.path.join("effective-spec.json");
        let text = serde_json::to_vec(spec)?;
        let write = || {
            File::options().write(true).create(true).truncate(true).mode(0o600).open(&path)?.write_all(&text)
        };
        write().with_context(|| path.display().to_string())
    }

    /// What [`StateDir::save_spec`] remembered.
    pub fn spec(&self) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.path.join("effective-spec.json")).ok()?).ok()
    }

    /// Held for the time of a checkpoint or restore: there is one at a time for each container.
    pub fn lock(&self) -> Result<Flock<File>> {
        let path = self.path.join("lock");
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| path.display().to_string())?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
            anyhow::anyhow!(
                "another checkpoint or restore of this container is under way: wait for it to end"
            )
        })
    }
}

/// The bundle's configuration file.
pub fn config_path(bundle: &Path) -> PathBuf {
    bundle.join("config.json")
}

/// Reads a bundle's configuration.
pub fn read_spec(bundle: &Path) -> Result<Value> {
    let path = config_path(bundle);
    let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    let spec = serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", path.display()))?;
    phos_hooks::check(&spec).map_err(|what| anyhow::anyhow!("{}: {what}", path.display()))?;
    Ok(spec)
}

/// Replaces a bundle's configuration at once, keeping its mode.
pub fn write_spec(bundle: &Path, spec: &Value) -> Result<()> {
    let path = config_path(bundle);
    let new = bundle.join(".config.json.phos");
    let write = || {
        let mode = fs::metadata(&path)?.permissions().mode();
        let _ = fs::remove_file(&new);
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(&serde_json::to_vec(spec)?)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        fs::rename(&new, &path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_paths_are_refused() {
        for id in ["a", "a-b_c+d.e", "0123"] {
            assert!(valid_id(id), "{id}");
        }
        for id in ["", ".", "..", "a/b", "../x", "a b", "ä"] {
            assert!(!valid_id(id), "{id}");
        }
    }

    #[test]
    fn roots_are_told_apart_and_one_checkpoint_runs_at_a_time() {
        let base = tempfile::tempdir().unwrap();
        let config = Config { state_dir: Some(base.path().into()), ..Config::default() };
        let dir = |root: &str| {
            let args = Args::parse(["--root", root, "state", "c"].iter().map(Into::into).collect());
            StateDir::of(&args, &config, "c").unwrap()
        };
        assert_ne!(dir("/a").path, dir("/b").path);
        let state = dir("/a");
        state.create().unwrap();
        let mode = fs::metadata(state.control_dir()).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o1777);
        let held = state.lock().unwrap();
        assert!(state.lock().unwrap_err().to_string().contains("under way"));
        drop(held);
        state.lock().unwrap();
        state.remove();
        assert!(!state.exists());
    }
}
