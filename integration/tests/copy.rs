//! The copy pipeline against writers that never stop: every image must hold the memory as it was when they stood still.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, LazyLock, RwLock};
use std::{env, fs, thread};

use phos_engine::copy::{self, Session, Tuning};
use phos_engine::device::{Device, Region, cuda};
use phos_engine::image::{
    CHUNK, Codec, Digest, Image, ImageError, ImageWriter, Location, Sink, Unpacker, data_file,
};
use phos_engine::progress::Progress;
use phos_integration::{memory, tools};

const CHUNKS: usize = 4;
const BLOCKS: usize = 2;
const WRITERS: usize = 2;
const SIZE: usize = CHUNKS * CHUNK;

/// The regions as words: on the simulated driver, device memory is memory.
fn words(regions: &[Region]) -> Vec<&[AtomicU64]> {
    regions
        .iter()
        // SAFETY: mapped for as long as the region lives, and only ever accessed as atomics and by the engine.
        .map(|r| unsafe { slice::from_raw_parts(r.address as *const AtomicU64, SIZE / 8) })
        .collect()
}

/// Writes to random places, with bursts over a whole chunk now and then.
fn scribble(memory: &[&[AtomicU64]], seed: u64, gate: &RwLock<()>, done: &AtomicBool) {
    let mut state = seed;
    while !done.load(Ordering::Relaxed) {
        let _open = gate.read().unwrap();
        for _ in 0..64 {
            // xorshift64 (Marsaglia 2003).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let block = memory[state as usize % BLOCKS];
            let at = (state >> 8) as usize % block.len();
            if state.is_multiple_of(97) {
                let chunk = at / (CHUNK / 8) * (CHUNK / 8);
                let value = if state.is_multiple_of(2) { 0 } else { state };
                block[chunk..chunk + CHUNK / 8].iter().for_each(|w| w.store(value, Ordering::Relaxed));
            } else {
                block[at].store(state, Ordering::Relaxed);
            }
        }
    }
}

fn contents(memory: &[&[AtomicU64]]) -> Vec<u8> {
    memory.iter().flat_map(|b| b.iter().flat_map(|w| w.load(Ordering::Relaxed).to_le_bytes())).collect()
}

fn read(folder: &Path) -> Vec<u8> {
    let image = Image::open(folder).unwrap();
    let mut all = Vec::new();
    let (mut buffer, mut unpacker) = (vec![0; SIZE], Unpacker::default());
    for a in &image.manifest.allocations {
        for extent in image.extents(a, SIZE) {
            image.read(&extent, &mut buffer, &mut unpacker).unwrap();
            all.extend_from_slice(&buffer[..extent.count as usize * CHUNK]);
        }
    }
    all
}

/// The simulated driver.
fn device() -> Arc<dyn Device> {
    static DEVICE: LazyLock<Arc<dyn Device>> = LazyLock::new(|| {
        // SAFETY: set before this process loads a driver; no other test reads the environment.
        unsafe { env::set_var(cuda::LIBCUDA_ENV, tools::built("libsimcuda.so").unwrap()) };
        cuda::open().unwrap()
    });
    DEVICE.clone()
}

