//! Threads that make no CUDA call: they change the process's address space all the time, also while the driver's state is
//! away. A driver that cannot bear that must be noticed here before it loses someone's process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// Smallest and largest mapping, as powers of two: 4 KiB to 256 MiB.
const SIZES: std::ops::RangeInclusive<u32> = 12..=28;
/// Mappings that a thread holds at once.
const HELD: usize = 16;

/// The threads; they end when this is dropped.
pub struct Churn {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Churn {
    /// Starts `count` of them.
    pub fn start(count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = |seed| {
            let stop = stop.clone();
            thread::spawn(move || run(seed as u64 + 1, &stop))
        };
        let threads = (0..count).map(thread).collect();
        Churn { stop, threads }
    }
}

impl Churn {
    /// Whether all of them still run: one that has found something wrong has ended, and said so.
    pub fn is_whole(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A private mapping of which the first and the last word carry a mark.
struct Mapping {
    at: *mut u64,
    words: usize,
    mark: u64,
}

impl Mapping {
    fn make(len: usize, mark: u64) -> Option<Self> {
        // SAFETY: a new private mapping, written to within its bounds.
        unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if at == libc::MAP_FAILED {
                return None;
            }
            let mapping = Mapping { at: at.cast(), words: len / 8, mark };
            mapping.at.write(mark);
            mapping.at.add(mapping.words - 1).write(mark);
            Some(mapping)
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `make`, and unmapped here only.
        unsafe {
            let ends = (self.at.read(), self.at.add(self.words - 1).read());
            assert_eq!(ends, (self.mark, self.mark), "a mapping changed under its owner");
            libc::munmap(self.at.cast(), self.words * 8);
        }
    }
}

fn run(seed: u64, stop: &AtomicBool) {
    let mut random = seed;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let mut mappings: Vec<Option<Mapping>> = (0..HELD).map(|_| None).collect();
    let mut blocks: Vec<Vec<u8>> = vec![Vec::new(); HELD];
    while !stop.load(Ordering::Relaxed) {
        let slot = next(HELD as u64) as usize;
        let power = SIZES.start() + next(u64::from(SIZES.end() - SIZES.start() + 1)) as u32;
        mappings[slot] = Mapping::make(1 << power, next(1 << 30));
        // Small and large blocks of the C library's heap, whose arenas grow and shrink.
        blocks[slot] = vec![slot as u8; 16 << next(14)];
        assert!(blocks[next(HELD as u64) as usize].windows(2).all(|w| w[0] == w[1]), "a block changed");
    }
}
