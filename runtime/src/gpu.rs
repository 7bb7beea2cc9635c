//! `gpu ID [--json]`: what a container's processes hold on the GPU, and what would prevent a checkpoint.

use anyhow::{Context as _, Result, anyhow, bail};
use phos_engine::device::{Device, ProcessState, cuda};
use phos_engine::peer::{ControlDir, Library};
use phos_engine::processes::{self, Process};
use phos_protocol::message::Summary;
use serde_json::{Value, json};

use crate::checkpoint::choose_driver;
use crate::context::Context;
use crate::state::StateDir;

const MIB: f64 = (1 << 20) as f64;

/// Names of the memory classes, by the protocol's `CLASS_` numbers.
const CLASSES: [&str; 5] = ["plain", "small", "virtual", "imported", "pool"];

/// What is known of one process.
struct Report {
    process: Process,
    state: ProcessState,
    /// What its library says; none while it is parked, or if it has none.
    summary: Option<Summary>,
    blockers: Vec<String>,
}

/// Asks the driver and the library; `None` if the process does not use the GPU.
fn ask(device: &dyn Device, control: Option<&ControlDir>, process: Process) -> Result<Option<Report>> {
    if !processes::has_driver_loaded(process.pid) {
        return Ok(None);
    }
    let Some(state) = device.process_state(process.pid)? else { return Ok(None) };
    let library = match control {
        Some(dir) => Library::connect(dir, process.pid, process.own_pid)?,
        None => None,
    };
    let summary = library.map(|l| l.query()).transpose()?;
    let mut blockers = summary.as_ref().map(|s| s.blockers.clone()).unwrap_or_default();
    if state == ProcessState::Failed {
        blockers.push("the driver could not bring it back from an earlier checkpoint".into());
    }
    Ok(Some(Report { process, state, summary, blockers }))
}

impl Report {
    fn json(&self) -> Value {
        let s = self.summary.clone().unwrap_or_default();
        let parked: serde_json::Map<_, _> =
            CLASSES.iter().zip(s.parked_bytes).map(|(name, bytes)| ((*name).into(), json!(bytes))).collect();
        json!({
            "pid": self.process.pid,
            "ownPid": self.process.own_pid,
            "command": self.process.command,
            "driverState": format!("{:?}", self.state).to_lowercase(),
            "library": self.summary.is_some(),
            "parkedBytes": parked,
            "handles": s.entries,
            "driverBytes": s.driver_bytes,
            "pinnedHostBytes": s.pinned_bytes,
            "allocations": s.allocations,
            "launches": s.launches,
            "unknownFunctions": s.unknown_functions,
            "blockers": self.blockers,
        })
    }

    fn print(&self) {
        let p = &self.process;
        let state = format!("{:?}", self.state).to_lowercase();
        println!("process     {} {} ({} inside): {state}", p.pid, p.command, p.own_pid);
        match &self.summary {
            None if self.state == ProcessState::Running => {
                println!("  library   none: the driver alone saves its memory, while it stands still");
            }
            None => println!("  library   does not answer: it is parked, or there is none"),
            Some(s) => {
                let classes = CLASSES.iter().zip(s.parked_bytes).filter(|(_, bytes)| *bytes > 0);
                let listed: Vec<_> = classes.map(|(n, b)| format!("{n} {:.1}", b as f64 / MIB)).collect();
                let total = s.parked_bytes.iter().sum::<u64>() as f64 / MIB;
                let detail =
                    if listed.is_empty() { String::new() } else { format!(" ({})", listed.join(", ")) };
                println!("  parked    {total:.1} MiB in {} handles{detail}", s.entries);
                println!(
                    "  driver    {:.1} MiB that the driver saves, as far as known",
                    s.driver_bytes as f64 / MIB
                );
                println!("  host      {:.1} MiB page-locked", s.pinned_bytes as f64 / MIB);
                println!("  counters  {} allocations now, {} launches so far", s.allocations, s.launches);
                if s.unknown_functions > 0 {
                    println!(
                        "  unknown   {} functions of a driver newer than libphos.so",
                        s.unknown_functions
                    );
                }
            }
        }
        self.blockers.iter().for_each(|b| println!("  blocked   {b}"));
    }
}

/// `gpu`.
pub fn run(run: &Context) -> Result<i32> {
    let args = &run.args;
    // The flag may stand on either side of the id here.
    let words: Vec<_> =
        args.all[args.verb_at + 1..].iter().map(|w| w.to_string_lossy().into_owned()).collect();
    let (flags, ids): (Vec<_>, Vec<_>) = words.iter().partition(|w| w.starts_with('-'));
    if let Some(flag) = flags.iter().find(|f| **f != "--json") {
        bail!("gpu: unknown flag {flag}: use --json");
    }
    let [id] = ids.as_slice() else { bail!("usage: phos-runc gpu ID [--json]") };
    let state = StateDir::of(args, &run.config, id)?;
    let container = run.lower.state(args, id)?.filter(|c| c.pid > 0);
    let container = container.ok_or_else(|| anyhow!("container {id} does not exist or has stopped"))?;
    choose_driver(&run.config);
    let mut processes = processes::of_container(container.pid)?;
    processes.retain(|p| processes::has_driver_loaded(p.pid));
    let control = state.control_dir();
    let control = if control.exists() { Some(ControlDir::open(&control)?) } else { None };
    let mut reports = Vec::new();
    // Without a process that uses it, the driver is not needed.
    if !processes.is_empty() {
        let device = cuda::open().context("the driver cannot be asked")?;
        for process in processes {
            reports.extend(ask(device.as_ref(), control.as_ref(), process)?);
        }
    }
    if flags.is_empty() {
        reports.iter().for_each(Report::print);
        if reports.is_empty() {
            println!("no process of {id} uses a GPU");
        }
    } else {
        let all: Vec<_> = reports.iter().map(Report::json).collect();
        println!("{}", serde_json::to_string_pretty(&json!({ "id": id, "processes": all }))?);
    }
    Ok(0)
}
