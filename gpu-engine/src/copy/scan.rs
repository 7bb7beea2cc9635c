//! Digests of memory as it is now, and chunks gathered: lists of addresses that the GPUs work off.

use std::collections::BTreeMap;

use super::ledger::{ChunkRef, Ledger};
use crate::device::{Device, DeviceError, GpuId, Pinned, Region, Stream};
use crate::image::{CHUNK, Digest};

/// Bytes of an address in a list, and of a digest in a result.
const ADDRESS: usize = 8;
const DIGEST: usize = 16;

/// One GPU's list.
struct List {
    // Dropped first: that ends what the stream was given to do.
    stream: Box<dyn Stream>,
    addresses: Box<dyn Pinned>,
    on_gpu: Region,
    digests: Box<dyn Pinned>,
    capacity: usize,
}

impl List {
    fn allocate(device: &dyn Device, gpu: GpuId, capacity: usize) -> Result<Self, DeviceError> {
        let capacity = capacity.max(1);
        let mut list = List {
            stream: device.stream(gpu)?,
            addresses: device.pinned(capacity * ADDRESS)?,
            on_gpu: device.allocate(gpu, (capacity * ADDRESS) as u64)?,
            digests: device.pinned(capacity * DIGEST)?,
            capacity,
        };
        // The first use of a kernel has it compiled, which takes longer than most scans.
        list.stream.digest(list.on_gpu.address, 0, list.digests.as_mut())?;
        Ok(list)
    }

    /// Begins to bring the addresses to the GPU.
    fn upload(&mut self, addresses: &[u64]) -> Result<(), DeviceError> {
        let bytes = self.addresses.bytes_mut();
        for (slot, address) in bytes.chunks_exact_mut(ADDRESS).zip(addresses) {
            slot.copy_from_slice(&address.to_le_bytes());
        }
        let len = addresses.len() * ADDRESS;
        self.stream.copy_in(self.on_gpu.address, self.addresses.as_mut(), 0, len)
    }
}

/// Works off lists of chunks on every GPU at the same time.
#[derive(Default)]
pub struct Scanner {
    lists: BTreeMap<GpuId, List>,
}

/// Addresses of chunks on each GPU.
pub type Addresses = BTreeMap<GpuId, Vec<u64>>;

/// Addresses of all chunks, and the runs of chunks of one GPU in the order of [`Ledger::all`].
fn by_gpu(ledger: &Ledger) -> (Addresses, Vec<(GpuId, usize)>) {
    let (mut lists, mut runs) = (Addresses::new(), Vec::new());
    for block in ledger.blocks().values() {
        let count = block.chunks.len();
        lists.entry(block.gpu).or_default().extend((0..count as u32).map(|n| block.chunk_address(n)));
        runs.push((block.gpu, count));
    }
    (lists, runs)
}

impl Scanner {
    /// Makes room for lists of all chunks of `ledger` and an eighth more, before the program is stopped.
    pub fn prepare(&mut self, device: &dyn Device, ledger: &Ledger) -> Result<(), DeviceError> {
        let mut counts = BTreeMap::<GpuId, usize>::new();
        for block in ledger.blocks().values() {
            *counts.entry(block.gpu).or_default() += block.chunks.len();
        }
        counts.values_mut().for_each(|count| *count += *count / 8);
        self.reserve(device, &counts)
    }

    /// Makes room for lists of so many chunks on each GPU.
    pub fn reserve(
        &mut self,
        device: &dyn Device,
        counts: &BTreeMap<GpuId, usize>,
    ) -> Result<(), DeviceError> {
        for (gpu, count) in counts {
            self.list(device, *gpu, *count)?;
        }
        Ok(())
    }

    /// The GPU's list, with room for `count`.
    fn list(&mut self, device: &dyn Device, gpu: GpuId, count: usize) -> Result<&mut List, DeviceError> {
        if self.lists.get(&gpu).is_none_or(|l| l.capacity < count) {
            self.lists.insert(gpu, List::allocate(device, gpu, count)?);
        }
        self.lists.get_mut(&gpu).ok_or(DeviceError::NoSuchGpu(gpu))
    }

