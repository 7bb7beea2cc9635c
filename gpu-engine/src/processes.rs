//! Which processes a container has, and which of them may use a GPU.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::{fs, io};

use phos_protocol::paths;
use thiserror::Error;

use crate::text::plain;

/// Why a container's processes cannot be listed.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// The container's first process is gone.
    #[error("process {0} of the container has ended")]
    Gone(i32),
    /// A file of `/proc` or of the cgroup hierarchy cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// One process of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process id in this program's PID namespace.
    pub pid: i32,
    /// Process id in its own, innermost namespace.
    pub own_pid: i32,
    /// Its parent's process id in this program's PID namespace.
    pub parent: i32,
    /// Start time in clock ticks since boot: tells a process from a later one with the same id.
    pub start_time: u64,
    /// `argv[0]`'s last part, for messages.
    pub command: String,
}

/// The folder of the cgroup hierarchy in which a process of `/proc/PID/cgroup` content `text` is found.
///
/// On the unified hierarchy that is the `0::` line. Otherwise it is the first controller's that places the
/// process anywhere but at the root.
fn cgroup_folder(text: &str, root: &Path, unified: bool) -> Option<PathBuf> {
    let lines = || text.lines().filter_map(|l| l.split_once(':')?.1.split_once(':'));
    if unified {
        let (_, path) = lines().find(|(controllers, _)| controllers.is_empty())?;
        return Some(root.join(path.trim_start_matches('/')));
    }
    for wanted in ["pids", "devices", "freezer", "memory", "cpu", "name=systemd"] {
        let found = lines().find(|(c, path)| *path != "/" && c.split(',').any(|c| c == wanted));
        if let Some((_, path)) = found {
            let hierarchy = root.join(wanted.trim_start_matches("name="));
            return Some(hierarchy.join(path.trim_start_matches('/')));
        }
    }
    None
}

fn read(path: PathBuf) -> Result<String, ProcessError> {
    fs::read_to_string(&path).map_err(|source| ProcessError::Io { path, source })
}

/// All process ids in a cgroup folder and below it.
fn members(folder: &Path, into: &mut Vec<i32>) -> Result<(), ProcessError> {
    let text = read(folder.join("cgroup.procs"))?;
    into.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|pid| *pid > 0));
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            // A folder may vanish while it is read; its processes then ended.
            let _ = members(&entry.path(), into);
        }
    }
    Ok(())
}

/// The processes whose parent is `pid`.
pub fn children(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(children.split_whitespace().filter_map(|c| c.parse::<i32>().ok()));
    }
    found
}

/// The processes that have the writing end of a pipe open, this one among them.
pub fn writing_to(pipe: BorrowedFd<'_>) -> Vec<i32> {
    let Ok(link) = fs::read_link(format!("/proc/self/fd/{}", pipe.as_raw_fd())) else { return Vec::new() };
    let writes = |fd: fs::DirEntry| {
        let info = fd.path().to_string_lossy().replacen("/fd/", "/fdinfo/", 1);
        let info = fs::read_to_string(info).unwrap_or_default();
        let flags = info.lines().find_map(|l| i32::from_str_radix(l.strip_prefix("flags:")?.trim(), 8).ok());
        flags.is_some_and(|f| f & libc::O_ACCMODE == libc::O_WRONLY)
    };
    let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|e| e.file_name());
    let pids = names.filter_map(|n| n.to_str()?.parse::<i32>().ok());
    let has_it = |pid: &i32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.filter(|e| fs::read_link(e.path()).is_ok_and(|l| l == link)).any(writes)
    };
    pids.filter(has_it).collect()
}

/// A process and its descendants: also a container's, where it shares its cgroup with others (rootless without delegation).
pub fn descendants(init: i32) -> Vec<i32> {
    let mut found = vec![init];
    let mut next = 0;
    while next < found.len() {
        let pid = found[next];
        next += 1;
        found.extend(children(pid));
    }
    found
}

/// Describes a process, `None` if it has ended.
pub fn describe(pid: i32) -> Option<Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    if field("State:").is_some_and(|s| s.starts_with(['Z', 'X'])) {
        return None;
    }
    let own_pid = field("NSpid:").and_then(|v| v.split_whitespace().last()?.parse().ok()).unwrap_or(pid);
    let parent = field("PPid:").and_then(|v| v.parse().ok()).unwrap_or(0);
    // A process chooses its name.
    let command = plain(field("Name:").unwrap_or_default());
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold anything; fields are counted behind its last parenthesis.
    let start_time = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    Some(Process { pid, own_pid, parent, start_time, command })
}

/// The cgroup folder of a process, unless that is the hierarchy's root. `None` as well if the process is gone.
pub(crate) fn folder_of(pid: i32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let root = Path::new("/sys/fs/cgroup");
    let unified = root.join("cgroup.controllers").exists();
    cgroup_folder(&text, root, unified).filter(|folder| folder != root)
}

/// The cgroup folders of a process, one a hierarchy, without those that this program is in or below.
pub fn cgroups_beyond_own(pid: i32) -> Vec<PathBuf> {
    let read = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let root = Path::new("/sys/fs/cgroup");
    let unified = root.join("cgroup.controllers").exists();
    beyond(&read(&pid.to_string()), &read("self"), root, unified)
}

