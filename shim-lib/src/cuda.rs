//! The driver's types, as far as this library reads them. Sources: cuda.h of CUDA 12.0 to 13.0.
//!
//! Enumerations are plain integers: values come from the application and from drivers newer than this library.

use std::ffi::{c_char, c_int, c_void};

/// `CUresult`.
pub type Status = u32;
/// `CUDA_SUCCESS`.
pub const SUCCESS: Status = 0;
/// `CUDA_ERROR_INVALID_VALUE`.
pub const INVALID_VALUE: Status = 1;
/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub const OUT_OF_MEMORY: Status = 2;
/// `CUDA_ERROR_NO_DEVICE`.
pub const NO_DEVICE: Status = 100;
/// `CUDA_ERROR_INVALID_CONTEXT`.
pub const INVALID_CONTEXT: Status = 201;
/// `CUDA_ERROR_INVALID_HANDLE`.
pub const INVALID_HANDLE: Status = 400;
/// `CUDA_ERROR_NOT_FOUND`.
pub const NOT_FOUND: Status = 500;

/// `CUdeviceptr`.
pub type DevicePtr = u64;
/// `CUdevice`.
pub type DeviceOrdinal = c_int;
/// `CUcontext`.
pub type Context = *mut c_void;
/// `CUstream`.
pub type Stream = *mut c_void;
/// `CUmemGenericAllocationHandle`.
pub type Handle = u64;

