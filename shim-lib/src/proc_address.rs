//! `cuGetProcAddress`: how every recent program finds the driver's functions.
//!
//! The driver is asked first: it alone knows which function a version and the stream flags mean. If what it names is
//! one of the functions this library wraps, the wrapper is returned in its place. The comparison is by address, so
//! versions and per-thread-stream variants are right by construction.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cuda::{SUCCESS, Status};
use crate::entry::address_of;
use crate::exports::{NAMES, WRAPPED};
use crate::real::api;

/// Wrappers by the address of the driver's function.
fn by_address() -> &'static HashMap<usize, usize> {
    static MAP: OnceLock<HashMap<usize, usize>> = OnceLock::new();
    MAP.get_or_init(|| {
        let known = WRAPPED.iter().map(|(index, wrapper)| (address_of(*index) as usize, wrapper.0 as usize));
        known.filter(|(address, _)| *address != 0).collect()
    })
}

/// Functions of the driver that the program found and this library does not know.
pub static UNKNOWN: AtomicU64 = AtomicU64::new(0);

/// The name under which the driver exports the function at this address.
fn exported_as(address: *mut c_void) -> Option<&'static CStr> {
    // SAFETY: an all-zero Dl_info is valid and is only written to; names live as long as the driver, which stays loaded.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        let found =
            libc::dladdr(address, &mut info) != 0 && info.dli_saddr == address && !info.dli_sname.is_null();
        found.then(|| CStr::from_ptr(info.dli_sname)).filter(|name| name.to_bytes().starts_with(b"cu"))
    }
}

/// Whether the driver's answers are the addresses of its exported functions. They are on every driver seen so far; if
/// one answers otherwise, wrappers are found by name.
fn substitute(symbol: *const c_char, found: *mut c_void, flags: u64) -> *mut c_void {
    if let Some(wrapper) = by_address().get(&(found as usize)) {
        return *wrapper as *mut c_void;
    }
    if symbol.is_null() || found.is_null() {
        return found;
    }
    // SAFETY: the caller passes a NUL-terminated name.
    let name = unsafe { CStr::from_ptr(symbol) }.to_bytes();
    // An address that is the export of any known entry point was recognised, and needs no wrapper.
    static EXPORTS: OnceLock<std::collections::HashSet<usize>> = OnceLock::new();
    let exports = EXPORTS.get_or_init(|| (0..NAMES.len()).map(|i| address_of(i) as usize).collect());
    if exports.contains(&(found as usize)) {
        return found;
    }
    if let Some(export) = exported_as(found) {
        // A version newer than this library, perhaps with other arguments: it passes, and is counted.
        UNKNOWN.fetch_add(1, Ordering::Relaxed);
        crate::log!("{} is unknown", export.to_string_lossy());
        return found;
    }
    // CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM
    let per_thread = flags & 2 != 0;
    let mut matching = WRAPPED.iter().filter_map(|(index, wrapper)| {
        let export = NAMES[*index].to_bytes();
        let (base, variant) = match export.strip_suffix(b"_ptsz").or(export.strip_suffix(b"_ptds")) {
            Some(base) => (base, true),
            None => (export, false),
        };
        let stem = match base {
            [stem @ .., b'_', b'v', b'2'..=b'9'] => stem,
            whole => whole,
        };
        (stem == name && variant == per_thread).then_some(wrapper.0)
    });
    // Of several versions only the driver knows which one this is: then its own is the right one.
    match (matching.next(), matching.next()) {
        (Some(wrapper), None) => {
            crate::log!("{} found by name", String::from_utf8_lossy(name));
            wrapper as *mut c_void
        }
        _ => found,
    }
}

/// The driver's answer, with this library's functions in place of those it wraps.
///
/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    entry: *mut *mut c_void,
    version: c_int,
    flags: u64,
    status: *mut u32,
) -> Status {
    // SAFETY: the arguments are the caller's.
    unsafe {
        let result = (api().proc_address_2)(symbol, entry, version, flags, status);
        if result == SUCCESS && !entry.is_null() {
            *entry = substitute(symbol, *entry, flags);
        }
        result
    }
}

/// The same in its first form.
///
/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress(
    symbol: *const c_char,
    entry: *mut *mut c_void,
    version: c_int,
    flags: u64,
) -> Status {
    // SAFETY: the arguments are the caller's.
    unsafe {
        let result = (api().proc_address_1)(symbol, entry, version, flags);
        if result == SUCCESS && !entry.is_null() {
            *entry = substitute(symbol, *entry, flags);
        }
        result
    }
}

/// The same, as a program for per-thread default streams calls it.
///
/// # Safety
/// As the driver's function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_ptsz(
    symbol: *const c_char,
    entry: *mut *mut c_void,
    version: c_int,
    flags: u64,
) -> Status {
    // CU_GET_PROC_ADDRESS_LEGACY_STREAM or …_PER_THREAD_DEFAULT_STREAM, if the program says neither.
    let flags = if flags & 3 == 0 { flags | 2 } else { flags };
    // SAFETY: the arguments are the caller's.
    unsafe { cuGetProcAddress(symbol, entry, version, flags) }
}
