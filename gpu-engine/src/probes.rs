//! The tmpfs in `/tmp` that a CRIU leaves which is killed while it looks at what the kernel can do. It does that before anything else
//! where the result of an earlier look is not kept (`/run/criu.kdat`, on a tmpfs).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::mount::{MntFlags, umount2};

/// Beginning of the names of CRIU's folders in `/tmp` (`criu/kerndat.c`). CRIU itself has one for milliseconds.
const PROBE: &str = ".criu.move_mount_set_group.";
/// How long one may be there before it counts as left.
const LEFT: Duration = Duration::from_secs(3);

/// The folders of CRIU's look at the kernel in `folder` that were made since `begun`.
fn probes(folder: &Path, begun: SystemTime) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let made = |e: &fs::DirEntry| {
        let meta = e.path().symlink_metadata().ok()?;
        let own = meta.uid() == 0 && meta.is_dir();
        (own && meta.modified().ok()? >= begun).then(|| e.path())
    };
    entries.filter(|e| e.file_name().to_string_lossy().starts_with(PROBE)).filter_map(|e| made(&e)).collect()
}

/// Removes what a CRIU that was killed after `begun` has left in `/tmp`.
pub fn clear(begun: SystemTime) {
    clear_in(Path::new("/tmp"), begun, LEFT);
}

fn clear_in(folder: &Path, begun: SystemTime, left: Duration) {
    // Those of a CRIU that lives go by themselves.
    let deadline = Instant::now() + left;
    let mut found = probes(folder, begun);
    while !found.is_empty() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(50));
        found = found.intersection(&probes(folder, begun)).cloned().collect();
    }
    for folder in found {
        let _ = umount2(&folder, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        let _ = fs::remove_dir(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stays_and_was_made_since_is_removed() {
        let place = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = place.path().join(format!("{PROBE}{name}"));
            fs::create_dir(&path).unwrap();
            path
        };
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let earlier = make("earlier");
        thread::sleep(Duration::from_millis(20));
        let begun = SystemTime::now();
        thread::sleep(Duration::from_millis(20));
        let (left, other) = (make("left"), place.path().join("other"));
        fs::create_dir(&other).unwrap();
        thread::scope(|scope| {
            let clearing = scope.spawn(|| clear_in(place.path(), begun, Duration::from_millis(400)));
            thread::sleep(Duration::from_millis(200));
            // Another CRIU has begun meanwhile.
            let later = make("later");
            clearing.join().unwrap();
            assert!(later.exists());
        });
        assert!(earlier.exists() && other.exists() && !left.exists());
    }
}
