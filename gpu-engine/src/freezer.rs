//! The unified hierarchy's freezer, used directly.
//!
//! CRIU freezes a container before it looks at it, and if that has not happened at its first look it sleeps for 100 ms before
//! the next one. A container that is frozen already costs it nothing: freezing takes less than a millisecond.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crate::processes;

/// Longest wait for the kernel. A task that does not stop by then is left to CRIU, which waits longer.
const PATIENCE: Duration = Duration::from_millis(20);

/// A container's freezer.
#[derive(Debug)]
pub struct Freezer(PathBuf);

impl Freezer {
    /// The freezer of the container whose first process is `init`; none where the container has no cgroup of its own in the
    /// unified hierarchy.
    pub fn of(init: i32) -> Option<Freezer> {
        let folder = processes::own_cgroup(init)?;
        // Never one that this process is in, or what it starts.
        let inside =
            processes::folder_of(std::process::id() as i32).is_some_and(|own| own.starts_with(&folder));
        (!inside && folder.join("cgroup.freeze").exists()).then_some(Freezer(folder))
    }

    /// Stops every task. `false`: not all of them stopped at once, or the container was frozen before.
    pub fn freeze(&self) -> bool {
        if self.says("cgroup.freeze", "1") || fs::write(self.0.join("cgroup.freeze"), "1").is_err() {
            return false;
        }
        let deadline = Instant::now() + PATIENCE;
        while !self.says("cgroup.events", "frozen 1") {
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(Duration::from_micros(100));
        }
        true
    }

    /// Lets the tasks go on. A container that has ended has no freezer any more; nothing is left to do then.
    pub fn thaw(&self) {
        let _ = fs::write(self.0.join("cgroup.freeze"), "0");
    }

    fn says(&self, file: &str, line: &str) -> bool {
        fs::read_to_string(self.0.join(file)).is_ok_and(|text| text.lines().any(|l| l == line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that looks like a frozen, or never freezing, cgroup.
    fn fake(events: &str) -> (tempfile::TempDir, Freezer) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("cgroup.freeze"), "0\n").unwrap();
        fs::write(folder.path().join("cgroup.events"), events).unwrap();
        let freezer = Freezer(folder.path().into());
        (folder, freezer)
    }

    #[test]
    fn frozen_means_that_the_kernel_says_so() {
        let (folder, freezer) = fake("populated 1\nfrozen 1\n");
        assert!(freezer.freeze());
        assert_eq!(fs::read_to_string(folder.path().join("cgroup.freeze")).unwrap(), "1");
        assert!(!freezer.freeze(), "frozen by somebody else before");
        freezer.thaw();
        assert_eq!(fs::read_to_string(folder.path().join("cgroup.freeze")).unwrap(), "0");
        let (_folder, freezer) = fake("populated 1\nfrozen 0\n");
        assert!(!freezer.freeze(), "a task that does not stop");
    }

    #[test]
    fn this_process_never_freezes_itself() {
        assert!(Freezer::of(std::process::id() as i32).is_none());
    }
}