fn beyond(text: &str, own: &str, root: &Path, unified: bool) -> Vec<PathBuf> {
    let folders = |text: &str| -> Vec<PathBuf> {
        let lines = text.lines().filter_map(|l| l.split_once(':')?.1.split_once(':'));
        let found = lines.map(|(controllers, path)| {
            let hierarchy = match controllers.split(',').next().unwrap_or_default() {
                "" if unified => root.to_path_buf(),
                "" => root.join("unified"),
                first => root.join(first.trim_start_matches("name=")),
            };
            hierarchy.join(path.trim_start_matches('/'))
        });
        found.collect()
    };
    let own = folders(own);
    let mut found = folders(text);
    found.retain(|f| !own.iter().any(|o| o.starts_with(f)) && !f.components().any(|c| c.as_os_str() == ".."));
    found
}

/// The cgroup folder that the container whose first process is `init` has to itself. `None` if it shares this program's.
pub fn own_cgroup(init: i32) -> Option<PathBuf> {
    let folder = folder_of(init)?;
    (Some(&folder) != folder_of(std::process::id() as i32).as_ref()).then_some(folder)
}

/// The processes of the container whose first process is `init`.
pub fn of_container(init: i32) -> Result<Vec<Process>, ProcessError> {
    if !Path::new(&format!("/proc/{init}")).exists() {
        return Err(ProcessError::Gone(init));
    }
    let pids = match own_cgroup(init) {
        Some(folder) => {
            let mut pids = Vec::new();
            members(&folder, &mut pids)?;
            pids
        }
        None => descendants(init),
    };
    let mut processes: Vec<_> = pids.into_iter().filter_map(describe).collect();
    processes.sort_by_key(|p| p.pid);
    processes.dedup_by_key(|p| p.pid);
    if processes.is_empty() { Err(ProcessError::Gone(init)) } else { Ok(processes) }
}

/// Whether `process`, one of `all`, descends from `init`. CRIU saves those and no others: what joined the container by
/// `exec` has its parent outside.
pub fn descends(process: &Process, init: i32, all: &[Process]) -> bool {
    let mut pid = process.pid;
    // No chain is longer than there are processes.
    for _ in 0..=all.len() {
        if pid == init {
            return true;
        }
        match all.iter().find(|p| p.pid == pid) {
            Some(p) => pid = p.parent,
            None => return false,
        }
    }
    false
}

/// Whether a process has a CUDA driver library loaded. Whether it uses it, the driver must say.
pub fn has_driver_loaded(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains("libcuda.so"))
}

/// Whether a process has `libphos.so` loaded, in front of the driver's library or preloaded.
pub fn has_library_loaded(pid: i32) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let names = [paths::REAL_LIBCUDA, paths::PRELOAD_LIBRARY].map(|p| p.rsplit('/').next().unwrap_or(p));
    names.into_iter().any(|name| maps.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_hierarchy_has_one_line() {
        let folder = cgroup_folder("0::/system.slice/docker-1.scope\n", Path::new("/c"), true);
        assert_eq!(folder.as_deref(), Some(Path::new("/c/system.slice/docker-1.scope")));
    }

    #[test]
    fn a_hybrid_hierarchy_uses_a_controller_that_places_the_process() {
        let text = "8:pids:/\n5:freezer:/box/1\n3:cpu,cpuacct:/box/1\n0::/\n";
        let folder = cgroup_folder(text, Path::new("/c"), false);
        assert_eq!(folder.as_deref(), Some(Path::new("/c/freezer/box/1")));
        assert_eq!(cgroup_folder("8:pids:/\n0::/\n", Path::new("/c"), false), None);
    }

    #[test]
    fn only_cgroups_that_this_program_is_not_in_are_a_containers_own() {
        let own = "5:freezer:/\n3:cpu,cpuacct:/box/1\n1:name=systemd:/\n0::/\n";
        let text = "5:freezer:/c\n3:cpu,cpuacct:/box\n1:name=systemd:/c\n0::/../c\n";
        let found = beyond(text, own, Path::new("/g"), false);
        assert_eq!(found, ["/g/freezer/c", "/g/systemd/c"].map(PathBuf::from));
        assert_eq!(beyond("0::/c/d\n", "0::/c\n", Path::new("/g"), true), [PathBuf::from("/g/c/d")]);
        assert!(beyond("0::/c\n", "0::/c/d\n", Path::new("/g"), true).is_empty());
    }

    #[test]
    fn what_joined_by_exec_does_not_descend_from_the_first_process() {
        let process =
            |pid, parent| Process { pid, own_pid: pid, parent, start_time: 1, command: String::new() };
        // 10 is the container's first, 20 joined; 30 and 31 loop, as a list read while processes end might.
        let all = [
            process(10, 1),
            process(11, 10),
            process(12, 11),
            process(20, 2),
            process(21, 20),
            process(30, 31),
            process(31, 30),
        ];
        let inside: Vec<_> = all.iter().filter(|p| descends(p, 10, &all)).map(|p| p.pid).collect();
        assert_eq!(inside, [10, 11, 12]);
    }

    #[test]
    fn this_process_is_described() {
        let me = describe(std::process::id() as i32).unwrap();
        assert!(me.start_time > 0);
        assert!(descendants(me.pid).contains(&me.pid));
        assert!(!has_driver_loaded(me.pid));
    }
}
