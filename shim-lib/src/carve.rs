//! Cutting allocations out of larger blocks: memory that can be parked comes in units of 2 MiB, and each unit that is parked
//! by itself costs time while the program stands still.
//!
//! Pure bookkeeping; the caller makes and frees the blocks.

use std::collections::{BTreeMap, BTreeSet};

use crate::cuda::DevicePtr;

/// Size of a block of small allocations in bytes: the driver's allocation granularity.
pub const BLOCK: u64 = 2 << 20;
/// Largest allocation that is cut from such a block, bytes.
pub const LARGEST: u64 = 512 << 10;
/// Alignment of small allocations, bytes, as the driver gives it.
const ALIGN: u64 = 512;

/// Where a block belongs: a context or a pool, on a device. Blocks are not shared, so that each owner's memory can go
/// with it.
pub type Home = (i32, usize);

/// One allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Address.
    pub start: DevicePtr,
    /// Bytes asked for.
    pub size: u64,
    /// Never used twice.
    pub serial: u64,
    /// Where it belongs.
    pub home: Home,
}

/// A block that is not carved any more: its address and bytes. The caller frees it.
pub type Emptied = (DevicePtr, u64);

#[derive(Debug)]
struct Block {
    home: Home,
    len: u64,
    /// Free stretches by offset. Neighbours are always merged.
    free: BTreeMap<u64, u64>,
    /// The same as (length, offset).
    by_len: BTreeSet<(u64, u64)>,
    /// Allocations by offset: bytes asked for and serial number.
    used: BTreeMap<u64, (u64, u64)>,
}

impl Block {
    fn largest(&self) -> u64 {
        self.by_len.last().map_or(0, |(len, _)| *len)
    }

    fn add_free(&mut self, at: u64, len: u64) {
        self.free.insert(at, len);
        self.by_len.insert((len, at));
    }

    fn remove_free(&mut self, at: u64) -> Option<u64> {
        let len = self.free.remove(&at)?;
        self.by_len.remove(&(len, at));
        Some(len)
    }
}

/// All blocks of one kind.
#[derive(Debug)]
pub struct Carver {
    /// Alignment of allocations, bytes.
    align: u64,
    blocks: BTreeMap<DevicePtr, Block>,
    /// Blocks as (home, largest free stretch, address).
    room: BTreeSet<(Home, u64, DevicePtr)>,
    /// Blocks that hold nothing.
    empty: BTreeSet<(Home, DevicePtr)>,
    count: u64,
    serial: u64,
}

/// Bytes that a small allocation of `size` takes.
pub fn rounded(size: u64) -> u64 {
    size.next_multiple_of(ALIGN)
}

impl Default for Carver {
    fn default() -> Self {
        Carver::new(ALIGN)
    }
}

impl Carver {
    /// Cuts at multiples of `align` bytes.
    pub fn new(align: u64) -> Self {
        let (blocks, room, empty) = Default::default();
        Carver { align, blocks, room, empty, count: 0, serial: 0 }
    }

    /// Cuts `size` bytes from a block of `home`, if one has room.
    pub fn allocate(&mut self, home: Home, size: u64) -> Option<DevicePtr> {
        let need = size.next_multiple_of(self.align);
        // The fullest block that has room: others may become empty.
        let entry = *self.room.range((home, need, 0)..=(home, u64::MAX, u64::MAX)).next()?;
        let block = self.blocks.get_mut(&entry.2)?;
        let (len, at) = *block.by_len.range((need, 0)..).next()?;
        block.remove_free(at);
        if len > need {
            block.add_free(at + need, len - need);
        }
        self.serial += 1;
        block.used.insert(at, (size, self.serial));
        let largest = block.largest();
        self.count += 1;
        self.room.remove(&entry);
        self.room.insert((home, largest, entry.2));
        self.empty.remove(&(home, entry.2));
        Some(entry.2 + at)
    }

    /// Adds an empty block of `len` bytes at `base`.
    pub fn add(&mut self, home: Home, base: DevicePtr, len: u64) {
        let (free, by_len, used) = Default::default();
        let mut block = Block { home, len, free, by_len, used };
        block.add_free(0, len);
        self.blocks.insert(base, block);
        self.room.insert((home, len, base));
        self.empty.insert((home, base));
    }

    fn block(&self, pointer: DevicePtr) -> Option<(DevicePtr, &Block)> {
        let (base, block) = self.blocks.range(..=pointer).next_back()?;
        (pointer - base < block.len).then_some((*base, block))
    }

    /// Ends the allocation that begins at `pointer`. Its room is not used again before [`Carver::give_back`].
    pub fn take(&mut self, pointer: DevicePtr) -> Option<Piece> {
        let base = self.block(pointer)?.0;
        let block = self.blocks.get_mut(&base)?;
        let (size, serial) = block.used.remove(&(pointer - base))?;
        self.count -= 1;
        Some(Piece { start: pointer, size, serial, home: block.home })
    }

    /// Makes the room of what [`Carver::take`] returned usable again.
    pub fn give_back(&mut self, piece: Piece) {
        let Some(base) = self.block(piece.start).map(|(base, _)| base) else { return };
        let Some(block) = self.blocks.get_mut(&base) else { return };
        self.room.remove(&(block.home, block.largest(), base));
        let (mut at, mut len) = (piece.start - base, piece.size.next_multiple_of(self.align));
        if let Some(after) = block.remove_free(at + len) {
            len += after;
        }
        if let Some((before, n)) = block.free.range(..at).next_back().map(|(b, n)| (*b, *n))
            && before + n == at
        {
            block.remove_free(before);
            (at, len) = (before, len + n);
        }
        block.add_free(at, len);
        self.room.insert((block.home, block.largest(), base));
        if block.used.is_empty() && len == block.len {
            self.empty.insert((block.home, base));
        }
    }

