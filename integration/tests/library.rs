//! `libphos.so` call by call: parking, and what happens when the driver fails in the middle of it.

use phos_integration::application::{Application, out};

const MIB: usize = 1 << 20;

/// Bytes of a piece's contents; large enough that each allocation has a piece of memory to itself.
fn size(n: u32) -> usize {
    (16 + n as usize) * MIB
}

/// Three pieces of memory with known contents.
struct Pieces(Vec<(u64, u32)>);

impl Pieces {
    fn make(app: &Application) -> Self {
        let made = (1..=3u32).map(|n| {
            let address = app.alloc(size(n));
            app.fill(address, n * 0x0101_0101, size(n) / 4);
            (address, n)
        });
        Pieces(made.collect())
    }

    fn check(&self, app: &Application) {
        for (address, n) in &self.0 {
            let words = app.read(*address, size(*n) / 4);
            assert!(words.iter().all(|w| *w == n * 0x0101_0101), "piece {n}");
        }
    }

    fn free(self, app: &Application) {
        self.0.iter().for_each(|(address, _)| app.free(*address));
    }
}

#[test]
fn a_park_that_fails_leaves_the_program_running() {
    let app = Application::start().unwrap();
    let pieces = Pieces::make(&app);
    for nth in 1..=3 {
        app.fail(&format!("cuMemUnmap:{nth}:999"));
        let (_, taken) = app.park().unwrap();
        let error = format!("{:#}", taken.unwrap_err());
        assert!(error.contains("cuMemUnmap") && error.contains("999"), "{error}");
        assert!(app.listens().unwrap(), "not parked");
        pieces.check(&app);
        app.round_trip().unwrap();
        pieces.check(&app);
    }
    app.fail("");
    pieces.free(&app);
}

#[test]
fn a_park_that_can_go_neither_on_nor_back_is_ended_by_the_host() {
    let app = Application::start().unwrap();
    let pieces = Pieces::make(&app);
    // The second piece cannot be unmapped, and the first cannot be mapped again.
    app.fail("cuMemUnmap:2:999,cuMemImportFromShareableHandle:1:999");
    let (parked, taken) = app.park().unwrap();
    assert!(taken.is_err());
    assert!(!app.listens().unwrap(), "it waits for the host");
    app.attach(&parked).unwrap();
    pieces.check(&app);
    app.round_trip().unwrap();
    pieces.check(&app);
    pieces.free(&app);
}

#[test]
fn an_attach_that_fails_can_be_tried_again() {
    let app = Application::start().unwrap();
    let pieces = Pieces::make(&app);
    for function in ["cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"] {
        let (parked, taken) = app.park().unwrap();
        taken.unwrap();
        for nth in 1..=2 {
            app.fail(&format!("{function}:{nth}:2"));
            let error = app.attach(&parked).unwrap_err().to_string();
            assert!(error.contains(function), "{error}");
        }
        app.attach(&parked).unwrap();
        pieces.check(&app);
    }
    pieces.free(&app);
}

#[test]
fn a_function_of_a_newer_driver_passes_and_is_counted() {
    let app = Application::start().unwrap();
    let find = |version: usize| {
        let (mut function, mut status) = (0usize, 0u32);
        let name = c"cuLaunchHostFunc".as_ptr() as usize;
        app.ok("cuGetProcAddress_v2", &[name, out(&mut function), version, 0, out(&mut status)]);
        function
    };
    let unknown = || app.library().unwrap().query().unwrap().unknown_functions;
    let before = unknown();
    assert_eq!(find(12080), app.symbol("cuLaunchHostFunc"), "wrapped");
    assert_eq!(unknown(), before);
    assert_eq!(find(99000), app.driver_symbol("cuLaunchHostFunc_v99"), "never replaced by an older one");
    assert_eq!(unknown(), before + 1);
}
