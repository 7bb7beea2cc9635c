//! Spare memory on the GPUs: chunks as they were when the program stood still, on their way to the image while it runs
//! again.

use std::collections::BTreeMap;

use super::ledger::{Batch, ChunkRef, Ledger};
use super::scan::Scanner;
use crate::device::{Device, DeviceError, GpuId, Region};
use crate::image::{CHUNK, Digest};

/// Spare memory is allocated in parts of at most this many bytes.
const PART: u64 = 1 << 30;

/// Spare memory on all GPUs of a job.
#[derive(Default)]
pub struct Spare {
    parts: BTreeMap<GpuId, Vec<Region>>,
    /// What is in it: for each GPU the chunks in their order.
    held: BTreeMap<GpuId, Vec<ChunkRef>>,
    /// Their digests, if they came with them or were asked for.
    digests: BTreeMap<GpuId, Vec<Digest>>,
}

impl Spare {
    /// Allocates up to the wanted number of bytes on each GPU; less where the GPU has no more.
    pub fn allocate(device: &dyn Device, wanted: &BTreeMap<GpuId, u64>) -> Result<Self, DeviceError> {
        let mut spare = Spare::default();
        for (gpu, bytes) in wanted {
            let mut left = bytes.next_multiple_of(CHUNK as u64);
            let parts = spare.parts.entry(*gpu).or_default();
            while left > 0 {
                match device.allocate(*gpu, left.min(PART)) {
                    Ok(region) => {
                        left -= left.min(PART);
                        parts.push(region);
                    }
                    Err(e) if e.is_out_of_memory() => break,
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(spare)
    }

    /// Bytes allocated on all GPUs.
    pub fn bytes(&self) -> u64 {
        self.parts.values().flatten().map(|r| r.size).sum()
    }

    /// Takes as many of `chunks` as there is room for and returns those that did not fit, with their digests. Call it once.
    /// `digests`: of `chunks`, as they are now, or none.
    pub fn take(
        &mut self,
        device: &dyn Device,
        scanner: &mut Scanner,
        ledger: &Ledger,
        chunks: &[ChunkRef],
        mut digests: &[Digest],
    ) -> Result<(Vec<ChunkRef>, Vec<Digest>), DeviceError> {
        let room: BTreeMap<GpuId, usize> =
            self.parts.iter().map(|(gpu, parts)| (*gpu, parts.iter().map(chunks_in).sum())).collect();
        let (mut left, mut of_left) = (Vec::new(), Vec::new());
        let mut addresses = BTreeMap::<GpuId, Vec<u64>>::new();
        // Chunks come sorted by allocation: what depends on the allocation is looked up once for each.
        for of_block in chunks.chunk_by(|a, b| a.block == b.block) {
            let (own, rest) = digests.split_at(of_block.len().min(digests.len()));
            digests = rest;
            let Some(block) = ledger.block(of_block[0].block) else { continue };
            let held = self.held.entry(block.gpu).or_default();
            let fit =
                room.get(&block.gpu).copied().unwrap_or(0).saturating_sub(held.len()).min(of_block.len());
            let (in_, out) = of_block.split_at(fit);
            held.extend_from_slice(in_);
            addresses.entry(block.gpu).or_default().extend(in_.iter().map(|c| block.chunk_address(c.chunk)));
            left.extend_from_slice(out);
            let (of_in, of_out) = own.split_at(fit.min(own.len()));
            self.digests.entry(block.gpu).or_default().extend_from_slice(of_in);
            of_left.extend_from_slice(of_out);
        }
        for (gpu, addresses) in &addresses {
            let parts = self.parts.get(gpu).map(Vec::as_slice).unwrap_or_default();
            let places: Vec<_> = parts.iter().map(|p| (p.address, chunks_in(p))).collect();
            scanner.gather(device, *gpu, addresses, &places)?;
        }
        Ok((left, of_left))
    }

    /// Computes the digests of what is held, unless they came with it, in one go: while the program stands still that costs it
    /// nothing, and later the GPU would have to switch between the two processes for it.
    pub fn digest(&mut self, device: &dyn Device, scanner: &mut Scanner) -> Result<(), DeviceError> {
        let mut lists = BTreeMap::new();
        for (gpu, held) in &self.held {
            if self.digests.get(gpu).is_some_and(|d| d.len() == held.len()) {
                continue;
            }
            let parts = self.parts.get(gpu).map(Vec::as_slice).unwrap_or_default();
            let places = parts.iter().flat_map(|p| (0..chunks_in(p)).map(|n| p.address + (n * CHUNK) as u64));
            lists.insert(*gpu, places.take(held.len()).collect());
        }
        self.digests.extend(scanner.digests_at(device, &lists)?);
        Ok(())
    }

    /// Digests of the chunks in the list that [`Spare::batches`] returns.
    pub fn digests(&self) -> Vec<Digest> {
        self.digests.values().flatten().copied().collect()
    }

    /// What is held, as a list of chunks and its batches of at most `most`.
    pub fn batches(&self, most: usize) -> (Vec<ChunkRef>, Vec<Batch>) {
        let (mut chunks, mut batches) = (Vec::new(), Vec::new());
        for (gpu, held) in &self.held {
            let base = chunks.len();
            chunks.extend_from_slice(held);
            let mut done = 0;
            for part in self.parts.get(gpu).into_iter().flatten() {
                let end = held.len().min(done + chunks_in(part));
                for first in (done..end).step_by(most) {
                    let address = part.address + ((first - done) * CHUNK) as u64;
                    batches.push(Batch {
                        gpu: *gpu,
                        address,
                        first: base + first,
                        count: most.min(end - first),
                    });
                }
                done = end;
            }
        }
        (chunks, batches)
    }
}

fn chunks_in(region: &Region) -> usize {
    (region.size / CHUNK as u64) as usize
}
