//! CUDA's older way to share memory between processes (`cuIpcGetMemHandle`), which the driver refuses for memory that can be
//! parked: emulated between the processes of one container.
//!
//! A handle names the process, the allocation and a place in it. Whoever opens one asks that process's library for the
//! memory's fd ([`crate::ipc_door`]) and maps it. Handles of the driver's own (a process that is not of the container made
//! them) go to the driver, and are counted.

#![allow(non_snake_case)]

use std::ffi::c_void;
use std::os::fd::IntoRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock, PoisonError};

use phos_protocol::message::{CLASS_IMPORTED, CLASS_PLAIN, CLASS_SMALL, FLAG_INSIDE};

use crate::cuda::{
    ACCESS_READ_WRITE, AccessDesc, DeviceOrdinal, DevicePtr, HANDLE_FD, INVALID_CONTEXT, INVALID_VALUE,
    IPC_LAZY_PEER_ACCESS, IpcHandle, LOCATION_DEVICE, Location, SUCCESS, Status,
};
use crate::fds::Kept;
use crate::ipc_door::{self, Given};
use crate::memory::{device_facts, unmake};
use crate::real::api;
use crate::table::{self, Mapping, Physical};
use crate::{control, gate, pointers};

/// The first bytes of a handle of this library.
const MAGIC: [u8; 8] = *b"PHOSIPC1";

/// What a handle is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Memory.
    Memory = 1,
    /// An event.
    Event = 2,
}

/// What a handle says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name {
    /// What it is of.
    pub kind: Kind,
    /// The process that made it, in its own namespace.
    pub pid: i32,
    /// That process's [`identity`].
    pub identity: u64,
    /// Id of the physical allocation there.
    pub id: u64,
    /// Where in it the application's allocation begins.
    pub offset: u64,
}

impl Name {
    /// A name of something of this process.
    pub fn own(kind: Kind, id: u64, offset: u64) -> Self {
        Name { kind, pid: std::process::id() as i32, identity: identity(), id, offset }
    }

    /// Whether it is something of this process.
    pub fn is_own(&self) -> bool {
        self.pid == std::process::id() as i32 && self.identity == identity()
    }

    /// As the application passes it around.
    pub fn encode(&self) -> IpcHandle {
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&self.pid.to_le_bytes());
        for (n, word) in [self.identity, self.id, self.offset].into_iter().enumerate() {
            bytes[16 + 8 * n..24 + 8 * n].copy_from_slice(&word.to_le_bytes());
        }
        IpcHandle(bytes)
    }

    /// The reverse; none if the handle is the driver's.
    pub fn decode(handle: &IpcHandle) -> Option<Self> {
        let (magic, rest) = handle.0.split_first_chunk::<8>()?;
        let (kind, rest) = rest.split_first_chunk::<4>()?;
        let (pid, rest) = rest.split_first_chunk::<4>()?;
        let (identity, rest) = rest.split_first_chunk::<8>()?;
        let (id, rest) = rest.split_first_chunk::<8>()?;
        let (offset, _) = rest.split_first_chunk::<8>()?;
        let kind =
            [Kind::Memory, Kind::Event].into_iter().find(|k| u32::from_le_bytes(*kind) == *k as u32)?;
        (*magic == MAGIC).then_some(Name {
            kind,
            pid: i32::from_le_bytes(*pid),
            identity: u64::from_le_bytes(*identity),
            id: u64::from_le_bytes(*id),
            offset: u64::from_le_bytes(*offset),
        })
    }
}

/// A number that tells this process from an earlier one with the same id.
pub fn identity() -> u64 {
    static IDENTITY: OnceLock<u64> = OnceLock::new();
    *IDENTITY.get_or_init(|| {
        let mut number = 0u64;
        // SAFETY: the buffer is 8 bytes of this frame. Where there are no random numbers the id has to do.
        unsafe { libc::getrandom((&raw mut number).cast(), 8, 0) };
        number
    })
}

/// Memory of another process that is mapped here.
struct Opened {
    /// Whose it is: process, its identity, id of the allocation.
    key: (i32, u64, u64),
    address: DevicePtr,
    len: usize,
    /// How often it was opened.
    references: u32,
}

/// Held during a whole open or close, so that nothing is mapped twice.
static OPENED: Mutex<Vec<Opened>> = Mutex::new(Vec::new());

