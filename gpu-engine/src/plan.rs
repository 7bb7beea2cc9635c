//! Decisions that need no device: what fits where, and how to copy.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::device::{GpuId, GpuInfo};
use crate::job::Strategy;
use crate::keeper::wire::Held;

/// Less than this is copied faster than a round is set up, bytes.
const SMALL: u64 = 64 << 20;
/// The rate at which a first round is expected to reach storage, bytes per second. Only the choice whether to try
/// depends on it; what a round really took decides the next one.
const EXPECTED_RATE: f64 = 10e9;
/// Most rounds of pre-copy.
const MOST_ROUNDS: u32 = 8;
/// If more than this share of the memory would have to be copied again, the first round is in vain.
const WORTHWHILE: f64 = 0.7;

/// How a checkpoint will copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyPlan {
    /// In rounds while the program runs, before it is stopped.
    pub precopy: bool,
    /// Through spare memory on the GPU, once it stands still.
    pub spare: bool,
}

/// Chooses how to copy. `fits`: spare memory for everything can be had. `changing` measures the share of the memory that
/// changes within the time it is told, and is only called where that decides.
pub fn choose<E>(
    strategy: Strategy,
    leave_running: bool,
    bytes: u64,
    fits: bool,
    changing: impl FnOnce() -> Result<(f64, Duration), E>,
) -> Result<CopyPlan, E> {
    let precopy = match strategy {
        Strategy::Stop | Strategy::Snapshot => false,
        Strategy::Precopy => true,
        // With room for all of it, the pause is a copy inside the GPU: 0.5 ms per GB, and nothing is copied twice.
        Strategy::Auto if leave_running && fits => false,
        Strategy::Auto if bytes < SMALL => false,
        Strategy::Auto => {
            let (share, window) = changing()?;
            let rounds_take = bytes as f64 / EXPECTED_RATE;
            share * (rounds_take / window.as_secs_f64()).max(1.0) < WORTHWHILE
        }
    };
    Ok(CopyPlan { precopy, spare: leave_running && strategy != Strategy::Stop })
}

/// Whether another round of pre-copy pays: the dirty set is not small yet and still shrinks by half or more.
pub fn another_round(rounds: u32, copied: u64, dirty: u64) -> bool {
    rounds < MOST_ROUNDS && dirty >= SMALL && dirty <= copied / 2
}

/// Spare memory to ask for on each GPU, bytes: room for what was dirty when last looked at, and for half as much again
/// that will have become so; never more than the GPU has beyond `reserve`.
pub fn spare_wanted(
    demand: &BTreeMap<GpuId, u64>,
    dirty: &BTreeMap<GpuId, u64>,
    gpus: &[GpuInfo],
    reserve: u64,
) -> BTreeMap<GpuId, u64> {
    let wanted = |(id, all): (&GpuId, &u64)| {
        let room = gpus.iter().find(|g| g.id == *id)?.free?.saturating_sub(reserve);
        let dirty = dirty.get(id).copied().unwrap_or(0);
        Some((*id, (dirty + dirty / 2 + SMALL).min(*all).min(room)))
    };
    demand.iter().filter_map(wanted).collect()
}

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
        .all(|(id, bytes)| gpus.iter().any(|g| g.id == *id && g.free >= Some(bytes.saturating_add(reserve))))
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
        if !gpus.iter().any(|g| g.id == w.id && g.free >= Some(w.bytes)) {
            return Err(w.clone());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(n: u8, free: u64) -> GpuInfo {
        GpuInfo { id: GpuId([n; 16]), name: "test".into(), total: 100, free: Some(free) }
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

    fn chosen(strategy: Strategy, leave_running: bool, fits: bool, share: f64) -> (bool, bool) {
        let second = Duration::from_secs(1);
        let plan =
            choose(strategy, leave_running, 20_000_000_000, fits, || Ok::<_, ()>((share, second))).unwrap();
        (plan.precopy, plan.spare)
    }

    #[test]
    fn memory_that_changes_faster_than_it_is_copied_is_not_pre_copied() {
        // 20 GB take two seconds, so what changes by a tenth in one second will have changed by a fifth.
        assert_eq!(chosen(Strategy::Auto, true, false, 0.1), (true, true));
        assert_eq!(chosen(Strategy::Auto, true, false, 0.4), (false, true));
        assert_eq!(chosen(Strategy::Auto, true, true, 0.0), (false, true), "all of it fits");
        assert_eq!(chosen(Strategy::Auto, false, true, 0.0), (true, false), "a stop needs no spare memory");
        assert_eq!(chosen(Strategy::Precopy, true, true, 1.0), (true, true));
        assert_eq!(chosen(Strategy::Snapshot, true, false, 0.0), (false, true));
        assert_eq!(chosen(Strategy::Stop, true, true, 0.0), (false, false));
    }

    #[test]
    fn rounds_end_when_the_dirty_set_stops_shrinking() {
        assert!(another_round(1, 10 * SMALL, 2 * SMALL));
        assert!(!another_round(1, 10 * SMALL, 6 * SMALL));
        assert!(!another_round(1, 10 * SMALL, SMALL - 1));
        assert!(!another_round(MOST_ROUNDS, 10 * SMALL, SMALL));
    }

    #[test]
    fn spare_memory_stays_within_what_is_free_and_needed() {
        let id = GpuId([1; 16]);
        let one = |n| BTreeMap::from([(id, n)]);
        let gb = 1 << 30;
        assert_eq!(spare_wanted(&one(20 * gb), &one(20 * gb), &[gpu(1, 100 * gb)], gb), one(20 * gb));
        assert_eq!(spare_wanted(&one(20 * gb), &one(2 * gb), &[gpu(1, 100 * gb)], gb), one(3 * gb + SMALL));
        assert_eq!(spare_wanted(&one(20 * gb), &one(20 * gb), &[gpu(1, 5 * gb)], gb), one(4 * gb));
        assert_eq!(spare_wanted(&one(20 * gb), &one(20 * gb), &[gpu(1, 0)], gb), one(0));
    }

    #[test]
    fn only_the_same_gpu_with_enough_memory_will_do() {
        let wanted = [WantedGpu { id: GpuId([1; 16]), name: "test".into(), bytes: 10 }];
        assert!(place(&wanted, &[gpu(1, 10)]).is_ok());
        assert!(place(&wanted, &[gpu(1, 9)]).is_err());
        assert!(place(&wanted, &[gpu(2, 100)]).is_err());
    }
}
