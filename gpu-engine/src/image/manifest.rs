//! The manifest, `phos.json`.

use serde::{Deserialize, Serialize};

use super::bounded::{at_most, spec};
use super::{CHUNK, VERSION};
use crate::device::GpuId;
use crate::text::plain;

/// Largest manifest that is read, bytes. A million allocations take 150 MB.
pub const MAX_BYTES: u64 = 256 << 20;

/// Most chunks of an image: 16 TiB of GPU memory. The chunk table of so many is 2 GiB, which is read as a whole.
pub const MOST_CHUNKS: u64 = 1 << 26;

/// Most data files of an image, those of the images it builds on included.
pub const MOST_FILES: usize = 4096;

/// The driver the image was made with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverEntry {
    /// `cuDriverGetVersion`.
    pub version: i32,
    /// The kernel module's version, "" if unknown.
    pub release: String,
}

/// A GPU the image has memory of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuEntry {
    /// UUID as `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
    #[serde(with = "gpu_id")]
    pub uuid: GpuId,
    /// Model.
    pub name: String,
    /// All its memory, bytes.
    pub total_bytes: u64,
}

/// A GPU process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEntry {
    /// Its id in its own PID namespace, which CRIU restores.
    pub pid: i32,
    /// Its name.
    pub command: String,
    /// Whether `libphos.so` parked its memory; otherwise the driver saved all of it.
    pub has_library: bool,
}

/// One physical allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// Index into the processes.
    pub process: u32,
    /// The library's id of it.
    pub id: u64,
    /// Index into the GPUs.
    pub gpu: u32,
    /// First address it was mapped at. Informative.
    pub address: u64,
    /// Bytes, a multiple of the chunk size.
    pub size: u64,
    /// `CLASS_` constant of the control protocol.
    pub class: u32,
    /// `FLAG_` constants of the control protocol.
    pub flags: u32,
    /// Number of its first chunk in the chunk table.
    pub first_chunk: u64,
}

/// A data file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the image folder.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
}

/// The chunk table's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexEntry {
    /// Its length in bytes.
    pub size: u64,
    /// Digest of the whole file, hexadecimal.
    pub digest: String,
}

/// The `libphos.so` that the processes have mapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibraryEntry {
    /// Its length in bytes.
    pub size: u64,
    /// Digest of the whole file, hexadecimal.
    pub digest: String,
}

/// The image that this one builds on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentEntry {
    /// Its folder, relative to this image's.
    pub path: String,
    /// Digest of its manifest's bytes, hexadecimal.
    pub digest: String,
}

/// The feature of images with a [`ParentEntry`].
pub const FEATURE_PARENT: &str = "parent";
/// The feature of pre-dumps, which serve as parents only.
pub const FEATURE_PRE_DUMP: &str = "pre-dump";

/// The manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// What a reader must know beyond the version: [`FEATURE_PARENT`], [`FEATURE_PRE_DUMP`].
    #[serde(default, deserialize_with = "at_most::<_, _, 64>")]
    pub features: Vec<String>,
    /// The phos-runc that wrote it.
    pub made_by: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The container's id.
    pub container: String,
    /// See [`DriverEntry`].
    pub driver: DriverEntry,
    /// The lower runtime's version line.
    pub lower_runtime: String,
    /// CRIU's version.
    pub criu: String,
    /// Chunk size in bytes.
    pub chunk_size: u64,
    /// Name of the digest.
    pub digest: String,
    /// See [`GpuEntry`].
    pub gpus: Vec<GpuEntry>,
    /// See [`ProcessEntry`].
    pub processes: Vec<ProcessEntry>,
    /// In the order of the chunk table.
    pub allocations: Vec<Allocation>,
    /// See [`FileEntry`].
    #[serde(deserialize_with = "at_most::<_, _, MOST_FILES>")]
    pub files: Vec<FileEntry>,
    /// See [`IndexEntry`].
    pub index: IndexEntry,
    /// See [`ParentEntry`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ParentEntry>,
    /// See [`LibraryEntry`].
    pub library: Option<LibraryEntry>,
    /// Things a person should know.
    #[serde(default, deserialize_with = "at_most::<_, _, 4096>")]
    pub warnings: Vec<String>,
    /// The container's configuration as it ran.
    #[serde(deserialize_with = "spec")]
    pub effective_spec: serde_json::Value,
}

impl Manifest {
    /// Bytes of GPU memory in all allocations.
    pub fn gpu_bytes(&self) -> u64 {
        self.allocations.iter().map(|a| a.size).sum()
    }

