//! Plain allocations, backed by memory that can be parked; and what is only counted.

#![allow(non_snake_case)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use phos_protocol::message::{CLASS_PLAIN, CLASS_SMALL, FLAG_RDMA};

use crate::carve::{BLOCK, Emptied, LARGEST};
use crate::cuda::{
    ACCESS_READ_WRITE, ALLOCATION_PINNED, AccessDesc, AllocationProp, Context, DEVICE_FD, DEVICE_RDMA_VMM,
    DEVICE_VMM, DeviceOrdinal, DevicePtr, HANDLE_FD, Handle, INVALID_VALUE, LOCATION_DEVICE, Location,
    OUT_OF_MEMORY, SUCCESS, Status,
};
use crate::fds::Kept;
use crate::real::api;
use crate::table::{self, Mapping, Physical, Plain};
use crate::{arena, gate, peers, pools};

/// What matters about a device.
#[derive(Clone, Copy)]
pub struct DeviceFacts {
    pub uuid: [u8; 16],
    /// Memory on it can be made parkable.
    pub parkable: bool,
    /// Memory for GPUDirect must be asked for.
    pub rdma: bool,
}

/// Asks the driver once for each device.
pub fn device_facts(device: DeviceOrdinal) -> DeviceFacts {
    static KNOWN: Mutex<Option<HashMap<DeviceOrdinal, DeviceFacts>>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(|e| e.into_inner());
    *known.get_or_insert_default().entry(device).or_insert_with(|| {
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: `value` is valid for writing.
            let result = unsafe { (api().device_attribute)(&mut value, which, device) };
            result == SUCCESS && value != 0
        };
        let mut uuid = [0; 16];
        // SAFETY: `uuid` is valid for writing.
        let named = unsafe { (api().device_uuid)(&mut uuid, device) } == SUCCESS;
        DeviceFacts {
            uuid,
            parkable: named && attribute(DEVICE_VMM) && attribute(DEVICE_FD),
            // Asked for only where there is an adapter that could use it.
            rdma: attribute(DEVICE_RDMA_VMM) && std::path::Path::new("/dev/infiniband").exists(),
        }
    })
}

/// Properties of plain memory on a device.
fn properties(device: DeviceOrdinal, rdma: bool) -> AllocationProp {
    AllocationProp {
        kind: ALLOCATION_PINNED,
        handle_types: HANDLE_FD,
        location: Location { kind: LOCATION_DEVICE, id: device },
        win32: ptr::null_mut(),
        compression: 0,
        rdma: u8::from(rdma),
        usage: 0,
        reserved: [0; 4],
    }
}

/// Makes `size` bytes (a multiple of [`BLOCK`]) of parkable memory on `device`: its handle, and the fd that keeps it.
pub fn create(device: DeviceOrdinal, size: usize) -> Result<(Handle, Kept), Status> {
    let (api, facts) = (api(), device_facts(device));
    let (mut handle, mut fd) = (0, -1);
    // SAFETY: the pointers are valid for the calls; a handle that is not exported is released.
    unsafe {
        match (api.create)(&mut handle, size, &properties(device, facts.rdma), 0) {
            SUCCESS => {}
            status => return Err(status),
        }
        match (api.export)((&raw mut fd).cast(), handle, HANDLE_FD, 0) {
            SUCCESS => Ok((handle, Kept::new(fd))),
            status => {
                (api.release)(handle);
                Err(status)
            }
        }
    }
}

/// The table's entry for memory of this library's own.
pub fn physical(device: DeviceOrdinal, size: usize, class: u32, fd: Kept) -> Physical {
    let facts = device_facts(device);
    Physical {
        handle: 0,
        fd,
        size: size as u64,
        uuid: facts.uuid,
        class,
        flags: if facts.rdma { FLAG_RDMA } else { 0 },
        references: 0,
        mappings: 0,
        generation: 0,
        asked_types: 0,
        shared: false,
    }
}

