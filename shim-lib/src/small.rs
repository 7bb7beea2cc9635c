//! Cutting small allocations out of larger blocks: memory that can be parked comes in units of 2 MiB.
//!
//! Pure bookkeeping; the caller makes and frees the blocks.

use std::collections::BTreeMap;

use crate::cuda::DevicePtr;

/// Size of a block in bytes: the driver's allocation granularity.
pub const BLOCK: u64 = 2 << 20;
/// Largest allocation that is cut from a block, bytes.
pub const LARGEST: u64 = 512 << 10;
/// Alignment of allocations, bytes, as the driver gives it.
const ALIGN: u64 = 512;

/// Where a block belongs: a context on a device. Blocks are not shared, so that each context's memory can go with it.
pub type Home = (i32, usize);

#[derive(Debug)]
struct Block {
    home: Home,
    /// Free stretches by offset. Neighbours are always merged.
    free: BTreeMap<u64, u64>,
    /// Allocations by offset: bytes asked for.
    used: BTreeMap<u64, u64>,
}

/// All blocks by address.
#[derive(Debug, Default)]
pub struct Small(BTreeMap<DevicePtr, Block>);

fn rounded(size: u64) -> u64 {
    size.next_multiple_of(ALIGN)
}

impl Small {
    /// Cuts `size` bytes from a block of `home`, if one has room.
    pub fn allocate(&mut self, home: Home, size: u64) -> Option<DevicePtr> {
        let need = rounded(size);
        for (base, block) in self.0.iter_mut().filter(|(_, b)| b.home == home) {
            let fit = block.free.iter().find(|(_, len)| **len >= need).map(|(at, len)| (*at, *len));
            if let Some((at, len)) = fit {
                block.free.remove(&at);
                if len > need {
                    block.free.insert(at + need, len - need);
                }
                block.used.insert(at, size);
                return Some(base + at);
            }
        }
        None
    }

    /// Adds an empty block at `base`.
    pub fn add(&mut self, home: Home, base: DevicePtr) {
        self.0.insert(base, Block { home, free: BTreeMap::from([(0, BLOCK)]), used: BTreeMap::new() });
    }

    fn block(&self, pointer: DevicePtr) -> Option<(DevicePtr, &Block)> {
        let (base, block) = self.0.range(..=pointer).next_back()?;
        (pointer - base < BLOCK).then_some((*base, block))
    }

    /// Whether an allocation begins at `pointer`.
    pub fn holds(&self, pointer: DevicePtr) -> bool {
        self.block(pointer).is_some_and(|(base, b)| b.used.contains_key(&(pointer - base)))
    }

    /// Frees the allocation at `pointer`. Returns the block's address if it is empty now and has been removed.
    pub fn free(&mut self, pointer: DevicePtr) -> Option<DevicePtr> {
        let base = self.block(pointer)?.0;
        let block = self.0.get_mut(&base)?;
        let mut at = pointer - base;
        let mut len = rounded(block.used.remove(&at)?);
        if let Some(after) = block.free.remove(&(at + len)) {
            len += after;
        }
        if let Some((before, n)) = block.free.range(..at).next_back().map(|(b, n)| (*b, *n))
            && before + n == at
        {
            block.free.remove(&before);
            (at, len) = (before, len + n);
        }
        block.free.insert(at, len);
        if block.used.is_empty() {
            self.0.remove(&base);
            return Some(base);
        }
        None
    }

    /// Start and size of the allocation that contains `address`.
    pub fn range(&self, address: DevicePtr) -> Option<(DevicePtr, u64)> {
        let (base, block) = self.block(address)?;
        let (at, size) = block.used.range(..=address - base).next_back()?;
        (address - base < at + size).then_some((base + at, *size))
    }

    /// Number of allocations.
    pub fn count(&self) -> u64 {
        self.0.values().map(|b| b.used.len() as u64).sum()
    }

    /// Removes all blocks of a context; returns their addresses.
    pub fn drop_context(&mut self, context: usize) -> Vec<DevicePtr> {
        let gone: Vec<_> =
            self.0.iter().filter(|(_, b)| b.home.1 == context).map(|(base, _)| *base).collect();
        gone.iter().for_each(|base| drop(self.0.remove(base)));
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: Home = (0, 1);

    #[test]
    fn allocations_never_overlap_and_all_room_comes_back() {
        let mut small = Small::default();
        let mut live: Vec<(u64, u64)> = Vec::new();
        let mut next_block = 0x7000_0000_0000;
        let mut random = 1u64;
        for round in 0..20_000u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if random >> 63 == 0 || live.is_empty() {
                let size = 1 + (random >> 20) % if round % 50 == 0 { LARGEST } else { 5000 };
                let at = match small.allocate(HOME, size) {
                    Some(at) => at,
                    None => {
                        small.add(HOME, next_block);
                        next_block += BLOCK;
                        small.allocate(HOME, size).unwrap()
                    }
                };
                assert_eq!(at % ALIGN, 0);
                assert!(live.iter().all(|(a, n)| at + size <= *a || a + n <= at), "overlap");
                assert_eq!(small.range(at + size - 1), Some((at, size)));
                assert!(small.holds(at) && !small.holds(at + 1));
                live.push((at, size));
            } else {
                let (at, _) = live.swap_remove((random >> 33) as usize % live.len());
                small.free(at);
                assert_eq!(small.range(at), None);
            }
            assert_eq!(small.count(), live.len() as u64);
        }
        for (at, _) in live {
            small.free(at);
        }
        assert!(small.0.is_empty(), "every block is given back");
        assert!(small.free(0x1234).is_none());
    }

    #[test]
    fn contexts_do_not_share_blocks() {
        let mut small = Small::default();
        small.add((0, 1), 0x1000_0000);
        assert_eq!(small.allocate((0, 2), 100), None);
        assert_eq!(small.allocate((1, 1), 100), None);
        assert!(small.allocate((0, 1), 100).is_some());
        assert_eq!(small.drop_context(1), vec![0x1000_0000]);
        assert_eq!(small.count(), 0);
    }
}
