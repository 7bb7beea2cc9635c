//! What every verb needs.

use crate::args::Args;
use crate::config::Config;
use crate::lower::Lower;

/// One run of this program.
#[derive(Clone)]
pub struct Context {
    /// Its command line.
    pub args: Args,
    /// The configuration file.
    pub config: Config,
    /// The runtime below.
    pub lower: Lower,
}
