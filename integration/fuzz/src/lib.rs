//! What each fuzz target does with its input. The same functions replay the committed corpus in the stable tests
//! (`integration/tests/fuzz_corpus.rs`).

// The runtime is a program; these are its modules that read what others write.
#[allow(dead_code, unused)]
#[path = "../../../runtime/src/args.rs"]
mod args;
#[allow(dead_code, unused)]
#[path = "../../../runtime/src/config.rs"]
mod config;
#[allow(dead_code, unused)]
#[path = "../../../runtime/src/state.rs"]
mod state;

pub mod command_line;
pub mod configuration;
pub mod conversation;
pub mod image;

/// A fuzz target: takes any bytes, and panics only if the product is wrong.
pub type Target = fn(&[u8]);

pub use command_line::args;
pub use configuration::{config, spec};
pub use conversation::{keeper, message, peer, peer_alone};
pub use image::{chain, chunk_table, manifest, unpack};

/// All targets by name, which is also that of their corpus folder.
pub const TARGETS: [(&str, Target); 10] = [
    ("manifest", manifest),
    ("chunk_table", chunk_table),
    ("chain", chain),
    ("unpack", unpack),
    ("message", message),
    ("peer", peer),
    ("keeper", keeper),
    ("args", args),
    ("spec", spec),
    ("config", config),
];
