//! The CUDA backend: NVIDIA's driver, or anything that stands in for it under the name `libcuda.so.1`.

use std::ffi::{CStr, CString, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use std::{fs, ptr, slice};

use cudarc::driver::sys;

use super::cuda_checkpoint::CheckpointCalls;
use super::cuda_kernels::Kernels;
use super::{Device, DeviceError, DriverInfo, GpuId, GpuInfo, Pinned, ProcessState, Region, Result, Stream};

/// Environment variable: the driver library to use instead of the machine's `libcuda.so.1`.
pub const LIBCUDA_ENV: &str = "PHOS_LIBCUDA";

/// Checks the result of a driver call, naming it.
macro_rules! check {
    ($name:ident($($arg:expr),* $(,)?)) => {
        // SAFETY: the arguments have the types of cuda.h and every pointer among them is valid for the call.
        check(stringify!($name), unsafe { sys::$name($($arg),*) })
    };
}

pub(super) fn check(call: &'static str, result: sys::CUresult) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: `text` is valid for writing; the driver returns a static string or an error.
    let named = unsafe { sys::cuGetErrorName(result, &mut text) } == sys::CUresult::CUDA_SUCCESS;
    let name = if named && !text.is_null() {
        // SAFETY: the driver's error names are static NUL-terminated strings.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        "unknown error".to_string()
    };
    Err(DeviceError::Driver { call, name, code: result as u32 })
}

/// A primary context and the granularity of memory on its GPU, bytes.
struct Context {
    handle: sys::CUcontext,
    granularity: u64,
}

struct Gpu {
    id: GpuId,
    ordinal: sys::CUdevice,
    /// Made when the GPU is first used.
    context: OnceLock<Context>,
    name: String,
    total: u64,
    kernels: Mutex<Option<Kernels>>,
}

// SAFETY: contexts, modules and functions are process-wide handles; the driver allows their use from any thread that
// makes the context current first, which every method here does.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver's own locking orders concurrent calls.
unsafe impl Sync for Gpu {}

/// The opened driver with one context per GPU.
pub struct CudaDevice {
    gpus: Vec<Arc<Gpu>>,
    calls: CheckpointCalls,
    driver: DriverInfo,
}

/// Loads the driver library so that cudarc, which opens it by name, finds it loaded.
fn load_library() -> Result<()> {
    let candidates = match std::env::var_os(LIBCUDA_ENV) {
        Some(path) if !path.is_empty() => vec![path.to_string_lossy().into_owned()],
        _ => vec![
            "libcuda.so.1".into(),
            "/usr/local/nvidia/lib64/libcuda.so.1".into(),
            "/usr/lib/x86_64-linux-gnu/libcuda.so.1".into(),
            "/usr/lib64/libcuda.so.1".into(),
            "/run/nvidia/driver/usr/lib/x86_64-linux-gnu/libcuda.so.1".into(),
        ],
    };
    let mut reason = String::new();
    for candidate in &candidates {
        let Ok(path) = CString::new(candidate.as_str()) else { continue };
        // SAFETY: loading the driver library runs its initialisers; nothing else of it is used here.
        if !unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null() {
            return Ok(());
        }
        if reason.is_empty() {
            // SAFETY: dlerror returns null or a NUL-terminated string valid until the next call.
            let text = unsafe { libc::dlerror() };
            if !text.is_null() {
                // SAFETY: just checked.
                reason = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
            }
        }
    }
    Err(DeviceError::Unavailable(format!(
        "no NVIDIA driver library on this host ({reason}): install the driver or set {LIBCUDA_ENV}"
    )))
}

/// The kernel module's version as it prints it, "" if there is none.
fn kernel_release(proc: &Path) -> String {
    let text = fs::read_to_string(proc).unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let version = |w: &&str| w.contains('.') && w.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(version).unwrap_or_default().to_string()
}

impl CudaDevice {
    /// Loads the driver. A context on a GPU takes 100 to 250 ms more, when it is first used.
    pub fn open() -> Result<Self> {
        load_library()?;
        check!(cuInit(0))?;
        let calls = CheckpointCalls::load()?;
        let mut version = 0;
        check!(cuDriverGetVersion(&mut version))?;
        let mut count = 0;
        check!(cuDeviceGetCount(&mut count))?;
        let gpus = (0..count).map(|n| Gpu::open(n).map(Arc::new)).collect::<Result<Vec<_>>>()?;
        let release = kernel_release(Path::new("/proc/driver/nvidia/version"));
        Ok(CudaDevice { gpus, calls, driver: DriverInfo { version, release } })
    }

    fn gpu(&self, id: GpuId) -> Result<&Arc<Gpu>> {
        self.gpus.iter().find(|g| g.id == id).ok_or(DeviceError::NoSuchGpu(id))
    }
}

impl Gpu {
    fn open(index: c_int) -> Result<Self> {
        let mut ordinal = 0;
        check!(cuDeviceGet(&mut ordinal, index))?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        check!(cuDeviceGetUuid_v2(&mut uuid, ordinal))?;
        let mut name = [0u8; 128];
        check!(cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, ordinal))?;
        let mut total = 0;
        check!(cuDeviceTotalMem_v2(&mut total, ordinal))?;
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        Ok(Gpu {
            id: GpuId(uuid.bytes.map(|b| b as u8)),
            ordinal,
            context: OnceLock::new(),
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
            total: total as u64,
            kernels: Mutex::new(None),
        })
    }

    /// The context, made now if there is none.
    fn context(&self) -> Result<&Context> {
        if let Some(context) = self.context.get() {
            return Ok(context);
        }
        let mut handle = ptr::null_mut();
        // Threads that wait for copies sleep: the program needs the processors, and runs while most of them are made.
        let sleep = sys::CUctx_flags::CU_CTX_SCHED_BLOCKING_SYNC as u32;
        check!(cuDevicePrimaryCtxSetFlags_v2(self.ordinal, sleep))?;
        check!(cuDevicePrimaryCtxRetain(&mut handle, self.ordinal))?;
        check!(cuCtxSetCurrent(handle))?;
        let mut granularity = 0;
        let option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        check!(cuMemGetAllocationGranularity(&mut granularity, &properties(self.ordinal), option))?;
        // Another thread may have been quicker: the primary context is the same one.
        Ok(self.context.get_or_init(|| Context { handle, granularity: granularity as u64 }))
    }

    fn enter(&self) -> Result<()> {
        check!(cuCtxSetCurrent(self.context()?.handle))
    }

    /// The engine's kernels on this GPU, loaded when first asked for.
    fn kernels(&self) -> Result<Kernels> {
        let mut kernels = self.kernels.lock().unwrap_or_else(|e| e.into_inner());
        match *kernels {
            Some(loaded) => Ok(loaded),
            None => Ok(*kernels.insert(Kernels::load(self.ordinal)?)),
        }
    }

    /// Reserves addresses, maps `handle` there and allows access.
    fn map(
        &self,
        handle: sys::CUmemGenericAllocationHandle,
        size: u64,
        fd: Option<OwnedFd>,
    ) -> Result<Region> {
        let handle = Handle(handle);
        let mut address = 0;
        check!(cuMemAddressReserve(&mut address, size as usize, 0, 0, 0))?;
        let mut mapping = Mapping { address, size: size as usize, mapped: false, _handle: handle };
        check!(cuMemMap(address, size as usize, 0, mapping._handle.0, 0))?;
        mapping.mapped = true;
        let access = sys::CUmemAccessDesc {
            location: location(self.ordinal),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        check!(cuMemSetAccess(address, size as usize, &access, 1))?;
        Ok(Region::new(self.id, address, size, fd, Box::new(mapping)))
    }
}

struct Handle(sys::CUmemGenericAllocationHandle);

impl Drop for Handle {
    fn drop(&mut self) {
        // Nothing sensible can be done about a failure; the process's end releases it too.
        let _ = check!(cuMemRelease(self.0));
    }
}

struct Mapping {
    address: sys::CUdeviceptr,
    size: usize,
    mapped: bool,
    _handle: Handle,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.mapped {
            let _ = check!(cuMemUnmap(self.address, self.size));
        }
        let _ = check!(cuMemAddressFree(self.address, self.size));
    }
}

