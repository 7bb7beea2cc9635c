//! Decisions that need no device: what fits where.

use std::collections::BTreeMap;

use crate::device::{GpuId, GpuInfo};
use crate::keeper::wire::Held;

/// Bytes held on each GPU.
pub fn demand_by_gpu<'a>(held: impl Iterator<Item = &'a Held>) -> BTreeMap<GpuId, u64> {
    let mut demand = BTreeMap::new();
    for h in held {
        *demand.entry(GpuId(h.device)).or_insert(0) += h.size;
    }
    demand
}

/// Whether every GPU has room for a second copy of what is on it and `reserve` bytes more.
pub fn snapshot_fits(demand: &BTreeMap<GpuId, u64>, gpus: &[GpuInfo], reserve: u64) -> bool {
    demand
        .iter()
        .all(|(id, bytes)| gpus.iter().any(|g| g.id == *id && g.free >= bytes.saturating_add(reserve)))
}

/// A GPU of the image's machine, as much as matters for finding a replacement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedGpu {
    /// Its identity.
    pub id: GpuId,
    /// Its model.
    pub name: String,
    /// Bytes of the image on it.
    pub bytes: u64,
}

/// Finds the same GPUs again. A process's driver state names its GPU by UUID, so only the very same GPU will do.
///
/// Returns the first one that is missing or has too little free memory.
pub fn place(wanted: &[WantedGpu], gpus: &[GpuInfo]) -> Result<(), WantedGpu> {
    for w in wanted {
        if !gpus.iter().any(|g| g.id == w.id && g.free >= w.bytes) {
            return Err(w.clone());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(n: u8, free: u64) -> GpuInfo {
        GpuInfo { id: GpuId([n; 16]), name: "test".into(), total: 100, free }
    }

    fn held(n: u8, size: u64) -> Held {
        Held { id: 0, device: [n; 16], address: 0, size, class: 0, flags: 0 }
    }

    #[test]
    fn a_snapshot_needs_room_on_every_gpu_it_touches() {
        let pieces = [held(1, 10), held(2, 20), held(1, 5)];
        let demand = demand_by_gpu(pieces.iter());
        assert_eq!(demand[&GpuId([1; 16])], 15);
        assert!(snapshot_fits(&demand, &[gpu(1, 17), gpu(2, 22)], 2));
        assert!(!snapshot_fits(&demand, &[gpu(1, 17), gpu(2, 21)], 2));
        assert!(!snapshot_fits(&demand, &[gpu(1, 17)], 0), "a GPU the host cannot see has no room");
        assert!(snapshot_fits(&BTreeMap::new(), &[], 2));
    }

    #[test]
    fn only_the_same_gpu_with_enough_memory_will_do() {
        let wanted = [WantedGpu { id: GpuId([1; 16]), name: "test".into(), bytes: 10 }];
        assert!(place(&wanted, &[gpu(1, 10)]).is_ok());
        assert!(place(&wanted, &[gpu(1, 9)]).is_err());
        assert!(place(&wanted, &[gpu(2, 100)]).is_err());
    }
}
