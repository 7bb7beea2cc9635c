//! A container with a GPU is checkpointed and restored; its program goes on with the right values.

use anyhow::Result;
use phos_integration::container::Place;
use phos_integration::sandbox::sandboxed;
use phos_integration::tools::Tools;

fn run(tools: &Tools) -> Result<()> {
    let place = Place::new(tools)?;
    let box1 = place.sample(&["--mib", "24"])?;
    box1.start()?;
    box1.steps(5)?;
    for name in ["running-1", "running-2"] {
        box1.checkpoint(name, true)?;
        box1.steps(5)?;
        assert_eq!(box1.state()?, "running");
    }
    box1.checkpoint("stopped", false)?;
    assert_ne!(box1.state()?, "running");
    box1.try_verb("delete", &["--force"])?;
    box1.restore("stopped")?;
    box1.steps(10)?;
    assert_eq!(box1.state()?, "running");
    Ok(())
}

#[test]
fn a_gpu_container_survives_checkpoint_and_restore() {
    sandboxed("a_gpu_container_survives_checkpoint_and_restore", |tools| run(tools).unwrap());
}
