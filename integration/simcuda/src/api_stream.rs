//! Streams, events, copies, launches.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::api_system::{export, put};
use crate::code::{INVALID_HANDLE, INVALID_VALUE, NOT_READY, NOT_SUPPORTED, Result, SUCCESS};
use crate::context::{self, Context};
use crate::module;
use crate::space;
use crate::stream::{Stream, Token};

type Handle = *mut c_void;

/// An event: the work it stands behind, and when that was done.
#[derive(Default, Clone)]
struct Event {
    token: Option<Arc<Token>>,
    time: Arc<Mutex<Option<Instant>>>,
}

static EVENTS: Mutex<Option<(HashMap<usize, Event>, usize)>> = Mutex::new(None);

fn events<T>(f: impl FnOnce(&mut HashMap<usize, Event>, &mut usize) -> T) -> T {
    let mut guard = EVENTS.lock().unwrap_or_else(|e| e.into_inner());
    let (map, next) = guard.get_or_insert_default();
    f(map, next)
}

fn event(handle: Handle) -> Result<Event> {
    events(|map, _| map.get(&(handle as usize)).cloned()).ok_or(INVALID_HANDLE)
}

fn stream(handle: Handle) -> Result<(Arc<Context>, Arc<Stream>)> {
    let context = context::usable()?;
    let stream = context.streams.get(handle as usize).ok_or(INVALID_HANDLE)?;
    Ok((context, stream))
}

