//! The driver's functions for stream-ordered memory.

#![allow(non_snake_case)]

use std::ffi::c_void;
use std::sync::atomic::Ordering;

use crate::cuda::{
    ALLOCATION_PINNED, AccessDesc, DevicePtr, LOCATION_DEVICE, POOL_RESERVED, POOL_RESERVED_HIGH, POOL_USED,
    POOL_USED_HIGH, PoolProps, SUCCESS, Status, Stream,
};
use crate::memory::{self, device_facts};
use crate::real::api;
use crate::streams::{is_capturing, per_thread};
use crate::{gate, pools, table};

/// Allocates from the pool, or lets the driver.
fn allocate(
    to: *mut DevicePtr,
    size: usize,
    pool: Option<usize>,
    stream: Stream,
    driver: impl FnOnce() -> Status,
) -> Status {
    match pool.filter(|_| !to.is_null()).and_then(|pool| pools::allocate(pool, size as u64, stream)) {
        Some(Ok(address)) => {
            // SAFETY: the caller's pointer, checked not to be null.
            unsafe { *to = address };
            SUCCESS
        }
        Some(Err(status)) => status,
        None => {
            let result = driver();
            if result == SUCCESS {
                table::POOLED.fetch_add(size as u64, Ordering::Relaxed);
            }
            result
        }
    }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(to: *mut DevicePtr, size: usize, stream: Stream) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's.
    allocate(to, size, pools::current_pool(), stream, || unsafe { (api().alloc_async)(to, size, stream) })
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync_ptsz(to: *mut DevicePtr, size: usize, stream: Stream) -> Status {
    // SAFETY: the arguments are the caller's.
    unsafe { cuMemAllocAsync(to, size, per_thread(stream)) }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocFromPoolAsync(
    to: *mut DevicePtr,
    size: usize,
    pool: *mut c_void,
    stream: Stream,
) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's.
    allocate(to, size, Some(pool as usize), stream, || unsafe { (api().alloc_pool)(to, size, pool, stream) })
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocFromPoolAsync_ptsz(
    to: *mut DevicePtr,
    size: usize,
    pool: *mut c_void,
    stream: Stream,
) -> Status {
    // SAFETY: the arguments are the caller's.
    unsafe { cuMemAllocFromPoolAsync(to, size, pool, per_thread(stream)) }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeAsync(pointer: DevicePtr, stream: Stream) -> Status {
    let _pass = gate::gate();
    if let Some(status) = pools::free(pointer, stream) {
        return status;
    }
    // Plain memory may be freed in this way too. It waits for the stream, as a free of plain memory may.
    if memory::is_ours(pointer) && !is_capturing(stream) {
        // SAFETY: the arguments are the caller's.
        return unsafe {
            match (api().stream_synchronize)(stream) {
                SUCCESS => memory::cuMemFree_v2(pointer),
                status => status,
            }
        };
    }
    // SAFETY: the arguments are the caller's.
    unsafe { (api().free_async)(pointer, stream) }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeAsync_ptsz(pointer: DevicePtr, stream: Stream) -> Status {
    // SAFETY: the arguments are the caller's.
    unsafe { cuMemFreeAsync(pointer, per_thread(stream)) }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolCreate(pool: *mut *mut c_void, props: *const PoolProps) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's; the driver reads and writes them first.
    unsafe {
        let result = (api().pool_create)(pool, props);
        if result == SUCCESS {
            let p = &*props;
            // A pool that can be shared, or that has a use of its own, stays the driver's.
            let plain = p.kind == ALLOCATION_PINNED
                && p.location.kind == LOCATION_DEVICE
                && p.handle_types == 0
                && p.usage == 0;
            if plain && device_facts(p.location.id).parkable {
                let limit = if p.max_size == 0 { u64::MAX } else { p.max_size as u64 };
                pools::adopt(*pool as usize, p.location.id, limit);
            }
        }
        result
    }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolDestroy(pool: *mut c_void) -> Status {
    let _pass = gate::gate();
    // SAFETY: the argument is the caller's.
    let result = unsafe { (api().pool_destroy)(pool) };
    if result == SUCCESS {
        pools::destroy(pool as usize);
    }
    result
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolTrimTo(pool: *mut c_void, keep: usize) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's.
    let result = unsafe { (api().pool_trim)(pool, keep) };
    if result == SUCCESS {
        pools::trim(pool as usize, keep as u64);
    }
    result
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolSetAccess(
    pool: *mut c_void,
    descs: *const AccessDesc,
    count: usize,
) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's; the driver has read `count` descriptions if it succeeds.
    unsafe {
        match (api().pool_access)(pool, descs, count) {
            SUCCESS if count > 0 => {
                pools::set_access(pool as usize, std::slice::from_raw_parts(descs, count))
            }
            status => status,
        }
    }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolGetAttribute(
    pool: *mut c_void,
    attribute: u32,
    value: *mut c_void,
) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's.
    let result = unsafe { (api().pool_get)(pool, attribute, value) };
    if result == SUCCESS
        && let Some((reserved, used)) = pools::levels(pool as usize)
    {
        let more = match attribute {
            POOL_RESERVED => reserved.current,
            POOL_RESERVED_HIGH => reserved.high,
            POOL_USED => used.current,
            POOL_USED_HIGH => used.high,
            _ => return result,
        };
        // SAFETY: these attributes are 8 bytes wide, and the driver has just written one. Graphs have theirs there.
        unsafe { *value.cast::<u64>() += more };
    }
    result
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolSetAttribute(
    pool: *mut c_void,
    attribute: u32,
    value: *mut c_void,
) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's.
    let result = unsafe { (api().pool_set)(pool, attribute, value) };
    if result == SUCCESS && matches!(attribute, POOL_RESERVED_HIGH | POOL_USED_HIGH) {
        pools::reset_high(pool as usize, attribute == POOL_RESERVED_HIGH);
    }
    result
}

/// A call that waits for the GPU: it does not keep the gate from closing; then pools give memory back, as the driver's do.
macro_rules! waits {
    ($name:ident, $api:ident $(, $arg:ident: $type:ty)*) => {
        /// # Safety
        /// As the driver's function.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> Status {
            let wait = gate::waiting();
            // SAFETY: the arguments are the caller's.
            let result = unsafe { (api().$api)($($arg),*) };
            drop(wait);
            pools::after_wait();
            result
        }
    };
}

waits!(cuStreamSynchronize, stream_synchronize, stream: Stream);
waits!(cuStreamSynchronize_ptsz, stream_synchronize_ptsz, stream: Stream);
waits!(cuEventSynchronize, event_synchronize, event: *mut c_void);
waits!(cuCtxSynchronize, ctx_synchronize);
waits!(cuCtxSynchronize_v2, ctx_synchronize_2, context: *mut c_void);

const _: () = assert!(size_of::<PoolProps>() == 88);
