//! Where `libphos.so` can run: with old C libraries, with drivers that lack functions, in programs that never call CUDA.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeSet;
use std::env;
use std::ffi::CString;
use std::fs;
use std::path::Path;
use std::process::Command;

use phos_integration::application::{Application, TEST_DRIVER, out};
use phos_integration::tools::built;

const MIB: usize = 1 << 20;
const NOT_FOUND: u32 = 500;

/// The oldest C library that the images of a CUDA program have: that of RHEL 8. Ubuntu 20.04 has 2.31.
const OLDEST_LIBC: [u32; 2] = [2, 28];

#[test]
fn an_old_c_library_will_do() {
    let readelf = |flags: &str| {
        let output = Command::new("readelf").args([flags, "-W"]).arg(built("libphos.so").unwrap()).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let needs = readelf("--version-info");
    let versions = needs.split("GLIBC_").skip(1).map(|rest| {
        let text: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        text.split('.').map(|n| n.parse().unwrap()).collect::<Vec<u32>>()
    });
    let newest = versions.max().unwrap();
    assert!(newest[..2] <= OLDEST_LIBC[..], "it needs version {newest:?} of the C library");
    let dynamic = readelf("--dynamic");
    let needed: BTreeSet<&str> = dynamic
        .lines()
        .filter(|l| l.contains("(NEEDED)"))
        .map(|l| l.split(['[', ']']).nth(1).unwrap())
        .collect();
    // Parts of the C library, and the compiler's own, which every C++ program has.
    let known = ["ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libpthread.so.0"];
    assert!(needed.iter().all(|n| known.contains(n)), "{needed:?}");
}

/// Functions that drivers before 12.8 do not all have.
const MISSING: [&str; 11] = [
    "cuCtxCreate_v4",
    "cuCtxSynchronize_v2",
    "cuStreamGetId",
    "cuMemcpyBatchAsync",
    "cuMemPoolCreate",
    "cuMemPoolDestroy",
    "cuMemPoolSetAttribute",
    "cuMemPoolGetAttribute",
    "cuDeviceGetDefaultMemPool",
    "cuDeviceGetMemPool",
    "cuPointerGetAttributes",
];

/// A driver in which functions have other names, so that nobody finds them.
fn older_driver(to: &Path) {
    let mut bytes = fs::read(built("libsimcuda.so").unwrap()).unwrap();
    for name in MISSING {
        let pattern = [&[0], name.as_bytes(), &[0]].concat();
        let found: Vec<_> =
            bytes.windows(pattern.len()).enumerate().filter(|(_, w)| *w == pattern).map(|(i, _)| i).collect();
        for at in found {
            bytes[at + 1] = b'x';
        }
    }
    fs::write(to, bytes).unwrap();
}

/// Not a test by itself: a program on the older driver.
#[test]
fn program_on_an_older_driver() {
    if env::var_os(TEST_DRIVER).is_none() {
        return;
    }
    let app = Application::start().unwrap();
    let mut value = 0usize;
    // What the driver lacks says so, and the process goes on.
    for name in ["cuCtxCreate_v4", "cuStreamGetId", "cuPointerGetAttributes", "cuMemPoolCreate"] {
        assert_eq!(app.call(name, &[out(&mut value), 0, 0, 0, 0]), NOT_FOUND, "{name}");
    }
    app.ok("cuGetProcAddress", &[c"cuMemAlloc".as_ptr() as usize, out(&mut value), 11080, 0]);
    assert_eq!(value, app.symbol("cuMemAlloc_v2"));
    let held: Vec<_> = [100, 3 * MIB, 40 * MIB].into_iter().map(|size| app.alloc(size)).collect();
    let mut stream = 0usize;
    app.ok("cuStreamCreate", &[out(&mut stream), 1]);
    // Without pools to ask for, this memory is the driver's, and counted.
    let mut ordered = 0u64;
    app.ok("cuMemAllocAsync", &[out(&mut ordered), MIB, stream]);
    assert_eq!(app.library().unwrap().query().unwrap().driver_bytes, MIB as u64);
    held.iter().for_each(|a| app.fill(*a, 9, 25));
    app.round_trip().unwrap();
    assert!(held.iter().all(|a| app.read(*a, 25) == [9; 25]));
    app.ok("cuMemFreeAsync", &[ordered as usize, stream]);
    app.ok("cuStreamSynchronize", &[stream]);
    app.ok("cuCtxSynchronize", &[]);
    held.into_iter().for_each(|a| app.free(a));
}

#[test]
fn a_driver_that_lacks_functions_will_do() {
    let folder = tempfile::tempdir().unwrap();
    let driver = folder.path().join("libcuda.so.1");
    older_driver(&driver);
    let program = Command::new(env::current_exe().unwrap())
        .args(["--exact", "program_on_an_older_driver", "--nocapture"])
        .env(TEST_DRIVER, &driver)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&program.stderr);
    assert!(program.status.success(), "{text}");
}

