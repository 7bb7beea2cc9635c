//! Spare memory on the GPUs: chunks as they were when the program stood still, on their way to the image while it runs
//! again.

use std::collections::BTreeMap;

use super::ledger::{Batch, ChunkRef, Ledger};
use super::scan::Scanner;
use crate::device::{Device, DeviceError, GpuId, Region};
use crate::image::CHUNK;

/// Spare memory is allocated in parts of at most this many bytes.
const PART: u64 = 1 << 30;

/// Spare memory on all GPUs of a job.
#[derive(Default)]
pub struct Spare {
    parts: BTreeMap<GpuId, Vec<Region>>,
    /// What is in it: for each GPU the chunks in their order.
    held: BTreeMap<GpuId, Vec<ChunkRef>>,
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

    /// Takes as many of `chunks` as there is room for and returns those that did not fit. Call it once.
    pub fn take(
        &mut self,
        device: &dyn Device,
        scanner: &mut Scanner,
        ledger: &Ledger,
        chunks: &[ChunkRef],
    ) -> Result<Vec<ChunkRef>, DeviceError> {
        let room: BTreeMap<GpuId, usize> =
            self.parts.iter().map(|(gpu, parts)| (*gpu, parts.iter().map(chunks_in).sum())).collect();
        let mut left = Vec::new();
        let mut addresses = BTreeMap::<GpuId, Vec<u64>>::new();
        for chunk in chunks {
            let Some(block) = ledger.block(chunk.block) else { continue };
            let held = self.held.entry(block.gpu).or_default();
            if held.len() < room.get(&block.gpu).copied().unwrap_or(0) {
                held.push(*chunk);
                addresses.entry(block.gpu).or_default().push(block.chunk_address(chunk.chunk));
            } else {
                left.push(*chunk);
            }
        }
        for (gpu, addresses) in &addresses {
            let parts = self.parts.get(gpu).map(Vec::as_slice).unwrap_or_default();
            let places: Vec<_> = parts.iter().map(|p| (p.address, chunks_in(p))).collect();
            scanner.gather(device, *gpu, addresses, &places)?;
        }
        Ok(left)
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