/// `CUipcMemHandle` and `CUipcEventHandle`, which are passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcHandle(pub [u8; 64]);
/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`, the one flag there is, which must be given.
pub const IPC_LAZY_PEER_ACCESS: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
pub const EVENT_DISABLE_TIMING: u32 = 2;
/// `CU_EVENT_INTERPROCESS`.
pub const EVENT_INTERPROCESS: u32 = 4;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// `CUmemLocationType`; 1 is a device.
    pub kind: u32,
    /// Device ordinal.
    pub id: c_int,
}
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
pub const LOCATION_DEVICE: u32 = 1;

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AllocationProp {
    /// `CUmemAllocationType`; 1 is pinned.
    pub kind: u32,
    /// `CUmemAllocationHandleType` bits.
    pub handle_types: u32,
    /// Where.
    pub location: Location,
    /// Windows only.
    pub win32: *mut c_void,
    /// Compression.
    pub compression: u8,
    /// `gpuDirectRDMACapable`.
    pub rdma: u8,
    /// Usage bits.
    pub usage: u16,
    /// Reserved.
    pub reserved: [u8; 4],
}
const _: () = assert!(size_of::<AllocationProp>() == 32);
// SAFETY: the one pointer in it is for Windows and never followed here.
unsafe impl Send for AllocationProp {}

/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
pub const ALLOCATION_PINNED: u32 = 1;
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub const HANDLE_FD: u32 = 1;

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AccessDesc {
    /// For whom.
    pub location: Location,
    /// `CUmemAccess_flags`; 3 is read and write.
    pub flags: u32,
}
/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
pub const ACCESS_READ_WRITE: u32 = 3;

/// `CUmemPoolProps`.
#[repr(C)]
pub struct PoolProps {
    /// `CUmemAllocationType`.
    pub kind: u32,
    /// `CUmemAllocationHandleType` bits.
    pub handle_types: u32,
    /// Where.
    pub location: Location,
    /// Windows only.
    pub win32: *mut c_void,
    /// Most bytes, 0 for no limit.
    pub max_size: usize,
    /// Usage bits.
    pub usage: u16,
    /// Reserved.
    pub reserved: [u8; 54],
}
/// `CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`.
pub const POOL_RELEASE_THRESHOLD: u32 = 4;
/// `CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT`.
pub const POOL_RESERVED: u32 = 5;
/// `CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH`.
pub const POOL_RESERVED_HIGH: u32 = 6;
/// `CU_MEMPOOL_ATTR_USED_MEM_CURRENT`.
pub const POOL_USED: u32 = 7;
/// `CU_MEMPOOL_ATTR_USED_MEM_HIGH`.
pub const POOL_USED_HIGH: u32 = 8;

/// `CU_LIMIT_STACK_SIZE`.
pub const LIMIT_STACK_SIZE: u32 = 0;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
pub const CAPTURE_RELAXED: u32 = 2;
/// `CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED`.
pub const DEVICE_VMM: u32 = 102;
/// `CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED`.
pub const DEVICE_FD: u32 = 103;
/// `CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED`.
pub const DEVICE_RDMA_VMM: u32 = 110;

/// Declares [`Api`]: one field for each driver function this library calls itself.
macro_rules! api {
    ($($field:ident = $symbol:literal ( $($arg:ty),* ) ;)*) => {
        /// The driver functions this library calls itself. A function the driver lacks answers `NOT_FOUND`.
        pub struct Api {
            $(
                #[doc = concat!("`", $symbol, "`")]
                pub $field: unsafe extern "C" fn($($arg),*) -> Status,
            )*
        }
        impl Api {
            /// Looks every function up.
            ///
            /// # Safety
            /// `find` must return null or the address of the driver's function of that name.
            pub unsafe fn load(find: impl Fn(&std::ffi::CStr) -> *mut c_void) -> Self {
                $(
                    unsafe extern "C" fn $field($(_: $arg),*) -> Status { NOT_FOUND }
                )*
                Api {
                    $($field: match std::ffi::CStr::from_bytes_with_nul(concat!($symbol, "\0").as_bytes()) {
                        Ok(name) if !find(name).is_null() => {
                            // SAFETY: the address is that function's, whose type cuda.h gives.
                            unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> Status>(find(name)) }
                        }
                        _ => $field,
                    },)*
                }
            }
        }
    };
}

api! {
    init = "cuInit"(u32);
    driver_version = "cuDriverGetVersion"(*mut c_int);
    proc_address_1 = "cuGetProcAddress"(*const c_char, *mut *mut c_void, c_int, u64);
    proc_address_2 = "cuGetProcAddress_v2"(*const c_char, *mut *mut c_void, c_int, u64, *mut u32);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut DeviceOrdinal, c_int);
    device_uuid = "cuDeviceGetUuid_v2"(*mut [u8; 16], DeviceOrdinal);
    device_attribute = "cuDeviceGetAttribute"(*mut c_int, u32, DeviceOrdinal);
    primary_state = "cuDevicePrimaryCtxGetState"(DeviceOrdinal, *mut u32, *mut c_int);
    primary_retain = "cuDevicePrimaryCtxRetain"(*mut Context, DeviceOrdinal);
    primary_release = "cuDevicePrimaryCtxRelease_v2"(DeviceOrdinal);
    ctx_create_2 = "cuCtxCreate_v2"(*mut Context, u32, DeviceOrdinal);
    ctx_create_3 = "cuCtxCreate_v3"(*mut Context, *mut c_void, c_int, u32, DeviceOrdinal);
    ctx_create_4 = "cuCtxCreate_v4"(*mut Context, *mut c_void, u32, DeviceOrdinal);
    ctx_destroy = "cuCtxDestroy_v2"(Context);
    ctx_device = "cuCtxGetDevice"(*mut DeviceOrdinal);
    ctx_get = "cuCtxGetCurrent"(*mut Context);
    ctx_set = "cuCtxSetCurrent"(Context);
    ctx_push = "cuCtxPushCurrent_v2"(Context);
    ctx_pop = "cuCtxPopCurrent_v2"(*mut Context);
    ctx_synchronize = "cuCtxSynchronize"();
    ctx_enable_peer = "cuCtxEnablePeerAccess"(Context, u32);
    ctx_disable_peer = "cuCtxDisablePeerAccess"(Context);
    ctx_get_limit = "cuCtxGetLimit"(*mut usize, u32);
    ctx_set_limit = "cuCtxSetLimit"(u32, usize);
    capture_mode = "cuThreadExchangeStreamCaptureMode"(*mut u32);
    alloc = "cuMemAlloc_v2"(*mut DevicePtr, usize);
    alloc_pitch = "cuMemAllocPitch_v2"(*mut DevicePtr, *mut usize, usize, usize, u32);
    alloc_managed = "cuMemAllocManaged"(*mut DevicePtr, usize, u32);
    alloc_async = "cuMemAllocAsync"(*mut DevicePtr, usize, Stream);
    alloc_pool = "cuMemAllocFromPoolAsync"(*mut DevicePtr, usize, *mut c_void, Stream);
    free_async = "cuMemFreeAsync"(DevicePtr, Stream);
    default_pool = "cuDeviceGetDefaultMemPool"(*mut *mut c_void, DeviceOrdinal);
    device_pool = "cuDeviceGetMemPool"(*mut *mut c_void, DeviceOrdinal);
    pool_create = "cuMemPoolCreate"(*mut *mut c_void, *const PoolProps);
    pool_destroy = "cuMemPoolDestroy"(*mut c_void);
    pool_trim = "cuMemPoolTrimTo"(*mut c_void, usize);
    pool_access = "cuMemPoolSetAccess"(*mut c_void, *const AccessDesc, usize);
    pool_get = "cuMemPoolGetAttribute"(*mut c_void, u32, *mut c_void);
    pool_set = "cuMemPoolSetAttribute"(*mut c_void, u32, *mut c_void);
    stream_capturing = "cuStreamIsCapturing"(Stream, *mut u32);
    stream_context = "cuStreamGetCtx"(Stream, *mut Context);
    stream_id = "cuStreamGetId"(Stream, *mut u64);
    stream_synchronize = "cuStreamSynchronize"(Stream);
    stream_synchronize_ptsz = "cuStreamSynchronize_ptsz"(Stream);
    event_create = "cuEventCreate"(*mut *mut c_void, u32);
    event_record = "cuEventRecord"(*mut c_void, Stream);
    event_query = "cuEventQuery"(*mut c_void);
    event_synchronize = "cuEventSynchronize"(*mut c_void);
    event_destroy = "cuEventDestroy_v2"(*mut c_void);
    event_destroy_1 = "cuEventDestroy"(*mut c_void);
    event_record_ptsz = "cuEventRecord_ptsz"(*mut c_void, Stream);
    event_record_flags = "cuEventRecordWithFlags"(*mut c_void, Stream, u32);
    event_record_flags_ptsz = "cuEventRecordWithFlags_ptsz"(*mut c_void, Stream, u32);
    ctx_synchronize_2 = "cuCtxSynchronize_v2"(Context);
    alloc_host = "cuMemAllocHost_v2"(*mut *mut c_void, usize);
    host_alloc = "cuMemHostAlloc"(*mut *mut c_void, usize, u32);
    free = "cuMemFree_v2"(DevicePtr);
    copy = "cuMemcpyDtoD_v2"(DevicePtr, DevicePtr, usize);
    memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
    address_range = "cuMemGetAddressRange_v2"(*mut DevicePtr, *mut usize, DevicePtr);
    pointer_attribute = "cuPointerGetAttribute"(*mut c_void, u32, DevicePtr);
    pointer_attributes = "cuPointerGetAttributes"(u32, *const u32, *mut *mut c_void, DevicePtr);
    reserve = "cuMemAddressReserve"(*mut DevicePtr, usize, usize, DevicePtr, u64);
    unreserve = "cuMemAddressFree"(DevicePtr, usize);
    create = "cuMemCreate"(*mut Handle, usize, *const AllocationProp, u64);
    release = "cuMemRelease"(Handle);
    map = "cuMemMap"(DevicePtr, usize, usize, Handle, u64);
    unmap = "cuMemUnmap"(DevicePtr, usize);
    set_access = "cuMemSetAccess"(DevicePtr, usize, *const AccessDesc, usize);
    export = "cuMemExportToShareableHandle"(*mut c_void, Handle, u32, u64);
    import = "cuMemImportFromShareableHandle"(*mut Handle, *mut c_void, u32);
    retain = "cuMemRetainAllocationHandle"(*mut Handle, *mut c_void);
    properties = "cuMemGetAllocationPropertiesFromHandle"(*mut AllocationProp, Handle);
    multicast_create = "cuMulticastCreate"(*mut Handle, *const c_void);
    multicast_bind = "cuMulticastBindMem"(Handle, usize, Handle, usize, usize, u64);
    multicast_bind_2 = "cuMulticastBindMem_v2"(Handle, c_int, usize, Handle, usize, usize, u64);
    endpoint_bind = "cuLogicalEndpointBindMem"(u64, c_int, u64, Handle, u64, u64, u64);
    endpoint_bind_address = "cuLogicalEndpointBindAddr"(u64, c_int, u64, *mut c_void, u64, u64);
    ipc_get = "cuIpcGetMemHandle"(*mut c_void, DevicePtr);
    ipc_open_1 = "cuIpcOpenMemHandle"(*mut DevicePtr, IpcHandle, u32);
    ipc_open = "cuIpcOpenMemHandle_v2"(*mut DevicePtr, IpcHandle, u32);
    ipc_close = "cuIpcCloseMemHandle"(DevicePtr);
    ipc_get_event = "cuIpcGetEventHandle"(*mut c_void, *mut c_void);
    ipc_open_event = "cuIpcOpenEventHandle"(*mut *mut c_void, IpcHandle);
    pool_export = "cuMemPoolExportToShareableHandle"(*mut c_void, *mut c_void, u32, u64);
    pool_import = "cuMemPoolImportFromShareableHandle"(*mut *mut c_void, *mut c_void, u32, u64);
    import_external = "cuImportExternalMemory"(*mut *mut c_void, *const c_void);
}
