//! `phos-hook late LIBRARY`: an OCI hook of the kind `createContainer`. It runs in the container's mount namespace before
//! the root is switched, after the hooks of GPU toolkits, and puts `libphos.so` in front of the driver that those have
//! mounted. Nothing it does can keep a container from starting: what it cannot do, it says.

use std::ffi::{CString, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;

use anyhow::{Context, Result, bail};
use phos_hooks::locate;
use phos_protocol::paths;
use serde_json::Value;

fn text(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).context("a path with a NUL")
}

/// A read-only bind mount of a file over another one.
fn bind(source: &Path, target: &Path) -> Result<()> {
    let (from, to) = (text(source)?, text(target)?);
    let mount = |flags| {
        // SAFETY: both paths are NUL-terminated; the other pointers may be null for bind mounts.
        let done = unsafe { libc::mount(from.as_ptr(), to.as_ptr(), ptr::null(), flags, ptr::null()) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    let protected = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV;
    mount(libc::MS_BIND)
        .and_then(|()| mount(libc::MS_PRIVATE))
        .and_then(|()| mount(libc::MS_BIND | libc::MS_REMOUNT | protected))
        .with_context(|| format!("mounting {} over {}", source.display(), target.display()))
}

/// The container's configuration and root, from the state that the runtime writes to a hook's standard input.
fn container() -> Result<(Value, PathBuf)> {
    let mut state = String::new();
    io::stdin().take(1 << 20).read_to_string(&mut state)?;
    let state: Value = serde_json::from_str(&state).context("the runtime's state is not JSON")?;
    let bundle = PathBuf::from(state["bundle"].as_str().context("the runtime's state names no bundle")?);
    let path = bundle.join("config.json");
    let spec = fs::read(&path).with_context(|| path.display().to_string())?;
    let spec: Value = serde_json::from_slice(&spec).with_context(|| path.display().to_string())?;
    let root = fs::canonicalize(locate::root_path(&spec, &bundle)).context("the root file system")?;
    Ok((spec, root))
}

fn late(library: &Path) -> Result<String> {
    let (_, root) = container()?;
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    let found = locate::mounted_libcuda(&mountinfo, &root);
    let Some(first) = found.first() else {
        bail!("no hook has mounted a libcuda.so.1: libphos.so is not put into this container");
    };
    let real = locate::resolve(&root, Path::new(paths::REAL_LIBCUDA))
        .context("the control folder is not mounted")?;
    bind(&first.host, &root.join(real))?;
    for f in &found {
        bind(library, &f.host)?;
    }
    Ok(format!("libphos.so stands in front of {}", first.inside.display()))
}

/// Gives up what two bind mounts do not need, for good: this program starts no other.
fn drop_privileges() -> Result<()> {
    use caps::{CapSet, Capability};
    let needed = [Capability::CAP_SYS_ADMIN, Capability::CAP_DAC_OVERRIDE, Capability::CAP_DAC_READ_SEARCH];
    let have = caps::read(None, CapSet::Permitted)?;
    let rest = needed.into_iter().filter(|c| have.contains(c)).collect();
    caps::set(None, CapSet::Effective, &rest)?;
    caps::set(None, CapSet::Permitted, &rest)?;
    caps::clear(None, CapSet::Inheritable)?;
    // SAFETY: sets an attribute of this process; the unused arguments must be 0.
    let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error().into()) }
}

fn main() {
    if let Err(e) = drop_privileges() {
        eprintln!("phos-hook: capabilities were not given up: {e:#}");
    }
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match words.as_slice() {
        [verb, library] if verb == "late" => late(Path::new(library)),
        _ => {
            Err(anyhow::anyhow!("usage: phos-hook late LIBRARY, as an OCI hook of the kind createContainer"))
        }
    };
    match result {
        Ok(line) => eprintln!("phos-hook: {line}"),
        Err(e) => eprintln!("phos-hook: {e:#}"),
    }
}