/// The paths that a program opens from its `exec` on, as the kernel sees them.
fn opened(preload: Option<&Path>) -> Vec<String> {
    let program = CString::new("/bin/true").unwrap();
    let preload = preload.map(|p| CString::new(format!("LD_PRELOAD={}", p.display())).unwrap());
    let args = [program.as_ptr(), std::ptr::null()];
    let environment = [preload.as_ref().map_or(std::ptr::null(), |p| p.as_ptr()), std::ptr::null()];
    let mut paths = Vec::new();
    // SAFETY: the child makes only system calls and is traced by this thread until it has ended; registers and memory are
    // read while it is stopped.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::execve(program.as_ptr(), args.as_ptr(), environment.as_ptr());
            libc::_exit(127);
        }
        let mut status = 0;
        libc::waitpid(child, &mut status, 0);
        assert!(libc::WIFSTOPPED(status), "not traced: {status:#x}");
        libc::ptrace(
            libc::PTRACE_SETOPTIONS,
            child,
            0,
            libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD,
        );
        let memory = fs::File::open(format!("/proc/{child}/mem")).unwrap();
        let mut entering = true;
        loop {
            libc::ptrace(libc::PTRACE_SYSCALL, child, 0, 0);
            libc::waitpid(child, &mut status, 0);
            if !libc::WIFSTOPPED(status) {
                break;
            }
            if entering {
                let mut registers: libc::user_regs_struct = std::mem::zeroed();
                libc::ptrace(libc::PTRACE_GETREGS, child, 0, &raw mut registers);
                let at = match registers.orig_rax as i64 {
                    libc::SYS_open => Some(registers.rdi),
                    libc::SYS_openat => Some(registers.rsi),
                    _ => None,
                };
                if let Some(at) = at {
                    let mut text = [0u8; 256];
                    let read = std::os::unix::fs::FileExt::read_at(&memory, &mut text, at).unwrap();
                    let end = text[..read].iter().position(|b| *b == 0).unwrap_or(read);
                    paths.push(String::from_utf8_lossy(&text[..end]).into_owned());
                }
            }
            entering = !entering;
        }
        assert_eq!(status, 0, "the program failed");
    }
    paths
}

#[test]
fn a_program_that_never_calls_cuda_opens_nothing_more() {
    let library = built("libphos.so").unwrap();
    let (without, with) = (opened(None), opened(Some(&library)));
    assert!(without.iter().any(|p| p.ends_with("libc.so.6")), "{without:?}");
    let more: Vec<_> = with.iter().filter(|p| !without.contains(p)).collect();
    let own = library.display().to_string();
    assert!(more.iter().any(|p| **p == own), "it was not loaded: {with:?}");
    // Besides itself, what the loader has to find for it: parts of the C library, and the compiler's.
    let parts = ["libgcc_s.so.1", "libdl.so.2", "libpthread.so.0"];
    let rest: Vec<_> = more.iter().filter(|p| ***p != own && !parts.iter().any(|l| p.ends_with(l))).collect();
    assert!(rest.is_empty(), "{rest:?}");
}
