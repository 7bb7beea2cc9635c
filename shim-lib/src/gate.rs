//! The gate: stops new GPU work in every thread, at the cost of a few nanoseconds while it is open.
//!
//! Every thread has a mark of its own that says how deep it is inside the driver. Entering sets the mark, then looks at
//! the gate; closing sets the gate, then looks at the marks ([`crate::gate_core`]). Between the two steps of a side a memory
//! barrier is needed, and only the closing side pays for it: `membarrier(2)` makes every running thread execute one.
//!
//! A thread that only waits for the GPU inside the driver does not keep the gate from closing: what it waits for may take
//! a while. But it has to be out of the driver before the driver's state is taken away, see [`settle`].

use std::cell::Cell;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::gate_base::State;
use crate::gate_core::{CALLS, CLOSED, Gate, WAITING};
use crate::thread_slot;

static GATE: Gate = Gate { state: State::open(), closer: AtomicBool::new(false) };

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
        Gate::leave(&self.0.depth, 1);
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
    GATE.enter(&slot.depth, 1);
    Pass(slot)
}

/// A thread's leave to wait for the GPU inside the driver.
pub struct Wait(&'static Slot);

impl Drop for Wait {
    fn drop(&mut self) {
        Gate::leave(&self.0.depth, WAITING);
    }
}

/// Enters to wait for the GPU, waiting first while the gate is closed.
pub fn waiting() -> Wait {
    let slot = own_slot();
    GATE.enter(&slot.depth, WAITING);
    Wait(slot)
}

/// Enters and counts a launch.
#[inline(always)]
pub fn launch() -> Pass {
    let pass = gate();
    // Only this thread writes its counter.
    pass.0.launches.store(pass.0.launches.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    pass
}

/// Closes the gate and waits until no thread is inside, but for those that wait for the GPU. If that takes longer than
/// `patience` the gate is opened again and `false` returned.
pub fn close(patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while !GATE.claim() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    GATE.shut();
    let closed = empty(deadline, CALLS);
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
            slots.iter().any(|s| Gate::is_inside(&s.depth, mask))
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
    GATE.open();
}

/// In a child after `fork`: its one thread is inside nothing, and the gate's state was the parent's.
pub fn reset_after_fork() {
    GATE.state.fetch_and(!CLOSED, Ordering::SeqCst);
    GATE.closer.store(false, Ordering::Relaxed);
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
