//! Where a container will find its CUDA driver library.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::detect::is_libcuda;

/// Folders in a root file system where the loader looks for the driver, as distributions and images have them.
pub(crate) const LIBRARY_FOLDERS: &[&str] = &[
    "usr/lib/x86_64-linux-gnu",
    "lib/x86_64-linux-gnu",
    "usr/lib64",
    "lib64",
    "usr/lib",
    "usr/local/nvidia/lib64",
    "usr/local/nvidia/lib",
    "usr/local/cuda/compat",
    "usr/lib/wsl/lib",
];

/// A driver library, seen from both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its path in the container.
    pub inside: PathBuf,
    /// Its path on the host.
    pub host: PathBuf,
}

/// The container's root file system on the host.
pub fn root_path(spec: &Value, bundle: &Path) -> PathBuf {
    bundle.join(spec["root"]["path"].as_str().unwrap_or("rootfs"))
}

/// Follows symbolic links of `path` inside `root`, never leaving it. `None` if it does not exist.
pub fn resolve(root: &Path, path: &Path) -> Option<PathBuf> {
    let mut parts: Vec<PathBuf> = vec![path.to_path_buf()];
    let mut inside = PathBuf::new();
    let mut links = 0;
    while let Some(part) = parts.pop() {
        let mut components = part.components();
        let Some(first) = components.next() else { continue };
        let rest = components.as_path().to_path_buf();
        if rest.components().next().is_some() {
            parts.push(rest);
        }
        match first {
            Component::RootDir => inside = PathBuf::new(),
            Component::ParentDir => {
                inside.pop();
            }
            Component::Normal(name) => {
                let next = inside.join(name);
                let meta = fs::symlink_metadata(root.join(&next)).ok()?;
                if meta.is_symlink() {
                    links += 1;
                    if links > 40 {
                        return None;
                    }
                    parts.push(fs::read_link(root.join(&next)).ok()?);
                } else {
                    inside = next;
                }
            }
            _ => {}
        }
    }
    Some(inside)
}

/// Whether a file is a 64-bit x86 ELF library.
fn is_x86_64_library(path: &Path) -> bool {
    let mut head = [0u8; 20];
    let read = File::open(path).and_then(|mut f| f.read_exact(&mut head));
    // e_ident: magic, class 2 (64 bit); e_type 3 (shared object); e_machine 62 (x86-64). See elf(5).
    read.is_ok() && head.starts_with(b"\x7fELF\x02") && head[16] == 3 && head[18] == 62
}

/// Driver libraries among the files of `folder` and `depth` levels below it.
fn search(folder: &Path, depth: u32, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && depth > 0 && name != "stubs" {
            search(&entry.path(), depth - 1, into);
        } else if kind.is_file() && is_libcuda(&name.to_string_lossy()) && is_x86_64_library(&entry.path()) {
            into.push(entry.path());
        }
    }
}

/// All driver libraries the container can reach, mounts before the root file system.
pub fn libcuda(spec: &Value, root: &Path) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    let mut add = |inside: PathBuf, host: PathBuf| {
        if !found.iter().any(|f| f.inside == inside) {
            found.push(Found { inside, host });
        }
    };
    let text = |m: &Value, key: &str| m[key].as_str().map(PathBuf::from);
    for mount in spec["mounts"].as_array().into_iter().flatten() {
        let (Some(source), Some(destination)) = (text(mount, "source"), text(mount, "destination")) else {
            continue;
        };
        if !source.is_absolute() || destination.starts_with(phos_protocol::paths::CONTROL_DIR) {
            continue;
        }
        let Ok(meta) = fs::metadata(&source) else { continue };
        if meta.is_file() {
            if is_libcuda(&destination.to_string_lossy()) && is_x86_64_library(&source) {
                add(destination, source);
            }
        } else if meta.is_dir() && !["/proc", "/sys", "/dev"].iter().any(|p| destination.starts_with(p)) {
            let mut files = Vec::new();
            search(&source, 3, &mut files);
            files.sort();
            for file in files {
                if let Ok(below) = file.strip_prefix(&source) {
                    add(destination.join(below), file.clone());
                }
            }
        }
    }
    for folder in LIBRARY_FOLDERS {
        let Some(folder) = resolve(root, Path::new(folder)) else { continue };
        let mut files = Vec::new();
        search(&root.join(&folder), 0, &mut files);
        files.sort();
        for file in files {
            if let Some(name) = file.file_name() {
                add(Path::new("/").join(&folder).join(name), file.clone());
            }
        }
    }
    found
}

