//! The image folder: made if it is missing, refused if something else is in it, as it was if the checkpoint fails.
//!
//! Podman checkpoints into the same folder again and again, and the lower runtime would overwrite what is there. An
//! earlier image is therefore set aside and only removed once the new one is complete.
//!
//! Whoever does that may be killed between any two files, so the names say how far it came:
//!
//! ```text
//! FOLDER.phos-moving    the earlier image is on its way out or back: FOLDER holds the rest of it, and nothing new
//! FOLDER.phos-earlier   it is all here: FOLDER holds the new one, or what there is of it
//! ```

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use crate::error::EngineError;
use crate::fault::{self, Access};
use crate::image::{INVENTORY, Image};
use crate::keeper::wire::FolderBefore;

/// A folder that is ready to take an image.
pub struct ImageFolder {
    path: PathBuf,
    before: FolderBefore,
    keep: bool,
}

impl ImageFolder {
    /// Makes sure that an image can be written there. `announce` is told how the folder was before anything of this job
    /// touches it.
    pub fn prepare(
        path: &Path,
        announce: impl FnOnce(FolderBefore) -> Result<(), EngineError>,
    ) -> Result<Self, EngineError> {
        let fail = |what: String| EngineError::Folder { path: path.into(), what };
        let made = match fs::symlink_metadata(path) {
            Ok(m) if m.is_dir() => false,
            Ok(_) => return Err(fail("is not a folder: name another --image-path".into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => true,
            Err(e) => return Err(fail(e.to_string())),
        };
        // What a job has left whose keeper was ended too, by a power failure for example.
        if with(path, EARLIER).is_dir() && Image::open_complete(path).is_ok() {
            forget_earlier(path);
        } else if !made {
            put_back(path).map_err(|e| fail(format!("an earlier image cannot be put back ({e})")))?;
        }
        let before = FolderBefore { made, earlier: holds_image(path) };
        if !made && !before.earlier && !is_empty(path) {
            return Err(fail("is not empty: name an empty one or remove what is in it".into()));
        }
        announce(before)?;
        let folder = ImageFolder { path: path.into(), before, keep: false };
        if made {
            // Like the lower runtime, which makes the folder and what is missing above it.
            fault::io(Access::MakeFolder)
                .and_then(|()| DirBuilder::new().recursive(true).mode(0o700).create(path))
                .map_err(|e| fail(format!("cannot be made ({e}): name a folder that can be written")))?;
        }
        let probe = path.join(PROBE);
        let _ = fs::remove_file(&probe);
        fault::io(Access::Probe)
            .and_then(|()| File::options().write(true).create_new(true).mode(0o600).open(&probe))
            .and_then(|_| fs::remove_file(&probe))
            .map_err(|e| fail(format!("cannot be written ({e}): name a folder that can be written")))?;
        if before.earlier {
            set_aside(path)
                .map_err(|e| fail(format!("holds an earlier image that cannot be replaced: {e}")))?;
        }
        Ok(folder)
    }

    /// Refuses if fewer than `bytes` are free.
    pub fn require(&self, bytes: u64) -> Result<(), EngineError> {
        let Ok(stat) = statvfs(&self.path) else { return Ok(()) };
        let free = stat.blocks_available() * stat.fragment_size();
        if free < bytes {
            let what = format!(
                "has {} MiB free, the checkpoint needs about {} MiB: free some space or name another folder",
                free >> 20,
                bytes.div_ceil(1 << 20)
            );
            return Err(EngineError::Folder { path: self.path.clone(), what });
        }
        Ok(())
    }

    /// The image is complete: it stays, and an earlier one goes.
    pub fn keep(mut self) {
        self.keep = true;
        forget_earlier(&self.path);
    }

    /// Nothing is done to it: whoever takes the job over needs what is there.
    pub fn leave(mut self) {
        self.keep = true;
    }
}

impl Drop for ImageFolder {
    fn drop(&mut self) {
        if !self.keep {
            undo(&self.path, self.before);
        }
    }
}

const EARLIER: &str = ".phos-earlier";
const MOVING: &str = ".phos-moving";
const PROBE: &str = ".phos-probe";

fn with(folder: &Path, suffix: &str) -> PathBuf {
    let mut name = folder.as_os_str().to_os_string();
    name.push(suffix);
    name.into()
}

/// Whether what is in the folder is a checkpoint: it has CRIU's inventory.
fn holds_image(folder: &Path) -> bool {
    folder.join(INVENTORY).is_file()
}

fn is_empty(folder: &Path) -> bool {
    // A job may have been ended between making its probe and removing it.
    fs::read_dir(folder).into_iter().flatten().flatten().all(|e| e.file_name() == PROBE)
}

/// Moves every file, `inventory.img` last: what has it is an image.
fn move_all(from: &Path, to: &Path, access: Access) -> io::Result<()> {
    let mut names: Vec<_> =
        fs::read_dir(from)?.map(|e| e.map(|e| e.file_name())).collect::<io::Result<_>>()?;
    names.sort_by_key(|name| name == INVENTORY);
    names.iter().try_for_each(|name| {
        fault::io(access)?;
        fs::rename(from.join(name), to.join(name))
    })
}

fn set_aside(folder: &Path) -> io::Result<()> {
    let moving = with(folder, MOVING);
    DirBuilder::new().mode(0o700).create(&moving)?;
    move_all(folder, &moving, Access::SetAside)?;
    fs::rename(moving, with(folder, EARLIER))
}

/// Puts an earlier image back, if one waits, in place of what is there.
fn put_back(folder: &Path) -> io::Result<()> {
    let (earlier, moving) = (with(folder, EARLIER), with(folder, MOVING));
    if earlier.is_dir() {
        empty(folder);
        fs::rename(&earlier, &moving)?;
    }
    if moving.is_dir() {
        move_all(&moving, folder, Access::PutBack)?;
        fs::remove_dir(&moving)?;
    }
    Ok(())
}

/// Removes the earlier image of `folder`, if one waits.
pub fn forget_earlier(folder: &Path) {
    let earlier = with(folder, EARLIER);
    let remove = || match fault::io(Access::Forget).and_then(|()| fs::remove_dir_all(&earlier)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    };
    // What fails once may be a network's.
    if let Err(e) = remove().or_else(|_| remove()) {
        // It goes with the next checkpoint.
        tracing::warn!(folder = %earlier.display(), error = %e, "an earlier image is still there");
    }
}

/// Undoes what a failed job has done to the folder, whosever job it was and however far it came.
pub fn undo(folder: &Path, before: FolderBefore) {
    if !before.earlier {
        empty(folder);
    } else if let Err(e) = put_back(folder).or_else(|_| put_back(folder)) {
        // The next checkpoint into this folder tries again.
        tracing::error!(folder = %folder.display(), error = %e, "the earlier image could not be put back");
    }
    if before.made {
        let _ = fs::remove_dir(folder);
    }
}

/// Whether a job that did not say so has completed its image.
pub fn is_complete(folder: &Path, before: FolderBefore, pre_dump: bool) -> bool {
    let own = !before.earlier || with(folder, EARLIER).is_dir();
    let open = if pre_dump { Image::open } else { Image::open_complete };
    own && open(folder).is_ok()
}

/// Removes everything in a folder that was empty when the job began.
fn empty(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let removed = fault::io(Access::Clear).and_then(|()| match entry.file_type() {
            Ok(t) if t.is_dir() => fs::remove_dir_all(entry.path()),
            _ => fs::remove_file(entry.path()),
        });
        if let Err(e) = removed {
            tracing::warn!(path = %entry.path().display(), error = %e, "left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepare(path: &Path) -> Result<ImageFolder, EngineError> {
        ImageFolder::prepare(path, |_| Ok(()))
    }

    #[test]
    fn a_failed_job_leaves_the_folder_as_it_was() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("a/b");
        let folder = prepare(&path).unwrap();
        fs::write(path.join("core-1.img"), "x").unwrap();
        drop(folder);
        assert!(!path.exists());
        let given = base.path().join("given");
        fs::create_dir(&given).unwrap();
        let folder = prepare(&given).unwrap();
        fs::write(given.join("core-1.img"), "x").unwrap();
        drop(folder);
        assert_eq!(fs::read_dir(&given).unwrap().count(), 0);
        prepare(&given).unwrap().keep();
        assert!(given.exists());
    }

    #[test]
    fn an_earlier_image_goes_only_when_the_new_one_is_complete() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("image");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inventory.img"), "old").unwrap();
        for how in ["drop", "undo"] {
            let folder = prepare(&path).unwrap();
            assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
            fs::write(path.join("inventory.img"), "half").unwrap();
            if how == "drop" {
                drop(folder);
            } else {
                std::mem::forget(folder);
                undo(&path, FolderBefore { made: false, earlier: true });
            }
            assert_eq!(fs::read_to_string(path.join("inventory.img")).unwrap(), "old", "{how}");
            assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
        }
        let folder = prepare(&path).unwrap();
        fs::write(path.join("inventory.img"), "new").unwrap();
        folder.keep();
        assert_eq!(fs::read_to_string(path.join("inventory.img")).unwrap(), "new");
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_earlier_image_survives_whenever_its_mover_is_ended() {
        let before = FolderBefore { made: false, earlier: true };
        let names = ["a.img", "b.img", "inventory.img"];
        let old = |path: &Path| {
            let found = fs::read_dir(path).unwrap().count();
            found == names.len()
                && names.iter().all(|n| fs::read_to_string(path.join(n)).is_ok_and(|t| t == "old"))
        };
        // How many files had been moved, and whether on the way out or back.
        for (moved, out) in (0..=names.len()).flat_map(|n| [(n, true), (n, false)]) {
            let base = tempfile::tempdir().unwrap();
            let path = base.path().join("image");
            let moving = with(&path, MOVING);
            fs::create_dir(&path).unwrap();
            fs::create_dir(&moving).unwrap();
            for (i, name) in names.iter().enumerate() {
                let gone = (i < moved) == out;
                fs::write(if gone { moving.join(name) } else { path.join(name) }, "old").unwrap();
            }
            undo(&path, before);
            assert!(old(&path), "{moved} of {} moved", names.len());
            // Asked again, and asked when nothing had been moved yet: the same.
            undo(&path, before);
            assert!(old(&path));
            assert!(!is_complete(&path, before, false), "an earlier image is not this job's");
            assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn what_is_in_the_way_is_named_and_left_alone() {
        let base = tempfile::tempdir().unwrap();
        fs::write(base.path().join("mine"), "x").unwrap();
        let error = prepare(base.path()).err().unwrap().to_string();
        assert!(error.contains("not empty"), "{error}");
        assert!(base.path().join("mine").exists());
        let error = prepare(&base.path().join("mine")).err().unwrap().to_string();
        assert!(error.contains("not a folder"), "{error}");
        let folder = prepare(&base.path().join("new")).unwrap();
        let error = folder.require(u64::MAX / 2).err().unwrap().to_string();
        assert!(error.contains("MiB free"), "{error}");
    }
}
