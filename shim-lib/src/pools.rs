//! Stream-ordered memory from pools whose memory this library makes, so that it can be parked.
//!
//! The driver's pool objects stay what they are: their attributes and access rights are kept there, allocations of captured
//! streams come from them, and so does all memory of pools that can be shared with other processes.

use std::collections::{BTreeMap, HashMap};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use phos_protocol::message::CLASS_POOL;

use crate::cache::{Cache, Stretch};
use crate::carve::{self, BLOCK, Carver, LARGEST};
use crate::cuda::{
    AccessDesc, DeviceOrdinal, DevicePtr, INVALID_VALUE, LOCATION_DEVICE, OUT_OF_MEMORY,
    POOL_RELEASE_THRESHOLD, SUCCESS, Status, Stream,
};
use crate::memory::{self, device_facts, make, unmake};
use crate::real::api;
use crate::streams::{self, Mark, Relaxed};
use crate::table;

/// A pool, by a number that is never used twice (the driver's handles are).
type Key = usize;

/// Bytes now, and the most there have been.
#[derive(Debug, Default, Clone, Copy)]
pub struct Level {
    /// Now.
    pub current: u64,
    /// Most since it was last reset.
    pub high: u64,
}

impl Level {
    fn add(&mut self, bytes: u64) {
        self.current += bytes;
        self.high = self.high.max(self.current);
    }
}

/// One pool.
#[derive(Debug)]
struct Pool {
    /// The driver's handle; 0 once the application has destroyed it.
    handle: usize,
    device: DeviceOrdinal,
    /// Most bytes it may reserve.
    limit: u64,
    /// Rights of other devices.
    access: Vec<AccessDesc>,
    cache: Cache<Mark>,
    small: Carver,
    /// Pieces and blocks: bytes by address.
    pieces: BTreeMap<DevicePtr, u64>,
    reserved: Level,
    used: Level,
}

/// One allocation.
#[derive(Debug, Clone, Copy)]
struct Live {
    pool: Key,
    size: u64,
    stretch: Stretch,
}

#[derive(Debug, Default)]
struct State {
    keys: HashMap<usize, Key>,
    last: Key,
    pools: HashMap<Key, Pool>,
    live: BTreeMap<DevicePtr, Live>,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);
/// Pieces of all pools. Whoever waits for the GPU looks at pools only if there are any.
static PIECES: AtomicUsize = AtomicUsize::new(0);

fn with<T>(f: impl FnOnce(&mut State) -> T) -> T {
    let mut state: MutexGuard<'_, Option<State>> = STATE.lock().unwrap_or_else(|e| e.into_inner());
    f(state.get_or_insert_default())
}

impl State {
    /// Enters a pool of the driver's.
    fn adopt(&mut self, handle: usize, device: DeviceOrdinal, limit: u64) -> Key {
        self.last += 1;
        self.keys.insert(handle, self.last);
        let pool = Pool {
            handle,
            device,
            limit,
            access: Vec::new(),
            cache: Cache::default(),
            small: Carver::default(),
            pieces: BTreeMap::new(),
            reserved: Level::default(),
            used: Level::default(),
        };
        self.pools.insert(self.last, pool);
        self.last
    }

    fn pool(&mut self, handle: usize) -> Option<&mut Pool> {
        self.pools.get_mut(self.keys.get(&handle)?)
    }
}

impl Pool {
    /// Makes usable what is behind finished work.
    fn retire(&mut self) {
        let (marks, small) = self.cache.retire(Mark::is_done);
        marks.into_iter().for_each(Mark::destroy);
        small.into_iter().for_each(|start| self.recycle(start));
    }

    /// A small stretch becomes usable.
    fn recycle(&mut self, start: DevicePtr) {
        if let Some(piece) = self.small.take(start) {
            self.small.give_back(piece);
        }
    }

