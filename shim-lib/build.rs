//! Generates the exported functions from `entry-points.txt`, names the library `libcuda.so.1`, and binds it to old versions of
//! the C library's functions.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=entry-points.txt");
    // Whoever asks the loader for libcuda.so.1 while this is loaded gets this.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    let text = fs::read_to_string("entry-points.txt").expect("entry-points.txt is part of the crate");
    let mut names = Vec::new();
    let mut code = String::new();
    let mut wrapped = Vec::new();
    for line in text.lines().filter(|l| !l.starts_with('#') && !l.trim().is_empty()) {
        let mut words = line.split_whitespace();
        let (name, treatment) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let index = names.len();
        names.push(name.to_string());
        match treatment {
            "pass" => writeln!(code, "trampoline!({name}, {index});"),
            "gate" | "launch" => {
                wrapped.push((index, name.to_string()));
                let count: usize = words.next().and_then(|n| n.parse().ok()).expect("a number of arguments");
                let params: Vec<_> = (0..count).map(|i| format!("a{i}")).collect();
                writeln!(code, "gated!({name}, {index}, {treatment}, {});", params.join(", "))
            }
            "replace" => {
                wrapped.push((index, name.to_string()));
                Ok(())
            }
            other => panic!("entry-points.txt: unknown treatment '{other}' of {name}"),
        }
        .expect("writing to a string");
    }
    writeln!(code, "/// Number of entry points.\npub const COUNT: usize = {};", names.len()).expect("string");
    writeln!(code, "/// Their names, NUL-terminated, in the order of `entry-points.txt`.").expect("string");
    writeln!(code, "pub static NAMES: [&std::ffi::CStr; COUNT] = [").expect("string");
    for name in &names {
        writeln!(code, "    c\"{name}\",").expect("string");
    }
    writeln!(code, "];").expect("string");
    writeln!(
        code,
        "/// Entry points that are not passed straight on: index and the function of this library."
    )
    .expect("string");
    writeln!(code, "pub static WRAPPED: [(usize, Wrapper); {}] = [", wrapped.len()).expect("string");
    for (index, name) in &wrapped {
        writeln!(code, "    ({index}, Wrapper(crate::exports::{name} as *const ())),").expect("string");
    }
    writeln!(code, "];").expect("string");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&out).join("entry_points.rs"), code).expect("OUT_DIR is writable");
    old_symbols(Path::new(&out));
}

/// Functions of `src/old_libc.rs`.
const BY_HAND: [&str; 5] = ["fstat", "fstat64", "stat64", "gettid", "statx"];

fn old_symbols(out: &Path) {
    println!("cargo:rerun-if-changed=old-symbols.txt");
    let text = fs::read_to_string("old-symbols.txt").expect("old-symbols.txt is part of the crate");
    let mut code = String::new();
    let lines = text.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
    let symbols = lines.map(|l| l.split_once(' ').expect("a function and a version"));
    for (name, version) in symbols {
        writeln!(code, "arranged!(\"{name}\", \"{name}\", \"{version}\",);").expect("string");
        println!("cargo:rustc-cdylib-link-arg=-Wl,--wrap={name}");
    }
    for name in BY_HAND {
        println!("cargo:rustc-cdylib-link-arg=-Wl,--wrap={name}");
    }
    // Where older ones have these functions; newer ones keep the names.
    let libraries = "--push-state,--no-as-needed,-l:libdl.so.2,-l:libpthread.so.0,--pop-state";
    println!("cargo:rustc-cdylib-link-arg=-Wl,{libraries}");
    fs::write(out.join("old_symbols.rs"), code).expect("OUT_DIR is writable");
}
