//! All exported functions in one place: the generated ones and those written by hand.

#![allow(non_snake_case)]

pub use crate::contexts::{cuCtxCreate_v2, cuCtxCreate_v3, cuCtxCreate_v4, cuCtxDestroy_v2};
pub use crate::control::cuInit;
use crate::entry::{Wrapper, gated, trampoline};
pub use crate::ipc::{cuIpcCloseMemHandle, cuIpcGetMemHandle, cuIpcOpenMemHandle, cuIpcOpenMemHandle_v2};
pub use crate::ipc_events::{
    cuEventCreate, cuEventDestroy, cuEventDestroy_v2, cuEventRecord, cuEventRecord_ptsz,
    cuEventRecordWithFlags, cuEventRecordWithFlags_ptsz, cuIpcGetEventHandle, cuIpcOpenEventHandle,
};
pub use crate::memory::{
    cuMemAlloc_v2, cuMemAllocHost_v2, cuMemAllocManaged, cuMemAllocPitch_v2, cuMemFree_v2, cuMemHostAlloc,
};
pub use crate::peers::{cuCtxDisablePeerAccess, cuCtxEnablePeerAccess};
pub use crate::pointers::{cuMemGetAddressRange_v2, cuPointerGetAttribute, cuPointerGetAttributes};
pub use crate::pool_calls::{
    cuCtxSynchronize, cuCtxSynchronize_v2, cuEventSynchronize, cuMemAllocAsync, cuMemAllocAsync_ptsz,
    cuMemAllocFromPoolAsync, cuMemAllocFromPoolAsync_ptsz, cuMemFreeAsync, cuMemFreeAsync_ptsz,
    cuMemPoolCreate, cuMemPoolDestroy, cuMemPoolGetAttribute, cuMemPoolSetAccess, cuMemPoolSetAttribute,
    cuMemPoolTrimTo, cuStreamSynchronize, cuStreamSynchronize_ptsz,
};
pub use crate::proc_address::{cuGetProcAddress, cuGetProcAddress_ptsz, cuGetProcAddress_v2};
pub use crate::sharing::{
    cuImportExternalMemory, cuMemPoolExportToShareableHandle, cuMemPoolImportFromShareableHandle,
    cuMulticastCreate,
};
pub use crate::vmm::{
    cuLogicalEndpointBindAddr, cuLogicalEndpointBindMem, cuMemCreate, cuMemExportToShareableHandle,
    cuMemGetAllocationPropertiesFromHandle, cuMemImportFromShareableHandle, cuMemMap, cuMemRelease,
    cuMemRetainAllocationHandle, cuMemSetAccess, cuMemUnmap, cuMulticastBindMem, cuMulticastBindMem_v2,
};

include!(concat!(env!("OUT_DIR"), "/entry_points.rs"));
