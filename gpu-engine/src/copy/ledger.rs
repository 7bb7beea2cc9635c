//! What is saved of the memory.

use std::collections::BTreeMap;

use phos_digest::ZERO_CHUNK;

use crate::device::GpuId;
use crate::image::{CHUNK, Digest, Location, Saved};

/// An allocation: index of its process, and the library's id of it.
pub type BlockId = (u32, u64);

/// One chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChunkRef {
    /// Its allocation.
    pub block: BlockId,
    /// Its number in there.
    pub chunk: u32,
}

/// One allocation, mapped into this process.
#[derive(Debug, Clone)]
pub struct Block {
    /// The GPU it is on.
    pub gpu: GpuId,
    /// Where it is mapped in this process.
    pub address: u64,
    /// Digest and place of each chunk's saved bytes.
    pub chunks: Vec<Option<Saved>>,
}

impl Block {
    /// Address of a chunk.
    pub fn chunk_address(&self, chunk: u32) -> u64 {
        self.address + u64::from(chunk) * CHUNK as u64
    }
}

/// Chunks that lie together on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// The GPU.
    pub gpu: GpuId,
    /// Where the first one begins.
    pub address: u64,
    /// Index of the first one in the list of chunks that was cut into batches.
    pub first: usize,
    /// How many.
    pub count: usize,
}

/// All memory of a job, and what is saved of it.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    blocks: BTreeMap<BlockId, Block>,
}

impl Ledger {
    /// The allocations.
    pub fn blocks(&self) -> &BTreeMap<BlockId, Block> {
        &self.blocks
    }

    /// An allocation, if it is still there.
    pub fn block(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(&id)
    }

    /// Adds an allocation of which nothing is saved; one that is there already stays as it is.
    pub fn add(&mut self, id: BlockId, gpu: GpuId, address: u64, size: u64) {
        let chunks = vec![None; (size / CHUNK as u64) as usize];
        self.blocks.entry(id).or_insert(Block { gpu, address, chunks });
    }

    /// Forgets the allocations for which `keep` is false.
    pub fn retain(&mut self, keep: impl Fn(BlockId) -> bool) {
        self.blocks.retain(|id, _| keep(*id));
    }

    /// What an earlier image has of an allocation. Without effect if it has another size.
    pub fn assume(&mut self, id: BlockId, saved: impl ExactSizeIterator<Item = Saved>) {
        if let Some(block) = self.blocks.get_mut(&id).filter(|b| b.chunks.len() == saved.len()) {
            block.chunks = saved.map(Some).collect();
        }
    }

    /// Every chunk, in order.
    pub fn all(&self) -> Vec<ChunkRef> {
        self.select(|_| true)
    }

    /// The chunks of which nothing is saved.
    pub fn unsaved(&self) -> Vec<ChunkRef> {
        self.select(|saved| saved.is_none())
    }

    fn select(&self, want: impl Fn(&Option<Saved>) -> bool) -> Vec<ChunkRef> {
        let mut chunks = Vec::new();
        for (id, block) in &self.blocks {
            let wanted = block.chunks.iter().enumerate().filter(|(_, saved)| want(saved));
            chunks.extend(wanted.map(|(n, _)| ChunkRef { block: *id, chunk: n as u32 }));
        }
        chunks
    }

    /// The chunks that differ from what is saved of them. `digests`: of [`Ledger::all`], as they are now.
    pub fn dirty(&self, digests: &[Digest]) -> Vec<ChunkRef> {
        let mut now = digests.iter();
        let mut dirty = Vec::new();
        for (id, block) in &self.blocks {
            for (n, saved) in block.chunks.iter().enumerate() {
                // A digest that is missing counts as another one.
                let digest = now.next();
                if saved.as_ref().map(|(d, _)| d) != digest || digest.is_none() {
                    dirty.push(ChunkRef { block: *id, chunk: n as u32 });
                }
            }
        }
        dirty
    }

    /// Parts chunks into those that are zero and the others. `digests`: of [`Ledger::all`], as they are now.
    pub fn part_zeros(&self, chunks: Vec<ChunkRef>, digests: &[Digest]) -> (Vec<ChunkRef>, Vec<ChunkRef>) {
        let all = self.all();
        // Both are in the same order.
        let mut now = all.iter().zip(digests);
        chunks.into_iter().partition(|chunk| {
            now.by_ref().find(|(c, _)| *c == chunk).is_some_and(|(_, digest)| *digest == ZERO_CHUNK)
        })
    }

    /// The digests of chunks. `digests`: of [`Ledger::all`], as they are now; a shorter list if they are not.
    pub fn digests_of(&self, chunks: &[ChunkRef], digests: &[Digest]) -> Vec<Digest> {
        let all = self.all();
        // Both are in the same order.
        let mut now = all.iter().zip(digests);
        chunks.iter().map_while(|chunk| now.by_ref().find(|(c, _)| *c == chunk).map(|(_, d)| *d)).collect()
    }

    /// Records chunks as being zero: so they are saved, without anything being stored.
    pub fn note_zeros(&mut self, chunks: &[ChunkRef]) {
        self.record(chunks.iter().map(|chunk| (*chunk, (ZERO_CHUNK, Location::Zero))));
    }