/// Calls `with` with a plain allocation's place in its piece of memory, the piece's id, and the piece. None: it is not this
/// library's.
fn with_plain<R>(
    pointer: DevicePtr,
    with: impl FnOnce(u64, u64, &mut Physical) -> R,
) -> Option<Result<R, Status>> {
    let found = pointers::find(pointer)?;
    if found.pool != 0 {
        // As the driver: memory of pools is shared by its pool.
        return Some(Err(INVALID_VALUE));
    }
    let mut table = table::lock();
    let (start, mapping) = table.mappings.range(..=found.start).next_back()?;
    let (offset, id) = (found.start - start, mapping.physical);
    let physical = table.physical.get_mut(&id)?;
    if !matches!(physical.class, CLASS_PLAIN | CLASS_SMALL) || physical.fd.get().is_none() {
        return None;
    }
    Some(Ok(with(offset, id, physical)))
}

/// Names a plain allocation and lets it be given out. None: it is not this library's.
fn name(pointer: DevicePtr) -> Option<Result<Name, Status>> {
    with_plain(pointer, |offset, id, physical| {
        physical.shared = true;
        Name::own(Kind::Memory, id, offset)
    })
}

/// Whether [`cuIpcGetMemHandle`] would name this memory.
pub fn is_capable(pointer: DevicePtr) -> bool {
    control::reachable().is_some() && matches!(with_plain(pointer, |_, _, _| ()), Some(Ok(())))
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcGetMemHandle(handle: *mut IpcHandle, pointer: DevicePtr) -> Status {
    let _pass = gate::gate();
    if control::reachable().is_some() && !handle.is_null() {
        match name(pointer) {
            Some(Ok(name)) if ipc_door::open() => {
                // SAFETY: checked not to be null, and the caller's for writing.
                unsafe { handle.write_unaligned(name.encode()) };
                return SUCCESS;
            }
            Some(Err(status)) => return status,
            _ => {}
        }
    }
    // SAFETY: the arguments are the caller's.
    counted(unsafe { (api().ipc_get)(handle.cast::<c_void>(), pointer) })
}

/// The driver's own sharing, which prevents a checkpoint.
pub fn counted(result: Status) -> Status {
    if result == SUCCESS {
        table::IPC.fetch_add(1, Ordering::Relaxed);
    }
    result
}

fn desc(device: DeviceOrdinal) -> AccessDesc {
    AccessDesc { location: Location { kind: LOCATION_DEVICE, id: device }, flags: ACCESS_READ_WRITE }
}

/// The ordinal of a device in this process.
fn ordinal(uuid: &[u8; 16]) -> Option<DeviceOrdinal> {
    let mut count = 0;
    // SAFETY: `count` is valid for writing.
    unsafe { (api().device_count)(&mut count) };
    (0..count).find(|device| device_facts(*device).uuid == *uuid)
}

/// Maps memory that was given by another process, for `device` and the one it is on.
fn map(given: Given, device: DeviceOrdinal) -> Result<(DevicePtr, usize), Status> {
    let (api, len) = (api(), given.size as usize);
    let check = |status| if status == SUCCESS { Ok(()) } else { Err(status) };
    let mut access = vec![desc(device)];
    access.extend(ordinal(&given.uuid).filter(|home| *home != device).map(desc));
    let (mut handle, mut address) = (0, 0);
    let mut kept = Kept::new(given.fd.into_raw_fd());
    let os = kept.get().ok_or(INVALID_VALUE)? as usize as *mut c_void;
    // SAFETY: the fd is the memory's; every pointer is valid for its call; what was made is undone if a later step fails.
    let result = unsafe {
        check((api.import)(&mut handle, os, HANDLE_FD)).and_then(|()| {
            let mapped = check((api.reserve)(&mut address, len, 0, 0, 0))
                .and_then(|()| check((api.map)(address, len, 0, handle, 0)))
                .and_then(|()| {
                    check((api.set_access)(address, len, access.as_ptr(), access.len())).inspect_err(|_| {
                        (api.unmap)(address, len);
                    })
                });
            (api.release)(handle);
            mapped
        })
    };
    if let Err(status) = result {
        kept.close();
        if address != 0 {
            // SAFETY: reserved above, nothing is mapped there.
            unsafe { (api.unreserve)(address, len) };
        }
        return Err(status);
    }
    let mut table = table::lock();
    let physical = table.insert(Physical {
        handle: 0,
        fd: kept,
        size: given.size,
        uuid: given.uuid,
        class: CLASS_IMPORTED,
        flags: FLAG_INSIDE,
        references: 0,
        mappings: 0,
        generation: 0,
        asked_types: 0,
        shared: false,
    });
    table.insert_mapping(address, Mapping { len, physical, access, present: true });
    Ok((address, len))
}

/// Opens what another process of the container has named.
fn open_named(name: Name) -> Result<DevicePtr, Status> {
    if name.is_own() {
        return Err(INVALID_CONTEXT);
    }
    let mut device = 0;
    // SAFETY: `device` is valid for writing.
    match unsafe { (api().ctx_device)(&mut device) } {
        SUCCESS => {}
        status => return Err(status),
    }
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (name.pid, name.identity, name.id);
    if let Some(known) = opened.iter_mut().find(|o| o.key == key) {
        let access = desc(device);
        // SAFETY: mapped by this library, and kept so by the lock.
        let status = unsafe { (api().set_access)(known.address, known.len, &access, 1) };
        if status != SUCCESS {
            return Err(status);
        }
        table::lock().set_access(known.address, known.len, &[access]);
        known.references += 1;
        return Ok(known.address + name.offset);
    }
    let given = ipc_door::ask(&name)?;
    if name.offset >= given.size {
        return Err(INVALID_VALUE);
    }
    let (address, len) = map(given, device)?;
    opened.push(Opened { key, address, len, references: 1 });
    Ok(address + name.offset)
}

/// What both versions of the function do.
fn open(
    pointer: *mut DevicePtr,
    handle: IpcHandle,
    flags: u32,
    driver: unsafe extern "C" fn(*mut DevicePtr, IpcHandle, u32) -> Status,
) -> Status {
    let _pass = gate::gate();
    let Some(name) = Name::decode(&handle) else {
        // SAFETY: the arguments are the caller's.
        return counted(unsafe { driver(pointer, handle, flags) });
    };
    if pointer.is_null() || flags != IPC_LAZY_PEER_ACCESS || name.kind != Kind::Memory {
        return INVALID_VALUE;
    }
    match open_named(name) {
        Ok(address) => {
            // SAFETY: checked not to be null, and the caller's for writing.
            unsafe { *pointer = address };
            SUCCESS
        }
        Err(status) => status,
    }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcOpenMemHandle(
    pointer: *mut DevicePtr,
    handle: IpcHandle,
    flags: u32,
) -> Status {
    open(pointer, handle, flags, api().ipc_open_1)
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcOpenMemHandle_v2(
    pointer: *mut DevicePtr,
    handle: IpcHandle,
    flags: u32,
) -> Status {
    open(pointer, handle, flags, api().ipc_open)
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcCloseMemHandle(pointer: DevicePtr) -> Status {
    let _pass = gate::gate();
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(at) = opened.iter().position(|o| (o.address..o.address + o.len as u64).contains(&pointer))
    else {
        // SAFETY: the argument is the caller's.
        return unsafe { (api().ipc_close)(pointer) };
    };
    opened[at].references -= 1;
    if opened[at].references > 0 {
        return SUCCESS;
    }
    // SAFETY: waits for work of the current context that may use the memory, as the driver does.
    unsafe { (api().ctx_synchronize)() };
    let closed = opened.swap_remove(at);
    unmake(closed.address, closed.len)
}

/// In a child after `fork`: it has no driver, and opens nothing of its parent's.
pub fn forget_after_fork() {
    if let Ok(mut opened) = OPENED.try_lock() {
        opened.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_says_what_was_named_and_the_drivers_are_left_alone() {
        let name = Name { kind: Kind::Memory, pid: 7, identity: 8 << 40, id: 9, offset: 512 };
        let handle = name.encode();
        assert_eq!(Name::decode(&handle), Some(name));
        assert!(!name.is_own());
        assert!(Name::own(Kind::Event, 1, 0).is_own());
        for at in [0, 8] {
            let mut other = handle;
            other.0[at] ^= 0x40;
            assert_eq!(Name::decode(&other), None, "byte {at}");
        }
        assert_eq!(Name::decode(&IpcHandle([0; 64])), None);
    }
}
