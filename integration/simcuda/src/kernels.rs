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
