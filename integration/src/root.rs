//! A root file system of another generation of Debian, entered by a whole sandbox: engines, their shims and monitors,
//! the runtime and the test itself run in it with its own C library.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::pivot_root;

use crate::tools::{built, workspace};

const NONE: Option<&str> = None;

/// The root file system of a version of Debian that `setup.sh engines` unpacks.
pub fn debian(version: u32) -> PathBuf {
    workspace().join(format!(".tools/debian-{version}"))
}

/// Whether this process is in one of them.
pub fn entered() -> bool {
    Path::new("/.packages").exists()
}

/// What the system that this process sees calls itself, such as `debian 13`.
pub fn system() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value =
        |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim_matches('"');
    format!("{} {}", value("ID="), value("VERSION_ID="))
}

/// Makes `root` this process's root file system. What is written there is kept in memory only; devices, cgroups, the
/// folder for temporary files, this workspace and its programs are the machine's. For a process in mount and PID
/// namespaces of its own.
pub fn enter(root: &Path) -> Result<()> {
    // Covers nothing: the overlay sees the folder below.
    let at = root.join("run");
    let bind = |from: &Path, to: &Path| {
        mount(Some(from), to, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
            .with_context(|| from.display().to_string())
    };
    mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), NONE).context("tmpfs")?;
    let new = at.join("new");
    for name in ["upper", "work", "new"] {
        fs::create_dir(at.join(name))?;
    }
    let layers = format!("lowerdir={0},upperdir={1}/upper,workdir={1}/work", root.display(), at.display());
    mount(Some("overlay"), &new, Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
        .context("overlay")?;
    let shared = ["/dev", "/sys"].map(PathBuf::from);
    for folder in shared.into_iter().chain([std::env::temp_dir(), workspace(), built("")?]) {
        let inside = new.join(folder.strip_prefix("/").unwrap_or(&folder));
        fs::create_dir_all(&inside)?;
        bind(&folder, &inside)?;
    }
    mount(Some("proc"), &new.join("proc"), Some("proc"), MsFlags::empty(), NONE).context("proc")?;
    std::env::set_current_dir(&new)?;
    // The old root ends up on top of the new one, and goes.
    pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(std::env::set_current_dir("/")?)
}
