//! The CRI's `CheckpointContainer`, as the kubelet calls it, and a container of its archive.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use phos_integration::container::Place;
use phos_integration::cri::{Cri, New};
use phos_integration::registry::Registry;
use phos_integration::tools::Tools;

use crate::{SAMPLE, documented, done, patiently, sample_root, steps, steps_again};

const DEVICES: [(&str, &str); 1] = [("/dev/fuse", "/dev/simgpu0")];

fn round_trip(tools: &Tools, snapshotter: &str) -> Result<()> {
    let place = Place::new(tools)?;
    let bundle = sample_root(&place)?;
    let registry = Registry::start(place.path("registry"))?;
    let root = bundle.path.join("rootfs");
    let pause = registry.tag("pause", &registry.layout.add(&root, &["/bin/busybox", "sleep", "100000"], &[])?);
    let image = registry.tag("sample", &registry.layout.add(&root, &[], &[])?);
    let cri = Cri::start(&place, snapshotter, &pause)?;
    documented("containerd", &cri.version()?)?;
    cri.pull(&image)?;
    let sandbox = cri.sandbox("pod")?;
    let status = bundle.out.join("status");
    let mounts: [(&Path, &str); 1] = [(&bundle.out, "/out")];
    let new = |image| New { name: "box", image, command: &SAMPLE, mounts: &mounts, devices: &DEVICES };
    let original = cri.create(&sandbox, &new(&image))?;
    cri.start_container(&original)?;
    steps(&status, 5)?;
    let archive = place.path("checkpoint.tar");
    done(patiently(|| Ok(cri.try_checkpoint(&original, &archive)))?)?;
    let stood_at = steps(&status, 0)?;
    steps(&status, 5)?;
    let unpacked = place.path("unpacked");
    fs::create_dir(&unpacked)?;
    let (from, into) = (archive.display().to_string(), unpacked.display().to_string());
    done(place.command(Path::new("/usr/bin/tar"), &["-C", &into, "-xf", &from], false)?)?;
    let folder = unpacked.join("checkpoint").display().to_string();
    done(place.command(&tools.program("phos-runc"), &["inspect", "--verify", &folder], false)?)?;

    // The archive stands in the image's place.
    cri.remove(&original)?;
    fs::remove_file(&status)?;
    let restored = cri.create(&sandbox, &new(&from))?;
    cri.start_container(&restored)?;
    steps_again(&status, stood_at)?;
    ensure!(restored != original);
    Ok(())
}

#[test]
fn overlayfs() {
    crate::on(Some(14), concat!(module_path!(), "::overlayfs"), "containerd", |tools| {
        round_trip(tools, "overlayfs")
    });
}
#[test]
fn native() {
    crate::on(Some(14), concat!(module_path!(), "::native"), "containerd", |tools| {
        round_trip(tools, "native")
    });
}
