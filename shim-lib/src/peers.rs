//! Peer access: the driver grants it to the memory it made itself; to this library's it is granted here.

#![allow(non_snake_case)]

use std::ptr;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use phos_protocol::message::{CLASS_PLAIN, CLASS_SMALL};

use crate::cuda::{
    ACCESS_READ_WRITE, AccessDesc, Context, DeviceOrdinal, LOCATION_DEVICE, Location, SUCCESS, Status,
};
use crate::memory::device_facts;
use crate::real::api;
use crate::{gate, table};

/// One context may use another's memory.
struct Grant {
    context: usize,
    peer: usize,
    accessor: DeviceOrdinal,
    owner: DeviceOrdinal,
}

/// Held for reading while memory is made, so that none is made that a new grant misses.
static GRANTS: RwLock<Vec<Grant>> = RwLock::new(Vec::new());

/// Whoever may access a device's memory; no more are granted while this lives.
pub struct Accessors {
    _grants: RwLockReadGuard<'static, Vec<Grant>>,
    /// Rights of other devices.
    pub descs: Vec<AccessDesc>,
}

fn desc(device: DeviceOrdinal, flags: u32) -> AccessDesc {
    AccessDesc { location: Location { kind: LOCATION_DEVICE, id: device }, flags }
}

/// The devices that may access plain memory on `owner`.
pub fn accessors(owner: DeviceOrdinal) -> Accessors {
    let grants = GRANTS.read().unwrap_or_else(PoisonError::into_inner);
    let mut devices: Vec<_> = grants.iter().filter(|g| g.owner == owner).map(|g| g.accessor).collect();
    devices.sort_unstable();
    devices.dedup();
    let descs = devices.into_iter().map(|device| desc(device, ACCESS_READ_WRITE)).collect();
    Accessors { _grants: grants, descs }
}

/// The device of a context.
fn device_of(context: Context) -> Option<DeviceOrdinal> {
    let (mut device, mut popped) = (0, ptr::null_mut());
    // SAFETY: the context is the caller's; both pointers are valid for writing, and what is pushed is popped.
    unsafe {
        if (api().ctx_push)(context) != SUCCESS {
            return None;
        }
        let result = (api().ctx_device)(&mut device);
        (api().ctx_pop)(&mut popped);
        (result == SUCCESS).then_some(device)
    }
}

/// Changes the rights of `accessor` to all plain memory on `owner`.
fn apply(owner: DeviceOrdinal, accessor: DeviceOrdinal, flags: u32) -> Status {
    let uuid = device_facts(owner).uuid;
    let desc = desc(accessor, flags);
    let mut table = table::lock();
    let table = &mut *table;
    let mine = |id: &u64| {
        let physical = table.physical.get(id);
        physical.is_some_and(|p| p.uuid == uuid && matches!(p.class, CLASS_PLAIN | CLASS_SMALL))
    };
    let ranges: Vec<_> =
        table.mappings.iter().filter(|(_, m)| mine(&m.physical)).map(|(a, m)| (*a, m.len)).collect();
    for (address, len) in ranges {
        // SAFETY: mapped by this library, and kept so by the lock.
        let status = unsafe { (api().set_access)(address, len, &desc, 1) };
        if status != SUCCESS {
            return status;
        }
        table.set_access(address, len, &[desc]);
    }
    SUCCESS
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxEnablePeerAccess(peer: Context, flags: u32) -> Status {
    let _pass = gate::gate();
    let mut grants = GRANTS.write().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the arguments are the caller's; the pointers are valid for writing.
    let (status, context, accessor) = unsafe {
        let (mut context, mut device) = (ptr::null_mut(), 0);
        let status = (api().ctx_enable_peer)(peer, flags);
        (api().ctx_get)(&mut context);
        (api().ctx_device)(&mut device);
        (status, context as usize, device)
    };
    let Some(owner) = device_of(peer).filter(|_| status == SUCCESS) else { return status };
    grants.push(Grant { context, peer: peer as usize, accessor, owner });
    apply(owner, accessor, ACCESS_READ_WRITE)
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxDisablePeerAccess(peer: Context) -> Status {
    let _pass = gate::gate();
    // SAFETY: the arguments are the caller's; the pointer is valid for writing.
    let (status, context) = unsafe {
        let mut context = ptr::null_mut();
        (api().ctx_get)(&mut context);
        ((api().ctx_disable_peer)(peer), context as usize)
    };
    if status == SUCCESS {
        withdraw(|g| g.context == context && g.peer == peer as usize);
    }
    status
}

/// Ends grants, and the rights that no other grant gives.
fn withdraw(ended: impl Fn(&Grant) -> bool) {
    let mut grants = GRANTS.write().unwrap_or_else(PoisonError::into_inner);
    let gone: Vec<_> = grants.extract_if(.., |g| ended(g)).collect();
    for g in gone {
        if !grants.iter().any(|other| (other.owner, other.accessor) == (g.owner, g.accessor)) {
            apply(g.owner, g.accessor, 0);
        }
    }
}

/// A context is gone, and what it granted and was granted.
pub fn context_is_gone(context: usize) {
    withdraw(|g| g.context == context || g.peer == context);
}
