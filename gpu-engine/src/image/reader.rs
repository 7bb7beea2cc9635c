//! Reading an image. All files are opened at once and stay open: engines delete the folder while it is in use.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::sys::stat::Mode;
use serde::Deserialize;

use super::chunks::ChunkTable;
use super::manifest::{MAX_BYTES, MOST_FILES};
use super::writer::hex;
use super::{
    Allocation, CHUNK, Digest, FEATURE_PARENT, FEATURE_PRE_DUMP, INDEX, ImageError, Location, MANIFEST,
    Manifest, ParentEntry, Saved, VERSION,
};
use crate::text::plain;

/// Longest chain of images that build on each other.
const LONGEST_CHAIN: usize = 64;

/// An image whose manifest and chunk table have been checked.
#[derive(Debug)]
pub struct Image {
    /// The manifest.
    pub manifest: Manifest,
    /// Digest of the manifest's bytes, hexadecimal.
    pub digest: String,
    folder: PathBuf,
    table: ChunkTable,
    /// Its own, then its parent's, and so on.
    files: Vec<DataFile>,
}

/// A data file, open.
#[derive(Debug)]
struct DataFile {
    file: File,
    path: PathBuf,
    size: u64,
}

/// Chunks of one allocation that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Number of the first chunk.
    pub first: u64,
    /// Number of chunks.
    pub count: u64,
    /// Offset of the first chunk in its allocation, bytes.
    pub at: u64,
    /// Where they are stored.
    pub location: Location,
}

/// Opens an image's folder; everything in it is reached through this descriptor.
fn open_folder(at: BorrowedFd<'_>, name: &Path, path: &Path) -> Result<File, ImageError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    match openat(at, name, flags, Mode::empty()) {
        Ok(fd) => Ok(File::from(fd)),
        Err(Errno::ENOENT) => Err(ImageError::Missing(path.into())),
        Err(e) => Err(ImageError::io(path, e.into())),
    }
}

/// Opens a regular file of a folder, whatever the folder's owner may have put in its place. Nothing else is opened even for
/// a moment: a pipe may block, and some devices act when they are opened.
fn open(folder: &File, path: &Path) -> Result<(File, u64), ImageError> {
    let fail = |e| ImageError::io(path, e);
    let name = path.file_name().unwrap_or_default();
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let found = openat(folder, name, flags, Mode::empty()).map(File::from).map_err(|e| fail(e.into()))?;
    if !found.metadata().map_err(fail)?.is_file() {
        return Err(ImageError::Damaged { path: path.into(), what: "it is not a regular file".into() });
    }
    let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).map_err(fail)?;
    let len = file.metadata().map_err(fail)?.len();
    Ok((file, len))
}

/// Reads a whole file of a length that is known to be sane.
fn slurp(mut file: File, len: u64, path: &Path) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::with_capacity(len as usize);
    (&mut file).take(len).read_to_end(&mut bytes).map_err(|e| ImageError::io(path, e))?;
    if bytes.len() as u64 != len {
        return Err(ImageError::Damaged { path: path.into(), what: "it changed while it was read".into() });
    }
    Ok(bytes)
}

/// An image's folder, and its manifest as bytes.
struct Raw {
    folder: File,
    path: PathBuf,
    text: Vec<u8>,
    digest: String,
}

/// What is read of a manifest before its version is known.
#[derive(Deserialize)]
struct Head {
    version: Option<u64>,
}

