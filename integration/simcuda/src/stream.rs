//! Streams: queues of work, each worked off by a thread of its own, ordered as CUDA orders them.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

use crate::code::{Code, Result, SUCCESS};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Becomes done once.
#[derive(Default)]
pub struct Token {
    done: Mutex<bool>,
    changed: Condvar,
}

impl Token {
    fn set(&self) {
        *lock(&self.done) = true;
        self.changed.notify_all();
    }
    /// Waits.
    pub fn wait(&self) {
        let mut done = lock(&self.done);
        while !*done {
            done = self.changed.wait(done).unwrap_or_else(|e| e.into_inner());
        }
    }
    /// Waits until `deadline` at most.
    fn wait_until(&self, deadline: Instant) -> bool {
        let mut done = lock(&self.done);
        while !*done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            done = self.changed.wait_timeout(done, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        true
    }
    /// Looks.
    pub fn is_done(&self) -> bool {
        *lock(&self.done)
    }
}

type Work = Box<dyn FnOnce() -> Result<()> + Send>;

struct Item {
    after: Vec<Arc<Token>>,
    work: Work,
    done: Arc<Token>,
}

/// One queue.
pub struct Stream {
    /// Waits for, and is waited for by, the legacy default stream.
    blocking: bool,
    queue: Mutex<(VecDeque<Item>, bool)>,
    changed: Condvar,
    last: Mutex<Option<Arc<Token>>>,
    /// Never used twice in a process.
    pub number: u64,
    /// Work is meant for a graph, which is not simulated.
    pub capturing: AtomicBool,
}

static NUMBER: AtomicU64 = AtomicU64::new(1);

impl Stream {
    fn start(blocking: bool, error: Arc<AtomicU32>) -> Arc<Self> {
        let stream = Arc::new(Stream {
            blocking,
            queue: Mutex::default(),
            changed: Condvar::new(),
            last: Mutex::new(None),
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            capturing: AtomicBool::new(false),
        });
        let own = stream.clone();
        thread::spawn(move || own.work_off(&error));
        stream
    }

    fn work_off(&self, error: &AtomicU32) {
        loop {
            let item = {
                let mut queue = lock(&self.queue);
                loop {
                    if let Some(item) = queue.0.pop_front() {
                        break item;
                    }
                    if queue.1 {
                        return;
                    }
                    queue = self.changed.wait(queue).unwrap_or_else(|e| e.into_inner());
                }
            };
            item.after.iter().for_each(|t| t.wait());
            // After an error nothing runs any more, as on a GPU that has faulted.
            if error.load(Ordering::SeqCst) == SUCCESS
                && let Err(code) = (item.work)()
            {
                let _ = error.compare_exchange(SUCCESS, code, Ordering::SeqCst, Ordering::SeqCst);
            }
            item.done.set();
        }
    }

    /// The newest piece of work.
    pub fn last(&self) -> Option<Arc<Token>> {
        lock(&self.last).clone()
    }
}

/// All streams of a context.
pub struct Streams {
    error: Arc<AtomicU32>,
    legacy: Arc<Stream>,
    others: Mutex<HashMap<usize, Arc<Stream>>>,
    /// The last work of streams that were destroyed.
    ending: Mutex<Vec<Arc<Token>>>,
    /// Held while work is queued, so that the order between streams is well defined.
    order: Mutex<usize>,
}

impl Default for Streams {
    fn default() -> Self {
        let error = Arc::new(AtomicU32::new(SUCCESS));
        let legacy = Stream::start(true, error.clone());
        Streams {
            error,
            legacy,
            others: Mutex::default(),
            ending: Mutex::default(),
            order: Mutex::new(0x100),
        }
    }
}

impl Streams {
    /// The context's sticky error.
    pub fn error(&self) -> Code {
        self.error.load(Ordering::SeqCst)
    }

    /// A new stream; returns its handle.
    pub fn create(&self, blocking: bool) -> usize {
        let mut next = lock(&self.order);
        *next += 0x10;
        lock(&self.others).insert(*next, Stream::start(blocking, self.error.clone()));
        *next
    }

    /// Ends a stream once its work is done.
    pub fn destroy(&self, handle: usize) -> bool {
        let Some(stream) = lock(&self.others).remove(&handle) else { return false };
        let mut ending = lock(&self.ending);
        ending.retain(|t| !t.is_done());
        ending.extend(stream.last());
        lock(&stream.queue).1 = true;
        stream.changed.notify_all();
        true
    }

    /// A stream by its handle: 0 and 1 are the default stream.
    pub fn get(&self, handle: usize) -> Option<Arc<Stream>> {
        match handle {
            0 | 1 => Some(self.legacy.clone()),
            other => lock(&self.others).get(&other).cloned(),
        }
    }

    /// Queues work, after `extra` as well.
    pub fn submit(&self, stream: &Arc<Stream>, extra: Vec<Arc<Token>>, work: Work) -> Arc<Token> {
        let _order = lock(&self.order);
        let mut after = extra;
        if Arc::ptr_eq(stream, &self.legacy) {
            after.extend(lock(&self.others).values().filter(|s| s.blocking).filter_map(|s| s.last()));
        } else if stream.blocking {
            after.extend(self.legacy.last());
        }
        let done = Arc::new(Token::default());
        *lock(&stream.last) = Some(done.clone());
        lock(&stream.queue).0.push_back(Item { after, work, done: done.clone() });
        stream.changed.notify_all();
        done
    }

    fn newest(&self) -> Vec<Arc<Token>> {
        let others = lock(&self.others);
        let live = others.values().chain([&self.legacy]).filter_map(|s| s.last());
        live.chain(lock(&self.ending).iter().cloned()).collect()
    }

    /// Waits for everything.
    pub fn synchronize(&self) -> Code {
        self.newest().iter().for_each(|t| t.wait());
        self.error()
    }

    /// Waits for everything until `deadline`; whether it is done.
    pub fn drain(&self, deadline: Instant) -> bool {
        self.newest().iter().all(|t| t.wait_until(deadline))
    }
}
