//! Progress for a person at a terminal: one line that is written over. Engines see nothing of it.

use std::convert::Infallible;
use std::io::{self, IsTerminal, Write};

use phos_engine::progress::Step;
use phos_engine::service::Client;

const MIB: u64 = 1 << 20;

/// The line for a step, and the milliseconds at which the step began.
fn line(name: &str, step: &Step, since_ms: u64) -> String {
    if step.total == 0 {
        return name.to_string();
    }
    let elapsed = (step.elapsed_ms.saturating_sub(since_ms)).max(1);
    let rate = step.done as f64 / 1e6 / elapsed as f64;
    let percent = step.done * 100 / step.total;
    let left = (step.total.saturating_sub(step.done) * elapsed).checked_div(step.done).unwrap_or(0) / 1000;
    format!(
        "{name} {percent:3} %  {} of {} MiB  {rate:.1} GB/s  {left} s left",
        step.done / MIB,
        step.total / MIB
    )
}

/// Shows what the worker does, if standard error is a terminal. Never ends: whoever waits for the job stops it.
pub async fn show(client: Client) -> Infallible {
    if !io::stderr().is_terminal() {
        return std::future::pending().await;
    }
    let (mut current, mut since) = (String::new(), 0);
    let watched = client.watch(|name, step| {
        if name != current {
            (current, since) = (name.to_string(), step.elapsed_ms);
        }
        let text = if step.finished { String::new() } else { line(name, &step, since) };
        // \r and "erase to the end of the line" (ECMA-48 EL).
        let _ = write!(io::stderr(), "\r{text}\x1b[K");
    });
    let _ = watched.await;
    std::future::pending().await
}

/// Takes the line away.
pub fn clear() {
    if io::stderr().is_terminal() {
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left_are_of_the_present_step() {
        let step = Step { name: "", done: 500 * MIB, total: 1000 * MIB, elapsed_ms: 3000, finished: false };
        assert_eq!(line("copy", &step, 1000), "copy  50 %  500 of 1000 MiB  0.3 GB/s  2 s left");
        assert_eq!(line("dump", &Step::default(), 0), "dump");
        let begun = Step { total: MIB, ..Step::default() };
        assert!(line("copy", &begun, 0).contains("0 %"));
    }
}
