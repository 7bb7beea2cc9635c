//! The checkpoint and restore engine: state machine, image format, copy pipeline and the device trait.

pub mod copy;
pub mod device;
pub mod error;
pub mod fault;
pub mod freezer;
pub mod headroom;
pub mod image;
pub mod job;
pub mod keeper;
pub mod lower;
pub mod pages;
pub mod peer;
pub mod plan;
pub mod privilege;
pub mod probes;
pub mod processes;
pub mod progress;
pub mod service;
pub mod started;
pub mod text;
pub mod worker;
