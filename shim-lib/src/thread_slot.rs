//! One pointer for each thread, read with two instructions.
//!
//! A `thread_local!` of a library that may be loaded at run time is found by a function call (`__tls_get_addr`), which
//! costs more than the rest of the gate. This one lies in the block that every thread has from its beginning
//! ("initial-exec"), of which the loader keeps some room for libraries that come later; it takes 8 bytes.

use core::arch::{asm, global_asm};

global_asm!(
    ".pushsection .tbss,\"awT\",@nobits",
    ".balign 8",
    ".globl phos_thread_slot",
    ".hidden phos_thread_slot",
    ".type phos_thread_slot, @object",
    ".size phos_thread_slot, 8",
    "phos_thread_slot:",
    ".zero 8",
    ".popsection",
);

/// This thread's pointer, null until it is set.
#[inline(always)]
pub fn get() -> *const () {
    let pointer: *const ();
    // SAFETY: reads the eight bytes of this thread that were set aside above.
    unsafe {
        asm!(
            "mov {p}, qword ptr [rip + phos_thread_slot@GOTTPOFF]",
            "mov {p}, qword ptr fs:[{p}]",
            p = out(reg) pointer,
            options(nostack, preserves_flags, readonly),
        );
    }
    pointer
}

/// Sets it.
pub fn set(pointer: *const ()) {
    // SAFETY: writes the eight bytes of this thread that were set aside above.
    unsafe {
        asm!(
            "mov {t}, qword ptr [rip + phos_thread_slot@GOTTPOFF]",
            "mov qword ptr fs:[{t}], {p}",
            t = out(reg) _,
            p = in(reg) pointer,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_has_its_own() {
        let check = |value: usize| {
            assert!(get().is_null());
            set(value as *const ());
            std::thread::yield_now();
            assert_eq!(get() as usize, value);
            set(std::ptr::null());
        };
        std::thread::scope(|scope| {
            (1..50).for_each(|n| {
                scope.spawn(move || check(n * 64));
            });
        });
        check(8);
    }
}
