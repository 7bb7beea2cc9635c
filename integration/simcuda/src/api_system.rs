//! Initialisation, devices, errors, entry points, checkpoint calls.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::code::{self, Code, INVALID_VALUE, NO_DEVICE, NOT_FOUND, NOT_INITIALIZED, Result};
use crate::device::{self, machine};
use crate::{checkpoint, context, space};

static INITIALIZED: AtomicBool = AtomicBool::new(false);

/// Writes a result where the caller wants it.
pub fn put<T>(to: *mut T, value: T) -> Result<()> {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: CUDA's contract: the caller's pointer is valid for writing a value of this type.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// The caller's text.
pub fn text<'a>(from: *const c_char) -> Result<&'a str> {
    if from.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: CUDA's contract: a NUL-terminated string that lives during the call.
    unsafe { CStr::from_ptr(from) }.to_str().map_err(|_| INVALID_VALUE)
}

/// Declares exported functions: their bodies run as API calls, which wait while the process is locked.
macro_rules! export {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> crate::code::Code {
                let _call = crate::checkpoint::enter();
                if let Some(code) = crate::fault::due(stringify!($name)) {
                    return code;
                }
                let body = || -> crate::code::Result<()> { $body };
                crate::code::of(body())
            }
        )*
    };
}
pub(crate) use export;

fn initialized() -> Result<()> {
    if INITIALIZED.load(Ordering::SeqCst) { Ok(()) } else { Err(NOT_INITIALIZED) }
}

export! {
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if machine().devices == 0 {
            return Err(NO_DEVICE);
        }
        if !INITIALIZED.swap(true, Ordering::SeqCst) {
            checkpoint::start();
        }
        Ok(())
    }
    fn cuDriverGetVersion(version: *mut c_int) { put(version, machine().driver) }
    fn cuDeviceGetCount(count: *mut c_int) { initialized()?; put(count, machine().devices) }
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) { initialized()?; device::check(ordinal)?; put(device, ordinal) }
    fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) {
        device::check(device)?;
        let bytes = machine().name.as_bytes();
        for i in 0..(len.max(0) as usize) {
            put(name.wrapping_add(i), bytes.get(i).copied().unwrap_or(0) as c_char)?;
            if i + 1 == len as usize {
                put(name.wrapping_add(i), 0)?;
            }
        }
        Ok(())
    }
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) { device::check(device)?; put(uuid, device::uuid(device)) }
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) { device::check(device)?; put(uuid, device::uuid(device)) }
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) { device::check(device)?; put(bytes, machine().memory as usize) }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: u32, device: c_int) {
        device::check(device)?;
        put(value, match attribute {
            1 => 1024,                 // MAX_THREADS_PER_BLOCK
            10 => 32,                  // WARP_SIZE
            16 => 4,                   // MULTIPROCESSOR_COUNT
            75 => 9,                   // COMPUTE_CAPABILITY_MAJOR
            102 | 103 | 41 | 115 => 1, // VMM, POSIX fds, UNIFIED_ADDRESSING, MEMORY_POOLS
            _ => 0,
        })
    }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        context::current()?;
        put(free, space::free() as usize)?;
        put(total, machine().memory as usize)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: Code, name: *mut *const c_char) -> Code {
    let known = code::name(error);
    let result = put(name, known.map_or(std::ptr::null(), CStr::as_ptr));
    code::of(result.and(known.map(|_| ()).ok_or(INVALID_VALUE)))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: Code, name: *mut *const c_char) -> Code {
    // SAFETY: the same contract.
    unsafe { cuGetErrorName(error, name) }
}

/// The address of an exported function of this library.
fn own_symbol(name: &str) -> *mut c_void {
    let Ok(name) = CString::new(name) else { return std::ptr::null_mut() };
    // SAFETY: dladdr and dlopen(NOLOAD) look up this very library, which stays loaded.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(own_symbol as *const c_void, &mut info) == 0 {
            return std::ptr::null_mut();
        }
        let own = libc::dlopen(info.dli_fname, libc::RTLD_NOW | libc::RTLD_NOLOAD);
        if own.is_null() {
            return std::ptr::null_mut();
        }
        let found = libc::dlsym(own, name.as_ptr());
        libc::dlclose(own);
        found
    }
}

/// A version of CUDA that does not exist yet, in which a function has got another argument.
const FUTURE: c_int = 99000;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc_v99() -> Code {
    code::SUCCESS
}

/// The newest variant of a name that a program of this version knows.
fn entry(name: &str, version: c_int) -> *mut c_void {
    let newest = match (name, version) {
        ("cuCtxCreate", 12050..) => "_v4",
        ("cuLaunchHostFunc", FUTURE..) => "_v99",
        (_, 3020..) => "_v2",
        _ => "",
    };
    let suffixed = own_symbol(&format!("{name}{newest}"));
    if suffixed.is_null() { own_symbol(name) } else { suffixed }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    function: *mut *mut c_void,
    version: c_int,
    _flags: u64,
    status: *mut u32,
) -> Code {
    let found = text(symbol).map_or(std::ptr::null_mut(), |name| entry(name, version));
    if !status.is_null() {
        // CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND is 1.
        let _ = put(status, u32::from(found.is_null()));
    }
    let result = put(function, found);
    if found.is_null() { NOT_FOUND } else { code::of(result) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress(
    symbol: *const c_char,
    function: *mut *mut c_void,
    version: c_int,
    flags: u64,
) -> Code {
    // SAFETY: the same contract.
    unsafe { cuGetProcAddress_v2(symbol, function, version, flags, std::ptr::null_mut()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetExportTable(table: *mut *const c_void, _id: *const c_void) -> Code {
    let _ = put(table, std::ptr::null());
    NOT_FOUND
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCheckpointProcessGetState(pid: c_int, state: *mut c_int) -> Code {
    if let Some(code) = crate::fault::due("cuCheckpointProcessGetState") {
        return code;
    }
    code::of(checkpoint::state(pid).and_then(|s| put(state, s as c_int)))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCheckpointProcessLock(pid: c_int, args: *const u32) -> Code {
    if let Some(code) = crate::fault::due("cuCheckpointProcessLock") {
        return code;
    }
    // SAFETY: CUcheckpointLockArgs begins with the timeout in ms; null means none.
    let timeout = if args.is_null() { 0 } else { unsafe { *args } };
    checkpoint::ask(pid, checkpoint::LOCK, timeout)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCheckpointProcessCheckpoint(pid: c_int, _args: *const c_void) -> Code {
    if let Some(code) = crate::fault::due("cuCheckpointProcessCheckpoint") {
        return code;
    }
    checkpoint::ask(pid, checkpoint::CHECKPOINT, 0)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCheckpointProcessRestore(pid: c_int, _args: *const c_void) -> Code {
    if let Some(code) = crate::fault::due("cuCheckpointProcessRestore") {
        return code;
    }
    checkpoint::ask(pid, checkpoint::RESTORE, 0)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCheckpointProcessUnlock(pid: c_int, _args: *const c_void) -> Code {
    if let Some(code) = crate::fault::due("cuCheckpointProcessUnlock") {
        return code;
    }
    checkpoint::ask(pid, checkpoint::UNLOCK, 0)
}
