//! What there is on the machine, before a fault and after it. What is more afterwards has leaked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::container::{Container, Place};

/// The program in the containers.
const SAMPLE: &str = "phos-sample";

/// Everything that a job could leave behind, counted by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inventory(BTreeMap<String, usize>);

fn pids() -> Vec<i32> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|e| e.file_name());
    names.filter_map(|n| n.to_str()?.parse().ok()).collect()
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
}

/// The processes of this sandbox that belong neither to a container nor to the harness, by their command lines.
pub fn others() -> Vec<(i32, String)> {
    let own = std::process::id() as i32;
    let mut family = BTreeSet::from([1, own]);
    let mut pid = own;
    while pid > 1 {
        let stat = text(format!("/proc/{pid}/stat"));
        pid = stat.rsplit_once(')').and_then(|(_, r)| r.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0);
        family.insert(pid);
    }
    let strange = pids().into_iter().filter(|p| !family.contains(p)).filter_map(|pid| {
        let comm = text(format!("/proc/{pid}/comm"));
        let line = text(format!("/proc/{pid}/cmdline")).replace('\0', " ");
        (!comm.is_empty() && comm.trim() != SAMPLE).then(|| (pid, format!("{} {line}", comm.trim())))
    });
    strange.collect()
}

/// Waits until no process is at work. What still is after `limit` comes back.
pub fn wait_until_quiet(limit: Duration) -> Vec<String> {
    let deadline = Instant::now() + limit;
    loop {
        let left = others();
        if left.is_empty() || Instant::now() > deadline {
            return left.into_iter().map(|(_, line)| line).collect();
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// `socket:[123]` and the like without what differs each time.
fn kind(link: &str) -> String {
    link.chars().filter(|c| !c.is_ascii_digit()).collect()
}

impl Inventory {
    /// Of a container that runs, and of the place it is in. `None` if the container has no process.
    pub fn take(place: &Place, container: &Container<'_>) -> Option<Inventory> {
        let pid = container.pid().ok().filter(|p| *p > 0)?;
        let mut inventory = Inventory::of_place(place);
        let mut count = |name: String| *inventory.0.entry(name).or_default() += 1;
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
            let link = fs::read_link(fd.path()).ok()?;
            count(format!("fd of the program: {}", kind(&link.to_string_lossy())));
        }
        for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
            count(format!("thread of the program: {}", text(thread.path().join("comm")).trim()));
        }
        Some(inventory)
    }

    /// Of a place, whatever runs in it.
    pub fn of_place(place: &Place) -> Inventory {
        let mut found = BTreeMap::<String, usize>::new();
        let mut count = |name: String| *found.entry(name).or_default() += 1;
        let top = place.path("");
        let unique = top.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut memory = BTreeSet::new();
        for pid in pids() {
            for fd in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
                let is_memory =
                    fs::read_link(fd.path()).is_ok_and(|l| l.to_string_lossy().starts_with("/memfd:simgpu"));
                if let Some(meta) = fs::metadata(fd.path()).ok().filter(|_| is_memory) {
                    memory.insert(std::os::unix::fs::MetadataExt::ino(&meta));
                }
            }
            let maps = text(format!("/proc/{pid}/maps"));
            let mapped = maps.lines().filter(|l| l.contains("/memfd:simgpu"));
            memory.extend(mapped.filter_map(|l| l.split_whitespace().nth(4)?.parse::<u64>().ok()));
        }
        memory.iter().for_each(|_| count("piece of GPU memory".into()));
        for line in text("/proc/self/mountinfo").lines() {
            count(format!("mount {}", kind(line.split(' ').nth(4).unwrap_or_default())));
        }
        // On the unified hierarchy they are there at once.
        let root = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|e| e.path());
        for hierarchy in hierarchies.chain([root.to_path_buf()]) {
            for group in fs::read_dir(hierarchy).into_iter().flatten().flatten() {
                let name = group.file_name();
                if group.path().is_dir() && name.to_string_lossy().starts_with(&unique) {
                    count(format!("cgroup {}", kind(&group.path().to_string_lossy())));
                }
            }
        }
        // What CRIU has for the time of a job.
        let folders = fs::read_dir(&top).into_iter().flatten().flatten().map(|e| e.path());
        for folder in folders.chain(["/tmp".into()]) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(".criu") {
                    count(format!("file {}", entry.path().display()));
                }
            }
        }
        for line in text("/proc/net/unix").lines().filter(|l| l.contains(&unique)) {
            let path = line.split_whitespace().nth(7).unwrap_or_default();
            count(format!("socket {}", kind(path)));
        }
        let mut folders = vec![place.path("state"), place.path("root")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = kind(&entry.path().to_string_lossy());
                // The logs are there to stay.
                if !name.ends_with("engine.log") {
                    count(format!("file {name}"));
                }
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    folders.push(entry.path());
                }
            }
        }
        Inventory(found)
    }

    /// What is here and not, or not as often, in `before`.
    pub fn beyond(&self, before: &Inventory) -> Vec<String> {
        let more = self.0.iter().filter_map(|(name, n)| {
            let had = before.0.get(name).copied().unwrap_or(0);
            (*n > had).then(|| format!("{} more: {name}", n - had))
        });
        more.collect()
    }
}