/// Makes `size` bytes (a multiple of [`BLOCK`]) of parkable memory on `device`, mapped and accessible from there and for
/// `others`.
pub fn make(
    device: DeviceOrdinal,
    size: usize,
    class: u32,
    others: &[AccessDesc],
) -> Result<DevicePtr, Status> {
    let api = api();
    let check = |status| if status == SUCCESS { Ok(()) } else { Err(status) };
    let (handle, kept) = create(device, size)?;
    let mut address = 0;
    let result = (|| {
        // SAFETY: every pointer is valid for its call; what was made is undone if a later step fails.
        unsafe {
            check((api.reserve)(&mut address, size, 0, 0, 0))?;
            check((api.map)(address, size, 0, handle, 0))?;
            let own = AccessDesc {
                location: Location { kind: LOCATION_DEVICE, id: device },
                flags: ACCESS_READ_WRITE,
            };
            let access: Vec<_> = [own].into_iter().chain(others.iter().copied()).collect();
            check((api.set_access)(address, size, access.as_ptr(), access.len())).inspect_err(|_| {
                (api.unmap)(address, size);
            })?;
            Ok(access)
        }
    })();
    // The mapping keeps the memory; the handle is not needed until it is mapped again.
    // SAFETY: as above.
    unsafe { (api.release)(handle) };
    match result {
        Ok(access) => {
            let mut table = table::lock();
            let physical = table.insert(physical(device, size, class, kept));
            table.insert_mapping(address, Mapping { len: size, physical, access, present: true });
            Ok(address)
        }
        Err(status) => {
            let mut kept = kept;
            kept.close();
            if address != 0 {
                // SAFETY: reserved above, nothing is mapped there.
                unsafe { (api.unreserve)(address, size) };
            }
            Err(status)
        }
    }
}

/// Unmaps what [`make`] made.
pub fn unmake(address: DevicePtr, size: usize) -> Status {
    // SAFETY: `make` mapped exactly this.
    unsafe {
        let result = (api().unmap)(address, size);
        if result == SUCCESS {
            let range = {
                let mut table = table::lock();
                table.remove_mappings(address, size);
                table.leave_range(address)
            };
            match range {
                None => (api().unreserve)(address, size),
                Some(Some((base, len))) => (api().unreserve)(base, len),
                Some(None) => SUCCESS,
            };
        }
        result
    }
}

/// Gives back what is kept empty on `device` and tries again when memory is short.
pub fn make_room<T>(device: DeviceOrdinal, make: impl Fn() -> Result<T, Status>) -> Result<T, Status> {
    match make() {
        Err(OUT_OF_MEMORY) if drop_spare(device) => make(),
        result => result,
    }
}

/// Gives back blocks that are kept though they are empty. Whether there were any.
fn drop_spare(device: DeviceOrdinal) -> bool {
    let spare = table::lock().small.drop_all_empty(device);
    give_back(&spare);
    !spare.is_empty()
}

/// Gives blocks back to the driver.
fn give_back(blocks: &[Emptied]) {
    blocks.iter().for_each(|(base, len)| {
        unmake(*base, *len as usize);
    });
}

