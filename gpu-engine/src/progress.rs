//! What a job is doing, for whoever watches it: a person, and the watchdog that ends a worker which does nothing any more.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::EngineError;
use crate::fault::{self, named};

/// How often the log hears of bytes that are being moved.
const LOG_EVERY: Duration = Duration::from_secs(1);

named! {
    /// The states of a job. Entering one is where tests make faults, see [`fault`].
    pub enum State {
        /// Folder, processes, what cannot be saved, space.
        Preflight = "preflight",
        /// Copying while the program runs.
        Precopy = "pre-copy",
        /// Every gate closes, memory is handed over.
        Park = "park",
        /// The driver saves its own state.
        Detach = "driver checkpoint",
        /// The lower runtime's checkpoint.
        Dump = "dump",
        /// The way back to running.
        Wake = "wake",
        /// Spare memory goes to the image.
        Copy = "copy",
        /// The image becomes complete.
        Commit = "commit",
        /// An image is opened and checked.
        Open = "open image",
        /// It goes to the GPU.
        Load = "load",
        /// What a dead worker left is put right.
        Recover = "recover",
        /// The memory that only the keeper has left is written.
        Finish = "finish image",
    }
}

/// A snapshot of a job's progress.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    /// The step, in a word or two.
    pub name: &'static str,
    /// Bytes done in this step.
    pub done: u64,
    /// Bytes this step will move; 0 if it has no such measure.
    pub total: u64,
    /// Milliseconds since the job began.
    pub elapsed_ms: u64,
    /// The job is over.
    pub finished: bool,
}

/// A stretch of time of a job, for a timeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What was done.
    pub name: String,
    /// Who did it: a process, or a part of the engine.
    pub track: String,
    /// Begin, milliseconds since the job began.
    pub begin_ms: f64,
    /// Length, milliseconds.
    pub ms: f64,
}

/// Written by the job, read by watchers. Counting bytes is one relaxed addition.
#[derive(Debug)]
pub struct Progress {
    begin: Instant,
    name: Mutex<&'static str>,
    done: AtomicU64,
    total: AtomicU64,
    /// When the step began and when the log hears of it next, milliseconds since the job began.
    step_began: AtomicU64,
    log_at: AtomicU64,
    finished: AtomicBool,
    spans: Mutex<Vec<Span>>,
    /// Requests and threads under way. With none the job may stand still as long as it likes.
    busy: AtomicU32,
    /// When something last happened, milliseconds since `begin`.
    beat: AtomicU64,
    /// Waits that have limits of their own.
    allowed: Mutex<Vec<(u64, Instant, String)>>,
    next: AtomicU64,
}

/// While it lives, the job is under way.
#[must_use]
pub struct Busy<'a>(&'a Progress);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::SeqCst);
    }
}

/// While it lives, the job may wait until its own limit.
#[must_use]
pub struct Allowance<'a>(&'a Progress, u64);

impl Drop for Allowance<'_> {
    fn drop(&mut self) {
        self.0.beat();
        self.0.waits().retain(|(id, ..)| *id != self.1);
    }
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            begin: Instant::now(),
            name: Mutex::new("starting"),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            step_began: AtomicU64::new(0),
            log_at: AtomicU64::new(0),
            finished: AtomicBool::new(false),
            spans: Mutex::new(Vec::new()),
            busy: AtomicU32::new(0),
            beat: AtomicU64::new(0),
            allowed: Mutex::default(),
            next: AtomicU64::new(0),
        }
    }
}

impl Progress {
    /// Enters a state that will move `total` bytes (0: no measure). The error is one that a test has made.
    pub fn step(&self, state: State, total: u64) -> Result<(), EngineError> {
        let name = state.name();
        tracing::info!(step = name, total, elapsed_ms = self.elapsed_ms(), "step");
        *self.name.lock().unwrap_or_else(|e| e.into_inner()) = name;
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        let now = self.begin.elapsed();
        self.step_began.store(now.as_millis() as u64, Ordering::Relaxed);
        self.log_at.store((now + LOG_EVERY).as_millis() as u64, Ordering::Relaxed);
        self.beat();
        fault::at(state)
    }

