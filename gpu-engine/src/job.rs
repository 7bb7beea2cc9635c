//! What the foreground asks of the engine. Serialised: it crosses from the foreground to the worker and, should
//! the worker die, from the keeper to the next one.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::image::Codec;
use crate::progress::Span;

/// How memory gets from the GPU into the image while the program stands still as briefly as possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Snapshot where there is room for one; otherwise pre-copy, unless the memory changes faster than it is copied.
    #[default]
    Auto,
    /// Copy while the program runs, then only what changed meanwhile.
    Precopy,
    /// Copy inside the GPU, let the program go on, copy out afterwards.
    Snapshot,
    /// Copy out while the program stands still.
    Stop,
}

impl std::str::FromStr for Strategy {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Strategy::Auto),
            "precopy" => Ok(Strategy::Precopy),
            "snapshot" => Ok(Strategy::Snapshot),
            "stop" => Ok(Strategy::Stop),
            other => Err(format!("unknown strategy '{other}': use auto, snapshot, precopy or stop")),
        }
    }
}

/// Limits on waiting. All are generous: they end what hangs, they do not hurry what works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// For the GPU to finish the work in flight, milliseconds.
    pub drain_ms: u64,
    /// For the driver's lock, milliseconds.
    pub lock_ms: u64,
    /// For the lower runtime's checkpoint (CRIU's), milliseconds.
    pub lower_ms: u64,
    /// For a parked process to come back and be attached, milliseconds.
    pub attach_ms: u64,
    /// For one call into the driver about a process, milliseconds. Without libphos.so the driver moves all of a GPU's
    /// memory in one call, at about 2 GB/s.
    pub driver_ms: u64,
    /// For anything else: how long nothing at all may happen, milliseconds.
    pub stall_ms: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            drain_ms: 10_000,
            lock_ms: 10_000,
            lower_ms: 600_000,
            attach_ms: 60_000,
            driver_ms: 600_000,
            stall_ms: 300_000,
        }
    }
}

impl Timeouts {
    pub(crate) fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms)
    }
    pub(crate) fn lock(&self) -> Duration {
        Duration::from_millis(self.lock_ms)
    }
    pub(crate) fn lower(&self) -> Duration {
        Duration::from_millis(self.lower_ms)
    }
    pub(crate) fn attach(&self) -> Duration {
        Duration::from_millis(self.attach_ms)
    }
    pub(crate) fn driver(&self) -> Duration {
        Duration::from_millis(self.driver_ms)
    }
    pub(crate) fn stall(&self) -> Duration {
        Duration::from_millis(self.stall_ms)
    }
}

/// A program and its arguments, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CommandLine(Vec<Vec<u8>>);

impl CommandLine {
    /// The first item is the program's path.
    pub fn new(argv: impl IntoIterator<Item = OsString>) -> Self {
        CommandLine(argv.into_iter().map(OsStringExt::into_vec).collect())
    }
    /// The program.
    pub fn program(&self) -> OsString {
        OsString::from_vec(self.0.first().cloned().unwrap_or_default())
    }
    /// What follows it.
    pub fn args(&self) -> impl Iterator<Item = OsString> + '_ {
        self.0.iter().skip(1).map(|a| std::ffi::OsStr::from_bytes(a).to_os_string())
    }
}

/// One checkpoint of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointJob {
    /// The container's id, for messages.
    pub container: String,
    /// Host folder that the container sees as `/run/phos`.
    pub control_dir: PathBuf,
    /// Host process id of the container's first process.
    pub init_pid: i32,
    /// Absolute path of the image folder.
    pub image: PathBuf,
    /// Whether the container goes on afterwards.
    pub leave_running: bool,
    /// Save a base for a later checkpoint only, while the program runs.
    pub pre_dump: bool,
    /// An earlier image to build on: its folder relative to `image`.
    pub parent: Option<String>,
    /// Whether the container was frozen when the checkpoint was asked for.
    pub frozen: bool,
    /// The lower runtime's own checkpoint, as the engine typed it.
    pub lower_checkpoint: CommandLine,
    /// The lower runtime's `pause` and `resume` of this container.
    pub lower_pause: CommandLine,
    /// See `lower_pause`.
    pub lower_resume: CommandLine,
    /// The lower runtime's `state` of this container.
    pub lower_state: CommandLine,
    /// The foreground: process id and start time ([`crate::processes::Process::start_time`]).
    pub asked_by: (i32, u64),
    /// How to copy.
    pub strategy: Strategy,
    /// How to pack what is copied.
    pub compression: Codec,
    /// Limits.
    pub timeouts: Timeouts,
    /// The container's configuration as it really runs (after injection), for restore.
    pub effective_spec: serde_json::Value,
    /// Host path of the `libphos.so` that the container's processes have loaded, if it was injected.
    pub library: Option<PathBuf>,
    /// First line of the lower runtime's `--version`, for the record.
    pub lower_version: String,
    /// CRIU's version, for the record.
    pub criu_version: String,
}

