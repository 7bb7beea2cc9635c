//! What each fuzz target does with its input. The same functions replay the committed corpus in the stable tests
//! (`integration/tests/fuzz_corpus.rs`).

pub mod command_line;
pub mod configuration;
pub mod conversation;
pub mod image;

/// A fuzz target: takes any bytes, and panics only if the product is wrong.
pub type Target = fn(&[u8]);

pub use command_line::args;
pub use configuration::{config, spec};
pub use conversation::{keeper, message, peer};
pub use image::{chain, chunk_table, manifest};

/// All targets by name, which is also that of their corpus folder.
pub const TARGETS: [(&str, Target); 9] = [
    ("manifest", manifest),
    ("chunk_table", chunk_table),
    ("chain", chain),
    ("message", message),
    ("peer", peer),
    ("keeper", keeper),
    ("args", args),
    ("spec", spec),
    ("config", config),
];