    /// Takes free memory out, until `keep` bytes are left or all that is left is in use.
    fn trim(&mut self, key: Key, keep: u64) -> Vec<(DevicePtr, u64)> {
        let mut gone = self.cache.trim(self.reserved.current.saturating_sub(keep));
        let left = self.reserved.current - gone.iter().map(|(_, len)| len).sum::<u64>();
        if left > keep {
            let blocks = self.small.drop_empty((self.device, key), 0);
            gone.extend(blocks);
        }
        for (start, len) in &gone {
            self.pieces.remove(start);
            self.reserved.current -= len;
        }
        gone
    }

    /// Bytes the application wants to be kept though they are free.
    fn threshold(&self) -> u64 {
        let mut bytes = 0u64;
        if self.handle != 0 {
            // SAFETY: a live pool, and `bytes` is valid for writing this attribute.
            unsafe {
                (api().pool_get)(self.handle as Stream, POOL_RELEASE_THRESHOLD, (&raw mut bytes).cast())
            };
        }
        bytes
    }
}

fn release(pieces: Vec<(DevicePtr, u64)>) {
    PIECES.fetch_sub(pieces.len(), Ordering::Relaxed);
    for (address, len) in pieces {
        unmake(address, len as usize);
    }
}

/// The pool that `cuMemAllocAsync` on this thread's device uses.
pub fn current_pool() -> Option<usize> {
    let (mut device, mut pool) = (0, ptr::null_mut());
    // SAFETY: both are valid for writing.
    let found = unsafe {
        (api().ctx_device)(&mut device) == SUCCESS && (api().device_pool)(&mut pool, device) == SUCCESS
    };
    found.then_some(pool as usize)
}

/// Takes charge of a pool's memory. `limit`: most bytes it may reserve.
pub fn adopt(handle: usize, device: DeviceOrdinal, limit: u64) {
    with(|s| s.adopt(handle, device, limit));
}

/// The key of a pool whose memory this library makes. A device's default pool is met here for the first time.
fn managed(handle: usize) -> Option<Key> {
    if let Some(key) = with(|s| s.keys.get(&handle).copied()) {
        return Some(key);
    }
    let mut count = 0;
    // SAFETY: `count` and `pool` are valid for writing.
    unsafe { (api().device_count)(&mut count) };
    let device = (0..count).find(|device| {
        let mut pool = ptr::null_mut();
        // SAFETY: as above.
        unsafe { (api().default_pool)(&mut pool, *device) == SUCCESS && pool as usize == handle }
    })?;
    device_facts(device)
        .parkable
        .then(|| with(|s| s.keys.get(&handle).copied().unwrap_or_else(|| s.adopt(handle, device, u64::MAX))))
}

/// Allocates for work that is queued on `stream` from now on. `None`: the driver must.
pub fn allocate(handle: usize, size: u64, stream: Stream) -> Option<Result<DevicePtr, Status>> {
    if size == 0 || handle == 0 || streams::is_capturing(stream) {
        return None;
    }
    let key = managed(handle)?;
    let _relaxed = Relaxed::new();
    let result = find_room(key, size, stream).or_else(|status| {
        if status != OUT_OF_MEMORY {
            return Err(status);
        }
        // First what is free, then what becomes free when the GPU has done its work.
        trim_all(0);
        find_room(key, size, stream).or_else(|_| {
            // SAFETY: a context is current: memory has just been asked for in it.
            unsafe { (api().ctx_synchronize)() };
            trim_all(0);
            find_room(key, size, stream)
        })
    });
    Some(result)
}

