//! For restore: where on this host the files are now that a container had mounted. A GPU toolkit mounts the driver's files
//! one by one from where the driver's package put them, which differs between distributions, while the driver is the same.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::locate::LIBRARY_FOLDERS;
use crate::plan::is_ours;

/// A file that a mount shows and this host lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Where the container sees it.
    pub destination: String,
    /// Where it was on the host.
    pub source: String,
}

/// Whether a mount binds a file or folder of the host.
fn binds(mount: &Value) -> bool {
    let option =
        |o: &Value| o.as_array().into_iter().flatten().any(|o| matches!(o.as_str(), Some("bind" | "rbind")));
    mount["type"] == "bind" || option(&mount["options"])
}

/// Goes through those bind mounts of `effective` that `spec`, the engine's configuration, lacks. A source that is not there
/// is looked for by its name: in `driver`, the folder of this host's driver library, and where libraries usually are. Returns
/// a line for each that was found elsewhere, and those that were not found.
pub fn find(
    effective: &mut Value,
    spec: &Value,
    driver: Option<&Path>,
    root: &Path,
) -> (Vec<String>, Vec<Missing>) {
    let (mut moved, mut missing) = (Vec::new(), Vec::new());
    let engines: Vec<&Value> =
        spec["mounts"].as_array().into_iter().flatten().map(|m| &m["destination"]).collect();
    for mount in effective["mounts"].as_array_mut().into_iter().flatten() {
        let Some(source) = mount["source"].as_str().map(PathBuf::from) else { continue };
        if !binds(mount)
            || !source.is_absolute()
            || is_ours(mount)
            || engines.contains(&&mount["destination"])
        {
            continue;
        }
        let here = |p: &Path| root.join(p.strip_prefix("/").unwrap_or(p));
        if here(&source).exists() {
            continue;
        }
        let text = |v: &Value| v.as_str().unwrap_or_default().to_string();
        let folders = driver.map(Path::to_path_buf).into_iter();
        let folders = folders.chain(LIBRARY_FOLDERS.iter().map(|f| Path::new("/").join(f)));
        let found = source.file_name().and_then(|n| folders.map(|f| f.join(n)).find(|p| here(p).is_file()));
        match found {
            Some(path) => {
                moved.push(format!("{} is taken from {}", text(&mount["destination"]), path.display()));
                mount["source"] = path.to_string_lossy().into();
            }
            None => missing
                .push(Missing { destination: text(&mount["destination"]), source: text(&mount["source"]) }),
        }
    }
    (moved, missing)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    #[test]
    fn what_has_moved_is_found_by_its_name_and_what_is_gone_is_named() {
        let root = tempfile::tempdir().unwrap();
        for path in ["opt/driver/libcuda.so.580.1", "usr/lib64/libnvidia-ml.so.580.1", "srv/data"] {
            fs::create_dir_all(root.path().join(path).parent().unwrap()).unwrap();
            fs::write(root.path().join(path), "").unwrap();
        }
        let mount = |source: &str, destination: &str| json!({"destination": destination, "source": source, "options": ["ro", "rbind"]});
        let mut effective = json!({"mounts": [
            mount("/usr/lib/libcuda.so.580.1", "/usr/lib/libcuda.so.580.1"),
            mount("/usr/lib/libnvidia-ml.so.580.1", "/usr/lib/libnvidia-ml.so.580.1"),
            mount("/srv/data", "/data"),
            mount("/usr/lib/libgone.so.580.1", "/usr/lib/libgone.so.580.1"),
            mount("/old/hosts", "/etc/hosts"),
            mount("/run/phos-runc/old/ctl", "/run/phos"),
            {"destination": "/proc", "type": "proc", "source": "proc"},
        ]});
        let spec = json!({"mounts": [mount("/new/hosts", "/etc/hosts")]});
        let (moved, missing) = find(&mut effective, &spec, Some(Path::new("/opt/driver")), root.path());
        assert_eq!(effective["mounts"][0]["source"], "/opt/driver/libcuda.so.580.1");
        assert_eq!(effective["mounts"][1]["source"], "/usr/lib64/libnvidia-ml.so.580.1");
        assert_eq!(moved.len(), 2, "{moved:?}");
        let gone = "/usr/lib/libgone.so.580.1".to_string();
        assert_eq!(missing, [Missing { destination: gone.clone(), source: gone }]);
    }
}
