//! Events that processes share (`CU_EVENT_INTERPROCESS`): the driver's own tie the processes together, so they are emulated
//! where the process can be checkpointed.
//!
//! Once an event is shared, recording it waits until what it marks is done. Then nobody ever has to wait for the event of
//! another process: whatever was recorded is complete by the time another process can know of it. What a process opens is an
//! event of its own, of which the same holds.

#![allow(non_snake_case)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cuda::{
    EVENT_DISABLE_TIMING, EVENT_INTERPROCESS, INVALID_CONTEXT, INVALID_VALUE, IpcHandle, SUCCESS, Status,
    Stream,
};
use crate::ipc::{Kind, Name, counted};
use crate::real::api;
use crate::{control, gate};

/// Events that may be shared, and whether they are.
static EVENTS: Mutex<Option<HashMap<usize, bool>>> = Mutex::new(None);
/// There are such events: only then the table is looked at.
static ANY: AtomicBool = AtomicBool::new(false);

/// The table, locked.
struct Events(MutexGuard<'static, Option<HashMap<usize, bool>>>);

impl Events {
    fn lock() -> Self {
        Events(EVENTS.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn map(&mut self) -> &mut HashMap<usize, bool> {
        self.0.get_or_insert_default()
    }

    fn insert(&mut self, event: *mut c_void, shared: bool) {
        self.map().insert(event as usize, shared);
        ANY.store(true, Ordering::Release);
    }
}

fn is_shared(event: *mut c_void) -> bool {
    ANY.load(Ordering::Acquire) && Events::lock().map().get(&(event as usize)) == Some(&true)
}

fn forget(event: *mut c_void) {
    if ANY.load(Ordering::Acquire) {
        Events::lock().map().remove(&(event as usize));
    }
}

/// Waits for what an event marks.
fn finish(event: *mut c_void) -> Status {
    let _wait = gate::waiting();
    // SAFETY: the event is the caller's.
    unsafe { (api().event_synchronize)(event) }
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, flags: u32) -> Status {
    let _pass = gate::gate();
    // Without this flag's condition the driver refuses it.
    const BOTH: u32 = EVENT_INTERPROCESS | EVENT_DISABLE_TIMING;
    let emulated = flags & BOTH == BOTH && control::reachable().is_some();
    let flags = if emulated { flags & !EVENT_INTERPROCESS } else { flags };
    // SAFETY: the arguments are the caller's, but for the flag.
    let result = unsafe { (api().event_create)(event, flags) };
    if emulated && result == SUCCESS {
        // SAFETY: the driver has just written an event there.
        Events::lock().insert(unsafe { *event }, false);
    }
    result
}

macro_rules! destroys {
    ($($name:ident, $api:ident;)*) => {
        $(
            /// # Safety
            /// As the driver's function.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(event: *mut c_void) -> Status {
                let _pass = gate::gate();
                // Before it is destroyed: the same address may be another event's at once.
                forget(event);
                // SAFETY: the argument is the caller's.
                unsafe { (api().$api)(event) }
            }
        )*
    };
}

destroys! {
    cuEventDestroy, event_destroy_1;
    cuEventDestroy_v2, event_destroy;
}

macro_rules! records {
    ($($name:ident, $api:ident, $($arg:ident: $type:ty),*;)*) => {
        $(
            /// # Safety
            /// As the driver's function.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(event: *mut c_void, $($arg: $type),*) -> Status {
                let pass = gate::gate();
                // SAFETY: the arguments are the caller's.
                let result = unsafe { (api().$api)(event, $($arg),*) };
                drop(pass);
                if result == SUCCESS && is_shared(event) { finish(event) } else { result }
            }
        )*
    };
}

records! {
    cuEventRecord, event_record, stream: Stream;
    cuEventRecord_ptsz, event_record_ptsz, stream: Stream;
    cuEventRecordWithFlags, event_record_flags, stream: Stream, flags: u32;
    cuEventRecordWithFlags_ptsz, event_record_flags_ptsz, stream: Stream, flags: u32;
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcGetEventHandle(handle: *mut IpcHandle, event: *mut c_void) -> Status {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let known = {
        let mut events = Events::lock();
        events.map().get_mut(&(event as usize)).map(|shared| *shared = true).is_some()
    };
    if !known {
        let _pass = gate::gate();
        // SAFETY: the arguments are the caller's.
        return counted(unsafe { (api().ipc_get_event)(handle.cast::<c_void>(), event) });
    }
    if handle.is_null() {
        return INVALID_VALUE;
    }
    // What it marks already must be done before anybody can open it.
    let result = finish(event);
    if result == SUCCESS {
        let name = Name::own(Kind::Event, LAST.fetch_add(1, Ordering::Relaxed), 0);
        // SAFETY: checked not to be null, and the caller's for writing.
        unsafe { handle.write_unaligned(name.encode()) };
    }
    result
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcOpenEventHandle(event: *mut *mut c_void, handle: IpcHandle) -> Status {
    let _pass = gate::gate();
    let Some(name) = Name::decode(&handle) else {
        // SAFETY: the arguments are the caller's.
        return counted(unsafe { (api().ipc_open_event)(event, handle) });
    };
    if event.is_null() || name.kind != Kind::Event {
        return INVALID_VALUE;
    }
    if name.is_own() {
        return INVALID_CONTEXT;
    }
    // SAFETY: checked not to be null, and the caller's for writing.
    unsafe {
        let result = (api().event_create)(event, EVENT_DISABLE_TIMING);
        if result == SUCCESS {
            Events::lock().insert(*event, true);
        }
        result
    }
}
