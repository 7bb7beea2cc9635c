//! How much host memory a container may still take, by the limits of its cgroup and of those above it.

use std::fs;
use std::path::Path;

/// The hierarchy that limits memory, and its two files: the limit and what is used.
const UNIFIED: [&str; 2] = ["memory.max", "memory.current"];
const OLD: [&str; 2] = ["memory.limit_in_bytes", "memory.usage_in_bytes"];

/// Bytes, `None` if nothing limits the process.
pub fn of(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let root = Path::new("/sys/fs/cgroup");
    let lines = || text.lines().filter_map(|l| l.split_once(':')?.1.split_once(':'));
    let old = lines().find(|(controllers, _)| controllers.split(',').any(|c| c == "memory"));
    match old {
        Some((_, path)) => below(&root.join("memory"), path, OLD),
        None => below(root, lines().find(|(controllers, _)| controllers.is_empty())?.1, UNIFIED),
    }
}

fn below(root: &Path, path: &str, files: [&str; 2]) -> Option<u64> {
    let folder = root.join(path.trim_start_matches('/'));
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = |folder: &Path| {
        let [limit, used] = files.map(|f| number(&folder.join(f)));
        // The old hierarchy writes "no limit" as the largest number of whole pages.
        Some(limit.filter(|l| *l < i64::MAX as u64 / 2)?.saturating_sub(used?))
    };
    folder.ancestors().take_while(|f| f.starts_with(root)).filter_map(left).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_on_the_way_up_counts() {
        let root = tempfile::tempdir().unwrap();
        let set = |folder: &str, files: [&str; 2], limit: &str, used: &str| {
            let folder = root.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(files[0]), limit).unwrap();
            fs::write(folder.join(files[1]), used).unwrap();
        };
        set("pod", UNIFIED, "1000\n", "300\n");
        set("pod/box", UNIFIED, "max\n", "200\n");
        assert_eq!(below(root.path(), "/pod/box", UNIFIED), Some(700));
        set("pod/box", UNIFIED, "250\n", "200\n");
        assert_eq!(below(root.path(), "/pod/box", UNIFIED), Some(50));
        set("old", OLD, "9223372036854771712\n", "200\n");
        assert_eq!(below(root.path(), "/old", OLD), None);
        set("old", OLD, "100\n", "200\n");
        assert_eq!(below(root.path(), "/old", OLD), Some(0));
        assert_eq!(below(root.path(), "/is/not/there", OLD), None);
    }
}
