//! Why a checkpoint or a restore failed. Each text is the one line a person reads.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::device::{DeviceError, GpuId};
use crate::keeper::wire::WireError;
use crate::lower::LowerError;
use crate::peer::PeerError;
use crate::processes::ProcessError;

/// The error of a whole job.
#[derive(Debug, Error)]
pub enum EngineError {
    /// A pre-dump needs room on the GPU beside the program.
    #[error(
        "the GPU has no room for a second process, which a pre-dump needs: make a checkpoint without --pre-dump"
    )]
    NoRoom,
    /// A device call failed.
    #[error("GPU: {0}")]
    Device(#[from] DeviceError),
    /// A driver call on a process of the container failed.
    #[error("process {pid} ({command}): {source}")]
    Driver {
        /// Host process id.
        pid: i32,
        /// Its name.
        command: String,
        /// What failed.
        source: DeviceError,
    },
    /// The driver has given a process up. Whatever is done, it does not run again.
    #[error("process {pid} ({command}): the driver could not bring back its GPU state and has given it up")]
    Poisoned {
        /// Host process id.
        pid: i32,
        /// Its name.
        command: String,
    },
    /// A process's GPU work did not end in time; nothing was changed.
    #[error(
        "process {pid} ({command}): its GPU work did not finish in time ({text}); try again or raise drain_timeout"
    )]
    Busy {
        /// Host process id.
        pid: i32,
        /// Its name.
        command: String,
        /// The library's own words.
        text: String,
    },
    /// The library in a process does not cooperate.
    #[error("{0}")]
    Peer(#[from] PeerError),
    /// The container's processes cannot be listed.
    #[error("{0}")]
    Process(#[from] ProcessError),
    /// The keeper is gone; without it nothing is begun.
    #[error("{0}")]
    Keeper(#[from] WireError),
    /// The lower runtime did not run.
    #[error("{0}")]
    Lower(#[from] LowerError),
    /// The lower runtime ran and failed; its own words say why.
    #[error("the lower runtime's checkpoint failed with status {0}")]
    LowerFailed(i32),
    /// The image could not be written or read.
    #[error("{0}")]
    Image(#[from] crate::image::ImageError),
    /// The image folder cannot be used.
    #[error("image folder {path}: {what}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// The container holds something that cannot be saved.
    #[error("process {pid} ({command}) cannot be checkpointed: {reason}")]
    Unsupported {
        /// Host process id.
        pid: i32,
        /// Its name.
        command: String,
        /// The reason.
        reason: String,
    },
    /// The image needs a GPU that this machine does not have.
    #[error("the image needs a {wanted} with {bytes} bytes free, this machine has {present}")]
    NoGpu {
        /// Model in the image.
        wanted: String,
        /// Bytes needed.
        bytes: u64,
        /// What is there.
        present: String,
    },
    /// The image was made with another driver.
    #[error(
        "the image was made with driver {image}, this machine runs {here}: restore it on a machine with driver {image}"
    )]
    OtherDriver {
        /// The image's.
        image: String,
        /// This machine's.
        here: String,
    },
    /// The image's processes have another `libphos.so` mapped.
    #[error(
        "the image's processes run another build of libphos.so than {path}: install the phos-runc version that made the image"
    )]
    OtherLibrary {
        /// The installed one.
        path: PathBuf,
    },
    /// The lower runtime restored other processes than the image has GPU state for.
    #[error("process {own_pid} of the image is missing in the restored container")]
    MissingProcess {
        /// Its id in the container.
        own_pid: i32,
    },
    /// Requests came in the wrong order.
    #[error("{0}")]
    Order(&'static str),
    /// A GPU named in a process's table that the worker cannot see.
    #[error("memory of process {pid} is on {gpu}, which the host cannot see")]
    HiddenGpu {
        /// Host process id.
        pid: i32,
        /// The GPU.
        gpu: GpuId,
    },
    /// The container ended, or was ended, before its state was saved.
    #[error("the container ended in the middle of the checkpoint: {0}")]
    Ended(Box<EngineError>),
    /// The application could not be brought back. Nothing hides this one.
    #[error("{cause}; and the container could not be brought back to running: {rollback}")]
    RollbackFailed {
        /// The first error.
        cause: Box<EngineError>,
        /// Why the way back failed.
        rollback: Box<EngineError>,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}
