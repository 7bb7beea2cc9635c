//! OCI images of root file systems as files. Format: the OCI image specification, version 1.0.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// What a manifest is.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// An image layout: a folder of blobs that any number of images share.
pub struct Layout(PathBuf);

/// An archive of a folder's contents.
fn tar(folder: &Path, into: &Path) -> Result<()> {
    ensure!(Command::new("tar").arg("-C").arg(folder).arg("-cf").arg(into).arg(".").status()?.success());
    Ok(())
}

impl Layout {
    /// A new one.
    pub fn new(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(folder.join("blobs/sha256"))?;
        Ok(Layout(folder))
    }

    /// Where a blob is.
    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        self.0.join("blobs").join(digest.replace(':', "/"))
    }

    /// Stores a file as a blob; returns its descriptor.
    fn store(&self, media: &str, file: &Path) -> Result<Value> {
        let output = Command::new("sha256sum").arg(file).output()?;
        let text = String::from_utf8(output.stdout)?;
        let digest = format!("sha256:{}", text.split_whitespace().next().context("sha256sum")?);
        let size = fs::metadata(file)?.len();
        fs::rename(file, self.blob(&digest))?;
        Ok(json!({"mediaType": media, "digest": digest, "size": size}))
    }

    fn store_json(&self, media: &str, value: &Value) -> Result<Value> {
        let file = self.0.join("new");
        fs::write(&file, value.to_string())?;
        self.store(media, &file)
    }

    /// Adds the image of a root file system, with its command and with annotations of its manifest; returns the manifest's
    /// descriptor.
    pub fn add(&self, root: &Path, command: &[&str], annotations: &[(&str, &str)]) -> Result<Value> {
        let layer = self.0.join("new");
        tar(root, &layer)?;
        let layer = self.store("application/vnd.oci.image.layer.v1.tar", &layer)?;
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"Cmd": command},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        });
        let config = self.store_json("application/vnd.oci.image.config.v1+json", &config)?;
        let annotations: serde_json::Map<_, _> =
            annotations.iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer], "annotations": annotations,
        });
        self.store_json(MANIFEST, &manifest)
    }

    /// Writes the layout as an archive with one image, `manifest`, under this name.
    pub fn archive(&self, mut manifest: Value, name: &str, into: &Path) -> Result<()> {
        manifest["annotations"] = json!({"io.containerd.image.name": name});
        fs::write(self.0.join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string())?;
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(self.0.join("index.json"), index.to_string())?;
        tar(&self.0, into)
    }
}
