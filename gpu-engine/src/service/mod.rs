//! The ttrpc service between the foreground and the worker.

mod client;
mod server;

pub use client::{Client, ClientError, LowerOutput};
pub use server::{Handler, serve};

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// A short name for a socket at any path: addresses hold 107 bytes only, and container ids alone can have 64. Valid while
/// the returned folder is open.
fn short_path(socket: &Path) -> io::Result<(File, PathBuf)> {
    let folder = File::open(socket.parent().unwrap_or(Path::new("/")))?;
    let name = socket.file_name().unwrap_or_default();
    let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    Ok((folder, short))
}

/// Generated from `proto/engine.proto`.
#[allow(missing_docs, unused_imports, unused_mut, unused_results, non_snake_case, non_camel_case_types)]
#[allow(non_upper_case_globals, dead_code, trivial_casts)]
#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
mod generated {
    pub mod engine {
        include!(concat!(env!("OUT_DIR"), "/engine.rs"));
    }
    pub mod engine_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/engine_ttrpc.rs"));
    }
}
