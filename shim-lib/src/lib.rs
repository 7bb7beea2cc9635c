//! `libphos.so`: stands in front of the CUDA driver inside the application.
//!
//! Loading it does nothing. The first CUDA call loads the real driver; everything goes on to it, most by a bare
//! jump. What submits work or looks at memory passes the [`gate`]; allocations are made so that they can be
//! parked ([`memory`], [`vmm`]); a thread that starts with `cuInit` talks to the host ([`control`], [`park`]).
//!
//! Nothing here may panic, print (unless `PHOS_LOG` is set) or call an exported function of this library.

#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "libphos.so is written for x86_64: the trampolines in entry.rs need a version for this processor"
);

mod arena;
mod cache;
mod carve;
mod contexts;
mod control;
#[cfg(test)]
mod coverage;
mod cuda;
mod drain;
mod entry;
mod exports;
mod fds;
mod gate;
mod gate_base;
mod gate_core;
mod ipc;
mod ipc_door;
mod ipc_events;
mod memory;
mod old_libc;
mod park;
mod peers;
mod pointers;
mod pool_calls;
mod pools;
mod prefault;
mod proc_address;
mod real;
mod sharing;
mod streams;
mod table;
mod thread_slot;
mod trim;
mod vmm;

/// Prints a line to standard error if `PHOS_LOG` is set; otherwise this library is silent.
macro_rules! log {
    ($($arg:tt)*) => {
        if crate::real::verbose() {
            eprintln!("libphos[{}]: {}", std::process::id(), format_args!($($arg)*));
        }
    };
}
pub(crate) use log;
