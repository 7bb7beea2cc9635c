//! The gate: stops new GPU work in every thread, at the cost of a few nanoseconds while it is open.
//!
//! Every thread has a mark of its own that says how deep it is inside the driver. Entering sets the mark, then looks at
//! the gate; closing sets the gate, then looks at the marks. Between the two steps of a side a memory barrier is
//! needed, and only the closing side pays for it: `membarrier(2)` makes every running thread execute one.
//!
//! A thread that only waits for the GPU inside the driver does not keep the gate from closing: what it waits for may take
//! a while. But it has to be out of the driver before the driver's state is taken away, see [`settle`].

use std::cell::Cell;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, compiler_fence, fence};
use std::time::{Duration, Instant};

use crate::thread_slot;

/// Bit of [`STATE`]: nobody may enter.
const CLOSED: u32 = 1;
/// Bit of [`STATE`]: `membarrier` does not work here, so entering threads pay for a barrier themselves.
const FENCED: u32 = 2;

/// What a thread that waits for the GPU adds to its mark; other calls add 1.
const WAITING: u32 = 1 << 16;

/// Of these bits; the futex that waiting threads sleep on. 0 as long as entering is free.
static STATE: AtomicU32 = AtomicU32::new(0);

/// A thread's mark. A cache line of its own.
#[repr(align(128))]
struct Slot {
    depth: AtomicU32,
    taken: AtomicBool,
    launches: AtomicU64,
}

static SLOTS: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());

thread_local! {
    static GUARD: Owner = const { Owner(Cell::new(None)) };
}

/// Gives the slot back when its thread ends.
struct Owner(Cell<Option<&'static Slot>>);

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some(slot) = self.0.take() {
            thread_slot::set(ptr::null());
            slot.taken.store(false, Ordering::Release);
        }
    }
}

#[cold]
fn register() -> &'static Slot {
    let mut slots = SLOTS.lock().unwrap_or_else(|e| e.into_inner());
    let free = slots
        .iter()
        .find(|s| s.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok());
    let slot = match free {
        Some(slot) => *slot,
        None => {
            let slot: &'static Slot = Box::leak(Box::new(Slot {
                depth: AtomicU32::new(0),
                taken: AtomicBool::new(true),
                launches: AtomicU64::new(0),
            }));
            slots.push(slot);
            slot
        }
    };
    drop(slots);
    thread_slot::set(ptr::from_ref(slot).cast());
    // A thread that is already ending keeps its slot for ever; there are few of those.
    let _ = GUARD.try_with(|g| g.0.set(Some(slot)));
    slot
}

/// A thread's leave to be inside the driver.
pub struct Pass(&'static Slot);

impl Drop for Pass {
    #[inline(always)]
    fn drop(&mut self) {
        let depth = self.0.depth.load(Ordering::Relaxed);
        // Release: whoever sees the mark gone sees what the driver did for this call.
        self.0.depth.store(depth - 1, Ordering::Release);
    }
}

#[inline(always)]
fn own_slot() -> &'static Slot {
    // SAFETY: only `register` sets the pointer, to a slot that is never freed.
    match unsafe { thread_slot::get().cast::<Slot>().as_ref() } {
        Some(slot) => slot,
        None => register(),
    }
}

/// Enters, waiting while the gate is closed. A thread that is inside already enters again at once.
#[inline(always)]
pub fn gate() -> Pass {
    let slot = own_slot();
    enter(slot, 1);
    Pass(slot)
}

