//! Stream-ordered memory: it is parked, and changes hands only in the order of the streams.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use phos_integration::application::{Application, out};
use phos_protocol::message::CLASS_POOL;

const MIB: usize = 1 << 20;
/// `CU_MEMPOOL_ATTR_…`
const RELEASE_THRESHOLD: usize = 4;
const RESERVED: usize = 5;
const USED: usize = 7;
const USED_HIGH: usize = 8;

fn stream(app: &Application) -> usize {
    let mut stream = 0usize;
    app.ok("cuStreamCreate", &[out(&mut stream), 1]);
    stream
}

fn alloc(app: &Application, size: usize, stream: usize) -> u64 {
    let mut address = 0u64;
    app.ok("cuMemAllocAsync", &[out(&mut address), size, stream]);
    address
}

fn free(app: &Application, address: u64, stream: usize) {
    app.ok("cuMemFreeAsync", &[address as usize, stream]);
}

fn default_pool(app: &Application) -> usize {
    let mut pool = 0usize;
    app.ok("cuDeviceGetDefaultMemPool", &[out(&mut pool), 0]);
    pool
}

fn level(app: &Application, pool: usize, attribute: usize) -> usize {
    let mut value = 0u64;
    app.ok("cuMemPoolGetAttribute", &[pool, attribute, out(&mut value)]);
    value as usize
}

fn set(app: &Application, pool: usize, attribute: usize, mut value: u64) {
    app.ok("cuMemPoolSetAttribute", &[pool, attribute, out(&mut value)]);
}

/// Work of a stream that does not end before it is told to.
struct Block(Box<AtomicBool>);