    /// Whether nothing at all is saved.
    pub fn is_blank(&self) -> bool {
        self.blocks.values().flat_map(|b| &b.chunks).all(Option::is_none)
    }

    /// Records what was copied.
    pub fn record(&mut self, copied: impl IntoIterator<Item = (ChunkRef, Saved)>) {
        for (chunk, saved) in copied {
            if let Some(slot) =
                self.blocks.get_mut(&chunk.block).and_then(|b| b.chunks.get_mut(chunk.chunk as usize))
            {
                *slot = Some(saved);
            }
        }
    }

    /// What is saved of a chunk.
    pub fn saved(&self, chunk: ChunkRef) -> Option<Saved> {
        *self.blocks.get(&chunk.block)?.chunks.get(chunk.chunk as usize)?
    }

    /// Cuts chunks into batches of at most `most` that lie together.
    pub fn batches(&self, chunks: &[ChunkRef], most: usize) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        for (n, chunk) in chunks.iter().enumerate() {
            let Some(block) = self.blocks.get(&chunk.block) else { continue };
            let address = block.chunk_address(chunk.chunk);
            match batches.last_mut() {
                Some(last)
                    if last.count < most
                        && chunks[last.first].block == chunk.block
                        && last.first + last.count == n
                        && last.address + (last.count * CHUNK) as u64 == address =>
                {
                    last.count += 1;
                }
                _ => batches.push(Batch { gpu: block.gpu, address, first: n, count: 1 }),
            }
        }
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: GpuId = GpuId([1; 16]);

    fn digest(n: u64) -> Digest {
        Digest([n, n])
    }

    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        ledger.add((0, 7), GPU, 0x1000_0000, 4 * CHUNK as u64);
        ledger.add((1, 7), GPU, 0x2000_0000, 2 * CHUNK as u64);
        ledger
    }

    #[test]
    fn what_differs_or_was_never_saved_is_dirty() {
        let mut ledger = ledger();
        let all = ledger.all();
        assert_eq!(all.len(), 6);
        let now: Vec<_> = (0..6).map(digest).collect();
        assert_eq!(ledger.dirty(&now), all, "nothing is saved");
        ledger.record(all.iter().zip(&now).map(|(c, d)| (*c, (*d, Location::Zero))));
        assert_eq!(ledger.dirty(&now), []);
        let mut later = now.clone();
        later[4] = digest(99);
        assert_eq!(ledger.dirty(&later), [all[4]]);
        assert_eq!(ledger.dirty(&now[..5]), [all[5]], "a missing digest is no match");
        // An allocation that came later is dirty, one that went is no more.
        ledger.add((1, 8), GPU, 0x3000_0000, CHUNK as u64);
        ledger.retain(|id| id != (0, 7));
        assert_eq!(ledger.dirty(&[digest(4), digest(5), digest(6)]), [ChunkRef { block: (1, 8), chunk: 0 }]);
    }

    #[test]
    fn what_is_zero_is_saved_once_that_is_known() {
        let mut ledger = ledger();
        let now = [digest(0), ZERO_CHUNK, digest(2), digest(3), ZERO_CHUNK, digest(5)];
        let all = ledger.all();
        assert!(ledger.is_blank());
        ledger.record([(all[0], (digest(0), Location::Zero))]);
        let (zero, rest) = ledger.part_zeros(ledger.dirty(&now), &now);
        assert_eq!((zero.clone(), rest.clone()), (vec![all[1], all[4]], vec![all[2], all[3], all[5]]));
        ledger.note_zeros(&zero);
        assert!(!ledger.is_blank());
        assert_eq!(ledger.dirty(&now), rest);
        let mut later = now;
        later[1] = digest(9);
        assert_eq!(ledger.dirty(&later), [all[1], all[2], all[3], all[5]], "zero no more");
        assert_eq!(ledger.digests_of(&rest, &now), [digest(2), digest(3), digest(5)]);
        assert_eq!(ledger.digests_of(&rest, &now[..3]), [digest(2)]);
        assert_eq!(ledger.part_zeros(rest.clone(), &[]), (vec![], rest), "what is not known is not zero");
    }

    #[test]
    fn batches_hold_only_what_lies_together() {
        let ledger = ledger();
        let mut chunks = ledger.all();
        let counts = |chunks: &[ChunkRef], most| {
            ledger.batches(chunks, most).iter().map(|b| b.count).collect::<Vec<_>>()
        };
        assert_eq!(counts(&chunks, 32), [4, 2]);
        assert_eq!(counts(&chunks, 3), [3, 1, 2]);
        chunks.remove(1);
        assert_eq!(counts(&chunks, 32), [1, 2, 2]);
        let batch = ledger.batches(&chunks, 32)[1];
        assert_eq!((batch.first, batch.address), (1, 0x1000_0000 + 2 * CHUNK as u64));
    }

    #[test]
    fn an_earlier_image_counts_only_for_the_same_size() {
        let mut ledger = ledger();
        ledger.assume((0, 7), vec![(digest(0), Location::Zero); 3].into_iter());
        assert_eq!(ledger.unsaved().len(), 6);
        ledger.assume((1, 7), vec![(digest(0), Location::Zero); 2].into_iter());
        assert_eq!(ledger.unsaved().len(), 4);
    }
}
