//! OCI bundles for the sample program.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::tools::Tools;

/// Where the container finds its driver.
pub const LIBCUDA: &str = "/usr/lib/x86_64-linux-gnu/libcuda.so.1";
/// Numbers of /dev/fuse, which the simulated GPU's node borrows.
const NODE: (u32, u32) = (10, 229);

/// What GPU a container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gpu {
    /// None.
    No,
    /// The simulated one.
    Simulated,
    /// The machine's: its driver library.
    Real(PathBuf),
}

impl Gpu {
    /// The machine's own GPU, if there is one; otherwise the simulated one.
    pub fn of_this_machine() -> Gpu {
        let folders = ["/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"];
        let library =
            folders.iter().map(|f| Path::new(f).join("libcuda.so.1")).find_map(|p| fs::canonicalize(p).ok());
        match library {
            Some(library) if Path::new("/dev/nvidiactl").exists() => Gpu::Real(library),
            _ => Gpu::Simulated,
        }
    }

    /// Device nodes: path in the container and numbers.
    fn nodes(&self) -> Vec<(String, u32, u32)> {
        match self {
            Gpu::No => Vec::new(),
            Gpu::Simulated => vec![("/dev/simgpu0".into(), NODE.0, NODE.1)],
            Gpu::Real(_) => {
                let names = fs::read_dir("/dev").into_iter().flatten().flatten().map(|e| e.path());
                let nvidia = names.filter(|p| p.to_string_lossy().starts_with("/dev/nvidia"));
                nvidia
                    .filter_map(|p| {
                        let meta = fs::metadata(&p).ok().filter(|m| m.file_type().is_char_device())?;
                        let (major, minor) =
                            (nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()));
                        Some((p.to_string_lossy().into_owned(), major as u32, minor as u32))
                    })
                    .collect()
            }
        }
    }
}

/// A bundle.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Its folder.
    pub path: PathBuf,
    /// The folder that the container sees as /out.
    pub out: PathBuf,
}

/// Libraries a program loads at start, by the loader's own account.
fn needed(file: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(file).output().context("ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|w| w.starts_with('/')).map(PathBuf::from).collect())
}

fn copy_into(root: &Path, file: &Path, inside: &Path) -> Result<()> {
    let target = root.join(inside.strip_prefix("/").unwrap_or(inside));
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(file, &target).with_context(|| file.display().to_string())?;
    Ok(())
}

/// Puts the machine's driver into a root file system: the library, the compiler that it loads for PTX, and what both
/// need.
fn copy_driver(root: &Path, library: &Path) -> Result<()> {
    let folder = library.parent().unwrap_or(Path::new("/"));
    let target = Path::new(LIBCUDA).parent().unwrap_or(Path::new("/"));
    copy_into(root, library, Path::new(LIBCUDA))?;
    for name in ["libnvidia-ptxjitcompiler.so.1", "libnvidia-nvvm.so.4", "libnvidia-gpucomp.so.1"] {
        if let Ok(file) = fs::canonicalize(folder.join(name)) {
            copy_into(root, &file, &target.join(name))?;
        }
    }
    for file in needed(library)? {
        copy_into(root, &file, &target.join(file.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

impl Bundle {
    /// Makes a bundle in `path` that runs `args`.
    pub fn make(tools: &Tools, path: &Path, name: &str, args: &[&str], gpu: &Gpu) -> Result<Self> {
        let (root, out) = (path.join("rootfs"), path.join("out"));
        for folder in
            ["bin", "dev", "proc", "sys", "tmp", "run", "out", "usr/lib/x86_64-linux-gnu", "usr/bin"]
        {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::create_dir_all(&out)?;
        for folder in ["lib", "lib64"] {
            symlink(if folder == "lib" { "usr/lib" } else { "usr/lib/x86_64-linux-gnu" }, root.join(folder))?;
        }
        copy_into(&root, &tools.busybox, Path::new("/bin/busybox"))?;
        symlink("busybox", root.join("bin/sh"))?;
        for name in ["phos-sample", "libphos.so", "libsimcuda.so"] {
            for library in needed(&tools.program(name))? {
                let inside =
                    Path::new("/usr/lib/x86_64-linux-gnu").join(library.file_name().unwrap_or_default());
                copy_into(&root, &library, &inside)?;
            }
        }
        copy_into(&root, &tools.program("phos-sample"), Path::new("/usr/bin/phos-sample"))?;
        match gpu {
            Gpu::No => {}
            Gpu::Simulated => copy_into(&root, &tools.program("libsimcuda.so"), Path::new(LIBCUDA))?,
            Gpu::Real(library) => copy_driver(&root, library)?,
        }
        let bundle = Bundle { path: path.into(), out };
        bundle.write_spec(&bundle.spec(name, args, gpu))?;
        Ok(bundle)
    }

    fn spec(&self, name: &str, args: &[&str], gpu: &Gpu) -> Value {
        let mut rules = vec![json!({"allow": false, "access": "rwm"})];
        let mut devices = vec![];
        for (path, major, minor) in gpu.nodes() {
            rules.push(json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"}));
            devices.push(json!({"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666, "uid": 0, "gid": 0}));
        }
        let capabilities = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"]);
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false, "user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/",
                "env": ["PATH=/usr/bin:/bin"],
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            },
            "root": {"path": "rootfs", "readonly": false},
            "hostname": "phos",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/out", "type": "bind", "source": self.out, "options": ["bind", "rw"]},
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
                "cgroupsPath": format!("/{name}"),
                "devices": devices,
                "resources": {"devices": rules},
            },
        })
    }

    /// The configuration as it stands.
    pub fn read_spec(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&fs::read(self.path.join("config.json"))?)?)
    }

    /// Replaces the configuration.
    pub fn write_spec(&self, spec: &Value) -> Result<()> {
        Ok(fs::write(self.path.join("config.json"), serde_json::to_vec_pretty(spec)?)?)
    }
}