/// Makes `count` checkpoints; returns how many are not what the memory was. `validate`: whether what was copied while
/// the writers wrote is compared with what is there when they stand still.
fn torn(count: usize, validate: bool) -> usize {
    let device = device();
    let gpu = memory::first_gpu(device.as_ref()).unwrap();
    let regions: Vec<_> = (0..BLOCKS).map(|_| device.allocate(gpu.id, SIZE as u64).unwrap()).collect();
    let words = words(&regions);
    let (gate, done, ready) = (RwLock::new(()), AtomicBool::new(false), Barrier::new(WRITERS + 1));
    let progress = Progress::default();
    // Pieces of two chunks, so that both threads have something to do.
    let tuning = Tuning { lanes: 2, piece: 2 * CHUNK };
    thread::scope(|scope| {
        for n in 0..WRITERS {
            let (words, gate, done, ready) = (&words, &gate, &done, &ready);
            scope.spawn(move || {
                ready.wait();
                scribble(words, 0x9e37_79b9 + n as u64, gate, done);
            });
        }
        ready.wait();
        let mut torn = 0;
        for n in 0..count {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            let ledger = memory::ledger(&regions, SIZE as u64);
            let writer = ImageWriter::create(folder.path(), 2, Codec::None).unwrap();
            let mut session = Session::prepare(device.as_ref(), &progress, writer, tuning, ledger).unwrap();
            // No spare memory, too little of it, enough.
            let spare = [0, 3 * CHUNK, BLOCKS * SIZE][n % 3] as u64;
            session.allocate_spare(&BTreeMap::from([(gpu.id, spare)])).unwrap();
            if n % 2 == 0 {
                session.prepare_scan().unwrap();
            }
            for _ in 0..n % 4 {
                let chunks = session.dirty().unwrap();
                session.round(&chunks).unwrap();
            }
            let standing_still = gate.write().unwrap();
            if validate {
                session.quiesce().unwrap();
            } else {
                let unsaved = session.ledger.unsaved();
                session.take(&unsaved).unwrap();
            }
            let expected = contents(&words);
            drop(standing_still);
            session.drain().unwrap();
            let (writer, ledger) = session.finish();
            let table = ledger.all().into_iter().map(|c| ledger.saved(c)).collect();
            writer.commit(memory::manifest(&gpu, &regions, SIZE as u64), table).unwrap();
            torn += usize::from(read(folder.path()) != expected);
        }
        done.store(true, Ordering::Relaxed);
        torn
    })
}

#[test]
fn no_chunk_is_torn_however_much_is_written_meanwhile() {
    assert_eq!(torn(1000, true), 0);
    // The test can fail: without validation, most images that were pre-copied are wrong.
    let without = torn(40, false);
    assert!(without >= 10, "{without} of 40 images wrong without validation");
}

/// Loads an image as a restore does; what is on the GPU then.
fn loaded(device: &dyn Device, folder: &Path, tuning: Tuning) -> Result<Vec<u8>, String> {
    let image = Image::open(folder).unwrap();
    let regions = copy::regions(&image);
    let mut allocated = false;
    let result = copy::load(device, &image, &regions, tuning, &Progress::default(), || allocated = true);
    result.map_err(|e| e.to_string())?;
    assert!(allocated);
    let regions: Vec<_> = regions.into_iter().map(|r| r.into_inner().unwrap()).collect();
    Ok(contents(&words(&regions)))
}

#[test]
fn what_is_loaded_is_what_was_saved_or_it_is_refused() {
    let device = device();
    let gpu = memory::first_gpu(device.as_ref()).unwrap();
    let regions: Vec<_> = (0..BLOCKS).map(|_| device.allocate(gpu.id, SIZE as u64).unwrap()).collect();
    for (block, words) in words(&regions).iter().enumerate() {
        // Every third chunk stays zero.
        let ones = words.chunks(CHUNK / 8).enumerate().filter(|(n, _)| (n + block) % 3 != 0);
        ones.flat_map(|(_, chunk)| chunk)
            .enumerate()
            .for_each(|(n, w)| w.store(n as u64 * 3 + 1, Ordering::Relaxed));
    }
    let folder = tempfile::tempdir().unwrap();
    let writer = ImageWriter::create(folder.path(), 2, Codec::None).unwrap();
    let progress = Progress::default();
    let tuning = Tuning { lanes: 2, piece: 2 * CHUNK };
    let ledger = memory::ledger(&regions, SIZE as u64);
    let mut session = Session::prepare(device.as_ref(), &progress, writer, tuning, ledger).unwrap();
    session.quiesce().unwrap();
    let (writer, ledger) = session.finish();
    let table = ledger.all().into_iter().map(|c| ledger.saved(c)).collect();
    writer.commit(memory::manifest(&gpu, &regions, SIZE as u64), table).unwrap();
    let expected = contents(&words(&regions));
    for piece in [CHUNK, 3 * CHUNK, 8 << 20] {
        assert!(loaded(device.as_ref(), folder.path(), Tuning { lanes: 3, piece }).unwrap() == expected);
    }
    // One bit anywhere, and nothing is handed on. One of the two threads may have come too late for any work.
    let files = [0, 1].map(|n| folder.path().join(data_file(n)));
    let written: Vec<_> = files.into_iter().filter(|f| fs::metadata(f).unwrap().len() > 0).collect();
    assert!(!written.is_empty());
    for file in written {
        let good = fs::read(&file).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&file, &bad).unwrap();
            let error = loaded(device.as_ref(), folder.path(), tuning).map(drop).unwrap_err();
            assert!(error.contains(file.to_str().unwrap()) && error.contains("another digest"), "{error}");
        }
        fs::write(&file, &good).unwrap();
    }
    loaded(device.as_ref(), folder.path(), tuning).unwrap();
}

