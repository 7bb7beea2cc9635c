//! Peer access: kernels of one device use plain memory of another, whenever it was made.

use phos_integration::application::{Application, out};

const MIB: usize = 1 << 20;
const PTX: &str = concat!(include_str!("../sample/kernels/sample.ptx"), "\0");

/// Runs one step of the sample's generator on the current device; returns what a zeroed first word becomes.
fn advance(app: &Application, address: u64, words: u64) {
    let (mut module, mut function) = (0usize, 0usize);
    app.ok("cuModuleLoadData", &[out(&mut module), PTX.as_ptr() as usize]);
    app.ok("cuModuleGetFunction", &[out(&mut function), module, c"advance".as_ptr() as usize]);
    let (mut address, mut words, mut salt) = (address, words, 0u32);
    let mut params = [out(&mut address), out(&mut words), out(&mut salt)];
    app.ok("cuLaunchKernel", &[function, 1, 1, 1, 256, 1, 1, 0, 0, params.as_mut_ptr() as usize, 0]);
    app.ok("cuCtxSynchronize", &[]);
}

#[test]
fn a_peer_uses_memory_made_before_and_after() {
    /// What the sample's generator makes of word 0 from 0.
    const FIRST: u32 = 1_013_904_223;
    let app = Application::start().unwrap();
    let other = app.use_device(1);
    let before = [app.alloc(4 * MIB), app.alloc(1000)];
    app.use_device(0);
    app.ok("cuCtxEnablePeerAccess", &[other, 0]);
    assert_eq!(app.call("cuCtxEnablePeerAccess", &[other, 0]), 704, "the driver's own answer");
    app.use_device(1);
    let after = [app.alloc(4 * MIB), app.alloc(600_000)];
    let all = [before, after].concat();
    all.iter().for_each(|a| app.fill(*a, 0, 100));
    app.use_device(0);
    all.iter().for_each(|a| advance(&app, *a, 100));
    app.round_trip().unwrap();
    app.use_device(1);
    for address in &all {
        assert_eq!(app.read(*address, 1), [FIRST]);
        app.fill(*address, 0, 100);
    }
    // The rights were given again with the memory.
    app.use_device(0);
    all.iter().for_each(|a| advance(&app, *a, 100));
    app.ok("cuCtxDisablePeerAccess", &[other]);
    assert_eq!(app.call("cuCtxDisablePeerAccess", &[other]), 705);
    app.use_device(1);
    for address in all {
        assert_eq!(app.read(address, 1), [FIRST]);
        app.free(address);
    }
}
