//! What a job is doing, for whoever watches it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How often the log hears of bytes that are being moved.
const LOG_EVERY: Duration = Duration::from_secs(1);

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
        }
    }
}

impl Progress {
    /// Enters a step that will move `total` bytes (0: no measure).
    pub fn step(&self, name: &'static str, total: u64) {
        tracing::info!(step = name, total, elapsed_ms = self.begin.elapsed().as_millis() as u64, "step");
        *self.name.lock().unwrap_or_else(|e| e.into_inner()) = name;
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        let now = self.begin.elapsed();
        self.step_began.store(now.as_millis() as u64, Ordering::Relaxed);
        self.log_at.store((now + LOG_EVERY).as_millis() as u64, Ordering::Relaxed);
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
    }

    /// Records what took `time` from `begin` on.
    pub fn span(&self, name: &str, track: &str, begin: Instant, time: Duration) {
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let begin_ms = ms(begin.saturating_duration_since(self.begin));
        let span = Span { name: name.into(), track: track.into(), begin_ms, ms: ms(time) };
        self.spans.lock().unwrap_or_else(|e| e.into_inner()).push(span);
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
            progress.step("copy", 100 << 20);
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
}
