//! A simulation of NVIDIA's driver library, for machines without a GPU.
//!
//! ```text
//! device      how many GPUs there are, and what they are called   (environment)
//! space       physical memory (memfds) and the address space it is mapped into
//! stream      queues of work, each a thread; events
//! context     contexts, current and primary; sticky errors
//! module      PTX text → the names and parameters of its kernels and variables
//! kernels     the kernels themselves, as host functions
//! checkpoint  the driver's checkpoint calls, across processes
//! fault       calls that fail on purpose
//! api_*       the exported functions, with CUDA's own signatures and error codes
//! ```

mod api_context;
mod api_memory;
mod api_module;
mod api_pool;
mod api_stream;
mod api_system;
mod api_vmm;
mod checkpoint;
mod code;
mod context;
mod device;
mod fault;
mod kernels;
mod module;
mod space;
mod stream;