impl CheckpointJob {
    /// Bytes that an image folder must have room for, for so many bytes of GPU memory. How small packing makes them shows
    /// only when it is done.
    pub(crate) fn bytes_in_files(&self, gpu_bytes: u64) -> u64 {
        match self.compression {
            Codec::None => gpu_bytes + gpu_bytes / 64,
            Codec::Lz4 | Codec::Zstd => 0,
        }
    }
}

/// One restore of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreJob {
    /// The new container's id, for messages.
    pub container: String,
    /// Host folder that the container will see as `/run/phos`.
    pub control_dir: PathBuf,
    /// Absolute path of the image folder.
    pub image: PathBuf,
    /// Digest of the manifest that the container's configuration was taken from, hexadecimal.
    pub manifest: String,
    /// Limits.
    pub timeouts: Timeouts,
    /// Host path of the `libphos.so` that will be mounted, if any.
    pub library: Option<PathBuf>,
}

/// What a finished checkpoint did, in figures.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// GPU processes saved.
    pub processes: u32,
    /// Bytes of GPU memory in the image's allocations.
    pub gpu_bytes: u64,
    /// Bytes of GPU memory that the libraries know of and cannot park: the driver saves them.
    pub driver_bytes: u64,
    /// Bytes written to the GPU image files (zero chunks take none).
    pub written_bytes: u64,
    /// Gate closed to GPU idle, slowest process, milliseconds.
    pub drain_ms: f64,
    /// Table and fds handed over, memory unmapped; slowest process, milliseconds.
    pub park_ms: f64,
    /// Bytes copied while the program ran, before it was stopped; what changed in between counts again.
    pub precopied_bytes: u64,
    /// Rounds of that.
    pub precopy_rounds: u32,
    /// Bytes that differed from what had been saved when the program stood still.
    pub dirty_bytes: u64,
    /// Bytes of them copied straight out, for want of room on the GPU.
    pub straight_bytes: u64,
    /// Finding out what differed, milliseconds; 0 if nothing had been saved before.
    pub digest_ms: f64,
    /// Copy inside the GPU, milliseconds; 0 if there was none.
    pub snapshot_ms: f64,
    /// The driver's lock and checkpoint, milliseconds.
    pub driver_checkpoint_ms: f64,
    /// Bytes of what the driver saved that were zeros and are not written.
    pub trimmed_bytes: u64,
    /// Finding them, milliseconds.
    pub trim_ms: f64,
    /// Bytes of host memory that CRIU handed over to the worker; 0 if it wrote them itself.
    #[serde(default)]
    pub host_bytes: u64,
    /// Bytes of them that found room made before.
    #[serde(default)]
    pub host_ready_bytes: u64,
    /// The lower runtime's checkpoint, milliseconds.
    pub criu_ms: f64,
    /// The driver's restore and unlock, milliseconds; 0 if the container was stopped.
    pub driver_restore_ms: f64,
    /// Memory mapped again; slowest process, milliseconds.
    pub attach_ms: f64,
    /// From closing the first gate to opening the last one, milliseconds; 0 if the container was stopped.
    pub pause_ms: f64,
    /// Copying to the image, all of it, milliseconds.
    pub copy_ms: f64,
    /// The whole checkpoint, milliseconds.
    pub total_ms: f64,
    /// Things a person should know.
    pub warnings: Vec<String>,
    /// The container was to go on and could not: why. The image is complete, and all that there is of it.
    #[serde(default)]
    pub lost: Option<String>,
    /// What happened when.
    pub spans: Vec<Span>,
}

/// What a finished restore did, in figures.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RestoreReport {
    /// GPU processes brought back.
    pub processes: u32,
    /// Bytes of GPU memory brought back.
    pub gpu_bytes: u64,
    /// Loading from the image to the GPU, milliseconds.
    pub load_ms: f64,
    /// The driver's restore and unlock, milliseconds.
    pub driver_ms: f64,
    /// Memory mapped; slowest process, milliseconds.
    pub attach_ms: f64,
    /// From the start of the worker until every gate was open, milliseconds.
    pub total_ms: f64,
    /// Things a person should know.
    pub warnings: Vec<String>,
    /// What happened when.
    pub spans: Vec<Span>,
}