fn location(ordinal: sys::CUdevice) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: ordinal }
}

const FD: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

fn properties(ordinal: sys::CUdevice) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: FD,
        location: location(ordinal),
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

struct PinnedMemory {
    at: *mut c_void,
    len: usize,
}

// SAFETY: the memory belongs to this value alone and is freed on drop, whatever the thread.
unsafe impl Send for PinnedMemory {}

impl Pinned for PinnedMemory {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `at` points to `len` bytes that live as long as `self` and were zeroed at allocation; the
        // caller keeps device copies and reads apart with `Stream::wait`.
        unsafe { slice::from_raw_parts(self.at.cast(), self.len) }
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes the access exclusive.
        unsafe { slice::from_raw_parts_mut(self.at.cast(), self.len) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let _ = check!(cuMemFreeHost(self.at));
    }
}

struct CudaStream {
    stream: sys::CUstream,
    gpu: Arc<Gpu>,
}

// SAFETY: a stream may be used from any thread in which its context is current; every method sets it.
unsafe impl Send for CudaStream {}

impl CudaStream {
    fn enter(&self) -> Result<()> {
        self.gpu.enter()
    }
}

impl Stream for CudaStream {
    fn copy_out(&mut self, address: u64, to: &mut dyn Pinned, at: usize, len: usize) -> Result<()> {
        let target = to.bytes_mut()[at..at + len].as_mut_ptr();
        self.enter()?;
        check!(cuMemcpyDtoHAsync_v2(target.cast(), address, len, self.stream))
    }
    fn copy_in(&mut self, address: u64, from: &mut dyn Pinned, at: usize, len: usize) -> Result<()> {
        let source = from.bytes()[at..at + len].as_ptr();
        self.enter()?;
        check!(cuMemcpyHtoDAsync_v2(address, source.cast(), len, self.stream))
    }
    fn zero(&mut self, address: u64, len: u64) -> Result<()> {
        self.enter()?;
        check!(cuMemsetD8Async(address, 0, len as usize, self.stream))
    }
    fn digest(&mut self, list: u64, count: u64, to: &mut dyn Pinned) -> Result<()> {
        let target = to.bytes_mut()[..count as usize * 16].as_mut_ptr();
        self.enter()?;
        self.gpu.kernels()?.digest(self.stream, list, count, target as u64)
    }
    fn gather(&mut self, list: u64, count: u64, to: u64) -> Result<()> {
        self.enter()?;
        self.gpu.kernels()?.gather(self.stream, list, count, to)
    }
    fn wait(&mut self) -> Result<()> {
        self.enter()?;
        check!(cuStreamSynchronize(self.stream))
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        // Whatever goes wrong above, no copy outlives the buffers it was given.
        let _ = self.wait();
        let _ = check!(cuStreamDestroy_v2(self.stream));
    }
}

