//! The driver's checkpoint calls (`cuCheckpointProcess*`, CUDA 12.8 and newer), which `cudarc` does not bind.

use std::ffi::{CStr, c_int, c_void};
use std::ptr;

use cudarc::driver::sys;

use super::{DeviceError, ProcessState};

/// `CUcheckpointLockArgs` of cuda.h: how long to wait, and reserved space that must be zero.
#[repr(C)]
struct LockArgs {
    timeout_ms: u32,
    reserved0: u32,
    reserved1: [u64; 7],
}

type ByPid = unsafe extern "C" fn(c_int, *mut c_void) -> sys::CUresult;
type GetState = unsafe extern "C" fn(c_int, *mut c_int) -> sys::CUresult;

/// The five entry points.
pub(super) struct CheckpointCalls {
    lock: ByPid,
    checkpoint: ByPid,
    restore: ByPid,
    unlock: ByPid,
    get_state: GetState,
}

fn resolve(name: &CStr) -> Result<*mut c_void, DeviceError> {
    let mut entry = ptr::null_mut();
    let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS;
    // SAFETY: `name` is NUL-terminated and both out-pointers are valid for writing.
    let r = unsafe { sys::cuGetProcAddress_v2(name.as_ptr(), &mut entry, 12080, 0, &mut status) };
    if r != sys::CUresult::CUDA_SUCCESS || entry.is_null() {
        return Err(DeviceError::Unavailable(format!(
            "the NVIDIA driver has no {}: driver 570 (CUDA 12.8) or newer is needed",
            name.to_string_lossy()
        )));
    }
    Ok(entry)
}

impl CheckpointCalls {
    /// Looks the calls up in the driver that is loaded.
    pub(super) fn load() -> Result<Self, DeviceError> {
        // SAFETY: the pointers come from the driver under these names, and the types are those of cuda.h.
        unsafe {
            Ok(CheckpointCalls {
                lock: std::mem::transmute::<*mut c_void, ByPid>(resolve(c"cuCheckpointProcessLock")?),
                checkpoint: std::mem::transmute::<*mut c_void, ByPid>(resolve(
                    c"cuCheckpointProcessCheckpoint",
                )?),
                restore: std::mem::transmute::<*mut c_void, ByPid>(resolve(c"cuCheckpointProcessRestore")?),
                unlock: std::mem::transmute::<*mut c_void, ByPid>(resolve(c"cuCheckpointProcessUnlock")?),
                get_state: std::mem::transmute::<*mut c_void, GetState>(resolve(
                    c"cuCheckpointProcessGetState",
                )?),
            })
        }
    }

    /// State of a process, `None` if the driver does not know it.
    pub(super) fn state(&self, pid: i32) -> Option<ProcessState> {
        let mut state = 0;
        // SAFETY: `state` is valid for writing.
        let r = unsafe { (self.get_state)(pid, &mut state) };
        if r != sys::CUresult::CUDA_SUCCESS {
            return None;
        }
        Some(match state {
            0 => ProcessState::Running,
            1 => ProcessState::Locked,
            2 => ProcessState::Checkpointed,
            _ => ProcessState::Failed,
        })
    }

    pub(super) fn lock(&self, pid: i32, timeout_ms: u32) -> sys::CUresult {
        let mut args = LockArgs { timeout_ms, reserved0: 0, reserved1: [0; 7] };
        // SAFETY: `args` has the layout of CUcheckpointLockArgs and outlives the call.
        unsafe { (self.lock)(pid, (&raw mut args).cast()) }
    }

    pub(super) fn checkpoint(&self, pid: i32) -> sys::CUresult {
        // SAFETY: null arguments mean defaults.
        unsafe { (self.checkpoint)(pid, ptr::null_mut()) }
    }

    pub(super) fn restore(&self, pid: i32) -> sys::CUresult {
        // SAFETY: null arguments mean defaults.
        unsafe { (self.restore)(pid, ptr::null_mut()) }
    }

    pub(super) fn unlock(&self, pid: i32) -> sys::CUresult {
        // SAFETY: null arguments mean defaults.
        unsafe { (self.unlock)(pid, ptr::null_mut()) }
    }
}