fn find_room(key: Key, size: u64, stream: Stream) -> Result<DevicePtr, Status> {
    let is_small = size <= LARGEST;
    let need = if is_small {
        carve::rounded(size)
    } else {
        size.checked_next_multiple_of(BLOCK).ok_or(OUT_OF_MEMORY)?
    };
    let len = if is_small { BLOCK } else { need };
    let identity = streams::identity(stream);
    type Missing = (DeviceOrdinal, Vec<AccessDesc>);
    let found = with(|s| -> Result<Result<DevicePtr, Missing>, Status> {
        let pool = s.pools.get_mut(&key).ok_or(INVALID_VALUE)?;
        let reused = identity.and_then(|stream| pool.cache.reuse(stream, need, is_small));
        let stretch = match reused {
            Some((stretch, mark)) => {
                mark.destroy();
                Some(stretch)
            }
            None => {
                pool.retire();
                pool.take_free(key, need, is_small)
            }
        };
        match stretch {
            Some(stretch) => Ok(Ok(s.enter(key, size, stretch))),
            None if pool.reserved.current.saturating_add(len) > pool.limit => Err(OUT_OF_MEMORY),
            None => Ok(Err((pool.device, pool.access.clone()))),
        }
    })?;
    let (device, access) = match found {
        Ok(pointer) => return Ok(pointer),
        Err(more) => more,
    };
    let start = memory::make_room(device, || make(device, len as usize, CLASS_POOL, &access))?;
    PIECES.fetch_add(1, Ordering::Relaxed);
    with(|s| {
        let pool = s.pools.get_mut(&key).ok_or(INVALID_VALUE)?;
        pool.pieces.insert(start, len);
        pool.reserved.add(len);
        if is_small {
            pool.small.add((device, key), start, BLOCK);
        } else {
            pool.cache.add_idle(start, len);
        }
        let stretch = pool.take_free(key, need, is_small).ok_or(OUT_OF_MEMORY)?;
        Ok(s.enter(key, size, stretch))
    })
}

impl Pool {
    /// Memory that nothing uses.
    fn take_free(&mut self, key: Key, need: u64, small: bool) -> Option<Stretch> {
        if small {
            let start = self.small.allocate((self.device, key), need)?;
            return Some(Stretch { start, len: need, small });
        }
        self.cache.take_idle(need).map(|(start, len)| Stretch { start, len, small })
    }
}

impl State {
    fn enter(&mut self, pool: Key, size: u64, stretch: Stretch) -> DevicePtr {
        self.live.insert(stretch.start, Live { pool, size, stretch });
        if let Some(pool) = self.pools.get_mut(&pool) {
            pool.used.add(stretch.len);
        }
        stretch.start
    }

    fn leave(&mut self, pointer: DevicePtr) -> Option<Live> {
        let live = self.live.remove(&pointer)?;
        if let Some(pool) = self.pools.get_mut(&live.pool) {
            pool.used.current -= live.stretch.len;
        }
        Some(live)
    }
}

/// Frees behind the work that is queued on `stream` so far. `None`: not memory of these pools, or a captured stream.
pub fn free(pointer: DevicePtr, stream: Stream) -> Option<Status> {
    if !with(|s| s.live.contains_key(&pointer)) || streams::is_capturing(stream) {
        return None;
    }
    let _relaxed = Relaxed::new();
    let live = with(|s| s.leave(pointer))?;
    let identity = streams::identity(stream);
    match Mark::record(stream) {
        Ok(mark) => {
            with(|s| {
                if let Some(pool) = s.pools.get_mut(&live.pool) {
                    pool.cache.free(identity, live.stretch, mark);
                }
            });
            Some(SUCCESS)
        }
        Err(status) => {
            with(|s| s.enter(live.pool, live.size, live.stretch));
            Some(status)
        }
    }
}

/// Frees what `synchronize` has waited for. `None`: not memory of these pools.
pub fn free_now(pointer: DevicePtr, synchronize: impl FnOnce()) -> Option<Status> {
    let live = with(|s| s.leave(pointer))?;
    synchronize();
    with(|s| {
        if let Some(pool) = s.pools.get_mut(&live.pool) {
            if live.stretch.small {
                pool.recycle(live.stretch.start);
            } else {
                pool.cache.add_idle(live.stretch.start, live.stretch.len);
            }
        }
    });
    after_wait();
    Some(SUCCESS)
}

