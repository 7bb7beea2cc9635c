//! The kernels, as host functions. Each has the name and the parameters of its `.entry` in some PTX text, and does to
//! memory exactly what the GPU's would.

use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::code::{ILLEGAL_ADDRESS, Result};
use crate::module;
use crate::space::{self, Space};

/// A kernel: its arguments as 64-bit words in the order of its parameters.
pub type Kernel = fn(&[u64]) -> Result<()>;

/// The kernel of that name.
pub fn find(name: &str) -> Option<Kernel> {
    match name {
        "advance" => Some(advance),
        "combine" => Some(combine),
        "count_generation" => Some(count_generation),
        "spin" => Some(spin),
        "phos_digest" => Some(digest),
        "phos_gather" => Some(gather),
        _ => None,
    }
}

/// Device memory as words: the whole range is mapped for reading and writing, and stays so while `space` is borrowed.
fn words(space: &Space, address: u64, count: u64) -> Result<*mut [u32]> {
    space.check(address, count.checked_mul(4).ok_or(ILLEGAL_ADDRESS)?)?;
    Ok(ptr::slice_from_raw_parts_mut(address as *mut u32, count as usize))
}

/// sample.cu: one step of a linear congruential generator in every word.
fn advance(args: &[u64]) -> Result<()> {
    let [data, count, step] = *args else { return Err(ILLEGAL_ADDRESS) };
    let added = (step as u32).wrapping_mul(2_654_435_761).wrapping_add(1_013_904_223);
    space::using(|s| {
        // SAFETY: checked by `words`. Programs order their kernels by streams, as on a GPU: no two write here at once.
        for (i, word) in unsafe { &mut *words(s, data, count)? }.iter_mut().enumerate() {
            *word = word.wrapping_mul(1_664_525).wrapping_add(added).wrapping_add(i as u32);
        }
        Ok(())
    })
}

/// sample.cu: adds one array to another.
fn combine(args: &[u64]) -> Result<()> {
    let [to, from, count] = *args else { return Err(ILLEGAL_ADDRESS) };
    space::using(|s| {
        // SAFETY: as in `advance`; the two ranges are different arrays of the program.
        let (to, from) = unsafe { (&mut *words(s, to, count)?, &*words(s, from, count)?) };
        for (to, from) in to.iter_mut().zip(from) {
            *to = to.wrapping_add(*from);
        }
        Ok(())
    })
}

/// sample.cu: counts in a variable of the module.
fn count_generation(_: &[u64]) -> Result<()> {
    let address = module::variable_of_any("generation").ok_or(ILLEGAL_ADDRESS)?;
    space::using(|s| {
        // SAFETY: as in `advance`.
        let word = unsafe { &mut *words(s, address, 1)? };
        word[0] = word[0].wrapping_add(1);
        Ok(())
    })
}

/// sample.cu: runs until the host writes to a word of page-locked memory.
fn spin(args: &[u64]) -> Result<()> {
    let [flag] = *args else { return Err(ILLEGAL_ADDRESS) };
    // SAFETY: page-locked host memory, which lives at least as long as the kernel that was given it.
    let flag = unsafe { &*(flag as *const AtomicU32) };
    while flag.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    Ok(())
}

/// Address of chunk `n` of a list in device memory.
fn listed(space: &Space, list: u64, n: u64) -> Result<u64> {
    // SAFETY: checked by `words`; addresses are two words, little-endian.
    let pair = unsafe { &*words(space, list + n * 8, 2)? };
    Ok(u64::from(pair[0]) | u64::from(pair[1]) << 32)
}

/// chunks.cu: digests of chunks, to page-locked host memory.
fn digest(args: &[u64]) -> Result<()> {
    let [list, count, out] = *args else { return Err(ILLEGAL_ADDRESS) };
    for n in 0..count {
        let digest = space::using(|s| {
            let at = listed(s, list, n)?;
            // SAFETY: checked by `words`. A program may write here meanwhile, as on a GPU; what is read then is some mix.
            let data = unsafe { &*words(s, at, phos_digest::CHUNK as u64 / 4)? };
            // SAFETY: words are bytes.
            Ok(phos_digest::digest(unsafe { data.align_to::<u8>() }.1))
        })?;
        // SAFETY: page-locked memory of at least 16 × `count` bytes, which lives as long as the kernel.
        unsafe { ptr::write_unaligned((out + n * 16) as *mut [u8; 16], digest.to_bytes()) };
    }
    Ok(())
}

/// chunks.cu: chunks from a list of addresses to one place.
fn gather(args: &[u64]) -> Result<()> {
    let [list, count, to] = *args else { return Err(ILLEGAL_ADDRESS) };
    let chunk = phos_digest::CHUNK as u64;
    space::using(|s| {
        for n in 0..count {
            let from = listed(s, list, n)?;
            // SAFETY: both checked by `words`; the engine gathers into memory of its own.
            unsafe { (*words(s, to + n * chunk, chunk / 4)?).copy_from_slice(&*words(s, from, chunk / 4)?) };
        }
        Ok(())
    })
}
