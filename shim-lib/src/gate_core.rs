//! The gate's algorithm, apart from what it runs on (`crate::gate_base`): atomics, the two halves of a memory barrier, and a
//! futex. `shim-lib/gate-model` compiles this same file on a model checker's, which tries every order of steps that the
//! memory model allows.
//!
//! Entering sets the thread's mark, then looks at the state; closing sets the state, then looks at the marks. With a barrier
//! between the two steps of either side, at least one of them sees the other.

use crate::gate_base::{AtomicBool, AtomicU32, Ordering, State, fence, heavy_barrier, light_barrier};

/// Bit of the state: nobody may enter.
pub const CLOSED: u32 = 1;

/// What a thread that waits for the GPU adds to its mark; other calls add 1.
pub const WAITING: u32 = 1 << 16;
/// The part of a mark that says how many calls other than waits a thread is inside.
pub const CALLS: u32 = WAITING - 1;

/// The gate.
pub struct Gate {
    /// [`CLOSED`]; any other bit makes entering threads pay for a whole barrier. 0 as long as entering is free.
    pub state: State,
    /// Whoever has closed the gate, or is about to: one at a time.
    pub closer: AtomicBool,
}

impl Gate {
    /// Enters with a thread's own mark, waiting while the gate is closed. A thread that is inside already enters at once.
    #[inline(always)]
    pub fn enter(&self, own: &AtomicU32, mark: u32) {
        let depth = own.load(Ordering::Relaxed);
        own.store(depth + mark, Ordering::Relaxed);
        light_barrier();
        if self.state.load(Ordering::Acquire) != 0 {
            self.look_again(own, depth, mark);
        }
    }

    /// The mark is set and the state is not 0.
    #[cold]
    fn look_again(&self, own: &AtomicU32, depth: u32, mark: u32) {
        fence(Ordering::SeqCst);
        if depth == 0 && self.state.load(Ordering::Acquire) & CLOSED != 0 {
            self.wait(own, mark);
        }
    }

    #[cold]
    fn wait(&self, own: &AtomicU32, mark: u32) {
        loop {
            own.store(0, Ordering::Release);
            let state = self.state.load(Ordering::Relaxed) | CLOSED;
            self.state.sleep_while(state);
            own.store(mark, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.state.load(Ordering::Acquire) & CLOSED == 0 {
                return;
            }
        }
    }

    /// Leaves again.
    #[inline(always)]
    pub fn leave(own: &AtomicU32, mark: u32) {
        let depth = own.load(Ordering::Relaxed);
        // Release: whoever sees the mark gone sees what the driver did for this call.
        own.store(depth - mark, Ordering::Release);
    }

    /// Tries to become the one that closes the gate.
    pub fn claim(&self) -> bool {
        !self.closer.swap(true, Ordering::Acquire)
    }

    /// Closes it, once claimed. Threads may still be inside, but none enters any more.
    pub fn shut(&self) {
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        heavy_barrier(&self.state);
    }

    /// Whether a thread is inside: what its mark holds within `mask`.
    pub fn is_inside(own: &AtomicU32, mask: u32) -> bool {
        own.load(Ordering::Acquire) & mask != 0
    }

    /// Opens it and wakes everyone who waits.
    pub fn open(&self) {
        self.state.fetch_and(!CLOSED, Ordering::SeqCst);
        self.closer.store(false, Ordering::Release);
        self.state.wake_all();
    }
}
