//! What the lower runtime has started, and what is left of it when CRIU is killed in the middle.
//!
//! CRIU takes down what it has built when it fails. One that is killed cannot: the processes that it was building wait for it
//! for ever, with the socket open over which the lower runtime waits for CRIU's answer, and so does one that it has started to
//! see what `ptrace` can do; cgroup mounts stay in CRIU's working folder, and folders in `/tmp`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{lower, probes, processes};

/// How often there is a look. Processes take longer until they no longer hold the lower runtime's socket.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long the lower runtime may take to notice that CRIU was killed.
const GRACE: Duration = Duration::from_secs(1);
/// How long what was killed may take to be gone.
const DEATH: Duration = Duration::from_secs(10);
/// Beginning of the names of the folders in `/tmp` in which CRIU puts a container's mounts together.
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

/// The name of a process, also of one that nobody has waited for.
fn name(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
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
        let (mut killed, mut left) = (false, Vec::new());
        while let Some(tool) = tools.pop() {
            let (mut dead, mut at_work) = (Vec::new(), Vec::new());
            for child in processes::children(tool) {
                match processes::describe(child) {
                    None if ended_by_signal(child) => dead.push(name(child)),
                    None => {}
                    Some(_) if home(&child.to_string()) == own => at_work.push(child),
                    Some(_) => self.note(child),
                }
            }
            killed |= !dead.is_empty();
            // A killed CRIU's own helpers, which have its name, have come to its parent, if that is a subreaper.
            let (helpers, others): (Vec<_>, Vec<_>) =
                at_work.into_iter().partition(|pid| dead.contains(&name(*pid)));
            left.extend(helpers);
            tools.extend(others);
        }
        self.killed = self.killed.or(Some(Instant::now())).filter(|_| killed);
        let in_vain = self.killed.is_some_and(|since| since.elapsed() > GRACE);
        if in_vain {
            left.into_iter().for_each(|pid| self.note(pid));
        }
        in_vain
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
        // Others of that kind may belong to a CRIU that lives, also to one that cannot be seen from this PID namespace. CRIU names
        // its own one before it mounts anything; where it was killed even earlier, an empty folder stays.
        if let Some(name) = log.lines().find_map(mounts) {
            let _ = fs::remove_dir(Path::new("/tmp").join(name));
        }
        probes::clear(self.begun);
    }
}

/// The folder for cgroup mounts that a line of CRIU's log speaks of.
fn yard(line: &str) -> Option<&str> {
    let name = line.split_once("cg: Opening ")?.1.strip_suffix(" as cg yard")?;
    (name.starts_with(".criu.cgyard.") && !name.contains('/')).then_some(name)
}

/// The folder in `/tmp` for the container's mounts that a line of CRIU's log speaks of. Other lines have paths of the container's,
/// which may be anything.
fn mounts(line: &str) -> Option<&str> {
    let text = line.split_once("mnt: ")?.1.trim_start();
    let path = match text.strip_prefix("Will mount ") {
        Some(rest) => {
            let (id, path) = rest.split_once(" @ ")?;
            id.bytes().all(|b| b.is_ascii_digit()).then_some(path)?
        }
        None => text.strip_prefix("Move the root to ")?,
    };
    let name = path.strip_prefix("/tmp/")?.split('/').next()?;
    let own = name.strip_prefix(MOUNTS)?;
    (!own.is_empty() && own.bytes().all(|b| b.is_ascii_alphanumeric())).then_some(name)
}

/// Removes a cgroup with those below it. One that has a process still at `deadline` stays.
pub fn remove_cgroup(folder: &Path, deadline: Instant) {
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
    fn a_cgroup_goes_as_soon_as_its_last_process_has_left() {
        let root = Path::new("/sys/fs/cgroup");
        let hierarchy = if root.join("freezer").is_dir() { root.join("freezer") } else { root.into() };
        let group = hierarchy.join(format!("phos-test-started-{}", std::process::id()));
        // Neither a container nor a user may make one everywhere.
        if fs::create_dir(&group).is_err() {
            return;
        }
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
        remove_cgroup(&group, Instant::now() + Duration::from_millis(20));
        assert!(group.exists(), "it is in use");
        thread::scope(|scope| {
            let removing = scope.spawn(|| remove_cgroup(&group, Instant::now() + DEATH));
            thread::sleep(Duration::from_millis(50));
            child.kill().unwrap();
            child.wait().unwrap();
            removing.join().unwrap();
        });
        assert!(!group.exists());
    }

    #[test]
    fn only_a_folder_of_criu_itself_is_taken_from_its_log() {
        assert_eq!(yard("(00.1) cg: Opening .criu.cgyard.NnnXxN as cg yard"), Some(".criu.cgyard.NnnXxN"));
        assert_eq!(yard("(00.1) cg: Opening .criu.cgyard.a/../.. as cg yard"), None);
        assert_eq!(yard("(00.1) cg: Opening /sys as cg yard"), None);
    }

    #[test]
    fn of_the_folders_for_mounts_only_its_own_is_taken_from_criu_s_log() {
        let own = "(00.107024) mnt: \t\tWill mount 151 @ /tmp/.criu.mntns.xYJzBa/mnt-0000000151 /out";
        assert_eq!(mounts(own), Some(".criu.mntns.xYJzBa"));
        let own = "(00.137007)      1: mnt: Move the root to /tmp/.criu.mntns.xYJzBa";
        assert_eq!(mounts(own), Some(".criu.mntns.xYJzBa"));
        for other in [
            "(00.1) mnt: \t\tWill mount 151 from /tmp/.criu.mntns.another (E)",
            "(00.1) mnt: \tRead 151 mp @ /tmp/.criu.mntns.another",
            "(00.1) mnt: \t\tWill mount 151 @ /out",
            "(00.1) mnt: Move the root to /tmp/.criu.mntns.",
            "(00.1) mnt: Move the root to /tmp/.criu.mntns...",
        ] {
            assert_eq!(mounts(other), None, "{other}");
        }
    }

    #[test]
    fn an_empty_folder_of_another_criu_outlives_a_failed_restore() {
        let mut started = Started::nothing();
        // As if its cgroup had been seen.
        started.cgroups.insert("/nowhere".into());
        let folder = || tempfile::Builder::new().prefix(MOUNTS).rand_bytes(6).tempdir_in("/tmp").unwrap();
        let (own, another, work) = (folder(), folder(), tempfile::tempdir().unwrap());
        let line = format!("(00.1) mnt: \t\tWill mount 15 @ {}/mnt-0000000015 /out\n", own.path().display());
        fs::write(work.path().join("restore.log"), line).unwrap();
        started.clear(work.path());
        assert!(!own.path().exists() && another.path().exists());
    }
}