impl Device for CudaDevice {
    fn driver(&self) -> DriverInfo {
        self.driver.clone()
    }

    fn gpus(&self) -> Result<Vec<GpuInfo>> {
        let info = |gpu: &Arc<Gpu>| {
            let mut free = None;
            if gpu.context.get().is_some() {
                gpu.enter()?;
                let (mut now, mut total) = (0, 0);
                check!(cuMemGetInfo_v2(&mut now, &mut total))?;
                free = Some(now as u64);
            }
            Ok(GpuInfo { id: gpu.id, name: gpu.name.clone(), total: gpu.total, free })
        };
        self.gpus.iter().map(info).collect()
    }

    fn open(&self, gpu: GpuId) -> Result<()> {
        self.gpu(gpu)?.enter()
    }

    fn close(&self) {
        for gpu in self.gpus.iter().filter(|g| g.context.get().is_some()) {
            // Nothing sensible can be done about a failure; the process's end gives it back too.
            let _ = check!(cuDevicePrimaryCtxRelease_v2(gpu.ordinal));
        }
    }

    fn process_state(&self, pid: i32) -> Result<Option<ProcessState>> {
        Ok(self.calls.state(pid))
    }
    fn lock(&self, pid: i32, timeout: Duration) -> Result<()> {
        let ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        check("cuCheckpointProcessLock", self.calls.lock(pid, ms))
    }
    fn checkpoint(&self, pid: i32) -> Result<()> {
        check("cuCheckpointProcessCheckpoint", self.calls.checkpoint(pid))
    }
    fn restore(&self, pid: i32) -> Result<()> {
        check("cuCheckpointProcessRestore", self.calls.restore(pid))
    }
    fn unlock(&self, pid: i32) -> Result<()> {
        check("cuCheckpointProcessUnlock", self.calls.unlock(pid))
    }