impl Block {
    fn on(app: &Application, stream: usize) -> Self {
        unsafe extern "C" fn wait(flag: *mut c_void) {
            // SAFETY: the flag lives until the stream has been waited for.
            while !unsafe { &*flag.cast::<AtomicBool>() }.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        let block = Block(Box::new(AtomicBool::new(false)));
        app.ok("cuLaunchHostFunc", &[stream, wait as *const () as usize, block.0.as_ptr() as usize]);
        block
    }

    fn end(self, app: &Application, stream: usize) {
        self.0.store(true, Ordering::SeqCst);
        app.ok("cuStreamSynchronize", &[stream]);
    }
}

/// Everything of the default pool is given back.
fn settle(app: &Application) {
    let pool = default_pool(app);
    set(app, pool, RELEASE_THRESHOLD, 0);
    app.ok("cuCtxSynchronize", &[]);
    assert_eq!((level(app, pool, RESERVED), level(app, pool, USED)), (0, 0));
}

#[test]
fn pooled_memory_is_parked() {
    let app = Application::start().unwrap();
    let on = stream(&app);
    let before = app.library().unwrap().query().unwrap();
    let sizes = [4, 1000, 512 << 10, (512 << 10) + 4, 9 * MIB];
    let held: Vec<_> = sizes.iter().map(|size| alloc(&app, *size, on)).collect();
    for (n, (address, size)) in held.iter().zip(sizes).enumerate() {
        app.fill(*address, n as u32 + 1, size / 4);
        let (mut base, mut len, mut pool) = (0u64, 0usize, 0usize);
        app.ok("cuMemGetAddressRange_v2", &[out(&mut base), out(&mut len), *address as usize + size - 1]);
        assert_eq!((base, len), (*address, size));
        app.ok("cuPointerGetAttribute", &[out(&mut pool), 17, *address as usize]);
        assert_eq!(pool, default_pool(&app));
    }
    let summary = app.library().unwrap().query().unwrap();
    assert_eq!(summary.driver_bytes, before.driver_bytes, "nothing is left to the driver");
    assert_eq!(summary.allocations, before.allocations + 5);
    let parked = app.round_trip().unwrap();
    assert_eq!(parked.bytes(CLASS_POOL), 14 * MIB as u64);
    for (n, (address, size)) in held.iter().zip(sizes).enumerate() {
        assert!(app.read(*address, size / 4).iter().all(|w| *w == n as u32 + 1));
        free(&app, *address, on);
        assert_ne!(app.call("cuMemFreeAsync", &[*address as usize, on]), 0, "freed twice");
    }
    settle(&app);
}

#[test]
fn memory_goes_to_another_stream_only_when_its_work_is_done() {
    let app = Application::start().unwrap();
    set(&app, default_pool(&app), RELEASE_THRESHOLD, u64::MAX);
    let (a, b) = (stream(&app), stream(&app));
    for size in [1000, 6 * MIB] {
        let first = alloc(&app, size, a);
        let block = Block::on(&app, a);
        free(&app, first, a);
        let other = alloc(&app, size, b);
        assert_ne!(other, first, "stream a still uses it");
        assert_eq!(alloc(&app, size, a), first, "in order on its own stream");
        free(&app, first, a);
        block.end(&app, a);
        assert_eq!(alloc(&app, size, b), first, "free for all");
        free(&app, first, b);
        free(&app, other, b);
        app.ok("cuStreamSynchronize", &[b]);
    }
    // The handle of a stream that is gone may come again; what was freed on it waits all the same.
    let first = alloc(&app, 6 * MIB, a);
    let block = Block::on(&app, a);
    free(&app, first, a);
    app.ok("cuStreamDestroy_v2", &[a]);
    let again = stream(&app);
    let second = alloc(&app, 6 * MIB, again);
    assert_ne!(second, first);
    block.0.store(true, Ordering::SeqCst);
    free(&app, second, again);
    settle(&app);
}

#[test]
fn what_is_free_is_kept_as_the_program_says() {
    let app = Application::start().unwrap();
    let (on, pool) = (stream(&app), default_pool(&app));
    settle(&app);
    set(&app, pool, USED_HIGH, 0);
    let cycle = || {
        let held: Vec<_> = (1..=4).map(|n| alloc(&app, n * 4 * MIB, on)).collect();
        assert_eq!(level(&app, pool, USED), 40 * MIB);
        held.into_iter().for_each(|a| free(&app, a, on));
        app.ok("cuStreamSynchronize", &[on]);
        assert_eq!(level(&app, pool, USED), 0);
    };
    cycle();
    assert_eq!((level(&app, pool, RESERVED), level(&app, pool, USED_HIGH)), (0, 40 * MIB));
    set(&app, pool, RELEASE_THRESHOLD, u64::MAX);
    cycle();
    cycle();
    assert_eq!(level(&app, pool, RESERVED), 40 * MIB, "the second time it was used again");
    app.ok("cuMemPoolTrimTo", &[pool, 16 * MIB]);
    assert!((1..=16 * MIB).contains(&level(&app, pool, RESERVED)));
    settle(&app);
    set(&app, pool, USED_HIGH, 0);
    assert_eq!(level(&app, pool, USED_HIGH), 0);
}

#[test]
fn captured_streams_and_shared_pools_stay_the_drivers() {
    let app = Application::start().unwrap();
    let on = stream(&app);
    let driver_bytes = || app.library().unwrap().query().unwrap().driver_bytes;
    let before = driver_bytes();
    app.ok("cuStreamBeginCapture_v2", &[on, 0]);
    alloc(&app, 3 * MIB, on);
    let mut graph = 0usize;
    app.ok("cuStreamEndCapture", &[on, out(&mut graph)]);
    assert_eq!(driver_bytes() - before, 3 * MIB as u64);
    // CUmemPoolProps: pinned, fds, device 0; the same without fds.
    for (handle_types, more) in [(1u32, 1), (0, 0)] {
        let props: [u32; 22] = std::array::from_fn(|i| [1, handle_types, 1].get(i).copied().unwrap_or(0));
        let (mut pool, mut address) = (0usize, 0u64);
        app.ok("cuMemPoolCreate", &[out(&mut pool), props.as_ptr() as usize]);
        let before = driver_bytes();
        app.ok("cuMemAllocFromPoolAsync", &[out(&mut address), MIB, pool, on]);
        assert_eq!(driver_bytes() - before, more * MIB as u64, "handle types {handle_types}");
        // It lives on without its pool.
        app.ok("cuMemPoolDestroy", &[pool]);
        app.fill(address, 5, 100);
        assert_eq!(app.read(address, 100), [5; 100]);
        free(&app, address, on);
        app.ok("cuStreamSynchronize", &[on]);
    }
    assert_eq!(app.round_trip().unwrap().bytes(CLASS_POOL), 0);
}

#[test]
fn a_pool_keeps_to_its_size() {
    let app = Application::start().unwrap();
    let on = stream(&app);
    // CUmemPoolProps: pinned, no handles, device 0, then 8 bytes, then the size.
    let props: [u64; 11] = std::array::from_fn(|i| match i {
        0 | 1 => 1,
        3 => 8 * MIB as u64,
        _ => 0,
    });
    let (mut pool, mut first, mut second) = (0usize, 0u64, 0u64);
    app.ok("cuMemPoolCreate", &[out(&mut pool), props.as_ptr() as usize]);
    set(&app, pool, RELEASE_THRESHOLD, u64::MAX);
    app.ok("cuMemAllocFromPoolAsync", &[out(&mut first), 6 * MIB, pool, on]);
    assert_eq!(app.call("cuMemAllocFromPoolAsync", &[out(&mut second), 4 * MIB, pool, on]), 2);
    free(&app, first, on);
    // What is free makes room.
    app.ok("cuMemAllocFromPoolAsync", &[out(&mut second), 4 * MIB, pool, on]);
    free(&app, second, on);
    app.ok("cuMemPoolDestroy", &[pool]);
    app.ok("cuStreamSynchronize", &[on]);
    assert_eq!(app.round_trip().unwrap().bytes(CLASS_POOL), 0);
}

#[test]
fn plain_and_ordered_calls_free_each_others_memory() {
    let app = Application::start().unwrap();
    let on = stream(&app);
    let baseline = app.round_trip().unwrap().pieces();
    for size in [100, 5 * MIB] {
        app.free(alloc(&app, size, on));
        free(&app, app.alloc(size), on);
    }
    settle(&app);
    assert!(app.round_trip().unwrap().pieces() <= baseline + 1, "one empty block may be kept");
}

#[test]
fn pending_memory_is_waited_for_before_it_runs_out() {
    let app = Application::start().unwrap();
    let (a, b) = (stream(&app), stream(&app));
    let (mut free_bytes, mut total) = (0usize, 0usize);
    app.ok("cuMemGetInfo_v2", &[out(&mut free_bytes), out(&mut total)]);
    let half = free_bytes / 2 / MIB * MIB;
    let first = alloc(&app, half + 4 * MIB, a);
    let block = Block::on(&app, a);
    free(&app, first, a);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            block.0.store(true, Ordering::SeqCst);
        });
        let second = alloc(&app, half + 8 * MIB, b);
        free(&app, second, b);
    });
    let mut none = 0u64;
    assert_eq!(app.call("cuMemAllocAsync", &[out(&mut none), total * 2, b]), 2);
    settle(&app);
}

