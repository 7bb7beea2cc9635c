//! The image of a container's GPU state: flat regular files beside CRIU's.
//!
//! ```text
//! phos.json          manifest: version, driver, GPUs, processes, allocations, the files below with sizes and digests,
//!                    the container's effective configuration. Written last, under another name, then renamed:
//!                    no manifest, no checkpoint.
//!                    An image with the feature "parent" builds on another one: it names that one's folder, relative to
//!                    its own, and the digest of that one's manifest.
//! phos-chunks.idx    chunk table, one 32-byte record for each chunk of all allocations in the manifest's order:
//!                      0  digest       16 bytes, see `phos_digest`
//!                     16  file          u32   0: all bytes are zero, nothing is stored; N: data file number N-1,
//!                                             counted through this image's files, then its parent's, and so on
//!                     20  reserved      u32   0
//!                     24  offset        u64   in that file, a multiple of 4096
//!                    behind a header: magic "PHOSIDX1", chunk size u64, chunk count u64, reserved u64 0
//! phos-gpu-N.img     chunks, each at a page-aligned offset, one file for each writing thread
//! ```
//!
//! All integers are little-endian. Readers refuse what they do not know. Sizes and counts are checked against each
//! other and against the real files before anything is allocated; each chunk is checked by its digest as it is read.

mod bounded;
mod chunks;
mod manifest;
mod reader;
mod writer;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

pub use chunks::{ChunkTable, Location, Saved};
pub use manifest::{
    Allocation, DriverEntry, FEATURE_PARENT, FEATURE_PRE_DUMP, FileEntry, GpuEntry, IndexEntry, LibraryEntry,
    Manifest, ParentEntry, ProcessEntry,
};
pub use phos_digest::{CHUNK, Digest};
pub use reader::{Extent, Image};
pub use writer::{ImageWriter, Sink};

/// The manifest's name.
pub const MANIFEST: &str = "phos.json";
/// The chunk table's name.
pub const INDEX: &str = "phos-chunks.idx";
/// Version of the format that is written and read.
pub const VERSION: u32 = 1;

/// Name of data file `n`.
pub fn data_file(n: usize) -> String {
    format!("phos-gpu-{n}.img")
}

/// Why an image cannot be written or read. The texts are what a person sees.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A file cannot be read or written.
    #[error("image file {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file system is full.
    #[error("image file {path}: no space left on the device: free some space or name another folder")]
    Full {
        /// The file that was being written.
        path: PathBuf,
    },
    /// There is no manifest.
    #[error("{0} holds no GPU image (no phos.json)")]
    Missing(PathBuf),
    /// The manifest is not JSON of the right form, or is cut short.
    #[error("image {path}: the manifest is damaged: {what}")]
    Manifest {
        /// The image folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Another version of the format.
    #[error(
        "image {path} has format version {found}, this phos-runc reads version {VERSION}: use the phos-runc that made it"
    )]
    Version {
        /// The image folder.
        path: PathBuf,
        /// The version found.
        found: u64,
    },
    /// A feature this reader does not know.
    #[error(
        "image {path} needs the feature '{feature}', which this phos-runc does not have: use the phos-runc that made it"
    )]
    Feature {
        /// The image folder.
        path: PathBuf,
        /// The feature.
        feature: String,
    },
    /// The image it builds on is missing or is not the one it was.
    #[error("image {path} builds on the image {parent}, which {what}: put that one back where it was")]
    Parent {
        /// The image folder.
        path: PathBuf,
        /// The folder of the image it builds on.
        parent: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A pre-dump, which has nothing of the CPU side and was written while the program ran.
    #[error("image {0} is a pre-dump: restore from the checkpoint that was made with --parent-path on it")]
    PreDump(PathBuf),
    /// The manifest is another one than a moment ago.
    #[error("image {0} was changed while it was being restored: try again when nothing writes to it")]
    Changed(PathBuf),
    /// A file is not what the manifest says.
    #[error("image file {path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl ImageError {
    fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ImageError::Full { path },
            _ => ImageError::Io { path, source },
        }
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
