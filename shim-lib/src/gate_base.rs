//! What the gate's algorithm ([`crate::gate_core`]) runs on: the processor's atomics, `membarrier` and a futex.

use std::sync::atomic::compiler_fence;
use std::time::Duration;

pub use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

/// Bit of the state: `membarrier` does not work here, so entering threads pay for a barrier themselves.
const FENCED: u32 = 2;

/// The half of the barrier that entering threads pay for: that the compiler keeps the order. The rest is paid by whoever
/// closes the gate.
#[inline(always)]
pub fn light_barrier() {
    compiler_fence(Ordering::SeqCst);
}

/// `membarrier` commands of linux/membarrier.h.
const PRIVATE_EXPEDITED: i32 = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;

/// Makes every thread of the process pass a full barrier.
pub fn heavy_barrier(state: &State) {
    // The registration belongs to the address space and is lost with it: after a restore it must be made anew.
    // SAFETY: membarrier touches no memory of ours.
    let done = unsafe {
        libc::syscall(libc::SYS_membarrier, REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0
            && libc::syscall(libc::SYS_membarrier, PRIVATE_EXPEDITED, 0, 0) == 0
    };
    if !done {
        state.fetch_or(FENCED, Ordering::SeqCst);
        // A thread that read the state just before may be between its two steps; it gets out of them in this time.
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The gate's state: a word that threads can sleep on.
pub struct State(AtomicU32);

impl State {
    /// An open gate.
    pub const fn open() -> Self {
        State(AtomicU32::new(0))
    }

    /// As of the atomic.
    #[inline(always)]
    pub fn load(&self, order: Ordering) -> u32 {
        self.0.load(order)
    }

    /// As of the atomic.
    pub fn fetch_or(&self, bits: u32, order: Ordering) {
        self.0.fetch_or(bits, order);
    }

    /// As of the atomic.
    pub fn fetch_and(&self, bits: u32, order: Ordering) {
        self.0.fetch_and(bits, order);
    }

    /// Sleeps until woken, unless it holds another value.
    pub fn sleep_while(&self, value: u32) {
        // SAFETY: a futex wait on a word that lives during the call, without a timeout.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.0.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                value,
                std::ptr::null::<libc::timespec>(),
            );
        }
    }

    /// Wakes everyone who sleeps on it.
    pub fn wake_all(&self) {
        // SAFETY: a futex wake on a word that lives during the call.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.0.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                i32::MAX,
            );
        }
    }
}
