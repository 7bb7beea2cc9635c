//! The application's own virtual-memory calls: tracked, so that the memory can be parked.
//!
//! Handles given to the application are this library's own, since the driver's change when memory is attached again.

#![allow(non_snake_case)]

use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::slice;
use std::sync::atomic::Ordering;

use phos_protocol::message::{CLASS_IMPORTED, CLASS_VMM, FLAG_RDMA};

use crate::cuda::{
    ALLOCATION_PINNED, AccessDesc, AllocationProp, DevicePtr, HANDLE_FD, Handle, INVALID_VALUE,
    LOCATION_DEVICE, SUCCESS, Status,
};
use crate::fds::Kept;
use crate::gate;
use crate::memory::device_facts;
use crate::real::api;
use crate::table::{self, Mapping, Physical};

/// High bits of a handle of this library. The driver's are addresses or small numbers.
const TAG: u64 = 0x5048 << 48;
const TAG_MASK: u64 = 0xffff << 48;

fn id_of(handle: Handle) -> Option<u64> {
    (handle & TAG_MASK == TAG).then_some(handle & !TAG_MASK)
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemCreate(
    handle: *mut Handle,
    size: usize,
    prop: *const AllocationProp,
    flags: u64,
) -> Status {
    let _pass = gate::gate();
    let api = api();
    if handle.is_null() || prop.is_null() {
        // SAFETY: the arguments are the caller's; the driver refuses them.
        return unsafe { (api.create)(handle, size, prop, flags) };
    }
    // SAFETY: not null, and the caller's for reading.
    let asked = unsafe { *prop };
    let parkable = asked.kind == ALLOCATION_PINNED
        && asked.location.kind == LOCATION_DEVICE
        && device_facts(asked.location.id).parkable;
    let wanted = AllocationProp { handle_types: asked.handle_types | HANDLE_FD, ..asked };
    let mut real = 0;
    // SAFETY: the pointers are valid; what the caller passed is passed on.
    let created = parkable && unsafe { (api.create)(&mut real, size, &wanted, flags) } == SUCCESS;
    if !created {
        // Not of a kind that can be parked, or an error that is the application's own.
        // SAFETY: the arguments are the caller's.
        let result = unsafe { (api.create)(handle, size, prop, flags) };
        if result == SUCCESS {
            table::FOREIGN.fetch_add(1, Ordering::Relaxed);
        }
        return result;
    }
    let (mut fd, mut kept): (RawFd, Kept) = (-1, Kept::NONE);
    // SAFETY: `fd` is valid for writing and the handle was made exportable.
    if unsafe { (api.export)((&raw mut fd).cast(), real, HANDLE_FD, 0) } == SUCCESS {
        kept = Kept::new(fd);
    }
    let id = table::lock().insert(Physical {
        handle: real,
        fd: kept,
        size: size as u64,
        uuid: device_facts(asked.location.id).uuid,
        class: CLASS_VMM,
        flags: if asked.rdma != 0 { FLAG_RDMA } else { 0 },
        references: 1,
        mappings: 0,
        generation: 0,
        asked_types: asked.handle_types,
        shared: false,
    });
    // SAFETY: checked not to be null.
    unsafe { *handle = TAG | id };
    SUCCESS
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemRelease(handle: Handle) -> Status {
    let _pass = gate::gate();
    let Some(id) = id_of(handle) else {
        // SAFETY: the argument is the caller's.
        return unsafe { (api().release)(handle) };
    };
    let mut table = table::lock();
    let Some(physical) = table.physical.get_mut(&id).filter(|p| p.references > 0) else {
        return INVALID_VALUE;
    };
    physical.references -= 1;
    let mut result = SUCCESS;
    if physical.references == 0 {
        // SAFETY: the last reference to the driver's handle is given up here.
        result = unsafe { (api().release)(physical.handle) };
        physical.handle = 0;
    }
    table.drop_if_unused(id);
    result
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemMap(
    address: DevicePtr,
    size: usize,
    offset: usize,
    handle: Handle,
    flags: u64,
) -> Status {
    let _pass = gate::gate();
    let Some(id) = id_of(handle) else {
        // SAFETY: the arguments are the caller's.
        return unsafe { (api().map)(address, size, offset, handle, flags) };
    };
    let mut table = table::lock();
    let Some(physical) = table.physical.get_mut(&id).filter(|p| p.handle != 0) else { return INVALID_VALUE };
    // SAFETY: the driver's own handle in place of this library's.
    let result = unsafe { (api().map)(address, size, offset, physical.handle, flags) };
    if result == SUCCESS {
        // Of imported memory the driver tells no size; it is mapped whole.
        physical.size = physical.size.max(size as u64);
        table.insert_mapping(address, Mapping { len: size, physical: id, access: Vec::new(), present: true });
    }
    result
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemUnmap(address: DevicePtr, size: usize) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's.
    let result = unsafe { (api().unmap)(address, size) };
    if result == SUCCESS {
        table::lock().remove_mappings(address, size);
    }
    result
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemSetAccess(
    address: DevicePtr,
    size: usize,
    descs: *const AccessDesc,
    count: usize,
) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's.
    let result = unsafe { (api().set_access)(address, size, descs, count) };
    if result == SUCCESS && !descs.is_null() {
        // SAFETY: the driver has just read `count` of them there.
        let descs = unsafe { slice::from_raw_parts(descs, count) };
        table::lock().set_access(address, size, descs);
    }
    result
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemExportToShareableHandle(
    out: *mut c_void,
    handle: Handle,
    kind: u32,
    flags: u64,
) -> Status {
    let _pass = gate::gate();
    let Some(id) = id_of(handle) else {
        // SAFETY: the arguments are the caller's.
        return unsafe { (api().export)(out, handle, kind, flags) };
    };
    let mut table = table::lock();
    let Some(physical) = table.physical.get_mut(&id) else { return INVALID_VALUE };
    physical.shared = true;
    if let Some(fd) = physical.fd.get().filter(|_| kind == HANDLE_FD && !out.is_null()) {
        // SAFETY: a copy of an fd this library owns, close-on-exec like the driver's.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if copy >= 0 {
            // SAFETY: for this kind `out` points to an int of the caller.
            unsafe { out.cast::<c_int>().write(copy) };
            return SUCCESS;
        }
    }
    // SAFETY: the arguments are the caller's, with the driver's own handle.
    unsafe { (api().export)(out, physical.handle, kind, flags) }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemImportFromShareableHandle(
    out: *mut Handle,
    os: *mut c_void,
    kind: u32,
) -> Status {
    let _pass = gate::gate();
    let mut real = 0;
    // SAFETY: the arguments are the caller's, `real` is valid for writing.
    let result = unsafe { (api().import)(&mut real, os, kind) };
    if result != SUCCESS || out.is_null() {
        return result;
    }
    if kind != HANDLE_FD {
        table::FOREIGN.fetch_add(1, Ordering::Relaxed);
        // SAFETY: checked not to be null.
        unsafe { *out = real };
        return SUCCESS;
    }
    // SAFETY: an all-zero property block is valid and is only written to; the fd is the caller's.
    let (prop, fd) = unsafe {
        let mut prop: AllocationProp = std::mem::zeroed();
        (api().properties)(&mut prop, real);
        (prop, libc::fcntl(os as usize as RawFd, libc::F_DUPFD_CLOEXEC, 3))
    };
    let id = table::lock().insert(Physical {
        handle: real,
        fd: if fd >= 0 { Kept::new(fd) } else { Kept::NONE },
        // Known when it is mapped.
        size: 0,
        uuid: device_facts(prop.location.id).uuid,
        class: CLASS_IMPORTED,
        flags: 0,
        references: 1,
        mappings: 0,
        generation: 0,
        asked_types: HANDLE_FD,
        shared: true,
    });
    // SAFETY: checked not to be null.
    unsafe { *out = TAG | id };
    SUCCESS
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemRetainAllocationHandle(out: *mut Handle, address: *mut c_void) -> Status {
    let _pass = gate::gate();
    let mut table = table::lock();
    let at = address as DevicePtr;
    let id = table
        .mappings
        .range(..=at)
        .next_back()
        .filter(|(start, m)| at - **start < m.len as u64 && !out.is_null())
        .map(|(_, m)| m.physical);
    let Some(physical) = id.and_then(|id| table.physical.get_mut(&id)) else {
        // SAFETY: the arguments are the caller's.
        return unsafe { (api().retain)(out, address) };
    };
    if physical.references == 0 {
        // SAFETY: `handle` is valid for writing.
        let result = unsafe { (api().retain)(&mut physical.handle, address) };
        if result != SUCCESS {
            return result;
        }
    }
    physical.references += 1;
    // SAFETY: checked not to be null.
    unsafe { *out = TAG | id.unwrap_or_default() };
    SUCCESS
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAllocationPropertiesFromHandle(
    prop: *mut AllocationProp,
    handle: Handle,
) -> Status {
    let _pass = gate::gate();
    let table = table::lock();
    let ours = id_of(handle).and_then(|id| table.physical.get(&id));
    let real = ours.map_or(handle, |p| p.handle);
    // SAFETY: the arguments are the caller's, with the driver's own handle.
    let result = unsafe { (api().properties)(prop, real) };
    if let Some(p) = ours.filter(|p| result == SUCCESS && p.class == CLASS_VMM) {
        // SAFETY: the driver has just written there.
        unsafe { (*prop).handle_types = p.asked_types };
    }
    result
}

/// The driver's handle in place of this library's.
fn real_handle(handle: Handle) -> Handle {
    let table = table::lock();
    id_of(handle).and_then(|id| table.physical.get(&id)).map_or(handle, |p| p.handle)
}

/// Memory that becomes part of an object which cannot be parked: its handle is translated, and the use counted.
macro_rules! bound {
    ($name:ident, $api:ident, $($arg:ident: $type:ty),*) => {
        /// # Safety
        /// As the driver's function.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> Status {
            let _pass = gate::gate();
            // SAFETY: the arguments are the caller's, with the driver's own handle.
            let result = unsafe { (api().$api)($(bound!(@$arg $arg)),*) };
            if result == SUCCESS {
                table::FOREIGN.fetch_add(1, Ordering::Relaxed);
            }
            result
        }
    };
    (@memory $arg:ident) => { real_handle($arg) };
    (@$other:ident $arg:ident) => { $arg };
}

bound!(cuMulticastBindMem, multicast_bind, object: Handle, offset: usize, memory: Handle, at: usize, size: usize, flags: u64);
bound!(cuMulticastBindMem_v2, multicast_bind_2, object: Handle, device: c_int, offset: usize, memory: Handle, at: usize, size: usize, flags: u64);
bound!(cuLogicalEndpointBindMem, endpoint_bind, object: u64, device: c_int, offset: u64, memory: Handle, at: u64, size: u64, flags: u64);
bound!(cuLogicalEndpointBindAddr, endpoint_bind_address, object: u64, device: c_int, offset: u64, address: *mut c_void, size: u64, flags: u64);
