//! Giving back what the driver saved as zeros.
//!
//! Most of the state that the driver saves of itself (heaps, stacks, queues that nobody filled) is zeros. Once it has been
//! saved nobody touches it before the driver's restore, so zero pages can go back to the system: read again, they are zeros.
//! Whoever saves the process's memory, while the program stands still, then has hundreds of megabytes less to write.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::{slice, thread};

/// Unit of work of a thread: a huge page, which goes back as a whole where it can.
const BLOCK: usize = 2 << 20;
/// Smallest stretch that is given back. Splitting a huge page for less would cost more than writing it.
const STRETCH: usize = 64 << 10;
/// More threads than this read memory no faster.
const MOST_THREADS: usize = 8;

fn is_zero(bytes: &[u8]) -> bool {
    // In steps that the compiler makes wide instructions of, and that end early where there is data.
    bytes.chunks(4096).all(|page| page.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Gives back the zero stretches of one block; their bytes.
///
/// # Safety
/// As [`trim`].
unsafe fn trim_block(at: usize, len: usize) -> u64 {
    // SAFETY: mapped, and written by nobody, as the caller says.
    let bytes = unsafe { slice::from_raw_parts(at as *const u8, len) };
    let zero: Vec<bool> = bytes.chunks(STRETCH).map(is_zero).collect();
    let (mut given, mut unit) = (0, 0);
    for run in zero.chunk_by(|a, b| a == b) {
        let begin = unit * STRETCH;
        unit += run.len();
        let end = (unit * STRETCH).min(len);
        // SAFETY: a part of the block; what is read there afterwards is zeros, as it was.
        let give = || unsafe { libc::madvise((at + begin) as *mut c_void, end - begin, libc::MADV_DONTNEED) };
        if run[0] && give() == 0 {
            given += (end - begin) as u64;
        }
    }
    given
}

/// Gives back the pages of `len` bytes at `at` that hold only zeros. Returns how many bytes that were.
///
/// # Safety
/// The range begins at a page boundary, is mapped private and anonymous, and nobody writes to it or unmaps it meanwhile.
pub unsafe fn trim(at: usize, len: usize) -> u64 {
    let (next, given) = (AtomicUsize::new(0), AtomicU64::new(0));
    let work = || {
        loop {
            let begin = next.fetch_add(BLOCK, Ordering::Relaxed);
            if begin >= len {
                return;
            }
            // SAFETY: within the range, and each block is one thread's.
            given.fetch_add(unsafe { trim_block(at + begin, BLOCK.min(len - begin)) }, Ordering::Relaxed);
        }
    };
    let threads = thread::available_parallelism().map_or(1, |n| n.get()).clamp(1, MOST_THREADS);
    thread::scope(|scope| {
        // Where no thread can be had, this one does it all.
        let helpers: Vec<_> =
            (1..threads).map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
        work();
        drop(helpers);
    });
    given.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_go_back_and_data_stays() {
        let len = 3 * BLOCK + 5 * 4096;
        // SAFETY: a new mapping of this test's own, of `len` bytes.
        let (at, bytes) = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
            let at = libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            (at as usize, slice::from_raw_parts_mut(at.cast::<u8>(), len))
        };
        let marks = [0, STRETCH - 1, BLOCK + 10 * STRETCH, 3 * BLOCK - 1, len - 1];
        marks.iter().for_each(|m| bytes[*m] = 7);
        // SAFETY: the mapping above.
        let given = unsafe { trim(at, len) };
        // Two marks share the first stretch, three have one each; the last stretch is short.
        assert_eq!(given, (3 * BLOCK - 3 * STRETCH) as u64);
        assert!(bytes.iter().enumerate().all(|(i, b)| *b == if marks.contains(&i) { 7 } else { 0 }));
        let resident = |offset: usize| {
            let mut there = 0u8;
            // SAFETY: one page of the mapping; `there` is valid for one page's answer.
            unsafe { libc::mincore((at + offset) as *mut c_void, 4096, &mut there) == 0 && there & 1 == 1 }
        };
        assert!(resident(0) && resident(len - 1 - (len - 1) % 4096));
    }
}
