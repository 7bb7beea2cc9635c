//! What tests and demo need to run containers with a (simulated) GPU: an isolated place to do it in, bundles, the
//! runtime's command line, the sample program's status lines.

pub mod application;
pub mod bundle;
pub mod container;
pub mod containerd;
pub mod cri;
pub mod engine;
pub mod faults;
pub mod image;
pub mod measure;
pub mod memory;
pub mod processes;
pub mod registry;
pub mod root;
pub mod sandbox;
pub mod status;
pub mod toolkit;
pub mod tools;
