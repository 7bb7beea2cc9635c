//! Generates the ttrpc service from its definition.

use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=proto/engine.proto");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/engine.proto")
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()
        .expect("proto/engine.proto is valid");
    // The files are included inside a module, where inner attributes may not stand.
    for name in ["engine.rs", "engine_ttrpc.rs"] {
        let path = Path::new(&out).join(name);
        let text = fs::read_to_string(&path).expect("just generated");
        let kept: Vec<_> = text.lines().filter(|l| !l.starts_with("#![") && !l.starts_with("//!")).collect();
        fs::write(&path, kept.join("\n")).expect("OUT_DIR is writable");
    }
}
