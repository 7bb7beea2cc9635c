//! What the lower runtime has started for a restore, and what is left of it when CRIU is killed in the middle.
//!
//! CRIU takes down what it has built when it fails. One that is killed cannot: the processes that it was building wait for it
//! for ever, with the socket open over which the lower runtime waits for CRIU's answer; cgroup mounts stay in CRIU's working
//! folder, and an empty folder in `/tmp`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{lower, processes};

/// How often there is a look. Processes take longer until they no longer hold the lower runtime's socket.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long the lower runtime may take to notice that CRIU was killed.
const GRACE: Duration = Duration::from_secs(1);
/// How long what was killed may take to be gone.
const DEATH: Duration = Duration::from_secs(10);
/// Beginning of the names of the folders in which CRIU puts a container's mounts together.
const MOUNTS: &str = ".criu.mntns.";

/// What was seen of it.
#[derive(Debug)]
pub struct Started {
    /// When that began.
    pub begun: SystemTime,
    looked: Option<Instant>,
    /// CRIU and the container's first process, by their start times.
    seen: BTreeMap<i32, u64>,
    /// Those of them that [`Started::fresh`] has not given out.
    fresh: Vec<i32>,
    cgroups: BTreeSet<PathBuf>,
    killed: Option<Instant>,
}

/// Whether a process was ended by a signal and nobody has waited for it yet.
fn ended_by_signal(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Fields are counted behind the command, which may hold anything: the state is the first, the exit code the 50th.
    let fields: Vec<_> = stat.rsplit_once(')').map_or("", |(_, f)| f).split_whitespace().collect();
    let code = fields.get(49).and_then(|c| c.parse::<i32>().ok()).unwrap_or(0);
    fields.first() == Some(&"Z") && code & 0x7f != 0
}

/// Where a process is: its cgroups and its PID namespace.
fn home(pid: &str) -> (String, PathBuf) {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    (cgroups, fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap_or_default())
}

impl Started {
    /// Nothing yet.
    pub fn nothing() -> Self {
        let (seen, fresh, cgroups) = (BTreeMap::new(), Vec::new(), BTreeSet::new());
        Started { begun: SystemTime::now(), looked: None, seen, fresh, cgroups, killed: None }
    }

    /// Notes a process that belongs to it.
    pub fn note(&mut self, pid: i32) {
        if let Some(process) = processes::describe(pid)
            && self.seen.insert(pid, process.start_time).is_none()
        {
            self.fresh.push(pid);
            self.cgroups.extend(processes::cgroups_beyond_own(pid));
        }
    }

    /// What was noted since this was asked for last.
    pub fn fresh(&mut self) -> Vec<i32> {
        std::mem::take(&mut self.fresh)
    }

    /// Notes what the lower runtime, process `lower`, has started. `true`: CRIU was killed, and the lower runtime waits for it
    /// all the same.
    pub fn look(&mut self, lower: i32) -> bool {
        if self.looked.is_some_and(|at| at.elapsed() < INTERVAL) {
            return false;
        }
        self.looked = Some(Instant::now());
        let own = home("self");
        // The lower runtime may be started by a wrapper of its own.
        let mut tools = vec![lower];
        let mut killed = false;
        while let Some(tool) = tools.pop() {
            for child in processes::children(tool) {
                match processes::describe(child) {
                    None => killed |= ended_by_signal(child),
                    Some(_) if home(&child.to_string()) == own => tools.push(child),
                    Some(_) => self.note(child),
                }
            }
        }
        self.killed = self.killed.or(Some(Instant::now())).filter(|_| killed);
        self.killed.is_some_and(|since| since.elapsed() > GRACE)
    }

    /// Of what was seen, and of what has come from that, all that lives.
    fn alive(&self) -> Vec<i32> {
        let is_same = |pid: i32, start: u64| processes::describe(pid).is_some_and(|p| p.start_time == start);
        let mut found: Vec<_> =
            self.seen.iter().filter(|(p, s)| is_same(**p, **s)).map(|(p, _)| *p).collect();
        let mut next = 0;
        while next < found.len() {
            let children = processes::children(found[next]);
            found.extend(children.into_iter().filter(|c| processes::describe(*c).is_some()));
            next += 1;
        }
        found
    }

