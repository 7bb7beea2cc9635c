//! The kubelet's place: what it asks of containerd through the CRI.

mod grpc;
mod messages;

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use prost::Message;

use crate::container::{Ended, Place};
use crate::containerd::Containerd;
use crate::engine::{cgroup_parent, runtime};
use messages::*;

/// A containerd that serves the CRI, with the shipped configuration.
pub struct Cri<'a> {
    place: &'a Place,
    containerd: Containerd<'a>,
    sandboxes: RefCell<Vec<String>>,
}

/// A pod's sandbox.
pub struct Sandbox {
    id: String,
    config: SandboxConfig,
}

/// A container that is to be made.
pub struct New<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its image, or the archive of a checkpoint.
    pub image: &'a str,
    /// Its command.
    pub command: &'a [&'a str],
    /// Bind mounts: on the host, in the container.
    pub mounts: &'a [(&'a Path, &'a str)],
    /// Devices: on the host, in the container.
    pub devices: &'a [(&'a str, &'a str)],
}

fn namespaces() -> Option<NamespaceOption> {
    Some(NamespaceOption { network: NODE, pid: CONTAINER })
}

impl<'a> Cri<'a> {
    /// Starts it; the sandboxes' own image is `pause`.
    pub fn start(place: &'a Place, snapshotter: &str, pause: &str) -> Result<Self> {
        let shipped = include_str!("../../contrib/containerd/config-v3.toml");
        let shipped = shipped.replace("/usr/local/bin/phos-runc", &runtime(place)?.display().to_string());
        // A process may make itself harder to kill only where the machine grants CAP_SYS_RESOURCE.
        let config = format!(
            r#"{shipped}
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{snapshotter}"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "{snapshotter}"
"#
        );
        let containerd = Containerd::configured(place, &config)?;
        Ok(Cri { place, containerd, sandboxes: RefCell::default() })
    }

    fn call<A: Message + Default>(&self, service: &str, method: &str, request: &impl Message) -> Result<A> {
        let path = format!("/runtime.v1.{service}Service/{method}");
        grpc::call(Path::new(&self.containerd.socket), &path, request).context(method.to_string())
    }

    fn runtime<A: Message + Default>(&self, method: &str, request: &impl Message) -> Result<A> {
        self.call("Runtime", method, request)
    }

    /// containerd's version.
    pub fn version(&self) -> Result<String> {
        Ok(self.runtime::<Version>("Version", &Empty {})?.runtime_version)
    }

    /// Pulls an image; returns its reference.
    pub fn pull(&self, image: &str) -> Result<String> {
        let request = PullImage { image: Some(ImageSpec { image: image.into() }) };
        Ok(self.call::<Id>("Image", "PullImage", &request)?.id)
    }

    /// Runs a sandbox of the host's network under phos-runc.
    pub fn sandbox(&self, name: &str) -> Result<Sandbox> {
        let logs = self.place.path("pods").join(name);
        fs::create_dir_all(&logs)?;
        let config = SandboxConfig {
            metadata: Some(SandboxMetadata {
                name: name.into(),
                uid: format!("{name}-uid"),
                namespace: "default".into(),
            }),
            log_directory: logs.display().to_string(),
            annotations: HashMap::from([("phos.strategy".into(), "snapshot".into())]),
            linux: Some(LinuxSandbox {
                cgroup_parent: cgroup_parent(self.place),
                security: Some(SandboxSecurity { namespaces: namespaces() }),
            }),
        };
        let request = RunPodSandbox { config: Some(config.clone()), runtime_handler: "phos".into() };
        let id = self.runtime::<Id>("RunPodSandbox", &request)?.id;
        self.sandboxes.borrow_mut().push(id.clone());
        Ok(Sandbox { id, config })
    }

    /// Makes a container; returns its id.
    pub fn create(&self, sandbox: &Sandbox, new: &New<'_>) -> Result<String> {
        let mounts = new.mounts.iter().map(|(host, inside)| Mount {
            host_path: host.display().to_string(),
            container_path: inside.to_string(),
        });
        let devices = new.devices.iter().map(|(host, inside)| Device {
            host_path: host.to_string(),
            container_path: inside.to_string(),
            permissions: "rwm".into(),
        });
        let config = ContainerConfig {
            metadata: Some(Id { id: new.name.into() }),
            image: Some(ImageSpec { image: new.image.into() }),
            command: new.command.iter().map(ToString::to_string).collect(),
            mounts: mounts.collect(),
            devices: devices.collect(),
            log_path: format!("{}.log", new.name),
            linux: Some(LinuxContainer { security: Some(ContainerSecurity { namespaces: namespaces() }) }),
        };
        let request = CreateContainer {
            sandbox: sandbox.id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox.config.clone()),
        };
        Ok(self.runtime::<Id>("CreateContainer", &request)?.id)
    }

    /// Starts a container.
    pub fn start_container(&self, id: &str) -> Result<()> {
        self.runtime::<Empty>("StartContainer", &Id { id: id.into() }).map(|_| ())
    }

    /// Checkpoints a container into an archive, whatever comes of it.
    pub fn try_checkpoint(&self, id: &str, archive: &Path) -> Ended {
        let request = CheckpointContainer {
            container: id.into(),
            location: archive.display().to_string(),
            timeout: 60,
        };
        match self.runtime::<Empty>("CheckpointContainer", &request) {
            Ok(_) => Ended { status: 0, text: String::new() },
            Err(e) => Ended { status: 1, text: format!("{e:#}") },
        }
    }

    /// Stops a container at once and removes it.
    pub fn remove(&self, id: &str) -> Result<()> {
        let id = Id { id: id.into() };
        self.runtime::<Empty>("StopContainer", &id)?;
        self.runtime::<Empty>("RemoveContainer", &id).map(|_| ())
    }
}

impl Drop for Cri<'_> {
    fn drop(&mut self) {
        for id in self.sandboxes.take() {
            let id = Id { id };
            let _ = self.runtime::<Empty>("StopPodSandbox", &id);
            let _ = self.runtime::<Empty>("RemovePodSandbox", &id);
        }
    }
}
