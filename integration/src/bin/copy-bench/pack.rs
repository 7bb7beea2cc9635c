//! What compressors make of memory as models leave it: one core, chunk by chunk.

use std::f64::consts::TAU;
use std::time::Instant;

use anyhow::{Context, Result};
use phos_engine::image::{CHUNK, Codec, Packer, Unpacker, ZSTD_LEVEL};

use crate::{Bench, RUNS, gb_s, median};

/// Bytes of each kind.
const BYTES: usize = 16 << 20;
/// Levels of Zstandard to compare.
const LEVELS: [i32; 5] = [-5, -1, 1, 3, 6];

/// Numbers that look random, the same ones each time (Knuth's MMIX generator).
struct Random(u64);

impl Random {
    /// Between 0 and 1, neither of them.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Normally distributed (Box and Muller).
    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (TAU * self.uniform()).cos()
    }
}

/// The upper half of a float, which is what bf16 is.
fn bf16(value: f64) -> [u8; 2] {
    let [_, _, low, high] = (value as f32).to_le_bytes();
    [low, high]
}

/// bf16 weights of a layer of width 4096, as they are initialised and as training leaves them.
pub fn weights(bytes: usize) -> Vec<u8> {
    let mut random = Random(1);
    (0..bytes / 2).flat_map(|_| bf16(random.normal() / 64.0)).collect()
}

fn kinds() -> Vec<(&'static str, Vec<u8>)> {
    let mut random = Random(2);
    let floats = |f: &mut dyn FnMut() -> f64| -> Vec<u8> {
        (0..BYTES / 4).flat_map(|_| (f() as f32).to_le_bytes()).collect()
    };
    let moments = floats(&mut || (random.normal() * 1e-4).powi(2));
    let mut random = Random(3);
    let masters = floats(&mut || random.normal() / 64.0);
    // A cache filled for 300 of 1024 positions of each head: 128 values a position.
    let mut random = Random(4);
    let cache = (0..BYTES / 2)
        .flat_map(|n| if n / 128 % 1024 < 300 { bf16(random.normal()) } else { [0; 2] })
        .collect();
    let mut random = Random(5);
    let tokens = (0..BYTES / 8).flat_map(|_| ((random.uniform() * 32000.0) as u64).to_le_bytes()).collect();
    vec![
        ("bf16 weights", weights(BYTES)),
        ("fp32 weights", masters),
        ("fp32 second moments of Adam", moments),
        ("bf16 cache, 30 % used", cache),
        ("int64 tokens", tokens),
    ]
}

impl Bench {
    /// Rates on one core, and what is left of the data.
    pub fn pack(&self) -> Result<()> {
        for (kind, data) in kinds() {
            let zstd = LEVELS.map(|level| (Codec::Zstd, level));
            for (codec, level) in [(Codec::Lz4, 0)].into_iter().chain(zstd) {
                let mut packer = Packer::new(codec, level).context("a codec")??;
                let (mut packing, mut unpacking, mut left) = (Vec::new(), Vec::new(), 0);
                for _ in 0..RUNS {
                    let mut packed = Vec::new();
                    let begin = Instant::now();
                    for chunk in data.chunks_exact(CHUNK) {
                        packed.push(packer.pack(chunk).map(|(bytes, len)| (bytes.to_vec(), len)));
                    }
                    packing.push(gb_s(BYTES as u64, begin.elapsed()));
                    left = packed.iter().map(|p| p.as_ref().map_or(CHUNK, |(bytes, _)| bytes.len())).sum();
                    let (mut unpacker, mut chunk) = (Unpacker::default(), vec![0; CHUNK]);
                    let stored: Vec<_> = packed.into_iter().flatten().collect();
                    let begin = Instant::now();
                    for (bytes, len) in &stored {
                        unpacker.room(*len).copy_from_slice(&bytes[..*len]);
                        unpacker.unpack(codec, *len, &mut chunk).map_err(anyhow::Error::msg)?;
                    }
                    unpacking.push(gb_s((stored.len() * CHUNK) as u64, begin.elapsed()));
                }
                let name = match codec {
                    Codec::Zstd if level == ZSTD_LEVEL => format!("zstd level {level}, the default"),
                    Codec::Zstd => format!("zstd level {level}"),
                    other => other.to_string(),
                };
                let figure = |metric, value: f64, n| {
                    self.print(kind, "phos-runc", metric, value, n, &name);
                };
                figure("packed_fraction", left as f64 / BYTES as f64, 1);
                figure("pack_gb_s", median(packing), RUNS);
                if left < BYTES {
                    figure("unpack_gb_s", median(unpacking), RUNS);
                }
            }
        }
        Ok(())
    }
}
