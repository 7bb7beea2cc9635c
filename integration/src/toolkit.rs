//! A host with NVIDIA's container toolkit: its programs and its CDI specification (stand-ins from `integration/toolkits`,
//! which do what the real ones do) and a driver, the simulated one, in the form in which a driver's package installs it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount, umount};
use serde_json::json;

use crate::container::Place;
use crate::tools::workspace;

/// Folder of libraries in a container.
pub const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
/// File name of the driver library that the toolkit mounts.
pub const DRIVER: &str = "libcuda.so.580.159.04";

/// An installed toolkit.
pub struct Toolkit {
    /// Its folder.
    pub folder: PathBuf,
    /// Keeps the persistence daemon's socket there.
    _persistence: UnixListener,
}

impl Toolkit {
    /// Installs it in a folder of the place.
    pub fn install(place: &Place) -> Result<Self> {
        let folder = place.path("toolkit");
        for sub in ["driver", "nvidia-persistenced", "nvidia-mps", "proc/gpus/0000:01:00.0"] {
            fs::create_dir_all(folder.join(sub))?;
        }
        // The hooks' own programs, where a root file system has few.
        fs::create_dir(folder.join("bin"))?;
        for applet in ["dirname", "grep", "head", "mktemp", "mount", "readlink", "sed", "tr"] {
            symlink(&place.tools.busybox, folder.join("bin").join(applet))?;
        }
        let library = place.tools.program("libsimcuda.so");
        fs::copy(&library, folder.join("driver").join(DRIVER))?;
        // Only the driver library itself is simulated.
        fs::write(folder.join("driver/libnvidia-ml.so.580.159.04"), "")?;
        fs::write(folder.join("proc/gpus/0000:01:00.0/information"), "Model: simulated\n")?;
        fs::write(folder.join("nvidia-mps/control.pid"), "1\n")?;
        let _persistence = UnixListener::bind(folder.join("nvidia-persistenced/socket"))?;
        for name in [
            "nvidia-cdi-hook",
            "nvidia-container-runtime",
            "nvidia-container-runtime-hook",
            "nvidia.yaml",
            "simulated.json",
        ] {
            let from = workspace().join("integration/toolkits").join(name);
            let text = fs::read_to_string(&from).with_context(|| from.display().to_string())?;
            fs::write(folder.join(name), text.replace("@TOOLKIT@", &folder.display().to_string()))?;
            fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o755))?;
        }
        Ok(Toolkit { folder, _persistence })
    }

    /// The toolkit's runtime, in front of `runtime`, in the mode `cdi` or `legacy`.
    pub fn runtime(&self, mode: &str, runtime: &Path) -> Result<PathBuf> {
        fs::write(self.folder.join("runtime.json"), json!({"mode": mode, "runtime": runtime}).to_string())?;
        Ok(self.folder.join("nvidia-container-runtime"))
    }
}

/// The folder in which engines look for CDI specifications, this sandbox's own while it exists: /etc with a layer over it.
pub struct CdiFolder;

impl CdiFolder {
    /// Puts the toolkit's two specifications there.
    pub fn of(place: &Place, toolkit: &Toolkit) -> Result<Self> {
        // An overlay's upper layer cannot be on another overlay, which the place may be on.
        let layers = place.path("etc");
        fs::create_dir_all(&layers)?;
        mount(Some("tmpfs"), &layers, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        let (upper, work) = (layers.join("upper"), layers.join("work"));
        fs::create_dir_all(upper.join("cdi"))?;
        fs::create_dir(&work)?;
        for name in ["nvidia.yaml", "simulated.json"] {
            fs::copy(toolkit.folder.join(name), upper.join("cdi").join(name))?;
        }
        let options = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
        mount(Some("overlay"), "/etc", Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .context("/etc")?;
        Ok(CdiFolder)
    }
}

impl Drop for CdiFolder {
    fn drop(&mut self) {
        let _ = umount("/etc");
    }
}
