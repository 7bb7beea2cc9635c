//! The image folder: made if it is missing, refused unless it is empty, emptied again if the checkpoint fails.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use crate::error::EngineError;

/// A folder that is ready to take an image.
pub struct ImageFolder {
    path: PathBuf,
    made: bool,
    keep: bool,
}

impl ImageFolder {
    /// Makes sure that an image can be written there.
    pub fn prepare(path: &Path) -> Result<Self, EngineError> {
        let fail = |what: String| EngineError::Folder { path: path.into(), what };
        let made = match fs::symlink_metadata(path) {
            Ok(m) if m.is_dir() => false,
            Ok(_) => return Err(fail("is not a folder: name another --image-path".into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // Like the lower runtime, which makes the folder and what is missing above it.
                let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
                made.map_err(|e| fail(format!("cannot be made ({e}): name a folder that can be written")))?;
                true
            }
            Err(e) => return Err(fail(e.to_string())),
        };
        let folder = ImageFolder { path: path.into(), made, keep: false };
        let mut entries = fs::read_dir(path).map_err(|e| fail(e.to_string()))?;
        if entries.next().is_some() {
            // Not this job's to empty.
            std::mem::forget(folder);
            return Err(fail("is not empty: name an empty one or remove what is in it".into()));
        }
        let probe = path.join(".phos-probe");
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&probe)
            .map_err(|e| fail(format!("cannot be written ({e}): name a folder that can be written")))?;
        let _ = fs::remove_file(&probe);
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

    /// The image is complete: nothing is removed any more.
    pub fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for ImageFolder {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        empty(&self.path);
        if self.made {
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Removes everything in a folder that was empty when the job began.
pub fn empty(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let removed = match entry.file_type() {
            Ok(t) if t.is_dir() => fs::remove_dir_all(entry.path()),
            _ => fs::remove_file(entry.path()),
        };
        if let Err(e) = removed {
            tracing::warn!(path = %entry.path().display(), error = %e, "left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_job_leaves_the_folder_as_it_was() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("a/b");
        let folder = ImageFolder::prepare(&path).unwrap();
        fs::write(path.join("core-1.img"), "x").unwrap();
        drop(folder);
        assert!(!path.exists());
        let given = base.path().join("given");
        fs::create_dir(&given).unwrap();
        let folder = ImageFolder::prepare(&given).unwrap();
        fs::write(given.join("core-1.img"), "x").unwrap();
        drop(folder);
        assert_eq!(fs::read_dir(&given).unwrap().count(), 0);
        ImageFolder::prepare(&given).unwrap().keep();
        assert!(given.exists());
    }

    #[test]
    fn what_is_in_the_way_is_named_and_left_alone() {
        let base = tempfile::tempdir().unwrap();
        fs::write(base.path().join("mine"), "x").unwrap();
        let error = ImageFolder::prepare(base.path()).err().unwrap().to_string();
        assert!(error.contains("not empty"), "{error}");
        assert!(base.path().join("mine").exists());
        let error = ImageFolder::prepare(&base.path().join("mine")).err().unwrap().to_string();
        assert!(error.contains("not a folder"), "{error}");
        let folder = ImageFolder::prepare(&base.path().join("new")).unwrap();
        let error = folder.require(u64::MAX / 2).err().unwrap().to_string();
        assert!(error.contains("MiB free"), "{error}");
    }
}