    /// Ends what lives of it.
    pub fn end(&self) {
        // An earlier attempt may have left the cgroup frozen; what is in it would not die.
        for cgroup in &self.cgroups {
            for (file, word) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
                if cgroup.join(file).exists() {
                    let _ = fs::write(cgroup.join(file), word);
                }
            }
        }
        let deadline = Instant::now() + DEATH;
        loop {
            let alive = self.alive();
            if alive.is_empty() || Instant::now() > deadline {
                return;
            }
            for pid in alive {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Removes all that is left of a restore that has come to nothing, once its lower runtime is gone. `work` is CRIU's working
    /// folder.
    pub fn clear(&self, work: &Path) {
        self.end();
        let log = fs::read(work.join("restore.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        for cgroup in &self.cgroups {
            remove_cgroup(cgroup, Instant::now() + GRACE);
        }
        for name in log.lines().filter_map(yard) {
            let yard = work.join(name);
            lower::release(&yard);
            let _ = umount2(&yard, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(yard);
        }
        // Another CRIU may be about to use one that looks just as empty from here.
        if !self.cgroups.is_empty() && !is_criu_at_work() {
            let made = self.begun.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
            for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
                let is_one = entry.file_name().to_string_lossy().starts_with(MOUNTS);
                if is_one && entry.metadata().is_ok_and(|m| m.is_dir() && m.uid() == 0 && m.ctime() >= made) {
                    let _ = fs::remove_dir(entry.path());
                }
            }
        }
    }
}

/// The folder for cgroup mounts that a line of CRIU's log speaks of.
fn yard(line: &str) -> Option<&str> {
    let name = line.split_once("cg: Opening ")?.1.strip_suffix(" as cg yard")?;
    (name.starts_with(".criu.cgyard.") && !name.contains('/')).then_some(name)
}

/// Whether any process of this machine is CRIU, or a copy of it that becomes one of a container.
fn is_criu_at_work() -> bool {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut lines = pids.filter_map(|e| fs::read(e.path().join("cmdline")).ok());
    lines.any(|line| {
        let mut words = line.split(|b| *b == 0);
        let program = words.next().unwrap_or_default();
        program.ends_with(b"criu") || words.any(|w| w == b"swrk")
    })
}

/// Removes a cgroup with those below it. One that has a process again stays.
fn remove_cgroup(folder: &Path, deadline: Instant) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroup(&entry.path(), deadline);
        }
    }
    // A process leaves its cgroup a moment after it has ended.
    while fs::remove_dir(folder).is_err() && folder.exists() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_killed_child_that_nobody_waits_for_is_told_from_one_that_ended() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        assert!(!ended_by_signal(pid));
        child.kill().unwrap();
        let deadline = Instant::now() + DEATH;
        while !ended_by_signal(pid) {
            assert!(Instant::now() < deadline, "it was killed");
            thread::sleep(Duration::from_millis(2));
        }
        child.wait().unwrap();
        let mut child = Command::new("false").spawn().unwrap();
        let pid = child.id() as i32;
        while processes::describe(pid).is_some() {
            assert!(Instant::now() < deadline, "it ends by itself");
            thread::sleep(Duration::from_millis(2));
        }
        assert!(!ended_by_signal(pid));
        child.wait().unwrap();
    }

    #[test]
    fn what_shares_this_programs_cgroup_and_namespace_is_no_ones_container() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mut started = Started::nothing();
        assert!(!started.look(std::process::id() as i32));
        started.end();
        assert!(started.seen.is_empty() && child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn only_a_folder_of_criu_itself_is_taken_from_its_log() {
        assert_eq!(yard("(00.1) cg: Opening .criu.cgyard.NnnXxN as cg yard"), Some(".criu.cgyard.NnnXxN"));
        assert_eq!(yard("(00.1) cg: Opening .criu.cgyard.a/../.. as cg yard"), None);
        assert_eq!(yard("(00.1) cg: Opening /sys as cg yard"), None);
    }
}
