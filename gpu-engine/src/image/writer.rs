//! Writing an image.
//!
//! Several threads write at the same time, each through a [`Lane`] with a data file of its own, so that none waits
//! for another. What has been written is only an image once [`ImageWriter::commit`] has renamed the manifest.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::chunks::{ALIGN, ChunkTable};
use super::{
    CHUNK, Digest, FileEntry, INDEX, ImageError, IndexEntry, Location, MANIFEST, Manifest, data_file,
};

/// An image being written. Dropped before [`ImageWriter::commit`], it removes the files it made.
#[derive(Debug)]
pub struct ImageWriter {
    folder: PathBuf,
    lanes: Vec<Lane>,
    committed: bool,
}

/// One thread's part: a data file and the places of the chunks it has taken.
#[derive(Debug)]
pub struct Lane {
    number: u32,
    path: PathBuf,
    file: File,
    length: u64,
    chunks: Vec<(u64, Digest, Location)>,
}

fn create(path: &Path) -> Result<File, ImageError> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
        .map_err(|e| ImageError::io(path, e))
}

impl ImageWriter {
    /// Begins an image with `lanes` data files in `folder`.
    pub fn create(folder: &Path, lanes: usize) -> Result<Self, ImageError> {
        let mut writer = ImageWriter { folder: folder.into(), lanes: Vec::new(), committed: false };
        for n in 0..lanes {
            let path = folder.join(data_file(n));
            let file = create(&path)?;
            writer.lanes.push(Lane { number: n as u32, path, file, length: 0, chunks: Vec::new() });
        }
        Ok(writer)
    }

    /// The lanes, one for each writing thread.
    pub fn lanes(&mut self) -> &mut [Lane] {
        &mut self.lanes
    }

    /// Bytes in the data files.
    pub fn written(&self) -> u64 {
        self.lanes.iter().map(|l| l.length).sum()
    }

    /// Makes the data written so far durable.
    pub fn sync(&self) -> Result<(), ImageError> {
        self.lanes.iter().try_for_each(|l| l.file.sync_all().map_err(|e| ImageError::io(&l.path, e)))
    }

    /// Writes chunk table and manifest, syncs everything and gives the manifest its name. `manifest` comes with
    /// everything but `files` and `index`. Every chunk of its allocations must have been put.
    pub fn commit(mut self, mut manifest: Manifest) -> Result<(), ImageError> {
        let damaged = |what: String| ImageError::Manifest { path: self.folder.clone(), what };
        let count = manifest.chunk_count();
        let mut table = vec![None; count as usize];
        for (n, digest, location) in self.lanes.iter().flat_map(|l| &l.chunks) {
            let slot = table.get_mut(*n as usize).ok_or_else(|| damaged(format!("chunk {n} of {count}")))?;
            *slot = Some((*digest, *location));
        }
        let missing = table.iter().position(Option::is_none);
        if let Some(n) = missing {
            return Err(damaged(format!("chunk {n} was never written")));
        }
        manifest.check().map_err(damaged)?;
        self.sync()?;
        let index = ChunkTable(table.into_iter().flatten().collect()).encode();
        let write = |name: &str, bytes: &[u8]| {
            let path = self.folder.join(name);
            let mut file = create(&path)?;
            file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| ImageError::io(&path, e))
        };
        write(INDEX, &index)?;
        manifest.files = self
            .lanes
            .iter()
            .map(|l| FileEntry { name: data_file(l.number as usize), size: l.length })
            .collect();
        manifest.index = IndexEntry { size: index.len() as u64, digest: hex(phos_digest::digest(&index)) };
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| ImageError::Manifest { path: self.folder.clone(), what: e.to_string() })?;
        let temporary = format!(".{MANIFEST}.new");
        write(&temporary, &text)?;
        let sync_folder = || File::open(&self.folder).and_then(|f| f.sync_all());
        sync_folder().map_err(|e| ImageError::io(&self.folder, e))?;
        let target = self.folder.join(MANIFEST);
        fs::rename(self.folder.join(&temporary), &target).map_err(|e| ImageError::io(&target, e))?;
        sync_folder().map_err(|e| ImageError::io(&self.folder, e))?;
        self.committed = true;
        Ok(())
    }
}

/// A digest as it stands in the manifest.
pub(super) fn hex(d: Digest) -> String {
    d.to_bytes().iter().map(|b| format!("{b:02x}")).collect()
}

impl Lane {
    /// Writes whole chunks, the first of which has number `first`. All-zero chunks take no space.
    pub fn put(&mut self, first: u64, data: &[u8]) -> Result<(), ImageError> {
        debug_assert!(data.len().is_multiple_of(CHUNK));
        // Runs of chunks that are not zero go out in one write.
        let mut run = 0..0;
        for (i, chunk) in data.chunks_exact(CHUNK).enumerate() {
            let digest = phos_digest::digest(chunk);
            let location = if phos_digest::is_zero(chunk) {
                self.write(&data[run.clone()])?;
                run = (i + 1) * CHUNK..(i + 1) * CHUNK;
                Location::Zero
            } else {
                run.end = (i + 1) * CHUNK;
                Location::File { file: self.number, offset: self.length + (i * CHUNK - run.start) as u64 }
            };
            self.chunks.push((first + i as u64, digest, location));
        }
        self.write(&data[run])
    }

    fn write(&mut self, data: &[u8]) -> Result<(), ImageError> {
        debug_assert!(self.length.is_multiple_of(ALIGN));
        self.file.write_all_at(data, self.length).map_err(|e| ImageError::io(&self.path, e))?;
        self.length += data.len() as u64;
        Ok(())
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if !self.committed {
            let temporary = format!(".{MANIFEST}.new");
            let data = self.lanes.iter().map(|l| l.path.clone());
            for path in data.chain([INDEX, temporary.as_str()].map(|n| self.folder.join(n))) {
                let _ = fs::remove_file(path);
            }
        }
    }
}