/// Queues work on a stream.
pub fn submit(handle: Handle, work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Arc<Token>> {
    let (context, stream) = stream(handle)?;
    if stream.capturing.load(Ordering::SeqCst) {
        return Err(NOT_SUPPORTED);
    }
    Ok(context.streams.submit(&stream, Vec::new(), Box::new(work)))
}

/// Queues work and waits for it.
pub fn submit_and_wait(handle: Handle, work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    submit(handle, work)?.wait();
    match context::current()?.streams.error() {
        SUCCESS => Ok(()),
        code => Err(code),
    }
}

fn token_state(token: Option<Arc<Token>>) -> Result<()> {
    context::usable()?;
    if token.is_none_or(|t| t.is_done()) { Ok(()) } else { Err(NOT_READY) }
}

fn create(to: *mut Handle, flags: u32) -> Result<()> {
    // CU_STREAM_NON_BLOCKING is 1.
    put(to, context::usable()?.streams.create(flags & 1 == 0) as Handle)
}

/// Copies between any two kinds of memory, checking what is device memory.
fn copy(to: u64, from: u64, len: usize) -> Result<()> {
    space::using(|s| {
        for address in [to, from] {
            if s.is_device(address) {
                s.check(address, len as u64)?;
            }
        }
        // SAFETY: device memory was checked and stays mapped while the space is borrowed; host memory is the
        // caller's, who promised that it lives until the copy is done.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, len) };
        Ok(())
    })
}

/// The same where one side must be device memory.
fn copy_checked(to: u64, from: u64, len: usize, device: u64) -> Result<()> {
    space::using(|s| s.check(device, len as u64))?;
    copy(to, from, len)
}

fn fill<const N: usize>(to: u64, pattern: [u8; N], count: usize) -> Result<()> {
    space::using(|s| {
        s.check(to, (count * N) as u64)?;
        for i in 0..count {
            // SAFETY: checked above, and mapped while the space is borrowed.
            unsafe { ((to as usize + i * N) as *mut [u8; N]).write_unaligned(pattern) };
        }
        Ok(())
    })
}

/// A host function and its argument, on their way to another thread.
struct Callback(unsafe extern "C" fn(*mut c_void), *mut c_void);
// SAFETY: cuLaunchHostFunc's contract is that another thread calls it.
unsafe impl Send for Callback {}

impl Callback {
    fn call(self) {
        // SAFETY: the caller gave a function for this argument.
        unsafe { (self.0)(self.1) };
    }
}

fn launch(
    function: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    handle: Handle,
    params: *mut *mut c_void,
) -> Result<()> {
    let function = module::get(function as usize)?;
    let threads = block.iter().map(|n| u64::from(*n)).product::<u64>();
    if grid.contains(&0) || threads == 0 || threads > 1024 {
        return Err(INVALID_VALUE);
    }
    if params.is_null() && !function.params.is_empty() {
        return Err(INVALID_VALUE);
    }
    let mut args = Vec::new();
    for (i, size) in function.params.iter().enumerate() {
        let mut word = [0u8; 8];
        // SAFETY: CUDA's contract: one pointer for each parameter, to a value of its size. Read now, as CUDA does.
        unsafe { std::ptr::copy_nonoverlapping((*params.add(i)).cast::<u8>(), word.as_mut_ptr(), *size) };
        args.push(u64::from_le_bytes(word));
    }
    let device = context::usable()?.device;
    submit(handle, move || {
        space::DEVICE.set(Some(device));
        let result = (function.kernel)(&args);
        space::DEVICE.set(None);
        result
    })?;
    Ok(())
}

export! {
    fn cuStreamCreate(to: *mut Handle, flags: u32) { create(to, flags) }
    fn cuStreamCreateWithPriority(to: *mut Handle, flags: u32, _priority: i32) { create(to, flags) }
    fn cuStreamDestroy_v2(handle: Handle) {
        if context::current()?.streams.destroy(handle as usize) { Ok(()) } else { Err(INVALID_HANDLE) }
    }
    fn cuStreamSynchronize(handle: Handle) {
        let (context, stream) = stream(handle)?;
        if let Some(token) = stream.last() {
            token.wait();
        }
        match context.streams.error() { SUCCESS => Ok(()), code => Err(code) }
    }
    fn cuStreamGetId(handle: Handle, to: *mut u64) { put(to, stream(handle)?.1.number) }
    fn cuStreamGetCtx(handle: Handle, to: *mut Handle) {
        stream(handle)?;
        put(to, context::current_handle() as Handle)
    }
    fn cuStreamBeginCapture_v2(handle: Handle, _mode: u32) {
        stream(handle)?.1.capturing.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn cuStreamEndCapture(handle: Handle, graph: *mut Handle) {
        stream(handle)?.1.capturing.store(false, Ordering::SeqCst);
        put(graph, std::ptr::null_mut())
    }
    fn cuStreamIsCapturing(handle: Handle, status: *mut u32) {
        put(status, u32::from(stream(handle)?.1.capturing.load(Ordering::SeqCst)))
    }
    fn cuStreamQuery(handle: Handle) { token_state(stream(handle)?.1.last()) }
    fn cuStreamWaitEvent(handle: Handle, waited: Handle, _flags: u32) {
        let (context, stream) = stream(handle)?;
        let after = event(waited)?.token.into_iter().collect();
        context.streams.submit(&stream, after, Box::new(|| Ok(())));
        Ok(())
    }
    fn cuEventCreate(to: *mut Handle, _flags: u32) {
        context::usable()?;
        let handle = events(|map, next| {
            *next += 0x10;
            map.insert(*next, Event::default());
            *next
        });
        put(to, handle as Handle)
    }
    fn cuEventDestroy_v2(handle: Handle) {
        events(|map, _| map.remove(&(handle as usize))).map(|_| ()).ok_or(INVALID_HANDLE)
    }
    fn cuEventRecord(handle: Handle, on: Handle) {
        let time = event(handle)?.time;
        let token = submit(on, move || {
            *time.lock().unwrap_or_else(|e| e.into_inner()) = Some(Instant::now());
            Ok(())
        })?;
        events(|map, _| map.get_mut(&(handle as usize)).map(|e| e.token = Some(token))).ok_or(INVALID_HANDLE)
    }
    fn cuEventQuery(handle: Handle) { token_state(event(handle)?.token) }
    fn cuEventSynchronize(handle: Handle) {
        if let Some(token) = event(handle)?.token {
            token.wait();
        }
        context::usable().map(|_| ())
    }
    fn cuEventElapsedTime(ms: *mut f32, from: Handle, to: Handle) {
        let time = |h| -> Result<Instant> { event(h)?.time.lock().unwrap_or_else(|e| e.into_inner()).ok_or(NOT_READY) };
        put(ms, time(to)?.saturating_duration_since(time(from)?).as_secs_f32() * 1e3)
    }
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, len: usize) {
        let from = from as u64;
        submit_and_wait(std::ptr::null_mut(), move || copy_checked(to, from, len, to))
    }
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, len: usize) {
        let to = to as u64;
        submit_and_wait(std::ptr::null_mut(), move || copy_checked(to, from, len, from))
    }
    fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) {
        submit_and_wait(std::ptr::null_mut(), move || copy_checked(to, from, len, from))
    }
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, len: usize, on: Handle) {
        let from = from as u64;
        submit(on, move || copy_checked(to, from, len, to)).map(|_| ())
    }
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, len: usize, on: Handle) {
        let to = to as u64;
        submit(on, move || copy_checked(to, from, len, from)).map(|_| ())
    }
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, on: Handle) {
        submit(on, move || copy_checked(to, from, len, from)).map(|_| ())
    }
    fn cuMemcpy(to: u64, from: u64, len: usize) { submit_and_wait(std::ptr::null_mut(), move || copy(to, from, len)) }
    fn cuMemcpyAsync(to: u64, from: u64, len: usize, on: Handle) { submit(on, move || copy(to, from, len)).map(|_| ()) }
    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) { submit_and_wait(std::ptr::null_mut(), move || fill(to, [value], count)) }
    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) {
        submit_and_wait(std::ptr::null_mut(), move || fill(to, value.to_le_bytes(), count))
    }
    fn cuMemsetD8Async(to: u64, value: u8, count: usize, on: Handle) { submit(on, move || fill(to, [value], count)).map(|_| ()) }
    fn cuMemsetD32Async(to: u64, value: u32, count: usize, on: Handle) {
        submit(on, move || fill(to, value.to_le_bytes(), count)).map(|_| ())
    }
    fn cuLaunchHostFunc(on: Handle, function: unsafe extern "C" fn(*mut c_void), data: *mut c_void) {
        let callback = Callback(function, data);
        submit(on, move || { callback.call(); Ok(()) }).map(|_| ())
    }
    fn cuLaunchKernel(
        function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, _shared: u32, on: Handle,
        params: *mut *mut c_void, _extra: *mut *mut c_void,
    ) {
        launch(function, [gx, gy, gz], [bx, by, bz], on, params)
    }
}

/// A launch that does nothing at all, for measuring what it costs to get here.
#[unsafe(no_mangle)]
pub extern "C" fn cuLaunch(_function: Handle) -> crate::code::Code {
    SUCCESS
}
