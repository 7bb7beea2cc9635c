//! Binds to old versions of the C library's functions, so that the library runs in containers whose C library is older than
//! the build machine's.
//!
//! The linker sends every call of these functions, the standard library's own included, to `__wrap_NAME` (`build.rs`). Most
//! jump on to an older version of the same function, see `old-symbols.txt`; those below had no such version. A jump leaves
//! the return address as it was, which `dlopen` looks at.

use core::arch::global_asm;

/// A function that goes on in an old one after its arguments have been arranged.
macro_rules! arranged {
    ($name:literal, $target:literal, $version:literal, $($line:literal),*) => {
        global_asm!(
            concat!(".pushsection .text.__wrap_", $name, ",\"ax\",@progbits"),
            concat!(".globl __wrap_", $name),
            concat!(".hidden __wrap_", $name),
            concat!(".type __wrap_", $name, ",@function"),
            concat!("__wrap_", $name, ":"),
            "endbr64",
            $($line,)*
            concat!("jmp qword ptr [rip + phos_", $name, "_", $target, "@GOTPCREL]"),
            concat!(".size __wrap_", $name, ", . - __wrap_", $name),
            concat!(".symver phos_", $name, "_", $target, ", ", $target, "@", $version),
            ".popsection",
        );
    };
}

include!(concat!(env!("OUT_DIR"), "/old_symbols.rs"));

// Until 2.33 these were inline functions around others that are told the layout of `struct stat`, which is 1 here.
arranged!("fstat", "__fxstat", "GLIBC_2.2.5", "mov rdx, rsi", "mov esi, edi", "mov edi, 1");
arranged!("fstat64", "__fxstat64", "GLIBC_2.2.5", "mov rdx, rsi", "mov esi, edi", "mov edi, 1");
arranged!("stat64", "__xstat64", "GLIBC_2.2.5", "mov rdx, rsi", "mov rsi, rdi", "mov edi, 1");

/// A function that did not exist: this library's own in its place.
macro_rules! replaced {
    ($name:literal, $function:ident) => {
        global_asm!(
            concat!(".pushsection .text.__wrap_", $name, ",\"ax\",@progbits"),
            concat!(".globl __wrap_", $name),
            concat!(".hidden __wrap_", $name),
            concat!(".type __wrap_", $name, ",@function"),
            concat!("__wrap_", $name, ":"),
            "endbr64",
            "jmp {function}",
            concat!(".size __wrap_", $name, ", . - __wrap_", $name),
            ".popsection",
            function = sym $function,
        );
    };
}

// These came with 2.30 and 2.28.
replaced!("gettid", gettid);
replaced!("statx", statx);

extern "C" fn gettid() -> libc::pid_t {
    // SAFETY: a system call without arguments.
    unsafe { libc::syscall(libc::SYS_gettid) as libc::pid_t }
}

/// # Safety
/// As the C library's function.
unsafe extern "C" fn statx(
    folder: libc::c_int,
    path: *const libc::c_char,
    flags: libc::c_int,
    mask: libc::c_uint,
    to: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the arguments are the caller's.
    unsafe { libc::syscall(libc::SYS_statx, folder, path, flags, mask, to) as libc::c_int }
}
