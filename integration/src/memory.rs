//! Images of GPU memory that belongs to no container: what the copy pipeline's own test and benchmark write and read.

use anyhow::{Context, Result};
use phos_engine::copy::Ledger;
use phos_engine::device::{Device, GpuInfo, Region};
use phos_engine::image::{
    Allocation, CHUNK, DriverEntry, GpuEntry, IndexEntry, Manifest, ProcessEntry, VERSION,
};

/// The first GPU.
pub fn first_gpu(device: &dyn Device) -> Result<GpuInfo> {
    device.gpus()?.into_iter().next().context("no GPU")
}

/// The first `size` bytes of each region, of which nothing is saved yet; region N is allocation N of process 0.
pub fn ledger(regions: &[Region], size: u64) -> Ledger {
    let mut ledger = Ledger::default();
    for (n, r) in regions.iter().enumerate() {
        ledger.add((0, n as u64), r.gpu, r.address, size);
    }
    ledger
}

/// A manifest for regions of one GPU, as [`ledger`] numbers them.
pub fn manifest(gpu: &GpuInfo, regions: &[Region], size: u64) -> Manifest {
    let allocation = |(n, r): (usize, &Region)| Allocation {
        process: 0,
        id: n as u64,
        gpu: 0,
        address: r.address,
        size,
        class: 0,
        flags: 0,
        first_chunk: n as u64 * (size / CHUNK as u64),
    };
    Manifest {
        version: VERSION,
        features: vec![],
        made_by: "phos-integration".into(),
        created: 0,
        container: "none".into(),
        driver: DriverEntry { version: 0, release: String::new() },
        lower_runtime: String::new(),
        criu: String::new(),
        chunk_size: CHUNK as u64,
        digest: phos_digest::NAME.into(),
        gpus: vec![GpuEntry { uuid: gpu.id, name: gpu.name.clone(), total_bytes: gpu.total }],
        processes: vec![ProcessEntry { pid: 1, command: "none".into(), has_library: true }],
        allocations: regions.iter().enumerate().map(allocation).collect(),
        shared: vec![],
        files: vec![],
        index: IndexEntry { size: 0, digest: String::new() },
        parent: None,
        library: None,
        warnings: vec![],
        effective_spec: serde_json::Value::Null,
    }
}
