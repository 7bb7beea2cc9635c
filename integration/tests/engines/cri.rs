//! The CRI's `CheckpointContainer`, as the kubelet calls it, and containers of its archives.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use phos_integration::container::{Ended, Place};
use phos_integration::cri::{Cri, New, Sandbox};
use phos_integration::engine::differing;
use phos_integration::registry::Registry;
use phos_integration::tools::Tools;

use crate::wrong::{
    HANGING, hindrances, impatient, refused_read_only, refused_while_busy, refused_while_damaged,
    refused_while_silent, refused_without_space, restore_hindrances,
};
use crate::{SAMPLE, documented, done, patiently, refused, sample_root, steps, steps_again};

/// A node: its registry, its containerd, a pod on it.
struct Node<'a> {
    place: &'a Place,
    registry: Registry,
    cri: Cri<'a>,
    sandbox: Sandbox,
    out: PathBuf,
}

impl<'a> Node<'a> {
    /// Starts it; returns the sample's image too. It has to be where it was pulled from: for a restore containerd pulls it anew.
    fn start(place: &'a Place, snapshotter: &str) -> Result<(Self, String)> {
        let bundle = sample_root(place)?;
        let registry = Registry::start(place.path("registry"))?;
        let root = bundle.path.join("rootfs");
        let pause = ["/bin/busybox", "sleep", "100000"];
        let pause = registry.tag("pause", &registry.layout.add(&root, &pause, &[])?);
        let image = registry.tag("sample", &registry.layout.add(&root, &[], &[])?);
        let cri = Cri::start(place, snapshotter, &pause)?;
        cri.pull(&image)?;
        let sandbox = cri.sandbox("pod")?;
        Ok((Node { place, registry, cri, sandbox, out: bundle.out }, image))
    }

    /// A container of an image, or of the archive of a checkpoint.
    fn run(&self, image: &str) -> Result<String> {
        let mounts: [(&Path, &str); 1] = [(&self.out, "/out")];
        let command = [&SAMPLE[..], &HANGING].concat();
        let devices = [("/dev/fuse", "/dev/simgpu0")];
        let new = New { name: "box", image, command: &command, mounts: &mounts, devices: &devices };
        let id = self.cri.create(&self.sandbox, &new)?;
        let started = self.cri.start_container(&id);
        if started.is_err() {
            self.cri.remove(&id)?;
        }
        started.map(|()| id)
    }

    fn try_run(&self, image: &str) -> Ended {
        match self.run(image) {
            Ok(_) => Ended { status: 0, text: String::new() },
            Err(e) => Ended { status: 1, text: format!("{e:#}") },
        }
    }

    fn try_checkpoint(&self, container: &str, archive: &Path) -> Result<Ended> {
        patiently(|| Ok(self.cri.try_checkpoint(container, archive)))
    }

    fn tar(&self, words: &[&str]) -> Result<()> {
        done(self.place.command(Path::new("/usr/bin/tar"), words, false)?).map(|_| ())
    }

    /// Unpacks an archive.
    fn unpack(&self, archive: &str) -> Result<PathBuf> {
        let folder = self.place.path("unpacked");
        fs::create_dir(&folder)?;
        self.tar(&["-C", &folder.display().to_string(), "-xf", archive])?;
        Ok(folder)
    }
}

fn round_trip(tools: &Tools, snapshotter: &str) -> Result<()> {
    let place = Place::new(tools)?;
    let (node, image) = Node::start(&place, snapshotter)?;
    documented("containerd", &node.cri.version()?)?;
    let original = node.run(&image)?;
    let status = node.out.join("status");
    steps(&status, 5)?;
    let archive = place.path("checkpoint.tar");
    done(node.try_checkpoint(&original, &archive)?)?;
    let stood_at = steps(&status, 0)?;
    steps(&status, 5)?;
    let archive = archive.display().to_string();
    let unpacked = node.unpack(&archive)?;
    let folder = unpacked.join("checkpoint").display().to_string();
    done(place.command(&tools.program("phos-runc"), &["inspect", "--verify", &folder], false)?)?;

    // The archive stands in the image's place.
    node.cri.remove(&original)?;
    fs::remove_file(&status)?;
    let restored = node.run(&archive)?;
    steps_again(&status, stood_at)?;

    // And so does an image that is made of it: what Kubernetes can be told to run.
    node.cri.remove(&restored)?;
    fs::remove_file(&status)?;
    let name = [("org.criu.checkpoint.container.name", "box")];
    let image = node.registry.tag("checkpoint", &node.registry.layout.add(&unpacked, &[], &name)?);
    node.cri.pull(&image)?;
    node.run(&image)?;
    steps_again(&status, stood_at)
}

#[test]
fn overlayfs_debian_14() {
    crate::on(Some(14), concat!(module_path!(), "::overlayfs_debian_14"), "containerd", |tools| {
        round_trip(tools, "overlayfs")
    });
}

#[test]
fn native_debian_14() {
    crate::on(Some(14), concat!(module_path!(), "::native_debian_14"), "containerd", |tools| {
        round_trip(tools, "native")
    });
}

/// What is wrong reaches the kubelet in words, and changes nothing.
fn refusals(tools: &Tools) -> Result<()> {
    let place = impatient(tools)?;
    let (node, image) = Node::start(&place, "overlayfs")?;
    let container = node.run(&image)?;
    let status = node.out.join("status");
    steps(&status, 3)?;
    let archive = place.path("checkpoint.tar");
    let checkpoint = || node.try_checkpoint(&container, &archive);
    for (name, value, words) in hindrances(&place)? {
        refused(&differing(&place, name, &value, checkpoint)?, &[words])?;
        steps(&status, 3)?;
    }
    refused_while_busy(&node.out, checkpoint)?;
    refused_while_silent(&node.out, checkpoint)?;
    // containerd's own folder for the checkpoint, and the kubelet's for the archive.
    refused_without_space(&place.path("run"), checkpoint)?;
    refused_read_only(&place.path("run"), "read-only file system", checkpoint)?;
    let elsewhere = place.path("kubelet");
    refused_read_only(&elsewhere, "read-only file system", || {
        node.try_checkpoint(&container, &elsewhere.join("checkpoint.tar"))
    })?;
    steps(&status, 3)?;
    done(checkpoint()?)?;
    let stood_at = steps(&status, 0)?;
    node.cri.remove(&container)?;
    refused(&checkpoint()?, &["not found"])?;
    fs::remove_file(&status)?;
    let archive = archive.display().to_string();
    for (name, value, words) in restore_hindrances(&place)? {
        refused(&differing(&place, name, &value, || Ok(node.try_run(&archive)))?, &[words])?;
    }
    let unpacked = node.unpack(&archive)?;
    let (folder, damaged) = (unpacked.display().to_string(), place.path("damaged.tar").display().to_string());
    refused_while_damaged(&unpacked, || {
        node.tar(&["-C", &folder, "-cf", &damaged, "."])?;
        Ok(node.try_run(&damaged))
    })?;
    done(node.try_run(&archive))?;
    steps_again(&status, stood_at)
}

#[test]
fn refusals_in_words_debian_14() {
    crate::on(Some(14), concat!(module_path!(), "::refusals_in_words_debian_14"), "containerd", refusals);
}