/// Allocates `size` bytes in the current context, or says that the driver should.
fn allocate(size: usize) -> Result<Option<DevicePtr>, Status> {
    let api = api();
    let (mut device, mut context) = (0, ptr::null_mut());
    // SAFETY: both pointers are valid for writing.
    unsafe {
        let result = (api.ctx_device)(&mut device);
        if result != SUCCESS {
            return Err(result);
        }
        (api.ctx_get)(&mut context);
    }
    if size == 0 || !device_facts(device).parkable {
        return Ok(None);
    }
    if size as u64 <= LARGEST {
        let home = (device, context as usize);
        if let Some(pointer) = table::lock().small.allocate(home, size as u64) {
            return Ok(Some(pointer));
        }
        let peers = peers::accessors(device);
        let block = make_room(device, || make(device, BLOCK as usize, CLASS_SMALL, &peers.descs))?;
        let mut table = table::lock();
        table.small.add(home, block, BLOCK);
        return Ok(table.small.allocate(home, size as u64));
    }
    let reserved = size.checked_next_multiple_of(BLOCK as usize).ok_or(OUT_OF_MEMORY)?;
    if let Some(pointer) = arena::allocate((device, context as usize), size as u64) {
        return Ok(Some(pointer));
    }
    let peers = peers::accessors(device);
    let pointer = make_room(device, || make(device, reserved, CLASS_PLAIN, &peers.descs))?;
    table::lock().plain.insert(pointer, Plain { size, reserved, context: context as usize });
    Ok(Some(pointer))
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(pointer: *mut DevicePtr, size: usize) -> Status {
    let pass = gate::gate();
    if pointer.is_null() {
        return INVALID_VALUE;
    }
    let mut result = allocate(size);
    if result == Err(OUT_OF_MEMORY) {
        // Whoever stops all other threads must not be inside itself.
        drop(pass);
        let gained = arena::dissolve();
        let _pass = gate::gate();
        if gained {
            result = allocate(size);
        }
    }
    match result {
        Ok(Some(address)) => {
            // SAFETY: the caller's pointer, checked not to be null.
            unsafe { *pointer = address };
            SUCCESS
        }
        Ok(None) => {
            // SAFETY: the arguments are the caller's.
            let result = unsafe { (api().alloc)(pointer, size) };
            if result == SUCCESS {
                table::UNPARKABLE.fetch_add(size as u64, Ordering::Relaxed);
            }
            result
        }
        Err(status) => status,
    }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocPitch_v2(
    pointer: *mut DevicePtr,
    pitch: *mut usize,
    width: usize,
    height: usize,
    element: u32,
) -> Status {
    /// Row alignment the driver uses on all current devices (`CU_DEVICE_ATTRIBUTE_TEXTURE_PITCH_ALIGNMENT` is less).
    const PITCH: usize = 512;
    let rows = width.checked_next_multiple_of(PITCH).and_then(|p| Some((p, p.checked_mul(height)?)));
    let valid =
        !pointer.is_null() && !pitch.is_null() && width > 0 && height > 0 && matches!(element, 4 | 8 | 16);
    let Some((row, size)) = rows.filter(|_| valid) else {
        // The driver knows best what is wrong. SAFETY: the arguments are the caller's.
        return unsafe { (api().alloc_pitch)(pointer, pitch, width, height, element) };
    };
    // SAFETY: `pointer` was checked.
    let result = unsafe { cuMemAlloc_v2(pointer, size) };
    if result == SUCCESS {
        // SAFETY: `pitch` was checked.
        unsafe { *pitch = row };
    }
    result
}

/// Waits for the work of the context in which memory was allocated: freeing implies it.
fn synchronize(context: usize) {
    // SAFETY: the context was current when the memory was allocated; a dead one makes the push fail.
    unsafe {
        if (api().ctx_push)(context as Context) == SUCCESS {
            (api().ctx_synchronize)();
            let mut popped = ptr::null_mut();
            (api().ctx_pop)(&mut popped);
        }
    }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(pointer: DevicePtr) -> Status {
    let _pass = gate::gate();
    // Taken out first: if two threads free the same memory, one of them fails.
    let plain = table::lock().plain.remove(&pointer);
    if let Some(plain) = plain {
        synchronize(plain.context);
        return unmake(pointer, plain.reserved);
    }
    let small = table::lock().small.take(pointer);
    if let Some(piece) = small {
        synchronize(piece.home.1);
        let empty = {
            let mut table = table::lock();
            table.small.give_back(piece);
            // One is kept: a program may allocate and free a single buffer again and again.
            table.small.drop_empty(piece.home, 1)
        };
        give_back(&empty);
        return SUCCESS;
    }
    let piece = table::lock().arenas.take(pointer);
    if let Some(piece) = piece {
        synchronize(piece.home.1);
        let empty = {
            let mut table = table::lock();
            table.arenas.give_back(piece);
            table.arenas.drop_empty(piece.home, 0)
        };
        give_back(&empty);
        return SUCCESS;
    }
    let mut context = ptr::null_mut();
    // SAFETY: `context` is valid for writing.
    unsafe { (api().ctx_get)(&mut context) };
    if let Some(status) = pools::free_now(pointer, || synchronize(context as usize)) {
        return status;
    }
    // SAFETY: the argument is the caller's.
    unsafe { (api().free)(pointer) }
}

/// Whether a plain or small allocation begins at `pointer`.
pub fn is_ours(pointer: DevicePtr) -> bool {
    let table = table::lock();
    let carved = table.small.find(pointer).or_else(|| table.arenas.find(pointer));
    table.plain.contains_key(&pointer) || carved.is_some_and(|p| p.start == pointer)
}

/// Frees what was allocated in a context that is gone.
pub fn free_context(context: usize) {
    let (plain, blocks) = {
        let mut table = table::lock();
        let gone: Vec<_> =
            table.plain.iter().filter(|(_, p)| p.context == context).map(|(a, p)| (*a, p.reserved)).collect();
        for (address, _) in &gone {
            table.plain.remove(address);
        }
        let mut blocks = table.small.drop_owner(context);
        blocks.extend(table.arenas.drop_owner(context));
        (gone, blocks)
    };
    plain.into_iter().for_each(|(address, size)| {
        unmake(address, size);
    });
    give_back(&blocks);
}

/// An allocation that stays the driver's and is only counted.
macro_rules! counted {
    ($name:ident, $api:ident, $counter:ident, $size:ident, $($arg:ident: $type:ty),*) => {
        /// # Safety
        /// As the driver's function.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> Status {
            let _pass = gate::gate();
            // SAFETY: the arguments are the caller's.
            let result = unsafe { (api().$api)($($arg),*) };
            if result == SUCCESS {
                let counter: &AtomicU64 = &table::$counter;
                counter.fetch_add($size as u64, Ordering::Relaxed);
            }
            result
        }
    };
}

counted!(cuMemAllocManaged, alloc_managed, MANAGED, size, pointer: *mut DevicePtr, size: usize, flags: u32);
counted!(cuMemAllocHost_v2, alloc_host, PINNED, size, pointer: *mut *mut c_void, size: usize);
counted!(cuMemHostAlloc, host_alloc, PINNED, size, pointer: *mut *mut c_void, size: usize, flags: u32);
