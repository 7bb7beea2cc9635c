//! What a program sees of memory that `libphos.so` allocates for it: what it asked for.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use phos_integration::application::{Application, out};
use phos_protocol::message::{CLASS_PLAIN, CLASS_SMALL};

const MIB: usize = 1 << 20;
/// `CU_POINTER_ATTRIBUTE_…`
const CONTEXT: usize = 1;
const MEMORY_TYPE: usize = 2;
const BUFFER_ID: usize = 7;
const RANGE_START: usize = 11;
const RANGE_SIZE: usize = 12;
const OUT_OF_MEMORY: u32 = 2;

fn attribute(app: &Application, which: usize, address: u64) -> u64 {
    let mut value = 0u64;
    app.ok("cuPointerGetAttribute", &[out(&mut value), which, address as usize]);
    value
}

fn free_bytes(app: &Application) -> usize {
    let (mut free, mut total) = (0usize, 0usize);
    app.ok("cuMemGetInfo_v2", &[out(&mut free), out(&mut total)]);
    free
}

#[test]
fn addresses_answer_for_the_allocation_not_for_the_block() {
    let app = Application::start().unwrap();
    let context = app.use_device(0) as u64;
    for size in [1, 1000, 300_000, 3 * MIB + 5] {
        let (first, second) = (app.alloc(size), app.alloc(size));
        for address in [first, second] {
            let inside = address + size as u64 - 1;
            let (mut base, mut len) = (0u64, 0usize);
            app.ok("cuMemGetAddressRange_v2", &[out(&mut base), out(&mut len), inside as usize]);
            assert_eq!((base, len), (address, size));
            assert_eq!(attribute(&app, RANGE_START, inside), address);
            assert_eq!(attribute(&app, RANGE_SIZE, inside), size as u64);
            assert_eq!(attribute(&app, CONTEXT, inside), context);
            let (mut start, mut bytes, mut kind) = (0u64, 0u64, 0u32);
            let which = [RANGE_START as u32, MEMORY_TYPE as u32, RANGE_SIZE as u32];
            let data = [out(&mut start), out(&mut kind), out(&mut bytes)];
            app.ok(
                "cuPointerGetAttributes",
                &[3, which.as_ptr() as usize, data.as_ptr() as usize, inside as usize],
            );
            assert_eq!((start, kind, bytes), (address, 2, size as u64));
        }
        let ids = [first, second].map(|a| attribute(&app, BUFFER_ID, a));
        assert_ne!(ids[0], ids[1], "{size} bytes");
        app.free(first);
        app.free(second);
        assert_ne!(app.call("cuMemFree_v2", &[first as usize]), 0, "freed twice");
    }
    // The same address as another allocation has another id.
    let first = app.alloc(100);
    let id = attribute(&app, BUFFER_ID, first);
    app.free(first);
    let second = app.alloc(100);
    assert_eq!(first, second);
    assert_ne!(attribute(&app, BUFFER_ID, second), id);
    app.free(second);
}

#[test]
fn rows_of_pitched_memory_are_aligned() {
    let app = Application::start().unwrap();
    for (width, height) in [(100, 10), (4096, 700)] {
        let (mut address, mut pitch) = (0u64, 0usize);
        app.ok("cuMemAllocPitch_v2", &[out(&mut address), out(&mut pitch), width, height, 4]);
        assert!(pitch >= width && pitch.is_multiple_of(512));
        app.fill(address, 7, pitch * height / 4);
        let parked = app.round_trip().unwrap();
        assert!(parked.bytes(CLASS_PLAIN) + parked.bytes(CLASS_SMALL) >= (pitch * height) as u64);
        assert!(app.read(address, pitch * height / 4).iter().all(|w| *w == 7));
        app.free(address);
    }
    let mut address = 0u64;
    assert_ne!(app.call("cuMemAllocPitch_v2", &[out(&mut address), 0, 100, 10, 4]), 0);
}

#[test]
fn memory_runs_out_as_it_does_without_the_library() {
    let app = Application::start().unwrap();
    let before = free_bytes(&app);
    let piece = 64 * MIB;
    let mut held = Vec::new();
    let code = loop {
        let mut address = 0u64;
        match app.call("cuMemAlloc_v2", &[out(&mut address), piece]) {
            0 => held.push(address),
            code => break code,
        }
    };
    assert_eq!(code, OUT_OF_MEMORY);
    assert_eq!(held.len(), before / piece);
    assert!(free_bytes(&app) < piece);
    assert_eq!(app.call("cuMemAlloc_v2", &[out(&mut 0u64), usize::MAX - 5]), OUT_OF_MEMORY);
    // The full card parks, and attaches.
    app.fill(held[0], 1, 10);
    assert_eq!(app.round_trip().unwrap().bytes(CLASS_PLAIN), (held.len() * piece) as u64);
    assert_eq!(app.read(held[0], 10), [1; 10]);
    held.into_iter().for_each(|a| app.free(a));
    assert_eq!(free_bytes(&app), before);
    let again = app.alloc(piece);
    app.free(again);
}

