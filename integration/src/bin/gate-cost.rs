//! What the gate of `libphos.so` adds to a call: an empty launch of the simulated driver, called directly and through the
//! library, alternating, with one thread and with many. Prints JSON lines in the form of `integration/results/`.

use std::hint::black_box;
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use phos_integration::application::Application;
use serde_json::json;

/// Calls of one thread in one measurement.
const CALLS: u32 = 1_000_000;
const ROUNDS: usize = 41;
const THREADS: [usize; 3] = [1, 2, 16];

type Launch = extern "C" fn(usize) -> u32;

/// Nanoseconds of processor time for one call, mean over all threads: threads may be more than processors.
fn measure(function: Launch, threads: usize) -> f64 {
    let start = Barrier::new(threads);
    let once = || {
        start.wait();
        let begin = thread_time();
        for i in 0..CALLS {
            black_box(function(black_box(i as usize)));
        }
        (thread_time() - begin) / f64::from(CALLS)
    };
    let total: f64 = thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(once)).collect();
        all.into_iter().map(|t| t.join().unwrap_or(f64::NAN)).sum()
    });
    total / threads as f64
}

/// Processor time of this thread, ns.
fn thread_time() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is valid for writing.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 * 1e9 + t.tv_nsec as f64
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> Result<()> {
    let app = Application::start()?;
    // SAFETY: cuLaunch has this type.
    let find = |address: usize| unsafe { std::mem::transmute::<usize, Launch>(address) };
    let (bare, gated) = (find(app.driver_symbol("cuLaunch")), find(app.symbol("cuLaunch")));
    ensure!(bare(0) == 0 && gated(0) == 0, "the empty launch fails");
    let output = |command: &str, args: &[&str]| -> Result<String> {
        let done = Command::new(command).args(args).output().context(command.to_string())?;
        Ok(String::from_utf8(done.stdout)?.trim().to_string())
    };
    let commit = output("git", &["rev-parse", "--short", "HEAD"])?;
    let date = output("date", &["+%F"])?;
    let begin = Instant::now();
    for threads in THREADS {
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS + 2 {
            let pair = (measure(bare, threads), measure(gated, threads));
            if round >= 2 {
                without.push(pair.0);
                with.push(pair.1);
            }
        }
        let (without, with) = (median(without), median(with));
        let line = json!({
            "bench": "overhead", "workload": "empty-kernels", "system": "phos-runc", "metric": "gate_ns",
            "value": ((with - without) * 1000.0).round() / 1000.0, "stat": "median", "n": ROUNDS,
            "device": "simcuda", "driver": "", "commit": commit, "date": date,
            "note": format!("{threads} threads, {without:.2} ns without the library"),
        });
        println!("{line}");
    }
    eprintln!("{:.1} s", begin.elapsed().as_secs_f64());
    Ok(())
}
