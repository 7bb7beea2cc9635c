//! The engine's own kernels, `kernels/chunks.cu`.

use std::ffi::{CStr, c_void};
use std::ptr;

use cudarc::driver::sys;

use super::cuda::check;
use super::{Chunks, Result};

const PTX: &CStr =
    match CStr::from_bytes_with_nul(concat!(include_str!("../../kernels/chunks.ptx"), "\0").as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("PTX is text"),
    };
/// Threads of a block, as the kernels are written for.
const THREADS: u32 = 256;
/// Blocks for each multiprocessor: enough loads in flight to keep the memory busy.
const BLOCKS: u32 = 8;

/// The kernels of one context.
#[derive(Clone, Copy)]
pub struct Kernels {
    digest: sys::CUfunction,
    gather: sys::CUfunction,
    blocks: u32,
}

impl Kernels {
    /// Loads them into the current context, which is one on `gpu`. They stay until it ends.
    pub fn load(gpu: sys::CUdevice) -> Result<Self> {
        let mut processors = 0;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        // SAFETY: `processors` is valid for writing.
        let got = unsafe { sys::cuDeviceGetAttribute(&mut processors, attribute, gpu) };
        check("cuDeviceGetAttribute", got)?;
        let mut module = ptr::null_mut();
        // SAFETY: `module` is valid for writing and the text ends with a NUL.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, PTX.as_ptr().cast()) })?;
        let function = |name: &CStr| {
            let mut function = ptr::null_mut();
            // SAFETY: `function` is valid for writing, the module was just loaded.
            let got = unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) };
            check("cuModuleGetFunction", got).map(|()| function)
        };
        let blocks = (processors.max(1) as u32) * BLOCKS;
        Ok(Kernels { digest: function(c"phos_digest")?, gather: function(c"phos_gather")?, blocks })
    }

    /// Digests of `count` chunks to `to`, 16 bytes each, memory that the GPU can write to.
    pub fn digest(&self, stream: sys::CUstream, chunks: Chunks, count: u64, to: u64) -> Result<()> {
        let (base, list) = match chunks {
            Chunks::Run(address) => (address, 0),
            Chunks::List(address) => (0, address),
        };
        self.launch(stream, self.digest, count, &mut [base, list, count, to])
    }

    /// Copies the `count` chunks whose addresses are at `list` to `to`, one behind the other.
    pub fn gather(&self, stream: sys::CUstream, list: u64, count: u64, to: u64) -> Result<()> {
        self.launch(stream, self.gather, count, &mut [list, count, to])
    }

    fn launch(
        &self,
        stream: sys::CUstream,
        kernel: sys::CUfunction,
        count: u64,
        args: &mut [u64],
    ) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let blocks = u32::try_from(count).unwrap_or(u32::MAX).min(self.blocks);
        let mut pointers: Vec<*mut c_void> = args.iter_mut().map(|a| ptr::from_mut(a).cast()).collect();
        // SAFETY: every parameter of both kernels is 64 bits wide and has its pointer; the driver copies them during
        // the call.
        check("cuLaunchKernel", unsafe {
            sys::cuLaunchKernel(
                kernel,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }
}