    /// Removes a block and what is known of it.
    pub fn remove(&mut self, base: DevicePtr) -> Option<Emptied> {
        let block = self.blocks.remove(&base)?;
        self.count -= block.used.len() as u64;
        self.room.remove(&(block.home, block.largest(), base));
        self.empty.remove(&(block.home, base));
        Some((base, block.len))
    }

    /// Removes empty blocks of `home`, all but `keep` of them; returns them.
    pub fn drop_empty(&mut self, home: Home, keep: usize) -> Vec<Emptied> {
        let empty = self.empty.range((home, 0)..=(home, u64::MAX));
        let gone: Vec<_> = empty.skip(keep).map(|(_, base)| *base).collect();
        gone.into_iter().filter_map(|base| self.remove(base)).collect()
    }

    /// Removes all empty blocks on a device; returns them.
    pub fn drop_all_empty(&mut self, device: i32) -> Vec<Emptied> {
        let gone: Vec<_> =
            self.empty.iter().filter(|(home, _)| home.0 == device).map(|(_, base)| *base).collect();
        gone.into_iter().filter_map(|base| self.remove(base)).collect()
    }

    /// Blocks on a device: address, bytes, and what is cut from each.
    pub fn on_device(&self, device: i32) -> Vec<(DevicePtr, u64, Vec<Piece>)> {
        let pieces = |base: DevicePtr, block: &Block| {
            let piece = |(at, (size, serial)): (&u64, &(u64, u64))| Piece {
                start: base + at,
                size: *size,
                serial: *serial,
                home: block.home,
            };
            block.used.iter().map(piece).collect()
        };
        let there = self.blocks.iter().filter(|(_, block)| block.home.0 == device);
        there.map(|(base, block)| (*base, block.len, pieces(*base, block))).collect()
    }

    /// The allocation that contains `address`.
    pub fn find(&self, address: DevicePtr) -> Option<Piece> {
        let (base, block) = self.block(address)?;
        let (at, (size, serial)) = block.used.range(..=address - base).next_back()?;
        let piece = Piece { start: base + at, size: *size, serial: *serial, home: block.home };
        (address - base < at + size).then_some(piece)
    }

    /// Number of allocations.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Removes all blocks of an owner; returns them.
    pub fn drop_owner(&mut self, owner: usize) -> Vec<Emptied> {
        let gone: Vec<_> =
            self.blocks.iter().filter(|(_, b)| b.home.1 == owner).map(|(base, _)| *base).collect();
        gone.into_iter().filter_map(|base| self.remove(base)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: Home = (0, 1);

    #[test]
    fn allocations_never_overlap_and_all_room_comes_back() {
        let mut small = Carver::default();
        let mut live: Vec<(u64, u64)> = Vec::new();
        let mut serials = std::collections::HashSet::new();
        let mut next_block = 0x7000_0000_0000;
        let mut random = 1u64;
        for round in 0..20_000u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if random >> 63 == 0 || live.is_empty() {
                let size = 1 + (random >> 20) % if round % 50 == 0 { LARGEST } else { 5000 };
                let at = match small.allocate(HOME, size) {
                    Some(at) => at,
                    None => {
                        small.add(HOME, next_block, BLOCK);
                        next_block += BLOCK;
                        small.allocate(HOME, size).unwrap()
                    }
                };
                assert_eq!(at % ALIGN, 0);
                assert!(live.iter().all(|(a, n)| at + size <= *a || a + n <= at), "overlap");
                let found = small.find(at + size - 1).unwrap();
                assert_eq!((found.start, found.size), (at, size));
                assert!(serials.insert(found.serial), "serial used twice");
                assert!(small.take(at + 1).is_none(), "not where an allocation begins");
                live.push((at, size));
            } else {
                let (at, _) = live.swap_remove((random >> 33) as usize % live.len());
                let piece = small.take(at).unwrap();
                assert_eq!(small.find(at), None);
                assert!(small.take(at).is_none(), "freed twice");
                small.give_back(piece);
            }
            assert_eq!(small.count(), live.len() as u64);
        }
        for (at, _) in live {
            let piece = small.take(at).unwrap();
            small.give_back(piece);
        }
        let blocks = small.blocks.len();
        assert_eq!(small.drop_empty(HOME, 1).len(), blocks - 1, "every block but one is given back");
        assert_eq!(small.drop_empty(HOME, 0).len(), 1);
        assert!(small.blocks.is_empty() && small.room.is_empty() && small.empty.is_empty());
        assert!(small.take(0x1234).is_none());
    }

    #[test]
    fn what_was_taken_is_not_given_out_before_it_is_given_back() {
        let mut small = Carver::default();
        small.add(HOME, 0, BLOCK);
        let pieces: Vec<_> = (0..4).map(|_| small.allocate(HOME, LARGEST).unwrap()).collect();
        let piece = small.take(pieces[2]).unwrap();
        assert_eq!(small.allocate(HOME, LARGEST), None);
        small.give_back(piece);
        assert_eq!(small.allocate(HOME, LARGEST), Some(pieces[2]));
    }

    #[test]
    fn contexts_do_not_share_blocks() {
        let mut small = Carver::default();
        small.add((0, 1), 0x1000_0000, BLOCK);
        assert_eq!(small.allocate((0, 2), 100), None);
        assert_eq!(small.allocate((1, 1), 100), None);
        assert!(small.allocate((0, 1), 100).is_some());
        assert_eq!(small.drop_owner(1), vec![(0x1000_0000, BLOCK)]);
        assert_eq!(small.count(), 0);
    }
}