impl Raw {
    /// Opens the folder `name` in the folder `at`; `path` is its full name.
    fn read(at: BorrowedFd<'_>, name: &Path, path: PathBuf) -> Result<Self, ImageError> {
        let folder = open_folder(at, name, &path)?;
        let manifest = path.join(MANIFEST);
        let (file, len) = match open(&folder, &manifest) {
            Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::Missing(path));
            }
            other => other?,
        };
        if len > MAX_BYTES {
            return Err(ImageError::Manifest { path, what: format!("it has {len} bytes") });
        }
        let text = slurp(file, len, &manifest)?;
        let digest = hex(phos_digest::digest(&text));
        Ok(Raw { folder, path, text, digest })
    }

    /// Which folder it is, whatever it was reached by.
    fn identity(&self) -> Result<(u64, u64), ImageError> {
        let meta = self.folder.metadata().map_err(|e| ImageError::io(&self.path, e))?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Checks the manifest and opens the data files, which it hands out.
    fn parse(&self) -> Result<(Manifest, Vec<DataFile>), ImageError> {
        let path = &self.path;
        let bad = |what: String| ImageError::Manifest { path: path.clone(), what: plain(&what) };
        // The version decides how the rest is read, so it is looked at alone first.
        let head: Head = serde_json::from_slice(&self.text).map_err(|e| bad(e.to_string()))?;
        match head.version {
            Some(v) if v == u64::from(VERSION) => {}
            Some(found) => return Err(ImageError::Version { path: path.clone(), found }),
            None => return Err(bad("it has no version".into())),
        }
        let mut manifest: Manifest = serde_json::from_slice(&self.text).map_err(|e| bad(e.to_string()))?;
        let unknown = |f: &&String| ![FEATURE_PARENT, FEATURE_PRE_DUMP].contains(&f.as_str());
        if let Some(feature) = manifest.features.iter().find(unknown) {
            return Err(ImageError::Feature { path: path.clone(), feature: plain(feature) });
        }
        manifest.check().map_err(bad)?;
        manifest.make_plain();
        let mut files = Vec::new();
        for entry in &manifest.files {
            let path = path.join(&entry.name);
            let (file, len) = open(&self.folder, &path)?;
            if len != entry.size {
                let what = format!("it has {len} bytes, the manifest says {}", entry.size);
                return Err(ImageError::Damaged { path, what });
            }
            files.push(DataFile { file, path, size: len });
        }
        Ok((manifest, files))
    }
}

/// Adds the data files of all images that `first` builds on. One manifest at a time is held beside the image's own, and
/// none is looked into before it is known to be the one that was meant.
fn open_chain(first: &Raw, entry: Option<ParentEntry>, files: &mut Vec<DataFile>) -> Result<(), ImageError> {
    let mut seen = HashSet::from([first.identity()?]);
    let mut next = entry;
    let mut child: Option<Raw> = None;
    while let Some(entry) = next {
        let at = child.as_ref().unwrap_or(first);
        let parent = at.path.join(&entry.path);
        let wrong = |what: String| ImageError::Parent { path: at.path.clone(), parent: parent.clone(), what };
        if seen.len() > LONGEST_CHAIN {
            return Err(wrong(format!("is the end of a chain of more than {LONGEST_CHAIN} images")));
        }
        let raw = match Raw::read(at.folder.as_fd(), Path::new(&entry.path), parent.clone()) {
            Err(ImageError::Missing(_)) => Err(wrong("is not there".into())),
            other => other,
        }?;
        if !seen.insert(raw.identity()?) {
            return Err(wrong("builds on it in turn".into()));
        }
        if raw.digest != entry.digest {
            return Err(wrong("is not the one it was".into()));
        }
        let (manifest, mut more) = raw.parse()?;
        files.append(&mut more);
        if files.len() > MOST_FILES {
            return Err(wrong(format!("makes them more than {MOST_FILES} data files")));
        }
        next = manifest.parent;
        child = Some(Raw { text: Vec::new(), ..raw });
    }
    Ok(())
}

impl Image {
    /// Whether `folder` claims to hold an image.
    pub fn exists(folder: &Path) -> bool {
        folder.join(MANIFEST).symlink_metadata().is_ok()
    }

    /// Opens an image, and those it builds on, and checks everything but the chunks' contents.
    pub fn open(folder: &Path) -> Result<Self, ImageError> {
        let raw = Raw::read(AT_FDCWD, folder, folder.into())?;
        let (manifest, mut files) = raw.parse()?;
        open_chain(&raw, manifest.parent.clone(), &mut files)?;
        let path = folder.join(INDEX);
        let damaged = |what: String| ImageError::Damaged { path: path.clone(), what };
        let (file, len) = open(&raw.folder, &path)?;
        if len != manifest.index.size || len != ChunkTable::encoded_len(manifest.chunk_count()) {
            return Err(damaged(format!("it has {len} bytes, the manifest says {}", manifest.index.size)));
        }
        let bytes = slurp(file, len, &path)?;
        if hex(phos_digest::digest(&bytes)) != manifest.index.digest {
            return Err(damaged("its digest is not the manifest's".into()));
        }
        let sizes: Vec<_> = files.iter().map(|f| f.size).collect();
        let table = ChunkTable::decode(&bytes, manifest.chunk_count(), &sizes).map_err(damaged)?;
        Ok(Image { manifest, digest: raw.digest, folder: folder.into(), table, files })
    }

