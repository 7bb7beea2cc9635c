//! The 128-bit digest by which a chunk of saved memory is recognised.
//!
//! A chunk is read as 16-byte blocks, each two little-endian 64-bit words `(x, y)`. Block number `i` contributes
//! two full 64×64→128-bit products of the words with keys that depend on `i` and on the lane:
//!
//! ```text
//! k(c, i) = c · (2i + 1)                                             64 bits, wrapping
//! fold(u, v) = low 64 bits ⊕ high 64 bits of the 128-bit product u · v
//! lane a:  Σ fold( x ⊕ k(A, i),            y ⊕ k(B, i) )            wrapping sum
//! lane b:  Σ fold( (x rotated by 32) ⊕ k(C, i),  y ⊕ k(D, i) )
//! digest = mix(a ⊕ length) ‖ mix(b + length)
//! ```
//!
//! Sums commute, so a GPU computes the blocks of a chunk in any order with any number of threads; keys that
//! depend on the position make the digest depend on the order of the blocks all the same. The construction follows
//! NH (Black et al., UMAC, CRYPTO '99) and the folded multiply of wyhash. Their bounds hold for random keys; these keys
//! are fixed and public, so what is claimed is what accidents need: two lanes with unrelated keys, each of which every
//! input bit reaches. It finds torn copies and bit rot; it is no defence against someone who writes the data.

#[cfg(target_arch = "x86_64")]
mod wide;

/// Bytes in a chunk. GPU memory is allocated in multiples of 2 MiB, so a chunk is never cut.
pub const CHUNK: usize = 256 * 1024;

/// Name of this digest in the image's manifest.
pub const NAME: &str = "phos-nh128";

/// Digest of a chunk of zeros: how such a chunk is recognised where only its digest is at hand.
pub const ZERO_CHUNK: Digest = zero_chunk();

/// A chunk's digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Digest(pub [u64; 2]);

impl Digest {
    /// As stored: little-endian.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.0[0].to_le_bytes());
        out[8..].copy_from_slice(&self.0[1].to_le_bytes());
        out
    }

    /// The reverse of [`Digest::to_bytes`].
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|j| bytes[i * 8 + j]));
        Digest([word(0), word(1)])
    }
}

const A: u64 = 0x9e37_79b9_7f4a_7c15;
const B: u64 = 0xc2b2_ae3d_27d4_eb4f;
const C: u64 = 0x1656_67b1_9e37_79f9;
const D: u64 = 0x27d4_eb2f_1656_67c5;

/// Multiplies to 128 bits and folds: every bit of both factors reaches the result.
#[inline(always)]
const fn fold(x: u64, y: u64) -> u64 {
    let product = x as u128 * y as u128;
    (product as u64) ^ ((product >> 64) as u64)
}

/// Key schedule: an odd multiple of a constant, distinct for every position in a chunk.
#[inline(always)]
const fn key(constant: u64, position: u64) -> u64 {
    constant.wrapping_mul(2 * position + 1)
}

const fn zero_chunk() -> Digest {
    let (mut a, mut b, mut i) = (0u64, 0u64, 0);
    while i < CHUNK as u64 / 16 {
        a = a.wrapping_add(fold(key(A, i), key(B, i)));
        b = b.wrapping_add(fold(key(C, i), key(D, i)));
        i += 1;
    }
    Digest([mix(a ^ CHUNK as u64), mix(b.wrapping_add(CHUNK as u64))])
}

/// Finalisation of MurmurHash3: spreads a lane's sum over all bits.
const fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// The two sums over `data`, whose first block has the number `position`.
fn sums_from(position: u64, data: &[u8]) -> (u64, u64) {
    let (mut a, mut b) = (0u64, 0u64);
    let mut add = |i: u64, block: &[u8; 16]| {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|j| block[at + j]));
        let (x, y) = (word(0), word(8));
        a = a.wrapping_add(fold(x ^ key(A, i), y ^ key(B, i)));
        b = b.wrapping_add(fold(x.rotate_left(32) ^ key(C, i), y ^ key(D, i)));
    };
    let (blocks, rest) = data.as_chunks::<16>();
    let mut i = position;
    for block in blocks {
        add(i, block);
        i += 1;
    }
    if !rest.is_empty() {
        let mut block = [0u8; 16];
        block[..rest.len()].copy_from_slice(rest);
        add(i, &block);
    }
    (a, b)
}

/// Digest of `data`, whose last block may be shorter than 16 bytes (it counts as filled up with zeros; the length
/// is part of the digest).
pub fn digest(data: &[u8]) -> Digest {
    #[cfg(target_arch = "x86_64")]
    let (done, a, b) = wide::sums(data);
    #[cfg(not(target_arch = "x86_64"))]
    let (done, a, b) = (0, 0u64, 0u64);
    let (rest_a, rest_b) = sums_from(done as u64 / 16, &data[done..]);
    let length = data.len() as u64;
    Digest([mix(a.wrapping_add(rest_a) ^ length), mix(b.wrapping_add(rest_b).wrapping_add(length))])
}

