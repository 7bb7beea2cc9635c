//! What a job is doing, for whoever watches it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

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
    }

    /// Counts bytes of the present step.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
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
