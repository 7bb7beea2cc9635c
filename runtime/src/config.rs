//! The configuration file, `/etc/phos-runc/config.toml`. All of it is optional; the environment wins over it.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use anyhow::{Context, Result, bail};
use phos_engine::image::Codec;
use phos_engine::job::{Strategy, Timeouts};
use phos_hooks::Mode;
use serde::Deserialize;

/// Where it is.
pub const PATH: &str = "/etc/phos-runc/config.toml";
/// Environment variable that names another one.
pub const PATH_ENV: &str = "PHOS_CONFIG";

/// What stands in the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Path of the lower runtime (`PHOS_LOWER_RUNTIME`).
    pub lower_runtime: Option<PathBuf>,
    /// Path of the CRIU program (`PHOS_CRIU`).
    pub criu: Option<PathBuf>,
    /// Folder of `libphos.so` and `phos-hook` (`PHOS_LIB_DIR`).
    pub lib_dir: Option<PathBuf>,
    /// Folder of the containers' state (`PHOS_STATE_DIR`), `/run/phos-runc` by default.
    pub state_dir: Option<PathBuf>,
    /// Path of the driver library that checkpoints are made with (`PHOS_LIBCUDA`).
    pub libcuda: Option<PathBuf>,
    /// `mount`, `preload` or `off`.
    pub inject: Option<String>,
    /// `auto`, `snapshot`, `precopy` or `stop` (`PHOS_STRATEGY`, annotation `phos.strategy`).
    pub strategy: Option<String>,
    /// `none`, `lz4` or `zstd` (`PHOS_COMPRESSION`, annotation `phos.compression`).
    pub compression: Option<String>,
    /// Seconds the GPU may take to finish its work before a checkpoint.
    pub drain_timeout: Option<u64>,
    /// Seconds the lower runtime's checkpoint or restore may take.
    pub criu_timeout: Option<u64>,
    /// Seconds the driver may take to lock a process.
    pub lock_timeout: Option<u64>,
    /// Seconds one call into the driver about a process may take.
    pub driver_timeout: Option<u64>,
    /// Seconds a process may take to come back and be attached.
    pub attach_timeout: Option<u64>,
    /// Seconds a job may stand still for any other reason.
    pub stall_timeout: Option<u64>,
}

impl Config {
    /// Reads the file, if there is one.
    pub fn load() -> Result<Self> {
        let path = env::var_os(PATH_ENV).map_or_else(|| PathBuf::from(PATH), PathBuf::from);
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text).with_context(|| path.display().to_string()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Config::default()),
            Err(e) => Err(e).with_context(|| path.display().to_string()),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        // A toml error is several lines with a picture; one line says enough.
        toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |s| text[..s.start].matches('\n').count() + 1);
            anyhow::anyhow!("line {line}: {}", e.message())
        })
    }

    /// A path that the environment or the file gives.
    fn path(&self, variable: &str, from_file: Option<&PathBuf>) -> Option<PathBuf> {
        env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from).or_else(|| from_file.cloned())
    }

    /// The lower runtime, if it is named.
    pub fn lower_runtime(&self) -> Option<PathBuf> {
        self.path("PHOS_LOWER_RUNTIME", self.lower_runtime.as_ref())
    }

    /// CRIU, if it is named.
    pub fn criu(&self) -> Option<PathBuf> {
        self.path("PHOS_CRIU", self.criu.as_ref())
    }

    /// Folder of all containers' state.
    pub fn state_dir(&self) -> PathBuf {
        self.path("PHOS_STATE_DIR", self.state_dir.as_ref()).unwrap_or_else(|| "/run/phos-runc".into())
    }

    /// `libphos.so`.
    pub fn library(&self) -> PathBuf {
        self.installed("libphos.so")
    }

    /// `phos-hook`.
    pub fn hook(&self) -> PathBuf {
        self.installed("phos-hook")
    }

    /// A file of this product: where it is named, beside this program, or where packages install it.
    fn installed(&self, name: &str) -> PathBuf {
        if let Some(dir) = self.path("PHOS_LIB_DIR", self.lib_dir.as_ref()) {
            return dir.join(name);
        }
        let beside = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name)));
        let installed = ["/usr/local/lib/phos", "/usr/lib/phos"].map(|d| Path::new(d).join(name));
        beside
            .into_iter()
            .chain(installed.clone())
            .find(|p| p.exists())
            .unwrap_or_else(|| installed[1].clone())
    }

    /// How containers are injected that do not say it themselves.
    pub fn inject(&self) -> Result<Mode> {
        self.inject.as_deref().map_or(Ok(Mode::Mount), |m| m.parse().map_err(anyhow::Error::msg))
    }

    /// How memory is copied. The environment wins over the container's annotation, and that over the file.
    pub fn strategy(&self, annotation: Option<&str>) -> Result<Strategy> {
        let named =
            env::var("PHOS_STRATEGY").ok().or(annotation.map(Into::into)).or_else(|| self.strategy.clone());
        named.map_or(Ok(Strategy::Auto), |s| s.parse().map_err(anyhow::Error::msg))
    }

    /// How what is copied is packed; as with [`Config::strategy`].
    pub fn compression(&self, annotation: Option<&str>) -> Result<Codec> {
        let named = env::var("PHOS_COMPRESSION")
            .ok()
            .or(annotation.map(Into::into))
            .or_else(|| self.compression.clone());
        named.map_or(Ok(Codec::None), |s| s.parse().map_err(anyhow::Error::msg))
    }

    /// Limits on waiting.
    pub fn timeouts(&self) -> Timeouts {
        let mut t = Timeouts::default();
        for (from, to) in [
            (self.drain_timeout, &mut t.drain_ms),
            (self.criu_timeout, &mut t.lower_ms),
            (self.lock_timeout, &mut t.lock_ms),
            (self.driver_timeout, &mut t.driver_ms),
            (self.attach_timeout, &mut t.attach_ms),
            (self.stall_timeout, &mut t.stall_ms),
        ] {
            if let Some(seconds) = from {
                *to = seconds.saturating_mul(1000);
            }
        }
        t
    }
}

