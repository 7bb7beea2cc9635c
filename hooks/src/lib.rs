//! Puts `libphos.so` into containers that use a GPU, by editing their configuration before they are created.
//!
//! ```text
//! detect   does this container use a GPU?                     (reads the configuration)
//! locate   where will it find libcuda.so.1?                   (reads the file system)
//! plan     which mounts and variables does that need?         (pure)
//! apply    the configuration with them; done twice is done once (pure)
//! late     mounts that only hooks make: declared to CRIU, remembered for restore (pure)
//! merge    for restore: what the engine's new configuration lacks (pure)
//! shape    whether a configuration can be edited at all (pure)
//! ```
//!
//! Configurations are edited as JSON values: fields this crate does not know stay as they are.

pub mod detect;
pub mod late;
pub mod locate;
pub mod merge;
pub mod plan;
pub mod shape;

use std::path::{Path, PathBuf};

use serde_json::Value;

pub use detect::Mode;
pub use plan::Edit;
pub use shape::check;

/// What the host offers.
#[derive(Debug, Clone)]
pub struct Host {
    /// `libphos.so`.
    pub library: PathBuf,
    /// `phos-hook`, for drivers that only a hook mounts.
    pub hook: PathBuf,
    /// The container's control folder.
    pub control_dir: PathBuf,
    /// What to do where no annotation says otherwise.
    pub default_mode: Mode,
}

/// What to do to a configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Injection {
    /// The edits, in order; empty for a container that is none of our business.
    pub edits: Vec<Edit>,
    /// Lines for the log.
    pub notes: Vec<String>,
}

/// Works out the injection for the configuration `spec` of the bundle in `bundle`.
pub fn inject(spec: &Value, bundle: &Path, host: &Host) -> Injection {
    match detect::mode(spec, host.default_mode) {
        Ok(mode) => inject_as(mode, spec, bundle, host),
        Err(text) => Injection { edits: Vec::new(), notes: vec![text] },
    }
}

/// The same where it is decided how. A restored container is injected as it was when its image was made.
pub fn inject_as(mode: Mode, spec: &Value, bundle: &Path, host: &Host) -> Injection {
    if mode == Mode::Off {
        return Injection::default();
    }
    let note = |text: String| Injection { edits: Vec::new(), notes: vec![text] };
    // A bundle that was run before may carry an earlier run's edits.
    let mut clean = spec.clone();
    plan::remove(&mut clean);
    let root = locate::root_path(&clean, bundle);
    if let Err(reason) = locate::can_load(&host.library, &root) {
        return note(format!("libphos.so is not put into this container: {reason}"));
    }
    let found = locate::libcuda(&clean, &root);
    let Some(first) = found.first() else {
        let says = |text: &str, edits| Injection { edits, notes: vec![text.to_string()] };
        if mode == Mode::Preload {
            return says(
                "libphos.so is preloaded; the driver is not visible yet",
                plan::edits(mode, &[], host),
            );
        }
        if detect::has_hooks(&clean) && host.hook.exists() {
            return says(
                "libphos.so will stand in front of the driver that a hook mounts",
                plan::late_edits(host),
            );
        }
        return note(
            "this container has a GPU but no libcuda.so.1 that is visible now: libphos.so is not put into it"
                .into(),
        );
    };
    let notes = vec![format!("libphos.so stands in front of {}", first.inside.display())];
    Injection { edits: plan::edits(mode, &found, host), notes }
}
