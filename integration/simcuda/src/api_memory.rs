//! Plain, pooled and host memory.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

use crate::api_stream::submit;
use crate::api_system::{export, put};
use crate::code::{INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, Result};
use crate::context;
use crate::space::{change, using};

/// `CUipcMemHandle`.
#[repr(C)]
pub struct IpcHandle([u8; 64]);

/// Page-locked host memory: address and size.
static HOST: Mutex<Option<HashMap<usize, usize>>> = Mutex::new(None);

fn host<T>(f: impl FnOnce(&mut HashMap<usize, usize>) -> T) -> T {
    f(HOST.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default())
}

/// Plain memory.
pub fn allocate(to: *mut u64, size: usize) -> Result<()> {
    let device = context::usable()?.device;
    if size == 0 || to.is_null() {
        return Err(INVALID_VALUE);
    }
    put(to, change(|s| s.allocate(device, size as u64))?)
}

fn allocate_host(to: *mut *mut c_void, size: usize) -> Result<()> {
    context::current()?;
    if size == 0 {
        return Err(INVALID_VALUE);
    }
    // SAFETY: a new anonymous mapping, anywhere.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(OUT_OF_MEMORY);
    }
    host(|h| h.insert(at as usize, size));
    put(to, at)
}

/// Start and size of the mapping around an address.
fn range(pointer: u64) -> Result<(u64, u64)> {
    using(|s| {
        let (start, m) = s.mappings.range(..=pointer).next_back().ok_or(INVALID_VALUE)?;
        if pointer < start + m.len { Ok((*start, m.len)) } else { Err(INVALID_VALUE) }
    })
}

fn attribute(data: *mut c_void, which: u32, pointer: u64) -> Result<()> {
    let (start, len) = range(pointer)?;
    match which {
        1 => put(data.cast::<usize>(), 0),    // CONTEXT: none of virtual memory
        2 => put(data.cast::<u32>(), 2),      // MEMORY_TYPE: device
        7 => put(data.cast::<u64>(), start),  // BUFFER_ID
        9 => put(data.cast::<i32>(), 0),      // DEVICE_ORDINAL
        10 => put(data.cast::<u8>(), 0),      // IS_LEGACY_CUDA_IPC_CAPABLE: no virtual memory is
        11 => put(data.cast::<u64>(), start), // RANGE_START_ADDR
        12 => put(data.cast::<u64>(), len),   // RANGE_SIZE
        _ => Err(INVALID_VALUE),
    }
}

export! {
    fn cuMemAlloc_v2(to: *mut u64, size: usize) { allocate(to, size) }
    fn cuMemAllocPitch_v2(to: *mut u64, pitch: *mut usize, width: usize, height: usize, _element: u32) {
        let row = width.next_multiple_of(512);
        put(pitch, row)?;
        allocate(to, row * height)
    }
    fn cuMemAllocManaged(to: *mut u64, size: usize, _flags: u32) { allocate(to, size) }
    fn cuMemFree_v2(pointer: u64) {
        let context = context::current()?;
        context.streams.synchronize();
        change(|s| s.free(pointer))
    }
    fn cuMemAllocAsync(to: *mut u64, size: usize, _on: *mut c_void) { allocate(to, size) }
    fn cuMemFreeAsync(pointer: u64, on: *mut c_void) {
        using(|s| s.mappings.get(&pointer).filter(|m| m.plain).map(|_| ()).ok_or(INVALID_VALUE))?;
        submit(on, move || change(|s| s.free(pointer))).map(|_| ())
    }
    fn cuMemGetAddressRange_v2(base: *mut u64, size: *mut usize, pointer: u64) {
        let (start, len) = range(pointer)?;
        if !base.is_null() {
            put(base, start)?;
        }
        if size.is_null() { Ok(()) } else { put(size, len as usize) }
    }
    fn cuPointerGetAttribute(data: *mut c_void, which: u32, pointer: u64) { attribute(data, which, pointer) }
    fn cuPointerGetAttributes(count: u32, which: *const u32, data: *mut *mut c_void, pointer: u64) {
        for i in 0..count as usize {
            // SAFETY: CUDA's contract: arrays of `count` elements.
            unsafe { attribute(*data.add(i), *which.add(i), pointer)? };
        }
        Ok(())
    }
    fn cuMemHostAlloc(to: *mut *mut c_void, size: usize, _flags: u32) { allocate_host(to, size) }
    fn cuMemAllocHost_v2(to: *mut *mut c_void, size: usize) { allocate_host(to, size) }
    fn cuMemFreeHost(pointer: *mut c_void) {
        let size = host(|h| h.remove(&(pointer as usize))).ok_or(INVALID_VALUE)?;
        // SAFETY: mapped by `allocate_host`, and forgotten just now.
        unsafe { libc::munmap(pointer, size) };
        Ok(())
    }
    fn cuMemHostGetDevicePointer_v2(to: *mut u64, pointer: *mut c_void, _flags: u32) { put(to, pointer as u64) }
    fn cuIpcGetEventHandle(_handle: *mut c_void, _event: *mut c_void) { Ok(()) }
    fn cuIpcOpenMemHandle_v2(to: *mut u64, handle: IpcHandle, flags: u32) {
        // No process gives out handles: only that it arrived is simulated.
        if flags == 1 && handle.0.iter().eq(&[7; 64]) { put(to, 0) } else { Err(INVALID_VALUE) }
    }
    fn cuIpcGetMemHandle(_handle: *mut c_void, _pointer: u64) { Err(NOT_SUPPORTED) }
}