/// Gives back what is free in every pool, down to `keep` bytes each.
fn trim_all(keep: u64) {
    let gone: Vec<_> = with(|s| {
        let trimmed = s.pools.iter_mut().flat_map(|(key, pool)| {
            pool.retire();
            pool.trim(*key, keep)
        });
        trimmed.collect()
    });
    release(gone);
}

/// Gives back what is free beyond each pool's release threshold, as the driver does whenever the application waits.
pub fn after_wait() {
    if PIECES.load(Ordering::Relaxed) != 0 {
        give_back();
    }
}

#[cold]
fn give_back() {
    let _pass = crate::gate::gate();
    let _relaxed = Relaxed::new();
    let gone: Vec<_> = with(|s| {
        let trimmed = s.pools.iter_mut().flat_map(|(key, pool)| {
            pool.retire();
            if pool.reserved.current == pool.used.current {
                return Vec::new();
            }
            pool.trim(*key, pool.threshold())
        });
        let gone = trimmed.collect();
        s.pools.retain(|_, pool| pool.handle != 0 || !pool.pieces.is_empty());
        gone
    });
    release(gone);
}

/// `cuMemPoolTrimTo`.
pub fn trim(handle: usize, keep: u64) {
    let _relaxed = Relaxed::new();
    let gone = with(|s| {
        let key = s.keys.get(&handle).copied()?;
        let pool = s.pools.get_mut(&key)?;
        pool.retire();
        Some(pool.trim(key, keep))
    });
    release(gone.unwrap_or_default());
}

/// `cuMemPoolDestroy`: what is allocated stays until it is freed.
pub fn destroy(handle: usize) {
    let pool = with(|s| {
        let key = s.keys.remove(&handle)?;
        s.pools.get_mut(&key).map(|pool| pool.handle = 0)
    });
    if pool.is_some() {
        after_wait();
    }
}

/// `cuMemPoolSetAccess`, for what is mapped already and what will be.
pub fn set_access(handle: usize, descs: &[AccessDesc]) -> Status {
    let pieces: Vec<_> = with(|s| {
        let Some(pool) = s.pool(handle) else { return Vec::new() };
        for desc in
            descs.iter().filter(|d| d.location.kind == LOCATION_DEVICE && d.location.id != pool.device)
        {
            pool.access.retain(|known| known.location != desc.location);
            if desc.flags != 0 {
                pool.access.push(*desc);
            }
        }
        pool.pieces.iter().map(|(start, len)| (*start, *len as usize)).collect()
    });
    for (start, len) in pieces {
        // SAFETY: a piece that is mapped; the application keeps its pool while it changes it.
        let status = unsafe { (api().set_access)(start, len, descs.as_ptr(), descs.len()) };
        if status != SUCCESS {
            return status;
        }
        table::lock().set_access(start, len, descs);
    }
    SUCCESS
}

/// Bytes reserved and used in a pool whose memory this library makes.
pub fn levels(handle: usize) -> Option<(Level, Level)> {
    with(|s| s.pool(handle).map(|p| (p.reserved, p.used)))
}

/// Resets the highest level of reserved (or used) bytes.
pub fn reset_high(handle: usize, of_reserved: bool) {
    with(|s| {
        if let Some(pool) = s.pool(handle) {
            let level = if of_reserved { &mut pool.reserved } else { &mut pool.used };
            level.high = level.current;
        }
    });
}

/// Start, size and pool of the allocation that contains `address`.
pub fn find(address: DevicePtr) -> Option<(DevicePtr, u64, usize)> {
    with(|s| {
        let (start, live) = s.live.range(..=address).next_back()?;
        let pool = s.pools.get(&live.pool)?;
        (address - start < live.size).then_some((*start, live.size, pool.handle))
    })
}

/// Number of allocations.
pub fn count() -> u64 {
    with(|s| s.live.len() as u64)
}

/// A context is gone, and with it its events and all its work.
pub fn context_is_gone(context: usize) {
    with(|s| {
        let marks = s.pools.values_mut().flat_map(|p| p.cache.marks());
        marks.filter(|m| m.context == context).for_each(Mark::context_is_gone);
    });
}
