//! The ttrpc service between the foreground and the worker.

mod client;
mod server;

pub use client::{Client, ClientError, LowerOutput};
pub use server::{Handler, serve};

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
