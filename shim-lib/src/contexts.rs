//! Every context of the process: all must be idle before memory can be taken away.

#![allow(non_snake_case)]

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Mutex;

use crate::cuda::{Context, DeviceOrdinal, SUCCESS, Status};
use crate::real::api;
use crate::{gate, memory, peers, pools};

/// Contexts the application made itself. Addresses: they are only handed back to the driver.
static CREATED: Mutex<Vec<usize>> = Mutex::new(Vec::new());

fn remember(result: Status, context: *mut Context) -> Status {
    if result == SUCCESS {
        // SAFETY: the driver has just written a context there.
        let context = unsafe { *context } as usize;
        CREATED.lock().unwrap_or_else(|e| e.into_inner()).push(context);
    }
    result
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v2(context: *mut Context, flags: u32, device: DeviceOrdinal) -> Status {
    // SAFETY: the arguments are the caller's.
    remember(unsafe { (api().ctx_create_2)(context, flags, device) }, context)
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v3(
    context: *mut Context,
    params: *mut c_void,
    count: c_int,
    flags: u32,
    device: DeviceOrdinal,
) -> Status {
    // SAFETY: the arguments are the caller's.
    remember(unsafe { (api().ctx_create_3)(context, params, count, flags, device) }, context)
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v4(
    context: *mut Context,
    params: *mut c_void,
    flags: u32,
    device: DeviceOrdinal,
) -> Status {
    // SAFETY: the arguments are the caller's.
    remember(unsafe { (api().ctx_create_4)(context, params, flags, device) }, context)
}

/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxDestroy_v2(context: Context) -> Status {
    let _pass = gate::gate();
    // SAFETY: the argument is the caller's.
    let result = unsafe { (api().ctx_destroy)(context) };
    if result == SUCCESS {
        CREATED.lock().unwrap_or_else(|e| e.into_inner()).retain(|c| *c != context as usize);
        pools::context_is_gone(context as usize);
        peers::context_is_gone(context as usize);
        memory::free_context(context as usize);
    }
    result
}

/// All live contexts. Primary ones are held by this value, so that they cannot go away meanwhile.
pub struct All {
    /// The contexts.
    pub contexts: Vec<Context>,
    held: Vec<DeviceOrdinal>,
}

// SAFETY: contexts may be used from any thread that makes them current.
unsafe impl Send for All {}

/// Collects them.
pub fn all() -> All {
    let api = api();
    let mut all = All { contexts: Vec::new(), held: Vec::new() };
    let mut count = 0;
    // SAFETY: every pointer below is valid for writing during its call.
    unsafe {
        (api.device_count)(&mut count);
        for index in 0..count {
            let (mut device, mut flags, mut active, mut context) = (0, 0, 0, ptr::null_mut());
            if (api.device_get)(&mut device, index) == SUCCESS
                && (api.primary_state)(device, &mut flags, &mut active) == SUCCESS
                && active != 0
                && (api.primary_retain)(&mut context, device) == SUCCESS
            {
                all.held.push(device);
                all.contexts.push(context);
            }
        }
    }
    let created = CREATED.lock().unwrap_or_else(|e| e.into_inner());
    all.contexts.extend(created.iter().map(|c| *c as Context));
    all
}

impl Drop for All {
    fn drop(&mut self) {
        for device in &self.held {
            // SAFETY: each was retained in `all`.
            unsafe { (api().primary_release)(*device) };
        }
    }
}
