//! The digest's two sums with wide registers: the same values, two to three times as fast as one product at a time.
//!
//! Neither AVX2 nor AVX-512 multiplies 64-bit words to 128 bits, so each product is put together from four of 32 bits.

use std::arch::x86_64::*;

use super::{A, B, C, D, key};

/// Sums over as many of the first blocks of `data` as a register takes at once, and the bytes these are: nothing on a
/// processor without wide registers.
pub fn sums(data: &[u8]) -> (usize, u64, u64) {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has what the function needs.
        unsafe { avx512(data) }
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: as above.
        unsafe { avx2(data) }
    } else {
        (0, 0, 0)
    }
}

/// [`super::fold`] of eight pairs.
#[target_feature(enable = "avx512f")]
fn fold_8(x: __m512i, y: __m512i) -> __m512i {
    let (x_high, y_high) = (_mm512_srli_epi64::<32>(x), _mm512_srli_epi64::<32>(y));
    let (low, high) = (_mm512_mul_epu32(x, y), _mm512_mul_epu32(x_high, y_high));
    // Neither sum can exceed 64 bits: a product of 32-bit words leaves room for another one on top.
    let middle = _mm512_add_epi64(_mm512_mul_epu32(x_high, y), _mm512_srli_epi64::<32>(low));
    let word = _mm512_set1_epi64(0xffff_ffff);
    let other = _mm512_add_epi64(_mm512_mul_epu32(x, y_high), _mm512_and_si512(middle, word));
    let carried = _mm512_add_epi64(_mm512_srli_epi64::<32>(middle), _mm512_srli_epi64::<32>(other));
    let low = _mm512_mask_blend_epi32(0xaaaa, low, _mm512_slli_epi64::<32>(other));
    _mm512_xor_si512(low, _mm512_add_epi64(high, carried))
}

/// Eight blocks at a time.
#[target_feature(enable = "avx512f")]
fn avx512(data: &[u8]) -> (usize, u64, u64) {
    const STEP: u64 = 8;
    let first = |c: u64| {
        let keys: [u64; 8] = std::array::from_fn(|i| key(c, i as u64));
        // SAFETY: `keys` is 64 bytes long; the load asks for no alignment.
        unsafe { _mm512_loadu_si512(keys.as_ptr().cast()) }
    };
    let step = |c: u64| _mm512_set1_epi64(c.wrapping_mul(2 * STEP) as i64);
    let (mut ka, mut kb, mut kc, mut kd) = (first(A), first(B), first(C), first(D));
    let (sa, sb, sc, sd) = (step(A), step(B), step(C), step(D));
    let (even, odd) =
        (_mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0), _mm512_set_epi64(15, 13, 11, 9, 7, 5, 3, 1));
    let (mut a, mut b) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    let (blocks, _) = data.as_chunks::<128>();
    for block in blocks {
        let at = block.as_ptr();
        // SAFETY: a block is 128 bytes long; the loads ask for no alignment.
        let (v, w) = unsafe { (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())) };
        let (x, y) = (_mm512_permutex2var_epi64(v, even, w), _mm512_permutex2var_epi64(v, odd, w));
        a = _mm512_add_epi64(a, fold_8(_mm512_xor_si512(x, ka), _mm512_xor_si512(y, kb)));
        let turned = _mm512_rol_epi64::<32>(x);
        b = _mm512_add_epi64(b, fold_8(_mm512_xor_si512(turned, kc), _mm512_xor_si512(y, kd)));
        (ka, kb) = (_mm512_add_epi64(ka, sa), _mm512_add_epi64(kb, sb));
        (kc, kd) = (_mm512_add_epi64(kc, sc), _mm512_add_epi64(kd, sd));
    }
    (blocks.len() * 128, _mm512_reduce_add_epi64(a) as u64, _mm512_reduce_add_epi64(b) as u64)
}

/// [`super::fold`] of four pairs; see [`fold_8`].
#[target_feature(enable = "avx2")]
fn fold_4(x: __m256i, y: __m256i) -> __m256i {
    let (x_high, y_high) = (_mm256_srli_epi64::<32>(x), _mm256_srli_epi64::<32>(y));
    let (low, high) = (_mm256_mul_epu32(x, y), _mm256_mul_epu32(x_high, y_high));
    let middle = _mm256_add_epi64(_mm256_mul_epu32(x_high, y), _mm256_srli_epi64::<32>(low));
    let word = _mm256_set1_epi64x(0xffff_ffff);
    let other = _mm256_add_epi64(_mm256_mul_epu32(x, y_high), _mm256_and_si256(middle, word));
    let carried = _mm256_add_epi64(_mm256_srli_epi64::<32>(middle), _mm256_srli_epi64::<32>(other));
    let low = _mm256_blend_epi32::<0xaa>(low, _mm256_slli_epi64::<32>(other));
    _mm256_xor_si256(low, _mm256_add_epi64(high, carried))
}

/// Four blocks at a time.
#[target_feature(enable = "avx2")]
fn avx2(data: &[u8]) -> (usize, u64, u64) {
    const STEP: u64 = 4;
    // The order in which unpacking two registers leaves the blocks.
    let first = |c: u64| {
        let keys: [u64; 4] = [0, 2, 1, 3].map(|i| key(c, i));
        // SAFETY: `keys` is 32 bytes long; the load asks for no alignment.
        unsafe { _mm256_loadu_si256(keys.as_ptr().cast()) }
    };
    let step = |c: u64| _mm256_set1_epi64x(c.wrapping_mul(2 * STEP) as i64);
    let (mut ka, mut kb, mut kc, mut kd) = (first(A), first(B), first(C), first(D));
    let (sa, sb, sc, sd) = (step(A), step(B), step(C), step(D));
    let (mut a, mut b) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    let (blocks, _) = data.as_chunks::<64>();
    for block in blocks {
        let at = block.as_ptr();
        // SAFETY: a block is 64 bytes long; the loads ask for no alignment.
        let (v, w) = unsafe { (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())) };
        let (x, y) = (_mm256_unpacklo_epi64(v, w), _mm256_unpackhi_epi64(v, w));
        a = _mm256_add_epi64(a, fold_4(_mm256_xor_si256(x, ka), _mm256_xor_si256(y, kb)));
        let turned = _mm256_shuffle_epi32::<0b10_11_00_01>(x);
        b = _mm256_add_epi64(b, fold_4(_mm256_xor_si256(turned, kc), _mm256_xor_si256(y, kd)));
        (ka, kb) = (_mm256_add_epi64(ka, sa), _mm256_add_epi64(kb, sb));
        (kc, kd) = (_mm256_add_epi64(kc, sc), _mm256_add_epi64(kd, sd));
    }
    let sum = |v: __m256i| {
        let mut words = [0u64; 4];
        // SAFETY: `words` is 32 bytes long; the store asks for no alignment.
        unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), v) };
        words.iter().fold(0, |sum: u64, w| sum.wrapping_add(*w))
    };
    (blocks.len() * 64, sum(a), sum(b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sums_from;

    proptest! {
        #[test]
        fn wide_sums_are_those_of_one_block_at_a_time(
            data in prop::collection::vec(any::<u8>(), 0..2000), ones in 0usize..200,
        ) {
            // Carries show where every bit is set.
            let data = [vec![0xff; ones], data].concat();
            let check = |(done, a, b): (usize, u64, u64)| {
                assert_eq!((a, b), sums_from(0, &data[..done]));
                assert!(done.is_multiple_of(16));
            };
            check(sums(&data));
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has what the function needs.
                check(unsafe { avx2(&data) });
            }
        }
    }
}