    /// Counts bytes of the present step. Now and then the log says how far it is.
    pub fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let now = self.begin.elapsed().as_millis() as u64;
        let due = self.log_at.load(Ordering::Relaxed);
        let next = now + LOG_EVERY.as_millis() as u64;
        // Of several threads that see it is time, one says so.
        if now >= due && self.log_at.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            let (step, total) = (self.now().name, self.total.load(Ordering::Relaxed));
            let ms = now.saturating_sub(self.step_began.load(Ordering::Relaxed)).max(1);
            let left_ms = u128::from(total.saturating_sub(done)) * u128::from(ms) / u128::from(done.max(1));
            let gb_s = (done as f64 / 1e4 / ms as f64).round() / 1e2;
            tracing::info!(step, done, total, gb_s, left_ms = left_ms as u64, "progress");
        }
        self.beat();
    }

    fn elapsed_ms(&self) -> u64 {
        self.begin.elapsed().as_millis() as u64
    }

    /// Something has happened.
    pub fn beat(&self) {
        self.beat.fetch_max(self.elapsed_ms(), Ordering::Relaxed);
    }

    fn waits(&self) -> std::sync::MutexGuard<'_, Vec<(u64, Instant, String)>> {
        self.allowed.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A request or a thread is under way.
    pub fn busy(&self) -> Busy<'_> {
        self.beat();
        self.busy.fetch_add(1, Ordering::SeqCst);
        Busy(self)
    }

    /// Whether a request or a thread is under way.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst) > 0
    }

    /// Waiting for `what` may take up to `limit`, whatever else happens or does not.
    pub fn allow(&self, what: impl Into<String>, limit: Duration) -> Allowance<'_> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        // A limit beyond what the clock can hold is none.
        let far = Duration::from_secs(u32::MAX.into());
        self.waits().push((id, Instant::now() + limit.min(far), what.into()));
        Allowance(self, id)
    }

    /// What the job waits for longer than it may: than its own limit, or, where it has none, than `stall`.
    pub fn overdue(&self, stall: Duration) -> Option<String> {
        if !self.is_busy() {
            return None;
        }
        let waits = self.waits();
        if let Some((.., what)) = waits.iter().find(|(_, deadline, _)| Instant::now() > *deadline) {
            return Some(format!("{what} did not end in the time allowed"));
        }
        let still = Duration::from_millis(self.elapsed_ms() - self.beat.load(Ordering::Relaxed));
        if !waits.is_empty() || still < stall {
            return None;
        }
        let name = *self.name.lock().unwrap_or_else(|e| e.into_inner());
        Some(format!("nothing happened for {} s in the step '{name}'", stall.as_secs()))
    }

    /// Records what took `time` from `begin` on.
    pub fn span(&self, name: &str, track: &str, begin: Instant, time: Duration) {
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let begin_ms = ms(begin.saturating_duration_since(self.begin));
        let span = Span { name: name.into(), track: track.into(), begin_ms, ms: ms(time) };
        self.spans.lock().unwrap_or_else(|e| e.into_inner()).push(span);
        self.beat();
    }

    /// Everything recorded so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// The job is over.
    pub fn finish(&self) {
        self.finished.store(true, Ordering::Relaxed);
    }

    /// When the job began.
    pub fn began(&self) -> Instant {
        self.begin
    }

    /// Where the job stands.
    pub fn now(&self) -> Step {
        Step {
            name: *self.name.lock().unwrap_or_else(|e| e.into_inner()),
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
            elapsed_ms: self.begin.elapsed().as_millis() as u64,
            finished: self.finished.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::Arc;
    use std::thread;

    use super::*;

    /// What a log writes.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_log_hears_of_long_steps_now_and_then() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let progress = Progress::default();
            progress.step(State::Copy, 100 << 20).unwrap();
            (0..10).for_each(|_| progress.add(1 << 20));
            thread::sleep(LOG_EVERY);
            (0..10).for_each(|_| progress.add(1 << 20));
        });
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().filter(|l| l.contains(" progress step=")).collect();
        let [line] = lines.as_slice() else { panic!("{text}") };
        for word in [
            "step=\"copy\"",
            &format!("done={}", 11 << 20),
            &format!("total={}", 100 << 20),
            "gb_s=0.01",
            "left_ms=",
        ] {
            assert!(line.contains(word), "{word} is missing in {line}");
        }
    }

    #[test]
    fn a_job_that_stands_still_is_noticed_and_one_that_waits_within_its_limit_is_not() {
        let progress = Progress::default();
        let (short, long) = (Duration::from_millis(20), Duration::from_secs(600));
        std::thread::sleep(short * 2);
        assert_eq!(progress.overdue(short), None, "nothing is under way");
        let busy = progress.busy();
        assert_eq!(progress.overdue(short), None, "it has just begun");
        std::thread::sleep(short * 2);
        assert!(progress.overdue(short).is_some_and(|t| t.contains("'starting'")));
        let wait = progress.allow("the driver", long);
        assert_eq!(progress.overdue(short), None);
        let expired = progress.allow("the disk", Duration::ZERO);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(progress.overdue(short).as_deref(), Some("the disk did not end in the time allowed"));
        drop((expired, wait));
        assert_eq!(progress.overdue(short), None, "the end of a wait is something that happens");
        drop(busy);
        std::thread::sleep(short * 2);
        assert_eq!(progress.overdue(short), None);
    }
}