/// All driver libraries that can be seen below `root` where mounts have been made: those that are mounts themselves, then
/// those in the loader's folders.
pub fn mounted_libcuda(mountinfo: &str, root: &Path) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    let mounts = crate::late::parse(mountinfo);
    let files = mounts.iter().filter_map(|m| Some((m.at.strip_prefix(root).ok()?, &m.at)));
    for (below, host) in files {
        if is_libcuda(&below.to_string_lossy()) && is_x86_64_library(host) {
            found.push(Found { inside: Path::new("/").join(below), host: host.clone() });
        }
    }
    for more in libcuda(&Value::Null, root) {
        if !found.iter().any(|f| f.inside == more.inside) {
            found.push(more);
        }
    }
    found
}

/// The highest `GLIBC_2.N` named in a file, as `N`.
fn glibc_minor(bytes: &[u8]) -> Option<u32> {
    const TAG: &[u8] = b"GLIBC_2.";
    bytes
        .windows(TAG.len() + 3)
        .filter(|w| w.starts_with(TAG))
        .filter_map(|w| {
            let digits: String =
                w[TAG.len()..].iter().map(|b| *b as char).take_while(char::is_ascii_digit).collect();
            digits.parse().ok()
        })
        .max()
}

/// The first segment of a library that is loaded: the names of versions stand there, and what stands behind it, debugging
/// information above all, can be many times as large. `None` if its headers do not say.
fn first_segment(path: &Path) -> Option<Vec<u8>> {
    let mut file = File::open(path).ok()?;
    let mut head = Vec::new();
    file.by_ref().take(4096).read_to_end(&mut head).ok()?;
    let number = |at: u64, len: u64| {
        let bytes = head.get(usize::try_from(at).ok()?..usize::try_from(at.checked_add(len)?).ok()?)?;
        Some(bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b)))
    };
    // e_phoff, e_phentsize, e_phnum; of each entry p_type (1: loaded), p_offset, p_filesz. See elf(5).
    let (table, entry, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let size = (0..count).find_map(|i| {
        let at = table.checked_add(i * entry)?;
        let first = number(at, 4)? == 1 && number(at.checked_add(8)?, 8)? == 0;
        if first { number(at.checked_add(32)?, 8) } else { None }
    })?;
    let read = head.len() as u64;
    file.take(size.saturating_sub(read)).read_to_end(&mut head).ok()?;
    head.truncate(usize::try_from(size).ok()?);
    Some(head)
}

/// The newest C library that a library needs, or that a C library is, as the `N` of `GLIBC_2.N`.
fn library_minor(path: &Path) -> Result<u32, String> {
    if let Some(minor) = first_segment(path).as_deref().and_then(glibc_minor) {
        return Ok(minor);
    }
    let bytes = fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(glibc_minor(&bytes).unwrap_or(0))
}

