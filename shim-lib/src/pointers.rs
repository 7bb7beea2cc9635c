//! What an address is: the answers that the application's own allocations get, not those of the blocks beneath.

#![allow(non_snake_case)]

use std::ffi::c_void;

use crate::carve::Carver;
use crate::cuda::{DevicePtr, SUCCESS, Status};
use crate::real::api;
use crate::{gate, ipc, pools, table};

/// `CU_POINTER_ATTRIBUTE_CONTEXT`.
const CONTEXT: u32 = 1;
/// `CU_POINTER_ATTRIBUTE_BUFFER_ID`.
const BUFFER_ID: u32 = 7;
/// `CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE`.
const IPC_CAPABLE: u32 = 10;
/// `CU_POINTER_ATTRIBUTE_RANGE_START_ADDR`.
const RANGE_START: u32 = 11;
/// `CU_POINTER_ATTRIBUTE_RANGE_SIZE`.
const RANGE_SIZE: u32 = 12;

/// `CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE`.
const POOL: u32 = 17;

/// Numbers of small allocations and of those in arenas, apart from the driver's buffer ids.
const SMALL_ID: u64 = 1 << 62;
const ARENA_ID: u64 = 1 << 61;

/// An allocation as the application asked for it.
pub struct Allocation {
    /// Where it begins.
    pub start: DevicePtr,
    size: u64,
    /// The context it was made in, 0 for none.
    context: usize,
    /// The pool it came from, 0 for none.
    pub pool: usize,
    /// Its buffer id, if it is not the driver's.
    id: Option<u64>,
}

/// The allocation at an address.
pub fn find(address: DevicePtr) -> Option<Allocation> {
    if let Some((start, size, pool)) = pools::find(address) {
        return Some(Allocation { start, size, context: 0, pool, id: None });
    }
    let table = table::lock();
    let carved = |carver: &Carver, kind| carver.find(address).map(|p| (p, kind));
    if let Some((p, kind)) = carved(&table.small, SMALL_ID).or_else(|| carved(&table.arenas, ARENA_ID)) {
        let id = Some(kind | p.serial);
        return Some(Allocation { start: p.start, size: p.size, context: p.home.1, pool: 0, id });
    }
    let (start, _) = table.mappings.range(..=address).next_back()?;
    let plain = table.plain.get(start)?;
    let inside = address - start < plain.size as u64;
    inside.then_some(Allocation {
        start: *start,
        size: plain.size as u64,
        context: plain.context,
        pool: 0,
        id: None,
    })
}

/// This library's answer: a value of 8 bytes, as all of these have.
fn answer(attribute: u32, pointer: DevicePtr) -> Option<u64> {
    if !matches!(attribute, CONTEXT | BUFFER_ID | RANGE_START | RANGE_SIZE | POOL) {
        return None;
    }
    let found = find(pointer)?;
    match attribute {
        // Of memory from virtual-memory calls the driver knows no context.
        CONTEXT => (found.context != 0).then_some(found.context as u64),
        BUFFER_ID => found.id,
        POOL => (found.pool != 0).then_some(found.pool as u64),
        RANGE_START => Some(found.start),
        _ => Some(found.size),
    }
}

/// Says of memory that has CUDA IPC by this library that it has, which the driver has denied.
///
/// # Safety
/// The driver has just written an attribute's value to `data`.
unsafe fn admit(attribute: u32, pointer: DevicePtr, data: *mut c_void) {
    if attribute == IPC_CAPABLE && !data.is_null() && ipc::is_capable(pointer) {
        // SAFETY: a boolean that the driver has written; whatever its width, this is the byte that tells.
        unsafe { data.cast::<u8>().write(1) };
    }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAddressRange_v2(
    base: *mut DevicePtr,
    size: *mut usize,
    pointer: DevicePtr,
) -> Status {
    let _pass = gate::gate();
    let Some(found) = find(pointer) else {
        // SAFETY: the arguments are the caller's.
        return unsafe { (api().address_range)(base, size, pointer) };
    };
    // SAFETY: either pointer may be null, otherwise it is the caller's for writing.
    unsafe {
        if !base.is_null() {
            *base = found.start;
        }
        if !size.is_null() {
            *size = found.size as usize;
        }
    }
    SUCCESS
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(
    data: *mut c_void,
    attribute: u32,
    pointer: DevicePtr,
) -> Status {
    let _pass = gate::gate();
    match answer(attribute, pointer) {
        Some(value) if !data.is_null() => {
            // SAFETY: these attributes are 8 bytes wide, and `data` is the caller's for writing them.
            unsafe { data.cast::<u64>().write_unaligned(value) };
            SUCCESS
        }
        // SAFETY: the arguments are the caller's.
        _ => unsafe {
            let result = (api().pointer_attribute)(data, attribute, pointer);
            if result == SUCCESS {
                admit(attribute, pointer, data);
            }
            result
        },
    }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttributes(
    count: u32,
    attributes: *const u32,
    data: *mut *mut c_void,
    pointer: DevicePtr,
) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's.
    let result = unsafe { (api().pointer_attributes)(count, attributes, data, pointer) };
    if result != SUCCESS || attributes.is_null() || data.is_null() {
        return result;
    }
    for i in 0..count as usize {
        // SAFETY: the driver has just read and written `count` of them; those with an answer are 8 bytes wide.
        unsafe {
            let to = *data.add(i);
            if let Some(value) = answer(*attributes.add(i), pointer).filter(|_| !to.is_null()) {
                to.cast::<u64>().write_unaligned(value);
            }
            admit(*attributes.add(i), pointer, to);
        }
    }
    SUCCESS
}
