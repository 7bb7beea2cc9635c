//! Generates the exported functions from `entry-points.txt`, and names the library `libcuda.so.1`.

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
}
