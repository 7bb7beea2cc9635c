//! The checkpoint and restore engine: state machine, image format, copy pipeline and the device trait.

pub mod copy;
pub mod device;
pub mod error;
pub mod freezer;
pub mod image;
pub mod job;
pub mod keeper;
pub mod lower;
pub mod peer;
pub mod plan;
pub mod processes;
pub mod progress;
pub mod service;
pub mod text;
pub mod worker;
