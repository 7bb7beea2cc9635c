//! `phos-runc`: an OCI runtime in front of runc whose checkpoints include the GPU.
//!
//! Verbs that are none of its business are handed to the lower runtime at once, byte for byte.

mod args;
mod checkpoint;
mod config;
mod context;
mod create;
mod criu_log;
mod doctor;
#[cfg(feature = "libcontainer")]
mod embedded;
mod gpu;
mod inspect;
mod log;
mod lower;
mod privilege;
mod progress;
mod restore;
mod state;
mod trace;

use std::env;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::args::Args;
use crate::config::Config;
use crate::context::Context;
use crate::lower::Lower;

const OWN_HELP: &str = "
PHOS-RUNC:
   phos-runc adds the GPU to `checkpoint` and `restore`, and these commands:
     doctor [--json]                    checks this host and says what to do about each finding
     gpu ID [--json]                    shows what its processes hold on the GPU
     inspect IMAGE [--json] [--verify]  shows what a GPU image holds
";

fn context(args: Args) -> Result<Context> {
    let config = Config::load()?;
    let lower = Lower::find(&config)?;
    Ok(Context { args, config, lower })
}

/// Refuses what the lower runtime cannot do.
fn able(run: Context) -> Result<Context> {
    match run.lower.no_checkpoint() {
        Some(why) => bail!(why),
        None => Ok(run),
    }
}

/// The lower runtime's own answer to `--version` or `--help`, with ours.
fn describe(run: &Context) -> Result<i32> {
    let wanted = |names: &[&str]| names.iter().any(|n| run.args.global.contains_key(*n));
    if wanted(&["version", "v"]) {
        println!("phos-runc version {}", env!("CARGO_PKG_VERSION"));
    }
    let about_itself = run.args.all.is_empty()
        || run.args.rest.is_empty() && (run.args.verb == "help" || wanted(&["help", "h"]));
    if !about_itself && !wanted(&["version", "v"]) {
        return Err(run.lower.exec(&run.args));
    }
    let status = run.lower.program().args(&run.args.all).status()?;
    if about_itself {
        print!("{OWN_HELP}");
    }
    Ok(status.code().unwrap_or(1))
}

fn dispatch(args: &Args) -> Result<i32> {
    let own = |args: &Args| context(args.clone());
    match args.verb.as_str() {
        "create" => create::create(&own(args)?),
        "run" => create::run(&own(args)?),
        "delete" => create::delete(&own(args)?),
        "checkpoint" => checkpoint::run(&able(own(args)?)?),
        "restore" => restore::run(&able(own(args)?)?),
        #[cfg(feature = "libcontainer")]
        embedded::WORD => embedded::run(&args.all[args.verb_at + 1..]),
        "doctor" => doctor::run(args),
        "gpu" => gpu::run(&own(args)?),
        "inspect" => inspect::run(args),
        "" | "help" => describe(&own(args)?),
        "__keeper" => Ok(phos_engine::keeper::run(&args.all[1..]).map(|()| 0)?),
        "__worker" => Ok(phos_engine::worker::run(&args.all[1..]).map(|()| 0)?),
        _ => {
            let run = own(args)?;
            Err(run.lower.exec(args))
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse(env::args_os().skip(1).collect());
    match dispatch(&args) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(255)),
        Err(e) => {
            log::error(&args, &format!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}
