//! The application owns its end of the control socket: whatever it says, a checkpoint is refused in one line and in bounded
//! time, the container stays as it was, and another one beside it is none the worse.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use phos_integration::container::Place;
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

/// Modes of `hostile-peer`, and a part of the line that its checkpoint is refused with.
const MODES: [(&str, &str); 9] = [
    ("silent", "does not answer"),
    ("garbage", "broke the control protocol"),
    ("identity", "it says it is process 4242"),
    ("flood", "broke the control protocol"),
    ("size", "an allocation of 1125899906842624 bytes"),
    ("device", "this machine has no GPU-00000000"),
    ("fds", "cuMemImportFromShareableHandle"),
    ("count", "its table has 18446744073709551615 entries"),
    ("endless", "its table does not end"),
];

/// More than any limit on a conversation.
const PATIENCE: Duration = Duration::from_secs(60);

fn lies(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let neighbour = place.sample(&["--mib", "16"])?;
    neighbour.start()?;
    for (mode, expected) in MODES {
        let command = format!("PHOS_CONTROL_DIR=/none exec /usr/bin/hostile-peer {mode}");
        let container = place.container(&["/bin/sh", "-c", &command], &place.gpu)?;
        let program = container.bundle.path.join("rootfs/usr/bin/hostile-peer");
        fs::copy(tools.program("hostile-peer"), program)?;
        container.start()?;
        let begin = Instant::now();
        while !container.bundle.out.join("ready").exists() {
            ensure!(begin.elapsed() < PATIENCE, "{mode}: not ready; {}", container.state()?);
            std::thread::sleep(Duration::from_millis(5));
        }
        let begin = Instant::now();
        let ended = container.try_checkpoint("image", true)?;
        assert_eq!(ended.status, 1, "{mode}: {}", ended.text);
        assert!(begin.elapsed() < PATIENCE, "{mode}: {:?}", begin.elapsed());
        let error = container.last_error()?;
        assert!(error.contains(expected) && !error.contains('\n'), "{mode}: {error}");
        assert!(!container.image("image").exists(), "{mode}: an image was left");
        assert_eq!(container.state()?, "running", "{mode}");
        neighbour.checkpoint(&format!("beside-{mode}"), true)?;
        neighbour.steps(2)?;
        container.try_verb("delete", &["--force"])?;
    }
    Ok(())
}

#[test]
fn a_process_that_lies_is_refused_and_harms_nobody() {
    sandboxed("a_process_that_lies_is_refused_and_harms_nobody", |tools| lies(tools).unwrap());
}
