//! The driver API, found at run time.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;

use anyhow::{Result, bail};

type Code = u32;
/// A driver object.
pub type Handle = *mut c_void;

/// `CUmemAllocationProp`.
#[repr(C)]
pub struct Prop {
    /// 1: pinned.
    pub kind: u32,
    /// None asked for: a program that does not share its memory.
    pub handle_types: u32,
    /// 1: a device.
    pub location_kind: u32,
    /// Device ordinal.
    pub location: c_int,
    /// Windows only.
    pub win32: Handle,
    /// Flags.
    pub flags: u64,
}

/// `CUmemAccessDesc`.
#[repr(C)]
pub struct Access {
    /// 1: a device.
    pub location_kind: u32,
    /// Device ordinal.
    pub location: c_int,
    /// 3: read and write.
    pub flags: u32,
}

/// `CUipcMemHandle`, which is passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcHandle(pub [u8; 64]);

macro_rules! driver {
    ($($method:ident = $symbol:literal ( $($arg:ident: $type:ty),* );)*) => {
        /// The driver's functions.
        pub struct Cuda {
            $($method: unsafe extern "C" fn($($type),*) -> Code,)*
        }
        impl Cuda {
            /// Loads the driver library and looks the functions up as a program for CUDA 12.8 does.
            pub fn load() -> Result<Self> {
                let find = open()?;
                let cuda = Cuda {
                    // SAFETY: the driver gives the function of that name, whose type cuda.h has.
                    $($method: unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> Code>(find($symbol)?) },)*
                };
                cuda.init(0)?;
                Ok(cuda)
            }
            $(
                #[doc = concat!("`", $symbol, "`. Pointers among the arguments must be valid as cuda.h says.")]
                #[allow(clippy::too_many_arguments)]
                pub fn $method(&self, $($arg: $type),*) -> Result<()> {
                    // SAFETY: the callers in `state` pass pointers to live values of the types of cuda.h.
                    match unsafe { (self.$method)($($arg),*) } {
                        0 => Ok(()),
                        code => bail!(concat!($symbol, " failed with CUDA error {}"), code),
                    }
                }
            )*
        }
    };
}

driver! {
    init = "cuInit"(flags: u32);
    device_get = "cuDeviceGet"(device: *mut c_int, ordinal: c_int);
    primary_retain = "cuDevicePrimaryCtxRetain"(context: *mut Handle, device: c_int);
    set_current = "cuCtxSetCurrent"(context: Handle);
    synchronize = "cuCtxSynchronize"();
    module_load = "cuModuleLoadData"(module: *mut Handle, image: *const c_void);
    function = "cuModuleGetFunction"(function: *mut Handle, module: Handle, name: *const c_char);
    variable = "cuModuleGetGlobal"(address: *mut u64, size: *mut usize, module: Handle, name: *const c_char);
    stream_create = "cuStreamCreate"(stream: *mut Handle, flags: u32);
    event_create = "cuEventCreate"(event: *mut Handle, flags: u32);
    event_record = "cuEventRecord"(event: Handle, stream: Handle);
    stream_wait = "cuStreamWaitEvent"(stream: Handle, event: Handle, flags: u32);
    stream_synchronize = "cuStreamSynchronize"(stream: Handle);
    alloc = "cuMemAlloc"(pointer: *mut u64, size: usize);
    alloc_async = "cuMemAllocAsync"(pointer: *mut u64, size: usize, stream: Handle);
    free = "cuMemFree"(pointer: u64);
    free_async = "cuMemFreeAsync"(pointer: u64, stream: Handle);
    host_alloc = "cuMemHostAlloc"(pointer: *mut Handle, size: usize, flags: u32);
    reserve = "cuMemAddressReserve"(address: *mut u64, size: usize, alignment: usize, at: u64, flags: u64);
    create = "cuMemCreate"(handle: *mut u64, size: usize, prop: *const Prop, flags: u64);
    map = "cuMemMap"(address: u64, size: usize, offset: usize, handle: u64, flags: u64);
    set_access = "cuMemSetAccess"(address: u64, size: usize, access: *const Access, count: usize);
    export = "cuMemExportToShareableHandle"(to: Handle, handle: u64, kind: u32, flags: u64);
    import = "cuMemImportFromShareableHandle"(handle: *mut u64, from: Handle, kind: u32);
    ipc_get = "cuIpcGetMemHandle"(handle: *mut IpcHandle, pointer: u64);
    ipc_open = "cuIpcOpenMemHandle"(pointer: *mut u64, handle: IpcHandle, flags: u32);
    memset = "cuMemsetD32"(address: u64, value: u32, count: usize);
    copy_out = "cuMemcpyDtoH"(to: Handle, from: u64, len: usize);
    launch = "cuLaunchKernel"(
        function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: Handle,
        params: *mut *mut c_void, extra: *mut *mut c_void
    );
}

type ProcAddress = unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut u32) -> Code;

/// Opens the driver library; returns a function that finds its entry points.
fn open() -> Result<impl Fn(&str) -> Result<*mut c_void>> {
    // SAFETY: loading the driver library, and asking for an entry point every driver since CUDA 12.0 has.
    let get = unsafe {
        let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        if library.is_null() {
            let text = libc::dlerror();
            let reason = if text.is_null() {
                String::new()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            };
            bail!("no CUDA driver: {reason}");
        }
        libc::dlsym(library, c"cuGetProcAddress_v2".as_ptr())
    };
    if get.is_null() {
        bail!("the CUDA driver is older than 12.0");
    }
    // SAFETY: the type cuda.h gives for this function.
    let get = unsafe { std::mem::transmute::<*mut c_void, ProcAddress>(get) };
    Ok(move |name: &str| {
        let symbol = CString::new(name)?;
        let (mut found, mut status) = (ptr::null_mut(), 0);
        // SAFETY: the pointers are valid during the call.
        let code = unsafe { get(symbol.as_ptr(), &mut found, 12080, 0, &mut status) };
        if code != 0 || found.is_null() {
            bail!("the CUDA driver has no {name}");
        }
        Ok(found)
    })
}
