//! The image folder: made if it is missing, refused if something else is in it, as it was if the checkpoint fails.
//!
//! Podman checkpoints into the same folder again and again, and the lower runtime would overwrite what is there. An
//! earlier image is therefore set aside and only removed once the new one is complete.

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
    /// Where an earlier image waits.
    aside: Option<PathBuf>,
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
        let probe = path.join(".phos-probe");
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&probe)
            .map_err(|e| fail(format!("cannot be written ({e}): name a folder that can be written")))?;
        let _ = fs::remove_file(&probe);
        let mut entries = fs::read_dir(path).map_err(|e| fail(e.to_string()))?;
        let aside = match entries.next().is_some() {
            false => None,
            // CRIU's inventory: what is here is a checkpoint.
            true if path.join("inventory.img").is_file() => Some(
                set_aside(path)
                    .map_err(|e| fail(format!("holds an earlier image that cannot be replaced: {e}")))?,
            ),
            true => return Err(fail("is not empty: name an empty one or remove what is in it".into())),
        };
        Ok(ImageFolder { path: path.into(), made, keep: false, aside })
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
}

impl Drop for ImageFolder {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        empty(&self.path);
        if let Some(aside) = &self.aside {
            if let Err(e) = move_all(aside, &self.path) {
                tracing::error!(aside = %aside.display(), error = %e, "the earlier image could not be put back");
                return;
            }
            let _ = fs::remove_dir(aside);
        }
        if self.made {
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Where an earlier image of `folder` waits while a new one is made.
fn aside_of(folder: &Path) -> PathBuf {
    let mut name = folder.as_os_str().to_os_string();
    name.push(".phos-earlier");
    name.into()
}

fn move_all(from: &Path, to: &Path) -> io::Result<()> {
    fs::read_dir(from)?.try_for_each(|entry| {
        let name = entry?.file_name();
        fs::rename(from.join(&name), to.join(&name))
    })
}

fn set_aside(folder: &Path) -> io::Result<PathBuf> {
    let aside = aside_of(folder);
    DirBuilder::new().mode(0o700).create(&aside)?;
    move_all(folder, &aside)?;
    Ok(aside)
}

/// Removes the earlier image of `folder`, if one waits.
pub fn forget_earlier(folder: &Path) {
    let _ = fs::remove_dir_all(aside_of(folder));
}

/// For a worker that recovers: what [`ImageFolder`] does when it is dropped, in a dead worker's stead.
pub fn undo(folder: &Path) {
    let aside = aside_of(folder);
    drop(ImageFolder {
        path: folder.into(),
        made: false,
        keep: false,
        aside: aside.is_dir().then_some(aside),
    });
}

/// Removes everything in a folder that was empty when the job began.
fn empty(folder: &Path) {
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
    fn an_earlier_image_goes_only_when_the_new_one_is_complete() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("image");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inventory.img"), "old").unwrap();
        for how in ["drop", "undo"] {
            let folder = ImageFolder::prepare(&path).unwrap();
            assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
            fs::write(path.join("inventory.img"), "half").unwrap();
            if how == "drop" {
                drop(folder);
            } else {
                std::mem::forget(folder);
                undo(&path);
            }
            assert_eq!(fs::read_to_string(path.join("inventory.img")).unwrap(), "old", "{how}");
            assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
        }
        let folder = ImageFolder::prepare(&path).unwrap();
        fs::write(path.join("inventory.img"), "new").unwrap();
        folder.keep();
        assert_eq!(fs::read_to_string(path.join("inventory.img")).unwrap(), "new");
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
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