#[inline(always)]
fn enter(slot: &'static Slot, mark: u32) {
    let depth = slot.depth.load(Ordering::Relaxed);
    slot.depth.store(depth + mark, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    if STATE.load(Ordering::Acquire) != 0 {
        look_again(slot, depth, mark);
    }
}

/// A thread's leave to wait for the GPU inside the driver.
pub struct Wait(&'static Slot);

impl Drop for Wait {
    fn drop(&mut self) {
        self.0.depth.fetch_sub(WAITING, Ordering::Release);
    }
}

/// Enters to wait for the GPU, waiting first while the gate is closed.
pub fn waiting() -> Wait {
    let slot = own_slot();
    enter(slot, WAITING);
    Wait(slot)
}

/// The mark is set and the state is not 0.
#[cold]
fn look_again(slot: &Slot, depth: u32, mark: u32) {
    fence(Ordering::SeqCst);
    if depth == 0 && STATE.load(Ordering::Acquire) & CLOSED != 0 {
        wait(slot, mark);
    }
}

/// Enters and counts a launch.
#[inline(always)]
pub fn launch() -> Pass {
    let pass = gate();
    // Only this thread writes its counter.
    pass.0.launches.store(pass.0.launches.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    pass
}

#[cold]
fn wait(slot: &Slot, mark: u32) {
    loop {
        slot.depth.store(0, Ordering::Release);
        let state = STATE.load(Ordering::Relaxed) | CLOSED;
        // SAFETY: a futex wait on a static word, without a timeout.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                STATE.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                state,
                std::ptr::null::<libc::timespec>(),
            );
        }
        slot.depth.store(mark, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if STATE.load(Ordering::Acquire) & CLOSED == 0 {
            return;
        }
    }
}

/// `membarrier` commands of linux/membarrier.h.
const PRIVATE_EXPEDITED: i32 = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;

/// Makes every thread of the process pass a full barrier.
fn barrier() {
    // The registration belongs to the address space and is lost with it: after a restore it must be made anew.
    // SAFETY: membarrier touches no memory of ours.
    let done = unsafe {
        libc::syscall(libc::SYS_membarrier, REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0
            && libc::syscall(libc::SYS_membarrier, PRIVATE_EXPEDITED, 0, 0) == 0
    };
    if !done {
        STATE.fetch_or(FENCED, Ordering::SeqCst);
        // A thread that read the state just before may be between its two steps; it gets out of them in this time.
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whoever has closed the gate, or is about to: one at a time.
static CLOSER: AtomicBool = AtomicBool::new(false);

/// Closes the gate and waits until no thread is inside, but for those that wait for the GPU. If that takes longer than
/// `patience` the gate is opened again and `false` returned.
pub fn close(patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while CLOSER.swap(true, Ordering::Acquire) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    STATE.fetch_or(CLOSED, Ordering::SeqCst);
    barrier();
    let closed = empty(deadline, WAITING - 1);
    if !closed {
        open();
    }
    closed
}

/// Once the gate is closed and the GPU idle: waits until the threads that waited for the GPU are out of the driver too.
/// `false` if that takes longer than `patience`.
pub fn settle(patience: Duration) -> bool {
    empty(Instant::now() + patience, u32::MAX)
}

/// Waits until no thread has a mark within `mask`; `false` if some still do at the deadline.
fn empty(deadline: Instant, mask: u32) -> bool {
    let mut rounds = 0u32;
    loop {
        let inside = {
            let slots = SLOTS.lock().unwrap_or_else(|e| e.into_inner());
            slots.iter().any(|s| s.depth.load(Ordering::Acquire) & mask != 0)
        };
        if !inside {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        rounds += 1;
        if rounds > 1000 {
            std::thread::sleep(Duration::from_micros(50));
        } else {
            std::thread::yield_now();
        }
    }
}

/// Opens the gate, which the caller has closed, and wakes everyone who waits.
pub fn open() {
    STATE.fetch_and(!CLOSED, Ordering::SeqCst);
    CLOSER.store(false, Ordering::Release);
    // SAFETY: a futex wake on a static word.
    unsafe {
        libc::syscall(libc::SYS_futex, STATE.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX);
    }
}

/// In a child after `fork`: its one thread is inside nothing, and the gate's state was the parent's.
pub fn reset_after_fork() {
    STATE.fetch_and(!CLOSED, Ordering::SeqCst);
    CLOSER.store(false, Ordering::Relaxed);
    if let Ok(slots) = SLOTS.try_lock() {
        slots.iter().for_each(|s| s.depth.store(0, Ordering::Relaxed));
    }
}

/// Launches counted in all threads so far.
pub fn launches() -> u64 {
    let slots = SLOTS.lock().unwrap_or_else(|e| e.into_inner());
    slots.iter().map(|s| s.launches.load(Ordering::Relaxed)).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicI64;

    use super::*;

    /// Threads hammer the gate while another one closes and opens it: no thread may be inside while it is closed, and
    /// nobody may be stuck.
    #[test]
    fn nobody_is_inside_a_closed_gate() {
        let before = launches();
        let inside = Arc::new(AtomicI64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let (inside, stop) = (inside.clone(), stop.clone());
                std::thread::spawn(move || {
                    let mut passes = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        let pass = gate();
                        inside.fetch_add(1, Ordering::SeqCst);
                        let nested = launch();
                        std::hint::spin_loop();
                        drop(nested);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(pass);
                        passes += 1;
                    }
                    passes
                })
            })
            .collect();
        for _ in 0..500 {
            assert!(close(Duration::from_secs(20)));
            for _ in 0..20 {
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                std::thread::yield_now();
            }
            open();
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        let passes: u64 = threads.into_iter().map(|t| t.join().unwrap()).sum();
        assert!(passes > 0);
        assert_eq!(launches() - before, passes);

        // A thread that stays inside makes closing give up, and the gate is open afterwards.
        let (enter, entered) = std::sync::mpsc::channel();
        let (leave, left) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let _pass = gate();
            enter.send(()).unwrap();
            let _ = left.recv();
        });
        entered.recv().unwrap();
        assert!(!close(Duration::from_millis(20)));
        drop(gate());
        leave.send(()).unwrap();
        thread.join().unwrap();
        assert!(close(Duration::from_secs(20)));
        open();

        // One that waits for the GPU lets the gate close, and is awaited before the driver's state is taken away.
        let (enter, entered) = std::sync::mpsc::channel();
        let (leave, left) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let wait = waiting();
            enter.send(()).unwrap();
            let _ = left.recv();
            drop(wait);
            // The gate is closed by now: the next wait begins when it opens.
            drop(waiting());
        });
        entered.recv().unwrap();
        assert!(close(Duration::from_secs(20)));
        assert!(!settle(Duration::from_millis(20)), "a thread is still inside");
        open();
        assert!(close(Duration::from_secs(20)));
        leave.send(()).unwrap();
        assert!(settle(Duration::from_secs(20)));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!thread.is_finished(), "the gate is closed to those that wait as well");
        open();
        thread.join().unwrap();
    }
}
