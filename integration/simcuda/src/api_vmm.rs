//! The virtual-memory calls.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use crate::api_system::{export, put};
use crate::code::{INVALID_VALUE, NOT_SUPPORTED, Result};
use crate::device;
use crate::space::{GRANULARITY, Physical, change};

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Prop {
    kind: u32,
    handle_types: u32,
    location_kind: u32,
    location: c_int,
    win32: *mut c_void,
    flags: u64,
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Access {
    location_kind: u32,
    location: c_int,
    flags: u32,
}

/// Waits for kernels that may be using what is about to go, as the real driver does.
fn settle() {
    if let Ok(context) = crate::context::current() {
        context.streams.synchronize();
    }
}

fn read<T: Copy>(from: *const T) -> Result<T> {
    if from.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: CUDA's contract: the caller's pointer is valid for reading a value of this type.
    Ok(unsafe { *from })
}

fn physical(handle: u64) -> Result<Arc<Physical>> {
    change(|s| s.handles.get(&handle).map(|h| h.0.clone())).ok_or(INVALID_VALUE)
}

export! {
    fn cuMemGetAllocationGranularity(to: *mut usize, _prop: *const Prop, _option: u32) { put(to, GRANULARITY as usize) }
    fn cuMemAddressReserve(to: *mut u64, size: usize, _alignment: usize, _address: u64, _flags: u64) {
        put(to, change(|s| s.reserve(size as u64))?)
    }
    fn cuMemAddressFree(address: u64, size: usize) { change(|s| s.unreserve(address, size as u64)) }
    fn cuMemCreate(to: *mut u64, size: usize, prop: *const Prop, _flags: u64) {
        let prop = read(prop)?;
        // CU_MEM_ALLOCATION_TYPE_PINNED on CU_MEM_LOCATION_TYPE_DEVICE.
        if prop.kind != 1 || prop.location_kind != 1 || size == 0 || !(size as u64).is_multiple_of(GRANULARITY) {
            return Err(INVALID_VALUE);
        }
        device::check(prop.location)?;
        device::hold_node();
        // CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR is 1.
        let made = Physical::allocate(prop.location, size as u64, prop.handle_types & 1 != 0)?;
        put(to, change(|s| s.insert_handle(made)))
    }
    fn cuMemRelease(handle: u64) {
        change(|s| {
            let entry = s.handles.get_mut(&handle).ok_or(INVALID_VALUE)?;
            entry.1 -= 1;
            if entry.1 == 0 {
                s.handles.remove(&handle);
            }
            Ok(())
        })
    }
    fn cuMemMap(address: u64, size: usize, offset: usize, handle: u64, _flags: u64) {
        if offset != 0 {
            return Err(INVALID_VALUE);
        }
        let physical = physical(handle)?;
        change(|s| s.map(address, size as u64, physical, false))
    }
    fn cuMemUnmap(address: u64, size: usize) {
        settle();
        change(|s| s.unmap(address, size as u64))
    }
    fn cuMemSetAccess(address: u64, size: usize, descs: *const Access, count: usize) {
        let descs = (0..count).map(|i| read(descs.wrapping_add(i))).collect::<Result<Vec<_>>>()?;
        change(|s| {
            let end = address + size as u64;
            let inside: Vec<_> = s.mappings.range(address..end).map(|(a, m)| (*a, m.len)).collect();
            if inside.iter().map(|(_, n)| n).sum::<u64>() != size as u64 {
                return Err(INVALID_VALUE);
            }
            inside.iter().for_each(|(a, _)| {
                if let Some(m) = s.mappings.get_mut(a) {
                    for desc in &descs {
                        m.access.retain(|d| *d != desc.location);
                        m.access.extend((desc.flags != 0).then_some(desc.location));
                    }
                }
            });
            Ok(())
        })
    }
    fn cuMemExportToShareableHandle(to: *mut c_void, handle: u64, kind: u32, _flags: u64) {
        if kind != 1 {
            return Err(NOT_SUPPORTED);
        }
        put(to.cast::<c_int>(), physical(handle)?.export()?)
    }
    fn cuMemImportFromShareableHandle(to: *mut u64, os: *mut c_void, kind: u32) {
        if kind != 1 {
            return Err(NOT_SUPPORTED);
        }
        device::hold_node();
        let imported = Physical::import(os as usize as c_int)?;
        put(to, change(|s| s.insert_handle(imported)))
    }
    fn cuMemRetainAllocationHandle(to: *mut u64, address: *mut c_void) {
        let handle = change(|s| {
            let (start, m) = s.mappings.range(..=address as u64).next_back().ok_or(INVALID_VALUE)?;
            if address as u64 >= start + m.len || m.plain {
                return Err(INVALID_VALUE);
            }
            let physical = m.physical.clone();
            let known = s.handles.iter_mut().find(|(_, h)| Arc::ptr_eq(&h.0, &physical));
            Ok(match known {
                Some((handle, entry)) => {
                    entry.1 += 1;
                    *handle
                }
                None => s.insert_handle(physical),
            })
        })?;
        put(to, handle)
    }
    fn cuMemGetAllocationPropertiesFromHandle(to: *mut Prop, handle: u64) {
        let physical = physical(handle)?;
        let handle_types = u32::from(physical.exportable || physical.imported);
        put(to, Prop { kind: 1, handle_types, location_kind: 1, location: physical.device, win32: std::ptr::null_mut(), flags: 0 })
    }
}
