//! A process that shares memory or events with others is not checkpointed alone.

use phos_integration::application::{Application, out};

#[repr(C)]
struct Handle([u8; 64]);

#[test]
fn what_is_shared_prevents_a_checkpoint() {
    let app = Application::start().unwrap();
    let blockers = || app.library().unwrap().query().unwrap().blockers;
    assert!(blockers().is_empty());
    let mut address = 0u64;
    // SAFETY: the function's type in cuda.h; the handle is passed by value.
    let opened = unsafe {
        type Open = unsafe extern "C" fn(usize, Handle, u32) -> u32;
        let open = std::mem::transmute::<usize, Open>(app.symbol("cuIpcOpenMemHandle_v2"));
        assert_eq!(open(out(&mut address), Handle([8; 64]), 1), 1, "the driver's own answer");
        assert!(blockers().is_empty());
        open(out(&mut address), Handle([7; 64]), 1)
    };
    assert_eq!(opened, 0, "the handle arrives as it was passed");
    assert!(blockers()[0].contains("CUDA IPC"), "{:?}", blockers());
    let error = format!("{:#}", app.round_trip().err().unwrap());
    assert!(error.contains("CUDA IPC"), "{error}");
    // Refused, not harmed.
    let address = app.alloc(1000);
    app.free(address);
}
