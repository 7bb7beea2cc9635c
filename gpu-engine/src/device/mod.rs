//! What the engine asks of a GPU.
//!
//! Everything above this module is the same for every vendor and for the simulated driver; nothing above it
//! knows a CUDA type.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use thiserror::Error;

pub mod cuda;
mod cuda_checkpoint;
mod cuda_kernels;

/// A GPU's identity: the 16 bytes of its UUID. Ordinals differ between processes, this does not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GpuId(pub [u8; 16]);

impl fmt::Display for GpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU-")?;
        for (i, b) in self.0.iter().enumerate() {
            let dash = if matches!(i, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{b:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for GpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One GPU of this machine.
#[derive(Debug, Clone)]
pub struct GpuInfo {
    /// Its identity.
    pub id: GpuId,
    /// Model name, e.g. "NVIDIA H200".
    pub name: String,
    /// All memory, bytes.
    pub total: u64,
    /// Memory that can be allocated now, bytes; `None` for a GPU that this process has not used yet, see [`Device::open`].
    pub free: Option<u64>,
}

/// The driver of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverInfo {
    /// `cuDriverGetVersion`, e.g. 13000.
    pub version: i32,
    /// The kernel module's version, e.g. "580.159.04"; empty if it has none (the simulated driver).
    pub release: String,
}

/// The driver's view of a process (`CUprocessState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// Runs normally.
    Running,
    /// Its driver calls block; its state is still on the GPU.
    Locked,
    /// Its state is in its own host memory; it holds no GPU.
    Checkpointed,
    /// The driver could not bring it back. It never runs again.
    Failed,
}

/// Why a device operation failed.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// No driver library, or one that cannot do checkpoints.
    #[error("{0}")]
    Unavailable(String),
    /// A driver call failed.
    #[error("{call}: {name} ({code})")]
    Driver {
        /// Name of the call.
        call: &'static str,
        /// Name of the error, e.g. `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// Its number.
        code: u32,
    },
    /// A GPU that this machine does not have.
    #[error("this machine has no {0}")]
    NoSuchGpu(GpuId),
}

impl DeviceError {
    /// Whether the GPU has too little memory left.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, DeviceError::Driver { code: 2, .. })
    }

    /// Whether there is no room for another process on the GPU: no memory, or it is in exclusive mode and taken
    /// (`CUDA_ERROR_DEVICE_UNAVAILABLE`).
    pub fn is_no_room(&self) -> bool {
        matches!(self, DeviceError::Driver { code: 2 | 46, .. })
    }
}

type Result<T> = std::result::Result<T, DeviceError>;

/// A piece of GPU memory mapped into this process; unmapped when dropped.
///
/// Dropping ends this process's claim only: an fd held elsewhere keeps the memory alive.
pub struct Region {
    /// The GPU it is on.
    pub gpu: GpuId,
    /// Where it is mapped in this process's address space on that GPU.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// For memory this process allocated: the fd that can be handed to others.
    pub fd: Option<OwnedFd>,
    /// Unmaps when dropped.
    _mapping: Box<dyn Send + Sync>,
}

impl Region {
    /// For backends.
    fn new(gpu: GpuId, address: u64, size: u64, fd: Option<OwnedFd>, mapping: Box<dyn Send + Sync>) -> Self {
        Region { gpu, address, size, fd, _mapping: mapping }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({} {:#x}+{:#x})", self.gpu, self.address, self.size)
    }
}

/// Page-locked host memory that the GPU reads and writes at the link's full rate.
pub trait Pinned: Send {
    /// The bytes.
    fn bytes(&self) -> &[u8];
    /// The bytes.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// A queue of copies on one GPU. Operations run in order and asynchronously; [`Stream::wait`] waits for all, and so does
/// dropping it: drop it before the buffers and regions it was given.
pub trait Stream: Send {
    /// Host ← GPU: `len` bytes from `address` to offset `at` of `to`.
    ///
    /// `to` must not be read, written or dropped before [`Stream::wait`] returned.
    fn copy_out(&mut self, address: u64, to: &mut dyn Pinned, at: usize, len: usize) -> Result<()>;
    /// GPU ← host: `len` bytes from offset `at` of `from` to `address`. `from` as in [`Stream::copy_out`].
    fn copy_in(&mut self, address: u64, from: &mut dyn Pinned, at: usize, len: usize) -> Result<()>;
    /// Sets `len` bytes at `address` to zero.
    fn zero(&mut self, address: u64, len: u64) -> Result<()>;
    /// Digests ([`phos_digest`]) of the `count` chunks whose addresses (u64 each) are in GPU memory at `list` to `to`, 16
    /// bytes each. `to` as in [`Stream::copy_out`].
    fn digest(&mut self, list: u64, count: u64, to: &mut dyn Pinned) -> Result<()>;
    /// Copies the `count` chunks whose addresses (u64 each) are in GPU memory at `list` to `to`, one behind the other.
    fn gather(&mut self, list: u64, count: u64, to: u64) -> Result<()>;
    /// Waits until everything submitted is done.
    fn wait(&mut self) -> Result<()>;
}

/// The GPUs of this machine and their driver.
pub trait Device: Send + Sync {
    /// The driver's version.
    fn driver(&self) -> DriverInfo;
    /// The GPUs, with present figures.
    fn gpus(&self) -> Result<Vec<GpuInfo>>;
    /// Makes a context on a GPU. Every use of a GPU does that by itself; it takes time and some of the GPU's memory, so GPUs
    /// that a job does not touch get none.
    fn open(&self, gpu: GpuId) -> Result<()>;
    /// Gives all contexts back. What was made on them must be gone, and the GPUs are not used through this value again.
    fn close(&self);

    /// The driver's state of a process; `None` if the process does not use a GPU.
    fn process_state(&self, pid: i32) -> Result<Option<ProcessState>>;
    /// Makes the process's driver calls block, waiting up to `timeout` for those under way.
    fn lock(&self, pid: i32, timeout: Duration) -> Result<()>;
    /// Moves a locked process's driver state into its own host memory.
    fn checkpoint(&self, pid: i32) -> Result<()>;
    /// The reverse of [`Device::checkpoint`]. A failure here is final for the process.
    fn restore(&self, pid: i32) -> Result<()>;
    /// Lets the process's driver calls go on.
    fn unlock(&self, pid: i32) -> Result<()>;

    /// Allocates and maps memory that other processes can import by its fd.
    fn allocate(&self, gpu: GpuId, size: u64) -> Result<Region>;
    /// Maps another process's memory.
    fn import(&self, gpu: GpuId, fd: BorrowedFd<'_>, size: u64) -> Result<Region>;
    /// Page-locked host memory of `size` bytes.
    fn pinned(&self, size: usize) -> Result<Box<dyn Pinned>>;
    /// A new queue on `gpu`. Use it from one thread at a time.
    fn stream(&self, gpu: GpuId) -> Result<Box<dyn Stream>>;
}