    /// Digests of every chunk of `ledger`, in the order of [`Ledger::all`].
    pub fn digests(&mut self, device: &dyn Device, ledger: &Ledger) -> Result<Vec<Digest>, DeviceError> {
        let (lists, runs) = by_gpu(ledger);
        let mut found = self.digests_at(device, &lists)?;
        let mut digests = Vec::with_capacity(runs.iter().map(|(_, count)| count).sum());
        let mut taken = BTreeMap::<GpuId, usize>::new();
        for (gpu, count) in runs {
            let from = taken.entry(gpu).or_default();
            let list = found.entry(gpu).or_default();
            digests.extend_from_slice(&list[*from..*from + count]);
            *from += count;
        }
        Ok(digests)
    }

    /// Digests of the chunks at these addresses, in their order.
    pub fn digests_at(
        &mut self,
        device: &dyn Device,
        lists: &Addresses,
    ) -> Result<BTreeMap<GpuId, Vec<Digest>>, DeviceError> {
        for (gpu, addresses) in lists {
            let list = self.list(device, *gpu, addresses.len())?;
            list.upload(addresses)?;
            list.stream.digest(list.on_gpu.address, addresses.len() as u64, list.digests.as_mut())?;
        }
        let mut results = BTreeMap::new();
        for (gpu, addresses) in lists {
            let list = self.list(device, *gpu, addresses.len())?;
            list.stream.wait()?;
            let bytes = list.digests.bytes().chunks_exact(DIGEST).take(addresses.len());
            results.insert(*gpu, bytes.map(|d| Digest::from_bytes(std::array::from_fn(|i| d[i]))).collect());
        }
        Ok(results)
    }

    /// Digests of these chunks, in their order, if the lists for so many are there; making them would take longer than the
    /// digests save.
    pub fn digests_of(
        &mut self,
        device: &dyn Device,
        ledger: &Ledger,
        chunks: &[ChunkRef],
    ) -> Result<Option<Vec<Digest>>, DeviceError> {
        let mut lists = Addresses::new();
        let mut gpus = Vec::with_capacity(chunks.len());
        for of_block in chunks.chunk_by(|a, b| a.block == b.block) {
            let Some(block) = ledger.block(of_block[0].block) else { return Ok(None) };
            lists.entry(block.gpu).or_default().extend(of_block.iter().map(|c| block.chunk_address(c.chunk)));
            gpus.extend(std::iter::repeat_n(block.gpu, of_block.len()));
        }
        if lists.iter().any(|(gpu, list)| self.lists.get(gpu).is_none_or(|l| l.capacity < list.len())) {
            return Ok(None);
        }
        let found = self.digests_at(device, &lists)?;
        let mut found: BTreeMap<_, _> = found.into_iter().map(|(gpu, d)| (gpu, d.into_iter())).collect();
        Ok(gpus.iter().map(|gpu| found.get_mut(gpu)?.next()).collect())
    }

    /// Copies chunks, all of one GPU, to the places given: each place takes the number of chunks that goes with it.
    /// Returns when they are there.
    pub fn gather(
        &mut self,
        device: &dyn Device,
        gpu: GpuId,
        addresses: &[u64],
        places: &[(u64, usize)],
    ) -> Result<(), DeviceError> {
        let list = self.list(device, gpu, addresses.len())?;
        list.upload(addresses)?;
        let mut done = 0;
        for (place, room) in places {
            let count = (*room).min(addresses.len() - done);
            list.stream.gather(list.on_gpu.address + (done * ADDRESS) as u64, count as u64, *place)?;
            done += count;
        }
        debug_assert_eq!(done, addresses.len(), "{} chunks, room for {done} × {CHUNK}", addresses.len());
        list.stream.wait()
    }
}