/// Whether the container's C library can load `library`. Says why not.
pub fn can_load(library: &Path, root: &Path) -> Result<(), String> {
    let needs = library_minor(library)?;
    let libc = LIBRARY_FOLDERS
        .iter()
        .filter_map(|folder| resolve(root, &Path::new(folder).join("libc.so.6")))
        .map(|inside| root.join(inside))
        .find(|path| is_x86_64_library(path));
    let Some(libc) = libc else {
        return Err(
            "it has no 64-bit GNU C library (a musl or 32-bit image), which the NVIDIA driver needs too"
                .into(),
        );
    };
    let has = library_minor(&libc).unwrap_or(0);
    if has < needs {
        let name = library.file_name().unwrap_or_default().to_string_lossy();
        return Err(format!("its GNU C library is 2.{has}, {name} needs 2.{needs}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::*;

    fn library(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut bytes = vec![0u8; 64];
        bytes[..5].copy_from_slice(b"\x7fELF\x02");
        (bytes[16], bytes[18]) = (3, 62);
        bytes.extend_from_slice(b"GLIBC_2.3\0GLIBC_2.36\0GLIBC_2.4\0GLIBC_PRIVATE\0");
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn files_folders_and_the_root_are_searched() {
        let base = tempfile::tempdir().unwrap();
        let at = |p: &str| base.path().join(p);
        library(&at("driver/lib64/libcuda.so.580.1"));
        library(&at("driver/stubs/libcuda.so"));
        symlink("libcuda.so.580.1", at("driver/lib64/libcuda.so.1")).unwrap();
        library(&at("host/libcuda.so.580.1"));
        library(&at("rootfs/usr/lib/x86_64-linux-gnu/libcuda.so.1"));
        symlink("usr/lib", at("rootfs/lib")).unwrap();
        fs::create_dir_all(at("rootfs/usr/lib64")).unwrap();
        fs::write(at("rootfs/usr/lib64/libcuda.so.1"), "a 32-bit one").unwrap();
        let spec = json!({"mounts": [
            {"destination": "/opt/nv", "source": at("driver")},
            {"destination": "/usr/lib64/libcuda.so.580.1", "source": at("host/libcuda.so.580.1")},
            {"destination": "/proc", "source": "proc"},
        ]});
        let found: Vec<_> = libcuda(&spec, &at("rootfs")).into_iter().map(|f| f.inside).collect();
        let expected = [
            "/opt/nv/lib64/libcuda.so.580.1",
            "/usr/lib64/libcuda.so.580.1",
            "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
        ];
        assert_eq!(found, expected.map(PathBuf::from));
    }

    #[test]
    fn links_stay_inside_the_root() {
        let base = tempfile::tempdir().unwrap();
        let root = base.path().join("r");
        fs::create_dir_all(root.join("real")).unwrap();
        symlink("/real", root.join("absolute")).unwrap();
        symlink("../../../../real", root.join("climbing")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        for path in ["absolute", "climbing", "/absolute/../real"] {
            assert_eq!(resolve(&root, Path::new(path)).as_deref(), Some(Path::new("real")), "{path}");
        }
        assert_eq!(resolve(&root, Path::new("loop")), None);
        assert_eq!(resolve(&root, Path::new("missing")), None);
    }

    #[test]
    fn versions_are_looked_for_in_the_first_segment_and_nowhere_else_if_it_has_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // One program header at 64, which loads the first 200 bytes.
        let mut bytes = vec![0u8; 120];
        (bytes[32], bytes[54], bytes[56], bytes[64], bytes[96]) = (64, 56, 1, 1, 200);
        bytes.extend_from_slice(b"\0GLIBC_2.17\0");
        bytes.resize(200, 0);
        bytes.extend_from_slice(b"\0GLIBC_2.99\0");
        fs::write(file.path(), &bytes).unwrap();
        assert_eq!(library_minor(file.path()), Ok(17));
        // Headers that say nothing, or nonsense.
        for (at, value) in [(56, 0), (39, 0xff), (64, 2), (103, 0xff)] {
            let mut other = bytes.clone();
            other[at] = value;
            fs::write(file.path(), &other).unwrap();
            assert_eq!(library_minor(file.path()), Ok(99), "{at}");
        }
    }

    #[test]
    fn an_old_or_missing_c_library_is_said() {
        let base = tempfile::tempdir().unwrap();
        let ours = base.path().join("libphos.so");
        library(&ours);
        assert_eq!(glibc_minor(&fs::read(&ours).unwrap()), Some(36));
        let root = base.path().join("r");
        assert!(can_load(&ours, &root).unwrap_err().contains("no 64-bit GNU C library"));
        library(&root.join("lib64/libc.so.6"));
        assert_eq!(can_load(&ours, &root), Ok(()));
        let mut newer = fs::read(&ours).unwrap();
        newer.extend_from_slice(b"GLIBC_2.38\0\0");
        fs::write(&ours, newer).unwrap();
        assert!(can_load(&ours, &root).unwrap_err().contains("2.36, libphos.so needs 2.38"));
    }
}
