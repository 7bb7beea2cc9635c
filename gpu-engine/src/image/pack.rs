//! Chunks packed by a general compressor on their way to a file, and unpacked on their way back.

use std::fmt;
use std::str::FromStr;

use lz4_flex::block;
use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, Decompressor};

use super::CHUNK;
use super::chunks::ALIGN;

/// The level that loses little against higher ones on the memory of models and is several times as fast (measured:
/// `integration/results/compress.jsonl`).
pub const ZSTD_LEVEL: i32 = 1;

/// A chunk is packed if that saves at least this many bytes; otherwise it is stored as it is, and need not be unpacked.
const LEAST_SAVED: usize = CHUNK / 16;

/// How the chunks of an image's own files are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// Not at all.
    #[default]
    None,
    /// LZ4 blocks.
    Lz4,
    /// Zstandard frames.
    Zstd,
}

impl FromStr for Codec {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "none" => Ok(Codec::None),
            "lz4" => Ok(Codec::Lz4),
            "zstd" => Ok(Codec::Zstd),
            other => Err(format!("unknown compression '{other}': use none, lz4 or zstd")),
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.feature().unwrap_or("none"))
    }
}

impl Codec {
    /// The feature that an image packed in this way has.
    pub fn feature(self) -> Option<&'static str> {
        match self {
            Codec::None => None,
            Codec::Lz4 => Some("lz4"),
            Codec::Zstd => Some("zstd"),
        }
    }

    /// The codec of an image with these features; an image has one at most.
    pub fn of(features: &[String]) -> Result<Self, String> {
        let mut named = [Codec::Lz4, Codec::Zstd]
            .into_iter()
            .filter(|c| features.iter().any(|f| Some(f.as_str()) == c.feature()));
        match (named.next(), named.next()) {
            (Some(_), Some(_)) => Err("it is packed in two ways".into()),
            (codec, _) => Ok(codec.unwrap_or_default()),
        }
    }
}

/// Room for a packed chunk, and for one that grows by it; aligned so that it can be written past the page cache.
#[repr(align(4096))]
struct Room([u8; CHUNK + CHUNK / 8]);

/// Bytes of a file that `packed` bytes take.
pub(super) fn in_file(packed: usize) -> usize {
    packed.next_multiple_of(ALIGN as usize)
}

/// Packs chunks, one at a time.
pub struct Packer {
    /// `None`: LZ4.
    zstd: Option<Compressor<'static>>,
    room: Box<Room>,
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.zstd.is_some() { "Packer(zstd)" } else { "Packer(lz4)" })
    }
}

impl Packer {
    /// `None` for [`Codec::None`]. `level` is Zstandard's.
    pub fn new(codec: Codec, level: i32) -> Option<std::io::Result<Self>> {
        let room = || Box::new(Room([0; CHUNK + CHUNK / 8]));
        match codec {
            Codec::None => None,
            Codec::Lz4 => Some(Ok(Packer { zstd: None, room: room() })),
            Codec::Zstd => Some(Compressor::new(level).map(|c| Packer { zstd: Some(c), room: room() })),
        }
    }

    /// The packed bytes of a chunk, filled up with zeros to a page's end, and how many they are without these; `None` if
    /// packing saves too little.
    pub fn pack(&mut self, chunk: &[u8]) -> Option<(&[u8], usize)> {
        let room = &mut self.room.0;
        let packed = match &mut self.zstd {
            // An error is a chunk that does not get smaller.
            Some(zstd) => zstd.compress_to_buffer(chunk, &mut room[..CHUNK - LEAST_SAVED]).ok()?,
            None => block::compress_into(chunk, room).ok().filter(|n| *n <= CHUNK - LEAST_SAVED)?,
        };
        let filled = in_file(packed);
        room[packed..filled].fill(0);
        Some((&room[..filled], packed))
    }
}

/// Unpacks chunks, one at a time.
#[derive(Default)]
pub struct Unpacker {
    zstd: Option<Decompressor<'static>>,
    packed: Vec<u8>,
}

impl Unpacker {
    /// Where the packed bytes of a chunk go.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        self.packed.resize(CHUNK, 0);
        &mut self.packed[..len]
    }

    /// Unpacks the first `len` bytes of [`Unpacker::room`] into a chunk. Says what is wrong with them.
    pub fn unpack(&mut self, codec: Codec, len: usize, into: &mut [u8]) -> Result<(), String> {
        debug_assert_eq!(into.len(), CHUNK);
        let packed = &self.packed[..len];
        let unpacked = match codec {
            Codec::None => return Err("a packed chunk in a file that has none".into()),
            Codec::Lz4 => block::decompress_into(packed, into).map_err(|e| e.to_string())?,
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(Decompressor::new().map_err(|e| e.to_string())?),
                };
                zstd.decompress_to_buffer(packed, into).map_err(|e| e.to_string())?
            }
        };
        if unpacked != CHUNK {
            return Err(format!("it unpacks to {unpacked} bytes"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(codec: Codec, chunk: &[u8]) -> Option<usize> {
        let mut packer = Packer::new(codec, ZSTD_LEVEL).unwrap().unwrap();
        let (bytes, len) = packer.pack(chunk)?;
        assert!(bytes.len().is_multiple_of(ALIGN as usize) && len <= bytes.len());
        assert!((bytes.as_ptr() as usize).is_multiple_of(ALIGN as usize));
        let mut back = vec![1; CHUNK];
        let mut unpacker = Unpacker::default();
        unpacker.room(len).copy_from_slice(&bytes[..len]);
        unpacker.unpack(codec, len, &mut back).unwrap();
        assert!(back == chunk);
        Some(len)
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let text: Vec<u8> = (0..CHUNK).map(|i| (i / 100) as u8).collect();
        let mut state = 1u64;
        let noise: Vec<u8> = (0..CHUNK)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        for codec in [Codec::Lz4, Codec::Zstd] {
            assert!(round_trip(codec, &text).unwrap() < CHUNK / 10);
            assert_eq!(round_trip(codec, &noise), None, "noise is stored as it is");
        }
        assert!(Packer::new(Codec::None, 0).is_none());
    }

    #[test]
    fn whatever_stands_in_a_file_is_unpacked_or_refused() {
        let text: Vec<u8> = (0..CHUNK).map(|i| (i / 1000) as u8).collect();
        for codec in [Codec::Lz4, Codec::Zstd] {
            let mut packer = Packer::new(codec, ZSTD_LEVEL).unwrap().unwrap();
            let (bytes, len) = packer.pack(&text).unwrap();
            let (mut refused, mut back) = (0, vec![0; CHUNK]);
            let mut unpacker = Unpacker::default();
            for (at, len) in (0..len).flat_map(|at| [(at, len), (at, at)]) {
                let room = unpacker.room(len);
                room.copy_from_slice(&bytes[..len]);
                room.get_mut(at).into_iter().for_each(|byte| *byte ^= 0x41);
                refused += u32::from(unpacker.unpack(codec, len, &mut back).is_err());
            }
            assert!(refused > 0);
        }
    }
}
