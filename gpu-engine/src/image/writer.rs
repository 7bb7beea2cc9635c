//! Writing an image.
//!
//! Several threads write at the same time, each to a data file of its own, so that none waits for another. A chunk that
//! is written again takes the place it had, if it still fits there. What has been written is only an image once [`ImageWriter::commit`] has
//! renamed the manifest.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::chunks::{ALIGN, ChunkTable, Saved};
use super::{
    CHUNK, Codec, Digest, FileEntry, INDEX, ImageError, IndexEntry, Location, MANIFEST, Manifest, Packer,
    ZSTD_LEVEL, data_file,
};
use crate::fault::{self, Access};

/// An image being written. Dropped before [`ImageWriter::commit`], it removes the files it made.
#[derive(Debug)]
pub struct ImageWriter {
    folder: PathBuf,
    codec: Codec,
    files: Vec<DataFile>,
    committed: bool,
}

/// One data file. New chunks go to its end.
#[derive(Debug)]
struct DataFile {
    path: PathBuf,
    file: File,
    length: AtomicU64,
    /// Taken by the one thread that writes here.
    packer: Option<Mutex<Packer>>,
}

/// Takes chunks from the copy pipeline.
pub trait Sink: Sync {
    /// Takes whole chunks from thread `lane`, with their digests. `places` has the place that each has already, if any,
    /// and receives where it is now.
    fn put(
        &self,
        lane: usize,
        data: &[u8],
        digests: &[Digest],
        places: &mut [Option<Location>],
    ) -> Result<(), ImageError>;
}

fn create(path: &Path, access: Access) -> Result<File, ImageError> {
    let made = fault::io(access).and_then(|()| {
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)
    });
    made.map_err(|e| ImageError::io(path, e))
}

impl DataFile {
    fn create(path: PathBuf, codec: Codec) -> Result<Self, ImageError> {
        let file = create(&path, Access::CreateData)?;
        let packer = Packer::new(codec, ZSTD_LEVEL).transpose().map_err(|e| ImageError::io(&path, e))?;
        // Past the page cache where the file system takes that: the bytes are written once and not read soon, and
        // memory is what the application needs. On tmpfs the page cache is the storage.
        if fstatfs(&file).is_ok_and(|s| s.filesystem_type() != TMPFS_MAGIC) {
            set_direct(&file, true);
        }
        Ok(DataFile { path, file, length: AtomicU64::new(0), packer: packer.map(Mutex::new) })
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<(), ImageError> {
        let written = match fault::io(Access::WriteData).and_then(|()| self.file.write_all_at(data, offset)) {
            // A file system with stricter rules of alignment than pages, or a buffer of other origin.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && set_direct(&self.file, false) => {
                self.file.write_all_at(data, offset)
            }
            other => other,
        };
        written.map_err(|e| ImageError::io(&self.path, e))
    }
}

/// Switches direct I/O; says whether that worked.
fn set_direct(file: &File, direct: bool) -> bool {
    let Ok(flags) = fcntl(file, FcntlArg::F_GETFL) else { return false };
    let mut flags = OFlag::from_bits_retain(flags);
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags)).is_ok()
}

impl ImageWriter {
    /// Begins an image with `lanes` data files in `folder`.
    pub fn create(folder: &Path, lanes: usize, codec: Codec) -> Result<Self, ImageError> {
        let mut writer = ImageWriter { folder: folder.into(), codec, files: Vec::new(), committed: false };
        for n in 0..lanes {
            writer.files.push(DataFile::create(folder.join(data_file(n)), codec)?);
        }
        Ok(writer)
    }

    /// Bytes in the data files.
    pub fn written(&self) -> u64 {
        self.files.iter().map(|f| f.length.load(Ordering::Relaxed)).sum()
    }

    /// Makes the data written so far durable.
    pub fn sync(&self) -> Result<(), ImageError> {
        self.files.iter().try_for_each(|f| {
            fault::io(Access::SyncData)
                .and_then(|()| f.file.sync_all())
                .map_err(|e| ImageError::io(&f.path, e))
        })
    }

