//! However much memory a GPU has, the engine needs its buffers and little more to copy it. On the simulated driver a GPU's
//! memory is shared memory, so that what the engine needs for itself is the process's anonymous memory. The only test of its
//! program: nothing else allocates meanwhile.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use std::{env, fs, slice, thread};

use phos_engine::copy::{self, Session, Tuning};
use phos_engine::device::{Region, cuda};
use phos_engine::image::{Codec, Image, ImageWriter};
use phos_engine::progress::Progress;
use phos_integration::{memory, tools};

const REGION: usize = 64 << 20;
const REGIONS: usize = 6;
const LANES: usize = 2;
/// What is needed beside the buffers: tables, threads, compressors; in this test's case, with room to spare.
const BESIDE: u64 = 16 << 20;

/// Anonymous memory of this process, bytes.
fn anonymous() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// By how much anonymous memory was larger while `work` ran, at most.
fn growth(work: impl FnOnce()) -> u64 {
    let (before, most, done) = (anonymous(), AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(anonymous(), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        });
        work();
        done.store(true, Ordering::Relaxed);
    });
    most.into_inner().saturating_sub(before)
}

fn fill(regions: &[Region]) {
    for (n, r) in regions.iter().enumerate() {
        // SAFETY: mapped for as long as the region lives; nothing else reads or writes it now.
        let words = unsafe { slice::from_raw_parts_mut(r.address as *mut u64, REGION / 8) };
        words.iter_mut().enumerate().for_each(|(i, w)| *w = (i as u64 / 3) << n | 1);
    }
}

#[test]
fn copying_needs_the_buffers_and_little_more() {
    // SAFETY: the only test of this program; nothing reads the environment yet.
    unsafe { env::set_var(cuda::LIBCUDA_ENV, tools::built("libsimcuda.so").unwrap()) };
    let device = cuda::open().unwrap();
    let gpu = memory::first_gpu(device.as_ref()).unwrap();
    let regions: Vec<_> = (0..REGIONS).map(|_| device.allocate(gpu.id, REGION as u64).unwrap()).collect();
    fill(&regions);
    let bytes = (REGIONS * REGION) as u64;
    let tuning = Tuning::from(LANES);
    let buffers = |t: Tuning| (t.lanes * 2 * t.piece) as u64;
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let saving = growth(|| {
            let writer = ImageWriter::create(folder.path(), LANES, codec).unwrap();
            let ledger = memory::ledger(&regions, REGION as u64);
            let progress = Progress::default();
            let mut session = Session::prepare(device.as_ref(), &progress, writer, tuning, ledger).unwrap();
            // Half of it in a round of pre-copy; of the rest, half from spare memory and half straight out.
            let all = session.ledger.all();
            session.round(&all[..all.len() / 2]).unwrap();
            session.allocate_spare(&BTreeMap::from([(gpu.id, bytes / 4)])).unwrap();
            let quiesced = session.quiesce().unwrap();
            assert_eq!((quiesced.dirty_bytes, quiesced.straight_bytes), (bytes / 2, bytes / 4));
            session.drain().unwrap();
            let (writer, ledger) = session.finish();
            let table = ledger.all().into_iter().map(|c| ledger.saved(c)).collect();
            writer.commit(memory::manifest(&gpu, &regions, REGION as u64), table).unwrap();
        });
        assert!(saving <= buffers(tuning) + BESIDE, "{codec}: saving took {saving} bytes");
        let loading = growth(|| {
            let image = Image::open(folder.path()).unwrap();
            let regions = copy::regions(&image);
            copy::load(device.as_ref(), &image, &regions, tuning, &Progress::default(), || ()).unwrap();
        });
        assert!(loading <= buffers(tuning) + BESIDE, "{codec}: loading took {loading} bytes");
        println!("{codec}: {} MiB for saving, {} MiB for loading", saving >> 20, loading >> 20);
    }
}