/// Whether `data` is all zero bytes.
pub fn is_zero(data: &[u8]) -> bool {
    // SAFETY: any bytes are valid u64s.
    let (head, body, tail) = unsafe { data.align_to::<u64>() };
    // Blocks of a cache line or more let the compiler use wide registers, and end early on other data.
    body.chunks(64).all(|block| block.iter().fold(0, |acc, w| acc | w) == 0)
        && head.iter().chain(tail).all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_answers_never_change() {
        // Images outlive programs: these values are part of the format.
        let counting: Vec<u8> = (0..4096u32).map(|i| i as u8).collect();
        let answers = [digest(&[]), digest(&[0; CHUNK]), digest(&counting)].map(|d| format!("{:016x?}", d.0));
        compare(&answers);
    }

    fn compare(answers: &[String; 3]) {
        let expected = include_str!("known-answers.txt");
        let got: String = answers.iter().map(|a| format!("{a}\n")).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn a_chunk_of_zeros_is_known_by_its_digest() {
        assert_eq!(digest(&[0; CHUNK]), ZERO_CHUNK);
    }

    /// What the threads of the GPU's kernel do: each takes every 256th block, with keys that grow by a fixed step, and the
    /// sums are added in another order.
    fn as_the_kernel_does(chunk: &[u8]) -> Digest {
        const THREADS: u64 = 256;
        let (mut a, mut b) = (0u64, 0u64);
        for t in (0..THREADS).rev() {
            let mut keys = [A, B, C, D].map(|c| c.wrapping_mul(2 * t + 1));
            for block in chunk.as_chunks::<16>().0.iter().skip(t as usize).step_by(THREADS as usize) {
                let value = u128::from_le_bytes(*block);
                let (x, y) = (value as u64, (value >> 64) as u64);
                a = a.wrapping_add(fold(x ^ keys[0], y ^ keys[1]));
                b = b.wrapping_add(fold(x.rotate_left(32) ^ keys[2], y ^ keys[3]));
                for (key, c) in keys.iter_mut().zip([A, B, C, D]) {
                    *key = key.wrapping_add(c.wrapping_mul(2 * THREADS));
                }
            }
        }
        Digest([mix(a ^ CHUNK as u64), mix(b.wrapping_add(CHUNK as u64))])
    }

    #[test]
    fn structured_chunks_differ() {
        // One word moved, swapped, or changed by one bit, over zeros: the cases accidents are made of.
        let mut seen = std::collections::HashSet::new();
        for at in 0..CHUNK / 8 {
            let mut chunk = vec![0u8; CHUNK];
            chunk[at * 8] = 1;
            if at % 64 == 0 {
                assert!(seen.insert(digest(&chunk)), "word {at}");
            }
        }
        for bit in 0..128 {
            let mut chunk = vec![0u8; CHUNK];
            chunk[bit / 8] = 1 << (bit % 8);
            seen.insert(digest(&chunk));
        }
        assert_eq!(seen.len(), CHUNK / 8 / 64 + 127, "bit 0 of word 0 was in both series");
    }

    proptest! {
        #[test]
        fn the_kernels_way_gives_the_same(seed: u64, zeros in 0..CHUNK) {
            let mut state = seed;
            let mut chunk = vec![0; CHUNK];
            chunk[zeros..].iter_mut().for_each(|byte| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8;
            });
            prop_assert_eq!(as_the_kernel_does(&chunk), digest(&chunk));
        }

        #[test]
        fn any_changed_byte_changes_both_lanes(
            mut data in prop::collection::vec(any::<u8>(), 1..5000), at: prop::sample::Index, by in 1u8..,
        ) {
            let before = digest(&data);
            let at = at.index(data.len());
            data[at] ^= by;
            let after = digest(&data);
            prop_assert_ne!(before.0[0], after.0[0]);
            prop_assert_ne!(before.0[1], after.0[1]);
        }

        #[test]
        fn swapped_blocks_change_the_digest(
            mut data in prop::collection::vec(any::<u8>(), 4096..4097), i in 0usize..256, j in 0usize..256,
        ) {
            let before = digest(&data);
            let (x, y): (Vec<u8>, Vec<u8>) = (data[i * 16..][..16].to_vec(), data[j * 16..][..16].to_vec());
            prop_assume!(x != y);
            data[i * 16..][..16].copy_from_slice(&y);
            data[j * 16..][..16].copy_from_slice(&x);
            prop_assert_ne!(before, digest(&data));
        }

        #[test]
        fn zero_is_recognised_whatever_the_alignment(len in 0usize..3000, from in 0usize..20, at: prop::sample::Index) {
            let mut data = vec![0u8; from + len];
            prop_assert!(is_zero(&data[from..]));
            if len > 0 {
                data[from + at.index(len)] = 1;
                prop_assert!(!is_zero(&data[from..]));
            }
        }

        #[test]
        fn bytes_round_trip(a: u64, b: u64) {
            prop_assert_eq!(Digest::from_bytes(Digest([a, b]).to_bytes()), Digest([a, b]));
        }
    }
}