/// Counts the chunks that come to it.
struct Count(AtomicU64);

impl Sink for Count {
    fn put(
        &self,
        _: usize,
        data: &[u8],
        _: &[Digest],
        places: &mut [Option<Location>],
    ) -> Result<(), ImageError> {
        self.0.fetch_add((data.len() / CHUNK) as u64, Ordering::Relaxed);
        places.fill(Some(Location::File { file: 0, offset: 0, packed: 0 }));
        Ok(())
    }
}

#[test]
fn what_is_known_to_be_zero_is_not_copied() {
    let device = device();
    let gpu = memory::first_gpu(device.as_ref()).unwrap();
    let regions: Vec<_> = (0..2).map(|_| device.allocate(gpu.id, SIZE as u64).unwrap()).collect();
    let words = words(&regions);
    words.iter().flat_map(|block| block.iter()).for_each(|w| w.store(0, Ordering::Relaxed));
    words[0][2 * CHUNK / 8].store(1, Ordering::Relaxed);
    words[1][SIZE / 8 - 1].store(1, Ordering::Relaxed);
    let progress = Progress::default();
    let tuning = Tuning { lanes: 2, piece: 2 * CHUNK };
    // Straight out without the digests, straight out with them, through spare memory, and what was zero before a write.
    for (number, expected) in [(0, 8), (1, 2), (2, 2), (3, 3)] {
        let ledger = memory::ledger(&regions, SIZE as u64);
        let sink = Count(AtomicU64::new(0));
        let mut session = Session::prepare(device.as_ref(), &progress, sink, tuning, ledger).unwrap();
        if number > 0 {
            session.prepare_scan().unwrap();
        }
        if number == 2 {
            session.allocate_spare(&BTreeMap::from([(gpu.id, 2 * SIZE as u64)])).unwrap();
        }
        if number == 3 {
            let (zero, others) = session.dirty_by_zero().unwrap();
            assert_eq!((zero.len(), others.len()), (6, 2));
            session.ledger.note_zeros(&zero);
            words[0][0].store(1, Ordering::Relaxed);
        }
        session.quiesce().unwrap();
        session.drain().unwrap();
        assert_eq!(session.sink().0.load(Ordering::Relaxed), expected, "{number}");
        assert_eq!(session.ledger.unsaved(), []);
    }
}

#[test]
fn memory_may_come_and_go_between_rounds() {
    let device = device();
    let gpu = memory::first_gpu(device.as_ref()).unwrap();
    let regions: Vec<_> = (0..3).map(|_| device.allocate(gpu.id, SIZE as u64).unwrap()).collect();
    let words = words(&regions);
    words.iter().enumerate().for_each(|(n, block)| {
        block.iter().enumerate().for_each(|(i, w)| w.store((i << 8 | n) as u64, Ordering::Relaxed));
    });
    let folder = tempfile::tempdir().unwrap();
    let writer = ImageWriter::create(folder.path(), 2, Codec::None).unwrap();
    let progress = Progress::default();
    let tuning = Tuning { lanes: 2, piece: 2 * CHUNK };
    let ledger = memory::ledger(&regions[..2], SIZE as u64);
    let mut session = Session::prepare(device.as_ref(), &progress, writer, tuning, ledger).unwrap();
    let all = session.ledger.all();
    session.round(&all).unwrap();
    // The first one is freed, a third one is made, and the second one changes in one chunk.
    session.ledger.retain(|(_, id)| id != 0);
    session.ledger.add((0, 2), gpu.id, regions[2].address, SIZE as u64);
    words[1][3 * CHUNK / 8].store(0xdead, Ordering::Relaxed);
    let quiesced = session.quiesce().unwrap();
    assert_eq!(quiesced.dirty_bytes, (SIZE + CHUNK) as u64);
    let (writer, ledger) = session.finish();
    let table = ledger.all().into_iter().map(|c| ledger.saved(c)).collect();
    writer.commit(memory::manifest(&gpu, &regions[1..], SIZE as u64), table).unwrap();
    assert!(read(folder.path()) == contents(&words[1..]));
}