/// The version a CRIU program says it has.
fn criu_version(path: &Path) -> Result<String> {
    let output = std::process::Command::new(path)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {}", path.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().find_map(|l| l.strip_prefix("Version:")).map(str::trim).unwrap_or_default().to_string())
}

/// Whether that version restores on today's kernels.
fn new_enough(version: &str) -> bool {
    let mut numbers = version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(4), Some(1))
}

/// Finds a CRIU of at least 4.1: the one that is named, or the first that is new enough beside this program, where
/// packages of phos-runc put one, and in `PATH`. Returns its path and version.
pub fn find_criu(config: &Config) -> Result<(PathBuf, String)> {
    let candidates: Vec<PathBuf> = match config.criu() {
        Some(named) => vec![named],
        None => {
            let usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
            let listed = env::var_os("PATH").unwrap_or_else(|| usual.into());
            let beside = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf()));
            let packaged = ["/usr/local/lib/phos", "/usr/lib/phos"].map(PathBuf::from);
            beside
                .into_iter()
                .chain(packaged)
                .chain(env::split_paths(&listed))
                .map(|d| d.join("criu"))
                .collect()
        }
    };
    let mut too_old = None;
    for path in candidates.into_iter().filter(|p| p.is_file()) {
        let version = criu_version(&path)?;
        if new_enough(&version) {
            return Ok((path, version));
        }
        too_old.get_or_insert((path, version));
    }
    match too_old {
        None => bail!("no CRIU found: install criu 4.1 or newer, or name it in PHOS_CRIU or {PATH}"),
        Some((path, version)) => {
            let found = if version.is_empty() { "of an unknown version" } else { &version };
            bail!(
                "{} is CRIU {found}: version 4.1 or newer is needed, name one in PHOS_CRIU or {PATH}",
                path.display()
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        for (version, expected) in [
            ("4.1", true),
            ("4.1.1", true),
            ("4.10", true),
            ("5.0", true),
            ("4.0", false),
            ("3.17.1", false),
            ("", false),
        ] {
            assert_eq!(new_enough(version), expected, "{version}");
        }
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        assert_eq!(Config::parse("criu = '/x'\n").unwrap().criu, Some("/x".into()));
        let error = Config::parse("criu = '/x'\nlowerruntime = 'y'\n").unwrap_err().to_string();
        assert!(
            error.starts_with("line 2:") && error.contains("lowerruntime") && !error.contains('\n'),
            "{error}"
        );
        assert!(Config::parse("criu = 5").is_err());
        let config = Config { strategy: Some("fast".into()), ..Config::default() };
        assert!(config.strategy(None).unwrap_err().to_string().contains("fast"));
        assert_eq!(config.compression(None).unwrap(), Codec::None);
        assert!(config.compression(Some("gzip")).unwrap_err().to_string().contains("none, lz4 or zstd"));
    }
}
