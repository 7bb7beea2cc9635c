//! Pools of stream-ordered memory: their handles, attributes and access rights. Their memory is plain memory.

use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::Mutex;

use crate::api_memory::allocate;
use crate::api_system::{export, put};
use crate::code::{INVALID_VALUE, Result};
use crate::{context, device};

/// The handle of device 0's default pool.
const FIRST: usize = 0x9001_0000;

#[derive(Default)]
struct Pools {
    /// Attributes of every pool that was made or changed, by its handle.
    attributes: HashMap<usize, HashMap<u32, u64>>,
    current: HashMap<c_int, usize>,
    made: usize,
}

static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

fn pools<T>(f: impl FnOnce(&mut Pools) -> T) -> T {
    f(POOLS.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default())
}

fn default(device: c_int) -> usize {
    FIRST + device as usize
}

fn is_pool(pools: &Pools, handle: usize) -> Result<()> {
    let known = pools.attributes.contains_key(&handle)
        || (0..device::machine().devices).any(|d| default(d) == handle);
    known.then_some(()).ok_or(INVALID_VALUE)
}

/// Whether an attribute is a number of bytes (of 8) and not a switch (of 4).
fn wide(attribute: u32) -> Result<bool> {
    match attribute {
        1..=3 => Ok(false),
        4..=8 => Ok(true),
        _ => Err(INVALID_VALUE),
    }
}

export! {
    fn cuDeviceGetDefaultMemPool(to: *mut usize, ordinal: c_int) { device::check(ordinal)?; put(to, default(ordinal)) }
    fn cuDeviceGetMemPool(to: *mut usize, ordinal: c_int) {
        device::check(ordinal)?;
        put(to, pools(|p| p.current.get(&ordinal).copied()).unwrap_or(default(ordinal)))
    }
    fn cuDeviceSetMemPool(ordinal: c_int, handle: usize) {
        device::check(ordinal)?;
        pools(|p| {
            is_pool(p, handle)?;
            p.current.insert(ordinal, handle);
            Ok(())
        })
    }
    fn cuMemPoolCreate(to: *mut usize, props: *const u32) {
        // SAFETY: CUDA's contract; CUmemPoolProps begins with the kind of allocation.
        if props.is_null() || unsafe { *props } != 1 {
            return Err(INVALID_VALUE);
        }
        put(to, pools(|p| {
            p.made += 1;
            let handle = FIRST + 0x1000 * p.made;
            p.attributes.insert(handle, HashMap::new());
            handle
        }))
    }
    fn cuMemPoolDestroy(handle: usize) {
        pools(|p| p.attributes.remove(&handle)).map(|_| ()).ok_or(INVALID_VALUE)
    }
    fn cuMemPoolTrimTo(handle: usize, _keep: usize) { pools(|p| is_pool(p, handle)) }
    fn cuMemPoolSetAccess(handle: usize, _descs: *const u32, _count: usize) { pools(|p| is_pool(p, handle)) }
    fn cuMemPoolGetAttribute(handle: usize, attribute: u32, value: *mut u64) {
        let known = pools(|p| -> Result<u64> {
            is_pool(p, handle)?;
            Ok(p.attributes.get(&handle).and_then(|a| a.get(&attribute).copied()).unwrap_or(0))
        })?;
        if wide(attribute)? { put(value, known) } else { put(value.cast::<u32>(), known as u32) }
    }
    fn cuMemPoolSetAttribute(handle: usize, attribute: u32, value: *const u64) {
        // SAFETY: CUDA's contract: a value of the attribute's width.
        let value = unsafe { if wide(attribute)? { *value } else { u64::from(*value.cast::<u32>()) } };
        pools(|p| {
            is_pool(p, handle)?;
            p.attributes.entry(handle).or_default().insert(attribute, value);
            Ok(())
        })
    }
    fn cuMemAllocFromPoolAsync(to: *mut u64, size: usize, handle: usize, _on: usize) {
        context::current()?;
        pools(|p| is_pool(p, handle))?;
        allocate(to, size)
    }
}
