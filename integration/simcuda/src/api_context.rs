//! Contexts.

use std::ffi::{c_int, c_void};

use crate::api_system::{export, put};
use crate::code::{INVALID_CONTEXT, INVALID_VALUE, PEER_ENABLED, PEER_NOT_ENABLED, Result, SUCCESS};
use crate::{context, device};

type Handle = *mut c_void;

fn create(to: *mut Handle, device: c_int) -> Result<()> {
    device::check(device)?;
    let handle = context::create(device);
    context::push(handle);
    put(to, handle as Handle)
}

export! {
    fn cuDevicePrimaryCtxRetain(to: *mut Handle, device: c_int) {
        device::check(device)?;
        put(to, context::retain_primary(device) as Handle)
    }
    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, flags: u32) {
        // Scheduling is up to the host here; the flags are checked as the driver does (CU_CTX_FLAGS_MASK).
        if flags & !0xff == 0 { device::check(device) } else { Err(INVALID_VALUE) }
    }
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        if context::release_primary(device) { Ok(()) } else { Err(INVALID_CONTEXT) }
    }
    fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut u32, active: *mut c_int) {
        device::check(device)?;
        put(flags, 0)?;
        put(active, c_int::from(context::primary_active(device)))
    }
    fn cuCtxCreate_v2(to: *mut Handle, _flags: u32, device: c_int) { create(to, device) }
    fn cuCtxCreate_v4(to: *mut Handle, _params: *mut c_void, _flags: u32, device: c_int) { create(to, device) }
    fn cuCtxDestroy_v2(handle: Handle) {
        let context = context::get(handle as usize)?;
        context.streams.synchronize();
        context::destroy(handle as usize);
        if context::current_handle() == handle as usize {
            context::pop();
        }
        Ok(())
    }
    fn cuCtxSetCurrent(handle: Handle) {
        if !handle.is_null() {
            context::get(handle as usize)?;
        }
        context::set_current(handle as usize);
        Ok(())
    }
    fn cuCtxGetCurrent(to: *mut Handle) { put(to, context::current_handle() as Handle) }
    fn cuCtxPushCurrent_v2(handle: Handle) {
        context::get(handle as usize)?;
        context::push(handle as usize);
        Ok(())
    }
    fn cuCtxPopCurrent_v2(to: *mut Handle) {
        let popped = context::pop().ok_or(INVALID_CONTEXT)?;
        if to.is_null() { Ok(()) } else { put(to, popped as Handle) }
    }
    fn cuCtxGetDevice(to: *mut c_int) { put(to, context::current()?.device) }
    fn cuDeviceCanAccessPeer(to: *mut c_int, device: c_int, peer: c_int) {
        device::check(device)?;
        device::check(peer)?;
        put(to, c_int::from(device != peer))
    }
    fn cuCtxEnablePeerAccess(peer: Handle, _flags: u32) {
        if context::current()?.peers.lock().unwrap_or_else(|e| e.into_inner()).insert(context::get(peer as usize)?.device) {
            Ok(())
        } else {
            Err(PEER_ENABLED)
        }
    }
    fn cuCtxDisablePeerAccess(peer: Handle) {
        if context::current()?.peers.lock().unwrap_or_else(|e| e.into_inner()).remove(&context::get(peer as usize)?.device) {
            Ok(())
        } else {
            Err(PEER_NOT_ENABLED)
        }
    }
    fn cuCtxSynchronize() {
        match context::current()?.streams.synchronize() {
            SUCCESS => Ok(()),
            code => Err(code),
        }
    }
    fn cuCtxGetLimit(to: *mut usize, limit: u32) {
        let context = context::current()?;
        let limits = context.limits.lock().unwrap_or_else(|e| e.into_inner());
        put(to, limits.get(&limit).copied().unwrap_or(0))
    }
    fn cuCtxSetLimit(limit: u32, value: usize) {
        let context = context::current()?;
        context.limits.lock().unwrap_or_else(|e| e.into_inner()).insert(limit, value);
        Ok(())
    }
    fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) {
        if mode.is_null() { Err(INVALID_VALUE) } else { put(mode, 0) }
    }
}
