//! What ties this process to others through the driver: counted, since no process can be checkpointed alone then.

#![allow(non_snake_case)]

use std::ffi::c_void;
use std::sync::atomic::Ordering;

use crate::cuda::{SUCCESS, Status};
use crate::real::api;
use crate::{gate, table};

macro_rules! shares {
    ($($name:ident, $api:ident, $counter:ident, $($arg:ident: $type:ty),*;)*) => {
        $(
            /// # Safety
            /// As the driver's function.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> Status {
                let _pass = gate::gate();
                // SAFETY: the arguments are the caller's.
                let result = unsafe { (api().$api)($($arg),*) };
                if result == SUCCESS {
                    table::$counter.fetch_add(1, Ordering::Relaxed);
                }
                result
            }
        )*
    };
}

shares! {
    cuMemPoolExportToShareableHandle, pool_export, IPC, handle: *mut c_void, pool: *mut c_void, kind: u32, flags: u64;
    cuMemPoolImportFromShareableHandle, pool_import, IPC, pool: *mut *mut c_void, handle: *mut c_void, kind: u32, flags: u64;
    cuImportExternalMemory, import_external, FOREIGN, memory: *mut *mut c_void, description: *const c_void;
    cuMulticastCreate, multicast_create, FOREIGN, handle: *mut u64, properties: *const c_void;
}