    /// Writes chunk table and manifest, syncs everything and gives the manifest its name. `manifest` comes with
    /// everything but `files`, `index` and the feature of the codec, `table` with a place for every chunk of its allocations.
    pub fn commit(mut self, mut manifest: Manifest, table: Vec<Option<Saved>>) -> Result<(), ImageError> {
        let damaged = |what: String| ImageError::Manifest { path: self.folder.clone(), what };
        let count = manifest.chunk_count();
        if table.len() as u64 != count {
            return Err(damaged(format!("{} chunks instead of {count}", table.len())));
        }
        if let Some(n) = table.iter().position(Option::is_none) {
            return Err(damaged(format!("chunk {n} was never written")));
        }
        manifest.features.extend(self.codec.feature().map(Into::into));
        manifest.check().map_err(damaged)?;
        self.sync()?;
        // Somebody may have removed or replaced the folder meanwhile.
        for f in &self.files {
            let ours = f.file.metadata().map_err(|e| ImageError::io(&f.path, e))?;
            let named = fs::symlink_metadata(&f.path).map_err(|e| ImageError::io(&f.path, e))?;
            if (ours.dev(), ours.ino()) != (named.dev(), named.ino()) {
                let what = "it was replaced while it was written".into();
                return Err(ImageError::Damaged { path: f.path.clone(), what });
            }
        }
        let index = ChunkTable(table.into_iter().flatten().collect()).encode();
        let write = |name: &str, bytes: &[u8]| {
            let path = self.folder.join(name);
            let mut file = create(&path, Access::CreateTable)?;
            fault::io(Access::WriteTable)
                .and_then(|()| file.write_all(bytes))
                .and_then(|()| fault::io(Access::SyncTable))
                .and_then(|()| file.sync_all())
                .map_err(|e| ImageError::io(&path, e))
        };
        write(INDEX, &index)?;
        let entry = |(n, f): (usize, &DataFile)| FileEntry {
            name: data_file(n),
            size: f.length.load(Ordering::Relaxed),
        };
        manifest.files = self.files.iter().enumerate().map(entry).collect();
        manifest.index = IndexEntry { size: index.len() as u64, digest: hex(phos_digest::digest(&index)) };
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| ImageError::Manifest { path: self.folder.clone(), what: e.to_string() })?;
        let temporary = format!(".{MANIFEST}.new");
        write(&temporary, &text)?;
        let sync_folder = || {
            fault::io(Access::SyncFolder).and_then(|()| File::open(&self.folder)).and_then(|f| f.sync_all())
        };
        sync_folder().map_err(|e| ImageError::io(&self.folder, e))?;
        let target = self.folder.join(MANIFEST);
        fault::io(Access::Rename)
            .and_then(|()| fs::rename(self.folder.join(&temporary), &target))
            .map_err(|e| ImageError::io(&target, e))?;
        // The image is there. Whether its name would survive a power failure is the only thing left open.
        self.committed = true;
        sync_folder().map_err(|e| ImageError::io(&self.folder, e))?;
        Ok(())
    }
}

/// A digest as it stands in the manifest.
pub(super) fn hex(d: Digest) -> String {
    d.to_bytes().iter().map(|b| format!("{b:02x}")).collect()
}

impl ImageWriter {
    /// The place for `room` bytes of a chunk from thread `lane`: where it is already, if that is in this image and large
    /// enough, or the end of the thread's file.
    fn place(&self, lane: usize, own: &DataFile, now: Option<Location>, room: u64) -> (u32, u64) {
        match now {
            Some(place @ Location::File { file, offset, .. })
                if (file as usize) < self.files.len() && place.room() >= room =>
            {
                (file, offset)
            }
            _ => (lane as u32, own.length.fetch_add(room, Ordering::Relaxed)),
        }
    }

    /// Writes those chunks that are stored as they are. What lies together goes out in one write.
    fn put_plain(&self, data: &[u8], places: &[Option<Location>]) -> Result<(), ImageError> {
        let mut from = 0;
        while from < places.len() {
            let Some(Location::File { file, offset, packed: 0 }) = places[from] else {
                from += 1;
                continue;
            };
            debug_assert!(offset.is_multiple_of(ALIGN));
            let follows = |n: &usize| {
                let offset = offset + ((*n - from) * CHUNK) as u64;
                places.get(*n) == Some(&Some(Location::File { file, offset, packed: 0 }))
            };
            let end = (from..=places.len()).find(|n| !follows(n)).unwrap_or(places.len());
            self.files[file as usize].write(&data[from * CHUNK..end * CHUNK], offset)?;
            from = end;
        }
        Ok(())
    }
}

impl Sink for ImageWriter {
    fn put(
        &self,
        lane: usize,
        data: &[u8],
        digests: &[Digest],
        places: &mut [Option<Location>],
    ) -> Result<(), ImageError> {
        debug_assert!(data.len() == digests.len() * CHUNK && digests.len() == places.len());
        let no_lane = || ImageError::io(&self.folder, io::Error::other("more threads than data files"));
        let own = self.files.get(lane).ok_or_else(no_lane)?;
        let mut packer = own.packer.as_ref().map(|p| p.lock().unwrap_or_else(|e| e.into_inner()));
        for ((chunk, digest), place) in data.chunks_exact(CHUNK).zip(digests).zip(&mut *places) {
            if *digest == phos_digest::ZERO_CHUNK {
                *place = Some(Location::Zero);
                continue;
            }
            let packed = packer.as_mut().and_then(|p| p.pack(chunk));
            let room = packed.map_or(CHUNK, |(bytes, _)| bytes.len());
            let (file, offset) = self.place(lane, own, *place, room as u64);
            if let Some((bytes, _)) = packed {
                self.files[file as usize].write(bytes, offset)?;
            }
            let packed = packed.map_or(0, |(_, len)| len as u32);
            *place = Some(Location::File { file, offset, packed });
        }
        self.put_plain(data, places)
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if !self.committed {
            let temporary = format!(".{MANIFEST}.new");
            let data = self.files.iter().map(|f| f.path.clone());
            for path in data.chain([INDEX, temporary.as_str()].map(|n| self.folder.join(n))) {
                let _ = fs::remove_file(path);
            }
        }
    }
}