#[test]
fn allocations_of_middle_size_share_pieces() {
    let app = Application::start().unwrap();
    let held: Vec<u64> = (0..128).map(|_| app.alloc(4 * MIB)).collect();
    held.iter().enumerate().for_each(|(n, a)| app.fill(*a, n as u32, 3));
    let pieces = app.round_trip().unwrap().pieces();
    assert!(pieces <= 128 / 4, "{pieces} pieces");
    for (n, address) in held.into_iter().enumerate() {
        assert_eq!(app.read(address, 3), [n as u32; 3]);
        app.free(address);
    }
}

/// A program that has freed half its memory, here and there, gets one large allocation out of it.
#[test]
fn memory_freed_in_pieces_is_had_again_as_a_whole() {
    let app = Application::start().unwrap();
    let before = free_bytes(&app);
    let piece = 4 * MIB;
    let mut held: Vec<u64> = (0..before * 5 / 8 / piece).map(|_| app.alloc(piece)).collect();
    for (n, address) in held.iter().enumerate() {
        app.fill(*address, n as u32, 3);
    }
    let kept: Vec<_> = held.iter().copied().enumerate().filter(|(n, _)| n % 2 == 0).collect();
    held.iter().skip(1).step_by(2).for_each(|a| app.free(*a));
    let large = before / 2;
    assert!(free_bytes(&app) < large, "what was freed is between what is not");
    let stop = AtomicBool::new(false);
    let address = thread::scope(|scope| {
        scope.spawn(|| {
            app.use_device(0);
            while !stop.load(Ordering::Relaxed) {
                let own = app.alloc(5000);
                app.fill(own, 9, 5);
                assert_eq!(app.read(own, 5), [9; 5]);
                app.free(own);
            }
        });
        let address = app.alloc(large);
        stop.store(true, Ordering::Relaxed);
        address
    });
    app.fill(address + large as u64 - 4, 77, 1);
    for _ in 0..2 {
        for (n, address) in &kept {
            assert_eq!(app.read(*address, 3), [*n as u32; 3]);
            assert_eq!(attribute(&app, RANGE_SIZE, *address + 5), piece as u64);
        }
        assert_eq!(app.read(address + large as u64 - 4, 1), [77]);
        app.round_trip().unwrap();
    }
    held = kept.into_iter().map(|(_, address)| address).chain([address]).collect();
    held.drain(..).for_each(|a| app.free(a));
    assert_eq!(free_bytes(&app), before, "everything is given back");
}

#[test]
fn a_hundred_thousand_small_ones_are_few_pieces_and_threads_go_on() {
    let app = Application::start().unwrap();
    const COUNT: usize = 100_000;
    const THREADS: usize = 4;
    let size = |n: usize| 4 + n * 37 % 1021;
    let mut all: Vec<u64> = (0..COUNT).map(|n| app.alloc(size(n))).collect();
    let mut sorted: Vec<_> = all.iter().enumerate().map(|(n, a)| (*a, *a + size(n) as u64)).collect();
    sorted.sort_unstable();
    assert!(sorted.windows(2).all(|w| w[0].1 <= w[1].0), "allocations overlap");
    for n in (0..COUNT).step_by(997) {
        app.fill(all[n], n as u32, 1);
    }
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for seed in 1..=THREADS {
            let (app, stop, done) = (&app, &stop, &done);
            scope.spawn(move || {
                app.use_device(0);
                let mut mine: Vec<(u64, u32)> = Vec::new();
                let mut random = seed as u64;
                while !stop.load(Ordering::Relaxed) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if mine.len() < 50 && random >> 63 == 0 || mine.is_empty() {
                        let (address, value) = (app.alloc(4 + (random >> 40) as usize % 5000), random as u32);
                        app.fill(address, value, 1);
                        mine.push((address, value));
                    } else {
                        let (address, value) = mine.swap_remove((random >> 33) as usize % mine.len());
                        assert_eq!(app.read(address, 1), [value]);
                        app.free(address);
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
                mine.into_iter().for_each(|(address, _)| app.free(address));
            });
        }
        for _ in 0..10 {
            let before = done.load(Ordering::Relaxed);
            let parked = app.round_trip().unwrap();
            let bytes: u64 = (0..COUNT).map(|n| size(n) as u64).sum();
            assert!(parked.bytes(CLASS_SMALL) < bytes * 2, "{} bytes", parked.bytes(CLASS_SMALL));
            assert!(parked.pieces() < 100, "{} pieces", parked.pieces());
            while done.load(Ordering::Relaxed) < before + 100 {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    for n in (0..COUNT).step_by(997) {
        assert_eq!(app.read(all[n], 1), [n as u32]);
    }
    all.drain(..).for_each(|a| app.free(a));
}