    fn allocate(&self, gpu: GpuId, size: u64) -> Result<Region> {
        let gpu = self.gpu(gpu)?;
        gpu.enter()?;
        let size = size.next_multiple_of(gpu.context()?.granularity);
        let mut handle = 0;
        check!(cuMemCreate(&mut handle, size as usize, &properties(gpu.ordinal), 0))?;
        let owner = Handle(handle);
        let mut fd: c_int = -1;
        check!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, FD, 0))?;
        // SAFETY: the driver just opened this fd for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        std::mem::forget(owner); // `map` takes the handle over
        gpu.map(handle, size, Some(fd))
    }

    fn import(&self, gpu: GpuId, fd: BorrowedFd<'_>, size: u64) -> Result<Region> {
        let gpu = self.gpu(gpu)?;
        gpu.enter()?;
        let mut handle = 0;
        check!(cuMemImportFromShareableHandle(&mut handle, fd.as_raw_fd() as usize as *mut c_void, FD))?;
        gpu.map(handle, size, None)
    }

    fn pinned(&self, size: usize) -> Result<Box<dyn Pinned>> {
        // Any context will do; one that is there, if there is one.
        let used = self.gpus.iter().find(|g| g.context.get().is_some()).or(self.gpus.first());
        used.ok_or_else(|| DeviceError::Unavailable("no GPU".into()))?.enter()?;
        let mut at = ptr::null_mut();
        check!(cuMemHostAlloc(&mut at, size, sys::CU_MEMHOSTALLOC_PORTABLE))?;
        // SAFETY: the driver just gave us `size` bytes at `at`; zeroing makes them initialised for `bytes`.
        unsafe { ptr::write_bytes(at.cast::<u8>(), 0, size) };
        Ok(Box::new(PinnedMemory { at, len: size }))
    }

    fn stream(&self, gpu: GpuId) -> Result<Box<dyn Stream>> {
        let gpu = self.gpu(gpu)?;
        gpu.enter()?;
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        check!(cuStreamCreate(&mut stream, flags))?;
        Ok(Box::new(CudaStream { stream, gpu: gpu.clone() }))
    }
}

/// Opens the machine's driver as a shared device.
pub fn open() -> Result<Arc<dyn Device>> {
    Ok(Arc::new(CudaDevice::open()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_modules_release_is_read_from_its_first_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(
            file.path(),
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC version: 15.3.0\n",
        )
        .unwrap();
        assert_eq!(kernel_release(file.path()), "580.159.04");
        assert_eq!(kernel_release(Path::new("/does/not/exist")), "");
    }
}
