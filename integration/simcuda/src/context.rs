//! Contexts: primary ones, made ones, and which is current in a thread.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::code::{INVALID_CONTEXT, Result, SUCCESS};
use crate::device;
use crate::stream::Streams;

/// A context.
pub struct Context {
    /// Its device.
    pub device: i32,
    /// Its streams.
    pub streams: Streams,
    /// Its limits by `CUlimit`.
    pub limits: Mutex<HashMap<u32, usize>>,
    /// Devices whose memory it may access.
    pub peers: Mutex<HashSet<i32>>,
}

#[derive(Default)]
struct Contexts {
    all: HashMap<usize, Arc<Context>>,
    primary: HashMap<i32, (usize, u32)>,
    next: usize,
}

static CONTEXTS: Mutex<Option<Contexts>> = Mutex::new(None);

thread_local! {
    static STACK: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

fn contexts() -> MutexGuard<'static, Option<Contexts>> {
    let mut guard = CONTEXTS.lock().unwrap_or_else(|e| e.into_inner());
    guard.get_or_insert_default();
    guard
}

fn make(contexts: &mut Contexts, device: i32) -> usize {
    contexts.next += 0x1000;
    let handle = 0xc0de_0000 + contexts.next;
    let context = Context {
        device,
        streams: Streams::default(),
        limits: Mutex::new(HashMap::from([(0, 1024)])),
        peers: Mutex::default(),
    };
    contexts.all.insert(handle, Arc::new(context));
    device::hold_node();
    handle
}

/// A new context.
pub fn create(device: i32) -> usize {
    contexts().as_mut().map_or(0, |c| make(c, device))
}

/// Ends a context.
pub fn destroy(handle: usize) -> bool {
    contexts().as_mut().is_some_and(|c| c.all.remove(&handle).is_some())
}

/// The device's primary context, made if need be.
pub fn retain_primary(device: i32) -> usize {
    let mut guard = contexts();
    let Some(c) = guard.as_mut() else { return 0 };
    let (handle, count) = c.primary.get(&device).copied().unwrap_or((0, 0));
    let handle = if count == 0 && !c.all.contains_key(&handle) { make(c, device) } else { handle };
    c.primary.insert(device, (handle, count + 1));
    handle
}

/// Gives up one reference. The context itself is kept: making it anew is what nothing here depends on.
pub fn release_primary(device: i32) -> bool {
    contexts().as_mut().and_then(|c| c.primary.get_mut(&device)).is_some_and(|p| {
        let held = p.1 > 0;
        p.1 = p.1.saturating_sub(1);
        held
    })
}

/// Whether the device's primary context is in use.
pub fn primary_active(device: i32) -> bool {
    contexts().as_ref().and_then(|c| c.primary.get(&device)).is_some_and(|p| p.1 > 0)
}

/// A context by its handle.
pub fn get(handle: usize) -> Result<Arc<Context>> {
    contexts().as_ref().and_then(|c| c.all.get(&handle).cloned()).ok_or(INVALID_CONTEXT)
}

/// All contexts.
pub fn all() -> Vec<Arc<Context>> {
    contexts().as_ref().map(|c| c.all.values().cloned().collect()).unwrap_or_default()
}

/// The thread's context, whatever its state.
pub fn current_handle() -> usize {
    STACK.with_borrow(|s| s.last().copied().unwrap_or(0))
}

/// The thread's context.
pub fn current() -> Result<Arc<Context>> {
    get(current_handle())
}

/// The thread's context, unless it has failed.
pub fn usable() -> Result<Arc<Context>> {
    let context = current()?;
    match context.streams.error() {
        SUCCESS => Ok(context),
        code => Err(code),
    }
}

/// Replaces the top of the thread's stack.
pub fn set_current(handle: usize) {
    STACK.with_borrow_mut(|s| {
        s.pop();
        if handle != 0 {
            s.push(handle);
        }
    });
}

/// Pushes.
pub fn push(handle: usize) {
    STACK.with_borrow_mut(|s| s.push(handle));
}

/// Pops.
pub fn pop() -> Option<usize> {
    STACK.with_borrow_mut(Vec::pop)
}