    /// Opens an image that is to be restored: a pre-dump is refused.
    pub fn open_complete(folder: &Path) -> Result<Self, ImageError> {
        let image = Self::open(folder)?;
        match image.manifest.is_pre_dump() {
            true => Err(ImageError::PreDump(folder.into())),
            false => Ok(image),
        }
    }

    /// Digests and places of the allocation's chunks. Files are numbered as in this image.
    pub fn saved(&self, allocation: &Allocation) -> &[Saved] {
        let first = allocation.first_chunk as usize;
        &self.table.0[first..first + (allocation.size / CHUNK as u64) as usize]
    }

    /// The allocation's chunks in runs of at most `max` bytes that lie together.
    pub fn extents(&self, allocation: &Allocation, max: usize) -> Vec<Extent> {
        let max = (max / CHUNK).max(1) as u64;
        let mut extents: Vec<Extent> = Vec::new();
        for i in 0..allocation.size / CHUNK as u64 {
            let n = allocation.first_chunk + i;
            let location = self.table.0[n as usize].1;
            if let Some(last) = extents.last_mut().filter(|l| l.count < max) {
                let follows = match (last.location, location) {
                    (Location::Zero, Location::Zero) => true,
                    (Location::File { file: f, offset: o }, Location::File { file, offset }) => {
                        f == file && o + last.count * CHUNK as u64 == offset
                    }
                    _ => false,
                };
                if follows {
                    last.count += 1;
                    continue;
                }
            }
            extents.push(Extent { first: n, count: 1, at: i * CHUNK as u64, location });
        }
        extents
    }

    /// Reads an extent into the first `count` chunks of `into`. Whoever uses the bytes checks their digests.
    pub fn fetch(&self, extent: &Extent, into: &mut [u8]) -> Result<(), ImageError> {
        let into = &mut into[..extent.count as usize * CHUNK];
        match extent.location {
            Location::Zero => into.fill(0),
            Location::File { file, offset } => {
                let DataFile { file, path, .. } = &self.files[file as usize];
                file.read_exact_at(into, offset).map_err(|e| ImageError::io(path, e))?;
            }
        }
        Ok(())
    }

    /// Reads an extent into the first `count` chunks of `into` and checks every chunk's digest.
    pub fn read(&self, extent: &Extent, into: &mut [u8]) -> Result<(), ImageError> {
        self.fetch(extent, into)?;
        let chunks = into.chunks_exact(CHUNK).take(extent.count as usize);
        self.compare(extent.first, chunks.map(phos_digest::digest))
    }

    /// Compares an allocation's digests with the image's.
    pub fn check(&self, allocation: &Allocation, found: &[Digest]) -> Result<(), ImageError> {
        self.compare(allocation.first_chunk, found.iter().copied())
    }

    /// Compares digests of chunks from number `first` on with the table's.
    fn compare(&self, first: u64, found: impl Iterator<Item = Digest>) -> Result<(), ImageError> {
        let wanted = &self.table.0[first as usize..];
        match found.zip(wanted).zip(first..).find(|((found, (digest, _)), _)| found != digest) {
            None => Ok(()),
            Some(((_, (_, location)), n)) => {
                let path = match *location {
                    Location::Zero => self.folder.join(INDEX),
                    Location::File { file, .. } => self.files[file as usize].path.clone(),
                };
                Err(ImageError::Damaged { path, what: format!("chunk {n} has another digest") })
            }
        }
    }

    /// Reads everything and checks it; returns the bytes stored in data files.
    pub fn verify(&self) -> Result<u64, ImageError> {
        let mut buffer = vec![0; 16 * CHUNK];
        for allocation in &self.manifest.allocations {
            for extent in self.extents(allocation, buffer.len()) {
                self.read(&extent, &mut buffer)?;
            }
        }
        Ok(self.manifest.files.iter().map(|f| f.size).sum())
    }
}
