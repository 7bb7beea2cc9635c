//! The chunk table, `phos-chunks.idx`.

use super::pack::in_file;
use super::{CHUNK, Digest};

const MAGIC: &[u8; 8] = b"PHOSIDX1";
const HEADER: usize = 32;
const RECORD: usize = 32;
/// Alignment of chunks in data files, bytes.
pub const ALIGN: u64 = 4096;

/// Where a chunk's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Location {
    /// Nowhere: they are all zero.
    #[default]
    Zero,
    /// In a data file.
    File {
        /// Number of the file.
        file: u32,
        /// Offset in bytes.
        offset: u64,
        /// Bytes that the chunk takes there if it is packed; 0 if it is stored as it is.
        packed: u32,
    },
}

impl Location {
    /// Bytes that the chunk takes in its file, what fills the last page included.
    pub(super) fn room(self) -> u64 {
        match self {
            Location::Zero => 0,
            Location::File { packed: 0, .. } => CHUNK as u64,
            Location::File { packed, .. } => in_file(packed as usize) as u64,
        }
    }
}

/// What a chunk table's reader knows of a data file.
#[derive(Debug, Clone, Copy)]
pub struct FileKind {
    /// Its length in bytes.
    pub size: u64,
    /// Whether its chunks may be packed.
    pub packs: bool,
}

/// Digest and place of a chunk's saved bytes.
pub type Saved = (Digest, Location);

/// Digest and place of every chunk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChunkTable(pub Vec<Saved>);

impl ChunkTable {
    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.0.len() * RECORD);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&(CHUNK as u64).to_le_bytes());
        out.extend_from_slice(&(self.0.len() as u64).to_le_bytes());
        out.extend_from_slice(&0u64.to_le_bytes());
        for (digest, location) in &self.0 {
            let (file, packed, offset) = match location {
                Location::Zero => (0, 0, 0),
                Location::File { file, packed, offset } => (file + 1, *packed, *offset),
            };
            out.extend_from_slice(&digest.to_bytes());
            out.extend_from_slice(&file.to_le_bytes());
            out.extend_from_slice(&packed.to_le_bytes());
            out.extend_from_slice(&offset.to_le_bytes());
        }
        out
    }

    /// Length of the file for `chunks` chunks.
    pub fn encoded_len(chunks: u64) -> u64 {
        HEADER as u64 + chunks * RECORD as u64
    }

    /// Reads the file; it must hold exactly `chunks` chunks, all within the files given.
    pub fn decode(bytes: &[u8], chunks: u64, files: &[FileKind]) -> Result<Self, String> {
        let header = bytes.get(..HEADER).ok_or("cut short")?;
        let word = |b: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|i| b[at + i]));
        if &header[..8] != MAGIC || word(header, 8) != CHUNK as u64 || word(header, 24) != 0 {
            return Err("not a chunk table of this format".into());
        }
        if word(header, 16) != chunks || bytes.len() as u64 != Self::encoded_len(chunks) {
            return Err(format!("holds {} chunks, the manifest has {chunks}", word(header, 16)));
        }
        let mut table = Vec::with_capacity(chunks as usize);
        for (n, record) in bytes[HEADER..].chunks_exact(RECORD).enumerate() {
            let digest = Digest::from_bytes(std::array::from_fn(|i| record[i]));
            let place = word(record, 16);
            let (number, packed, offset) = (place as u32, (place >> 32) as u32, word(record, 24));
            let location = match number.checked_sub(1) {
                None if packed == 0 && offset == 0 => Location::Zero,
                Some(file) if (file as usize) < files.len() => {
                    let location = Location::File { file, offset, packed };
                    let FileKind { size, packs } = files[file as usize];
                    if packed as usize >= CHUNK || (packed > 0 && !packs) {
                        return Err(format!("chunk {n} is packed as it cannot be"));
                    }
                    let fits = offset.checked_add(location.room()).is_some_and(|end| end <= size);
                    if !fits || !offset.is_multiple_of(ALIGN) {
                        return Err(format!("chunk {n} lies outside its file"));
                    }
                    location
                }
                _ => return Err(format!("chunk {n} names a file that is not listed")),
            };
            table.push((digest, location));
        }
        Ok(ChunkTable(table))
    }
}