#[test]
fn threads_and_streams_never_share_memory() {
    let app = Application::start().unwrap();
    set(&app, default_pool(&app), RELEASE_THRESHOLD, 64 * MIB as u64);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for seed in 1..=4u64 {
            let (app, stop) = (&app, &stop);
            scope.spawn(move || {
                app.use_device(0);
                let streams = [stream(app), stream(app)];
                let mut random = seed;
                let mut next = |below: u64| {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    (random >> 33) % below
                };
                while !stop.load(Ordering::Relaxed) {
                    let on = streams[next(2) as usize];
                    let batch: Vec<_> = (0..4)
                        .map(|_| {
                            let words = 1 + if next(4) == 0 { next(700_000) } else { next(2000) } as usize;
                            let (address, value) = (alloc(app, words * 4, on), next(1 << 31) as u32);
                            app.ok("cuMemsetD32Async", &[address as usize, value as usize, words, on]);
                            let mut data = vec![0u32; words];
                            let to = data.as_mut_ptr() as usize;
                            app.ok("cuMemcpyDtoHAsync_v2", &[to, address as usize, words * 4, on]);
                            free(app, address, on);
                            (data, value)
                        })
                        .collect();
                    app.ok("cuStreamSynchronize", &[on]);
                    for (data, value) in batch {
                        assert!(data.iter().all(|w| *w == value), "memory was used by two");
                    }
                }
            });
        }
        for _ in 0..20 {
            app.round_trip().unwrap();
            thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
    });
    settle(&app);
}
