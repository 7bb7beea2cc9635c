//! The exported functions: generated from `entry-points.txt`, resolved when they are first called.

use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cuda::{NO_DEVICE, NOT_FOUND, Status};
use crate::exports::{COUNT, NAMES};
use crate::real;

/// Addresses of the driver's functions, 0 until first used.
pub static SLOTS: [AtomicUsize; COUNT] = [const { AtomicUsize::new(0) }; COUNT];

/// Address of a function of this library.
pub struct Wrapper(pub *const ());
// SAFETY: the address of code, which nobody writes to.
unsafe impl Sync for Wrapper {}

extern "C" fn not_found() -> Status {
    NOT_FOUND
}

extern "C" fn no_device() -> Status {
    NO_DEVICE
}

/// Finds the driver's function number `index` and remembers it.
#[cold]
#[inline(never)]
pub extern "C" fn resolve(index: usize) -> usize {
    let mut address = real::find(NAMES[index]) as usize;
    if address == 0 {
        // A driver older than this library, or none: the call fails with a code instead of the process.
        let stand_in = if real::present() { not_found } else { no_device };
        address = stand_in as *const () as usize;
    }
    SLOTS[index].store(address, Ordering::Release);
    address
}

/// The driver's function number `index`.
#[inline(always)]
pub fn target(index: usize) -> usize {
    match SLOTS[index].load(Ordering::Relaxed) {
        0 => resolve(index),
        address => address,
    }
}

/// Where a trampoline goes whose slot is empty: `r11` holds its index. All registers that may carry arguments are
/// kept, so that the driver's function is entered exactly as the application called it.
///
/// # Safety
/// Jumped to by trampolines only.
#[unsafe(naked)]
pub unsafe extern "C" fn resolve_and_jump() {
    core::arch::naked_asm!(
        "push rdi", "push rsi", "push rdx", "push rcx", "push r8", "push r9", "push rax",
        // Seven pushes and the return address: the stack is aligned to 16 again.
        "sub rsp, 128",
        "movups [rsp], xmm0", "movups [rsp + 16], xmm1", "movups [rsp + 32], xmm2", "movups [rsp + 48], xmm3",
        "movups [rsp + 64], xmm4", "movups [rsp + 80], xmm5", "movups [rsp + 96], xmm6", "movups [rsp + 112], xmm7",
        "mov rdi, r11",
        "call {resolve}",
        "mov r11, rax",
        "movups xmm0, [rsp]", "movups xmm1, [rsp + 16]", "movups xmm2, [rsp + 32]", "movups xmm3, [rsp + 48]",
        "movups xmm4, [rsp + 64]", "movups xmm5, [rsp + 80]", "movups xmm6, [rsp + 96]", "movups xmm7, [rsp + 112]",
        "add rsp, 128",
        "pop rax", "pop r9", "pop r8", "pop rcx", "pop rdx", "pop rsi", "pop rdi",
        "jmp r11",
        resolve = sym resolve,
    )
}

/// An entry point that goes straight to the driver.
macro_rules! trampoline {
    ($name:ident, $index:expr) => {
        /// Passed to the driver.
        ///
        /// # Safety
        /// As the driver's function of this name.
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name() {
            core::arch::naked_asm!(
                "endbr64",
                "mov r11, qword ptr [rip + {slots} + {offset}]",
                "test r11, r11",
                "je 2f",
                "jmp r11",
                "2:",
                "mov r11d, {index}",
                "jmp {slow}",
                slots = sym crate::entry::SLOTS,
                offset = const $index * 8,
                index = const $index,
                slow = sym crate::entry::resolve_and_jump,
            )
        }
    };
}
pub(crate) use trampoline;

/// An entry point that calls the driver from inside the gate.
macro_rules! gated {
    ($name:ident, $index:expr, $kind:ident, $($arg:ident),*) => {
        /// Calls the driver inside the gate.
        ///
        /// # Safety
        /// As the driver's function of this name.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: usize),*) -> u32 {
            let _pass = crate::gate::$kind();
            // SAFETY: the slot holds the driver's function of this name, which takes this many integer or pointer
            // arguments; they are the caller's own.
            unsafe {
                let f: unsafe extern "C" fn($(gated!(@word $arg)),*) -> u32 =
                    std::mem::transmute::<usize, _>(crate::entry::target($index));
                f($($arg),*)
            }
        }
    };
    (@word $arg:ident) => { usize };
}
pub(crate) use gated;

/// The driver's function by name as a pointer, for comparisons.
pub fn address_of(index: usize) -> *mut c_void {
    real::find(NAMES[index])
}
