//! The programs under test and the programs they need.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Tools {
    /// Folder of the built programs and libraries.
    pub built: PathBuf,
    /// CRIU.
    pub criu: PathBuf,
    /// runc.
    pub runc: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    env::split_paths(&path).chain(usual).map(|d| d.join(name)).find(|p| p.is_file())
}

/// The folder of this workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Into::into).unwrap_or_default()
}

/// A built program or library. Tests lie in target/PROFILE/deps, programs in target/PROFILE.
pub fn built(name: &str) -> Result<PathBuf> {
    let exe = env::current_exe()?;
    let folder = exe.parent().context("a program has a folder")?;
    Ok(if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder }.join(name))
}

impl Tools {
    /// Finds everything, or says what is missing and what to do.
    pub fn find() -> Result<Self> {
        let tools = Tools {
            built: built("")?,
            criu: env::var_os("PHOS_CRIU").map_or_else(|| workspace().join(".tools/bin/criu"), PathBuf::from),
            runc: on_path("runc").context("runc is missing: run integration/scripts/setup.sh")?,
            busybox: on_path("busybox").context("busybox is missing: run integration/scripts/setup.sh")?,
        };
        if !nix::unistd::geteuid().is_root() {
            bail!("containers need root");
        }
        if !tools.criu.exists() {
            bail!("CRIU is missing: run integration/scripts/setup.sh");
        }
        for name in ["phos-runc", "libphos.so", "libsimcuda.so", "phos-sample", "sandbox-init"] {
            if !tools.program(name).exists() {
                bail!("{name} is not built: run cargo build --workspace");
            }
        }
        Ok(tools)
    }

    /// A built program or library.
    pub fn program(&self, name: &str) -> PathBuf {
        self.built.join(name)
    }
}

/// What a program prints, for the record of a measurement.
pub fn word(program: &str, args: &[&str]) -> Result<String> {
    Ok(String::from_utf8(std::process::Command::new(program).args(args).output()?.stdout)?.trim().to_string())
}
