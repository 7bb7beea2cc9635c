//! A container's folder on the host: its control folder and what phos-runc must remember about it.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use phos_engine::keeper::{BORROWED, lock_file};
use phos_engine::lower;
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

/// The lower runtime's own folder of container `id`.
pub fn lower_folder(args: &Args, id: &str) -> PathBuf {
    root(args).join(id)
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

    /// Whether the container was created by phos-runc.
    pub fn is_own(&self) -> bool {
        self.exists() && !self.path.join(BORROWED).exists()
    }

    /// Makes the folder for a container that was not, for the time of one checkpoint.
    pub fn borrow(&self) -> Result<()> {
        self.create()?;
        let mark = self.path.join(BORROWED);
        fs::write(&mark, "").with_context(|| mark.display().to_string())
    }

    /// What the container sees as `/run/phos`.
    pub fn control_dir(&self) -> PathBuf {
        self.path.join("ctl")
    }

    /// An empty folder.
    pub fn no_plugins(&self) -> PathBuf {
        self.path.join("no-plugins")
    }

    /// What the lower runtime logs where the engine has named no file.
    pub fn lower_log(&self) -> PathBuf {
        self.path.join("lower.log")
    }

    /// CRIU's working folder where the command line names none. CRIU mounts the host's cgroups there: a lower runtime's own
    /// folder, which that removes, and an image are no places for them.
    pub fn criu_work(&self) -> PathBuf {
        self.path.join("criu")
    }

    /// A command line of the lower runtime that names CRIU's working folder: its own, or this one.
    pub fn with_criu_work(&self, args: &Args) -> Result<Args> {
        if args.value("work-path").is_some_and(|p| !p.is_empty()) {
            return Ok(args.clone());
        }
        let work = self.criu_work();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&work)
            .with_context(|| work.display().to_string())?;
        Ok(args.with("work-path", work.as_os_str()))
    }

    /// Options for CRIU that the lower runtime does not set.
    pub fn criu_options(&self) -> PathBuf {
        self.path.join("criu.conf")
    }

    /// Makes the folder anew. Hold the lock meanwhile.
    pub fn create(&self) -> Result<()> {
        self.remove_folder();
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
        // Processes of any user of the container listen here; none may remove another's socket.
        fs::set_permissions(&control, fs::Permissions::from_mode(0o1777)).with_context(context)
    }

    /// Writes the options for CRIU: `timeout` in seconds, and `more`, one a line.
    pub fn write_criu_options(&self, timeout: u64, more: &str) -> Result<()> {
        let path = self.criu_options();
        // CRIU gives up after 10 s by default, which a large process on a slow disk can take.
        fs::write(&path, format!("timeout {timeout}\n{more}")).with_context(|| path.display().to_string())
    }

    fn remove_folder(&self) {
        lower::remove_folder(&self.path);
    }

    /// Removes everything there is of the container. Only whoever holds the lock may: it goes too.
    pub fn remove(&self) {
        self.remove_folder();
        let _ = fs::remove_file(lock_file(&self.path));
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

    /// Held for the time of a checkpoint, restore or anything else that changes the folder: there is one at a time for each
    /// container. A job's keeper holds it until it ends, which may be a moment after the job does: that is waited for.
    pub fn lock(&self) -> Result<Lock> {
        self.lock_while(|held, since| is_over(held) && since.elapsed() < TIDYING)
    }

    /// The same; waits for whoever holds it.
    pub fn lock_within(&self, patience: Duration) -> Result<Lock> {
        self.lock_while(|_, since| since.elapsed() < patience)
    }

    fn lock_while(&self, wait: impl Fn(&File, Instant) -> bool) -> Result<Lock> {
        let path = lock_file(&self.path);
        let context = || path.display().to_string();
        if let Some(folder) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(folder).with_context(context)?;
        }
        let since = Instant::now();
        loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .with_context(context)?;
            match file.try_lock() {
                // Whoever had it may have removed the file: then this is the lock of nothing.
                Ok(()) if same_file(&file, &path) => {
                    file.set_len(0).with_context(context)?;
                    return Ok(Lock(file));
                }
                Ok(()) => {}
                Err(TryLockError::Error(e)) => return Err(e).with_context(context),
                Err(TryLockError::WouldBlock) if wait(&file, since) => {
                    thread::sleep(Duration::from_millis(2))
                }
                Err(TryLockError::WouldBlock) => {
                    bail!("another checkpoint or restore of this container is under way: wait for it to end")
                }
            }
        }
    }
}

/// A container's lock. Whoever has inherited its descriptor holds it as well: it is free when the last one has closed it.
#[derive(Debug)]
pub struct Lock(File);

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Lock {
    /// What was to be done is done. Whoever holds it still has only to tidy up.
    fn drop(&mut self) {
        let _ = self.0.write_all_at(OVER, 0);
    }
}

/// What a lock's file says when the job is over.
const OVER: &[u8] = b"over";
/// How long a keeper and its worker may take to end after that: a driver gives its context back.
const TIDYING: Duration = Duration::from_secs(20);

fn is_over(held: &File) -> bool {
    let mut text = [0; OVER.len()];
    held.read_exact_at(&mut text, 0).is_ok() && text == OVER
}

fn same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
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
        // The keeper has its descriptor. While the job is under way nobody waits for it, when it is over everybody does.
        let keeper = held.as_fd().try_clone_to_owned().unwrap();
        drop(held);
        assert!(File::open(lock_file(&state.path)).unwrap().try_lock().is_err());
        thread::scope(|scope| {
            let next = scope.spawn(|| state.lock());
            thread::sleep(Duration::from_millis(50));
            assert!(!next.is_finished());
            drop(keeper);
            let next = next.join().unwrap().unwrap();
            assert!(state.lock().is_err(), "that one is under way");
            drop(next);
        });
        // A lock that was waited for while its file was removed is not taken for the new one's.
        let held = state.lock().unwrap();
        let waiting = state.clone();
        let waiter = thread::spawn(move || waiting.lock_within(Duration::from_secs(10)).unwrap());
        thread::sleep(Duration::from_millis(20));
        state.remove();
        drop(held);
        let _other = waiter.join().unwrap();
        assert!(state.lock().is_err());
        assert!(!state.exists());
    }
}
