//! Tests that make containers run in a PID and mount namespace of their own: whatever a runtime or CRIU does wrong ends
//! with it.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::tools::Tools;

const INSIDE: &str = "PHOS_TEST_SANDBOX";

/// Runs `test`, the body of the test function `name`, in a sandbox. Where the machine lacks what that needs, the test
/// is skipped with a reason; in CI (`CI=true`) that is a failure.
///
/// # Panics
/// If the test fails.
pub fn sandboxed(name: &str, test: impl FnOnce(&Tools)) {
    sandboxed_in(None, name, test);
}

/// The same in another root file system, see [`crate::root`]; its own CRIU is used there.
///
/// # Panics
/// If the test fails.
pub fn sandboxed_in(root: Option<&Path>, name: &str, test: impl FnOnce(&Tools)) {
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(reason) => {
            assert!(env::var("CI").is_err(), "{name} cannot run: {reason:#}");
            eprintln!("skipped {name}: {reason:#}");
            return;
        }
    };
    if env::var_os(INSIDE).is_some() {
        test(&tools);
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child", "--"]);
    command.arg(tools.program("sandbox-init"));
    if let Some(root) = root {
        command.arg("--root").arg(root).env("PHOS_CRIU", "/usr/sbin/criu");
    }
    let status = command
        .arg(env::current_exe().expect("a test has a path"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .status()
        .expect("unshare runs");
    assert!(status.success(), "{name} failed in its sandbox: {status}");
}
