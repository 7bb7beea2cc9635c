//! The gate of `libphos.so` under a model checker.

#[cfg(test)]
#[path = "../../src/gate_core.rs"]
mod gate_core;

/// What the algorithm runs on here: loom's atomics, and a futex made of a mutex and a condition variable, which is what the
/// kernel's is. `membarrier` makes every thread pass a full barrier at a moment of its own; between the two steps of an
/// entering thread that is a barrier there, so both halves are whole ones here.
#[cfg(test)]
mod gate_base {
    use loom::sync::{Condvar, Mutex};

    pub use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

    /// Environment variable that names a part to leave out, to see the model fail.
    pub const BROKEN: &str = "GATE_MODEL_WITHOUT";

    fn whole(part: &str) -> bool {
        static BROKEN_PART: std::sync::OnceLock<String> = std::sync::OnceLock::new();
        BROKEN_PART.get_or_init(|| std::env::var(BROKEN).unwrap_or_default()) != part
    }

    pub fn light_barrier() {
        if whole("light barrier") {
            fence(Ordering::SeqCst);
        }
    }

    pub fn heavy_barrier(_: &State) {
        if whole("heavy barrier") {
            fence(Ordering::SeqCst);
        }
    }

    pub struct State {
        word: AtomicU32,
        sleepers: Mutex<()>,
        woken: Condvar,
    }

    impl State {
        pub fn open() -> Self {
            State { word: AtomicU32::new(0), sleepers: Mutex::new(()), woken: Condvar::new() }
        }
        pub fn load(&self, order: Ordering) -> u32 {
            self.word.load(order)
        }
        pub fn fetch_or(&self, bits: u32, order: Ordering) {
            self.word.fetch_or(bits, order);
        }
        pub fn fetch_and(&self, bits: u32, order: Ordering) {
            self.word.fetch_and(bits, order);
        }
        pub fn sleep_while(&self, value: u32) {
            let sleepers = self.sleepers.lock().unwrap();
            if self.word.load(Ordering::SeqCst) == value {
                drop(self.woken.wait(sleepers).unwrap());
            }
        }
        pub fn wake_all(&self) {
            if whole("wake") {
                let _sleepers = self.sleepers.lock().unwrap();
                self.woken.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use crate::gate_base::{AtomicBool, AtomicU32, BROKEN, State};
    use crate::gate_core::{CALLS, Gate, WAITING};

    /// A process: its gate, the marks of its threads, and what only one may touch at a time: the driver's state.
    struct Process {
        gate: Gate,
        marks: Vec<AtomicU32>,
        driver: Vec<UnsafeCell<u32>>,
    }

    impl Process {
        fn new(threads: usize) -> Arc<Self> {
            Arc::new(Process {
                gate: Gate { state: State::open(), closer: AtomicBool::new(false) },
                marks: (0..threads).map(|_| AtomicU32::new(0)).collect(),
                driver: (0..threads).map(|_| UnsafeCell::new(0)).collect(),
            })
        }

        /// A call of thread `n` that changes something.
        fn call(&self, n: usize, mark: u32) {
            self.gate.enter(&self.marks[n], mark);
            self.touch(n);
            Gate::leave(&self.marks[n], mark);
        }

        /// Loom panics if anybody else touches it at the same time, or may still see an older value.
        fn touch(&self, n: usize) {
            // SAFETY: loom checks that nobody else does.
            self.driver[n].with_mut(|d| unsafe { *d += 1 });
        }

        fn await_all(&self, mask: u32) {
            while self.marks.iter().any(|m| Gate::is_inside(m, mask)) {
                thread::yield_now();
            }
        }

        /// Takes the driver's state away and gives it back; without effect while somebody else does.
        fn park(&self) {
            if !self.gate.claim() {
                return;
            }
            self.gate.shut();
            self.await_all(CALLS);
            self.await_all(u32::MAX);
            (0..self.driver.len()).for_each(|n| self.touch(n));
            self.gate.open();
        }
    }

    fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(model);
    }

    fn calls_and_a_park(threads: usize, mark: u32, preemptions: usize) {
        check(preemptions, move || {
            let process = Process::new(threads);
            let started: Vec<_> = (0..threads)
                .map(|n| {
                    let process = process.clone();
                    thread::spawn(move || {
                        process.call(n, mark);
                        process.call(n, mark);
                    })
                })
                .collect();
            process.park();
            started.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    #[test]
    fn no_call_is_inside_a_closed_gate_and_nobody_sleeps_for_ever() {
        calls_and_a_park(1, 1, 4);
        calls_and_a_park(2, 1, 3);
    }

    #[test]
    fn those_that_wait_for_the_gpu_are_out_before_the_driver_goes() {
        calls_and_a_park(1, WAITING, 4);
    }

    #[test]
    fn a_call_within_a_call_goes_on() {
        check(3, || {
            let process = Process::new(1);
            let other = process.clone();
            let thread = thread::spawn(move || {
                other.gate.enter(&other.marks[0], 1);
                other.call(0, 1);
                other.touch(0);
                Gate::leave(&other.marks[0], 1);
            });
            process.park();
            thread.join().unwrap();
        });
    }

    #[test]
    fn the_gate_has_one_closer_at_a_time() {
        check(3, || {
            let process = Process::new(1);
            let other = process.clone();
            let thread = thread::spawn(move || {
                other.park();
                other.call(0, 1);
            });
            process.park();
            process.park();
            thread.join().unwrap();
        });
    }

    #[test]
    fn without_a_barrier_or_a_wake_the_model_fails() {
        let raced = "Causality violation";
        for (part, what) in [("light barrier", raced), ("heavy barrier", raced), ("wake", "deadlock")] {
            // A model that fails takes its process with it.
            let model = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "tests::those_that_wait_for_the_gpu_are_out_before_the_driver_goes"])
                .args(["--nocapture", "--test-threads=1"])
                .env(BROKEN, part)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&model.stderr);
            assert!(!model.status.success() && text.contains(what), "without the {part}: {text}");
        }
    }
}
