//! A CUDA program whose GPU state evolves in steps and can be verified, to the last bit, at any of them.
//!
//! It uses the driver API only and finds it as every CUDA program does (`dlopen`, `cuGetProcAddress`), so one binary
//! runs on NVIDIA's driver and on the simulated one. Its memory is of every kind: plain allocations large and small,
//! virtual-memory calls of its own, a stream-ordered allocation, a variable of a module.
//!
//! Every verified step appends a line to `--out`:
//! `step=N digest=H ok=1 t_ms=T gap_ms=G`, where G is the longest time between two steps so far.

mod bench;
mod churn;
mod cuda;
mod model;
mod pair;
mod state;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail};

use crate::churn::Churn;
use crate::cuda::Cuda;
use crate::pair::Pair;
use crate::state::State;

const USAGE: &str = "usage: phos-sample --out FILE [--mib N] [--small N] [--steps N] [--step-ms N] [--verify-every N] [--stop-file FILE] [--hang-file FILE] [--churn N]
       phos-sample --out FILE --pair [--steps N] [--step-ms N] [--stop-file FILE]
       phos-sample --bench N

  --out FILE          where the status lines go
  --mib N             MiB of GPU memory to hold (64)
  --small N           and so many allocations of 4 to 1024 bytes (0)
  --steps N           end after so many steps (0: never)
  --step-ms N         wait so long after each step (5)
  --verify-every N    verify the whole state every so many steps (1)
  --stop-file FILE    end when this file exists
  --churn N           N threads that make no CUDA call map and unmap, allocate and free host memory all the time (0)
  --pair              no memory of its own: two processes share memory by CUDA IPC and by descriptor, and verify it in turn
  --bench N           no steps: print what N empty launches and N/100 allocations cost, in ns
  --hang-file FILE    while this file exists, keep the GPU busy with one kernel that does not end";

struct Options {
    out: PathBuf,
    mib: u64,
    small: u64,
    steps: u64,
    step_ms: u64,
    verify_every: u64,
    stop_file: Option<PathBuf>,
    hang_file: Option<PathBuf>,
    bench: usize,
    churn: usize,
    pair: bool,
}

fn options() -> Result<Options> {
    let mut o = Options {
        out: PathBuf::new(),
        mib: 64,
        small: 0,
        steps: 0,
        step_ms: 5,
        verify_every: 1,
        stop_file: None,
        hang_file: None,
        bench: 0,
        churn: 0,
        pair: false,
    };
    let mut words = env::args_os().skip(1);
    while let Some(word) = words.next() {
        let name = word.to_string_lossy().into_owned();
        if name == "--help" {
            println!("{USAGE}");
            std::process::exit(0);
        }
        if name == "--pair" {
            o.pair = true;
            continue;
        }
        let value = words.next().with_context(|| format!("{name} needs a value\n{USAGE}"))?;
        let number = || -> Result<u64> {
            value.to_str().and_then(|v| v.parse().ok()).with_context(|| format!("{name} needs a number"))
        };
        match name.as_str() {
            "--out" => o.out = value.into(),
            "--mib" => o.mib = number()?.max(8),
            "--small" => o.small = number()?,
            "--steps" => o.steps = number()?,
            "--step-ms" => o.step_ms = number()?,
            "--verify-every" => o.verify_every = number()?.max(1),
            "--stop-file" => o.stop_file = Some(value.into()),
            "--churn" => o.churn = number()? as usize,
            "--bench" => o.bench = number()? as usize,
            "--hang-file" => o.hang_file = Some(value.into()),
            _ => bail!("unknown option {name}\n{USAGE}"),
        }
    }
    if o.out.as_os_str().is_empty() && o.bench == 0 {
        bail!("--out is missing\n{USAGE}");
    }
    Ok(o)
}

fn monotonic_ms() -> u128 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is valid for writing.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u128 * 1000 + t.tv_nsec as u128 / 1_000_000
}

/// What is stepped and verified.
enum Work<'a> {
    Own(State<'a>),
    Shared(Pair<'a>),
}

fn run() -> Result<()> {
    if env::args_os().nth(1).is_some_and(|word| word == "--partner") {
        return Pair::partner(&Cuda::load()?);
    }
    let options = options()?;
    let cuda = Cuda::load()?;
    if options.bench > 0 {
        return bench::run(&cuda, options.bench);
    }
    let churn = Churn::start(options.churn);
    let mut work = match options.pair {
        true => Work::Shared(Pair::start(&cuda)?),
        false => Work::Own(State::allocate(&cuda, options.mib << 20, options.small as usize)?),
    };
    let mut longest = Duration::ZERO;
    let mut last = Instant::now();
    let stop = |step: u64| {
        (options.steps > 0 && step >= options.steps) || options.stop_file.as_ref().is_some_and(|f| f.exists())
    };
    let mut step = 0;
    while !stop(step) {
        let verified = match &mut work {
            Work::Own(state) => {
                if let Some(file) = options.hang_file.as_ref().filter(|f| f.exists()) {
                    state.hang(|| file.exists())?;
                }
                state.advance(step)?;
                None
            }
            Work::Shared(pair) => Some(pair.step(step)?),
        };
        step += 1;
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if step % options.verify_every == 0 {
            let (digest, ok) = match &work {
                Work::Own(state) => state.verify()?,
                Work::Shared(_) => verified.unwrap_or_default(),
            };
            // Opened and closed each time: a checkpointed program must not hold a file that grows behind its back.
            let mut out = File::options().create(true).append(true).open(&options.out)?;
            let line = format!(
                "step={step} digest={digest:016x} ok={} t_ms={} gap_ms={}\n",
                u8::from(ok),
                monotonic_ms(),
                longest.as_millis()
            );
            out.write_all(line.as_bytes())?;
            if !churn.is_whole() {
                bail!("step {step}: a thread found its memory changed");
            }
            if !ok {
                bail!("step {step}: the state on the GPU is not what it must be");
            }
        }
        thread::sleep(Duration::from_millis(options.step_ms));
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("phos-sample: {e:#}");
            ExitCode::FAILURE
        }
    }
}