    /// Chunks in all allocations.
    pub fn chunk_count(&self) -> u64 {
        self.gpu_bytes() / CHUNK as u64
    }

    /// Whether this is a pre-dump.
    pub fn is_pre_dump(&self) -> bool {
        self.features.iter().any(|f| f == FEATURE_PRE_DUMP)
    }

    /// Takes out of the texts that people are shown what a terminal would obey.
    pub(super) fn make_plain(&mut self) {
        let texts = [&mut self.made_by, &mut self.container, &mut self.lower_runtime, &mut self.criu];
        let names = self.gpus.iter_mut().map(|g| &mut g.name);
        let commands = self.processes.iter_mut().map(|p| &mut p.command);
        let all = texts.into_iter().chain([&mut self.driver.release]).chain(names).chain(commands);
        all.chain(&mut self.warnings).for_each(|text| *text = plain(text));
    }

    /// Checks everything that can be checked without the other files. Says what is wrong.
    pub(super) fn check(&self) -> Result<(), String> {
        debug_assert_eq!(self.version, VERSION);
        if self.chunk_size != CHUNK as u64 {
            return Err(format!("chunk size {} is not {CHUNK}", self.chunk_size));
        }
        if self.digest != phos_digest::NAME {
            return Err(format!("unknown digest '{}'", self.digest));
        }
        let mut gpus = std::collections::HashSet::new();
        if let Some(gpu) = self.gpus.iter().find(|g| !gpus.insert(g.uuid)) {
            return Err(format!("{} is listed twice", gpu.uuid));
        }
        let mut next_chunk = 0u64;
        let mut ids = std::collections::HashSet::new();
        for a in &self.allocations {
            if a.size == 0 || a.size % CHUNK as u64 != 0 || a.size > 1 << 46 {
                return Err(format!("allocation {} has {} bytes", a.id, a.size));
            }
            if a.gpu as usize >= self.gpus.len() || a.process as usize >= self.processes.len() {
                return Err(format!("allocation {} names a GPU or process that is not listed", a.id));
            }
            if !self.processes[a.process as usize].has_library {
                return Err(format!("allocation {} belongs to a process without libphos.so", a.id));
            }
            if !ids.insert((a.process, a.id)) {
                return Err(format!("allocation {} is listed twice", a.id));
            }
            if a.first_chunk != next_chunk {
                return Err(format!(
                    "allocation {} begins at chunk {}, not {next_chunk}",
                    a.id, a.first_chunk
                ));
            }
            next_chunk = next_chunk
                .checked_add(a.size / CHUNK as u64)
                .filter(|n| *n <= MOST_CHUNKS)
                .ok_or("more chunks than can exist")?;
        }
        let mut pids = std::collections::HashSet::new();
        if let Some(p) = self.processes.iter().find(|p| p.pid <= 0 || !pids.insert(p.pid)) {
            return Err(format!("process {} is listed twice or cannot exist", p.pid));
        }
        if self.parent.is_some() != self.features.iter().any(|f| f == FEATURE_PARENT) {
            return Err("the feature 'parent' and the entry do not go together".into());
        }
        if let Some(parent) = &self.parent {
            let path = std::path::Path::new(&parent.path);
            if path.as_os_str().is_empty() || path.is_absolute() || parent.path.contains(char::is_control) {
                return Err("the path of its parent is not relative, or none at all".into());
            }
        }
        for (n, file) in self.files.iter().enumerate() {
            // Names are not free: nothing outside the folder can ever be named.
            if file.name != super::data_file(n) {
                return Err(format!("data file {n} is called '{}'", file.name));
            }
            if file.size > MOST_CHUNKS * CHUNK as u64 {
                return Err(format!("data file {n} has {} bytes", file.size));
            }
        }
        Ok(())
    }
}

mod gpu_id {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::device::GpuId;

    pub fn serialize<S: Serializer>(id: &GpuId, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(id)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<GpuId, D::Error> {
        let text = String::deserialize(d)?;
        let digits: Vec<u8> = text
            .strip_prefix("GPU-")
            .unwrap_or_default()
            .bytes()
            .filter(|b| *b != b'-')
            .filter_map(|b| (b as char).to_digit(16).map(|d| d as u8))
            .collect();
        let (pairs, rest) = digits.as_chunks::<2>();
        let bytes: Vec<u8> = pairs.iter().map(|[h, l]| h << 4 | l).collect();
        match <[u8; 16]>::try_from(bytes) {
            Ok(bytes) if rest.is_empty() => Ok(GpuId(bytes)),
            _ => Err(D::Error::custom(format!("'{text}' is not a GPU UUID"))),
        }
    }
}
