//! The simulated GPUs, described by the environment.
//!
//! `SIMCUDA_DEVICES` (1), `SIMCUDA_MEMORY` in bytes each (2 GiB), `SIMCUDA_NAME`, `SIMCUDA_DRIVER` (13000),
//! `SIMCUDA_UUID_SEED` (0: another seed is another machine), `SIMCUDA_DEVICE_NODE` (/dev/simgpu0).

use std::env;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, OnceLock};

use crate::code::{INVALID_DEVICE, Result};

/// The machine.
pub struct Machine {
    /// GPUs.
    pub devices: i32,
    /// Bytes of memory on each.
    pub memory: u64,
    /// Model.
    pub name: String,
    /// `cuDriverGetVersion`.
    pub driver: i32,
    seed: u64,
}

fn number(variable: &str, default: u64) -> u64 {
    env::var(variable).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Read once.
pub fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| Machine {
        devices: number("SIMCUDA_DEVICES", 1) as i32,
        memory: number("SIMCUDA_MEMORY", 2 << 30),
        name: env::var("SIMCUDA_NAME").unwrap_or_else(|_| "Simulated GPU".into()),
        driver: number("SIMCUDA_DRIVER", 13000) as i32,
        seed: number("SIMCUDA_UUID_SEED", 0),
    })
}

/// Refuses ordinals that do not exist.
pub fn check(ordinal: i32) -> Result<()> {
    if (0..machine().devices).contains(&ordinal) { Ok(()) } else { Err(INVALID_DEVICE) }
}

/// The GPU's UUID: the same in every process of the machine.
pub fn uuid(ordinal: i32) -> [u8; 16] {
    let mut uuid = *b"simulated-gpu-\0\0";
    uuid[..8].copy_from_slice(&(machine().seed ^ 0x5349_4d55_4c41_5445).to_le_bytes());
    uuid[15] = ordinal as u8;
    uuid
}

static NODE: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Holds a device node open, as the real driver does while it has any state on the GPU. CRIU cannot dump a process
/// that has one open.
pub fn hold_node() {
    let mut node = NODE.lock().unwrap_or_else(|e| e.into_inner());
    if node.is_none() {
        let named = env::var("SIMCUDA_DEVICE_NODE").unwrap_or_else(|_| "/dev/simgpu0".into());
        // The node has the numbers of /dev/fuse, which does nothing when it is opened.
        *node = [named.as_str(), "/dev/fuse"]
            .iter()
            .find_map(|path| File::options().read(true).write(true).open(path).ok())
            .map(OwnedFd::from);
    }
}

/// Lets go of the node.
pub fn release_node() {
    *NODE.lock().unwrap_or_else(|e| e.into_inner()) = None;
}
