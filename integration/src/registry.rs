//! A registry of images on this machine, which engines pull from. Format: the OCI distribution specification, version 1.0, as
//! much of it as a pull needs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::Result;
use serde_json::Value;

use crate::image::{Layout, MANIFEST};

/// Serves the images of a layout on the loopback address as long as this process lives.
pub struct Registry {
    /// Where images are added.
    pub layout: Arc<Layout>,
    port: u16,
    tags: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Registry {
    /// Starts one whose blobs are in this folder.
    pub fn start(folder: PathBuf) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let registry = Registry { layout: Arc::new(Layout::new(folder)?), port, tags: Arc::default() };
        let (layout, tags) = (Arc::clone(&registry.layout), Arc::clone(&registry.tags));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (layout, tags) = (Arc::clone(&layout), Arc::clone(&tags));
                // A client that goes away is no matter.
                thread::spawn(move || answer(&layout, &tags, stream));
            }
        });
        Ok(registry)
    }

    /// Gives an image of the layout a name; returns it as an engine has to write it.
    pub fn tag(&self, name: &str, manifest: &Value) -> String {
        let digest = manifest["digest"].as_str().unwrap_or_default();
        self.tags.lock().unwrap_or_else(|e| e.into_inner()).insert(name.into(), digest.into());
        format!("{}:{}/{name}:1", Ipv4Addr::LOCALHOST, self.port)
    }
}

/// Answers one request, and closes.
fn answer(layout: &Layout, tags: &Mutex<BTreeMap<String, String>>, mut stream: TcpStream) -> io::Result<()> {
    let refuse = |mut stream: TcpStream, why: &str| {
        write!(stream, "HTTP/1.1 {why}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    };
    let mut reader = BufReader::new(stream.try_clone()?);
    // A client that speaks TLS sees from such an answer that there is none.
    if !reader.fill_buf()?.first().is_some_and(u8::is_ascii_uppercase) {
        return refuse(stream, "400 Bad Request");
    }
    let (mut request, mut line) = (String::new(), String::new());
    reader.read_line(&mut request)?;
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut words = request.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let parts: Vec<&str> = path.trim_start_matches("/v2/").split('/').collect();
    let found = match parts[..] {
        [""] => Some((String::from("registry"), "application/json", Vec::new())),
        [name, kind @ ("manifests" | "blobs"), reference] => {
            let tags = tags.lock().unwrap_or_else(|e| e.into_inner());
            let tag = tags.get(name).filter(|_| !reference.starts_with("sha256:"));
            let digest = tag.map_or(reference, String::as_str).to_string();
            let media = if kind == "manifests" { MANIFEST } else { "application/octet-stream" };
            fs::read(layout.blob(&digest)).ok().map(|bytes| (digest, media, bytes))
        }
        _ => None,
    };
    let Some((digest, media, bytes)) = found else {
        return refuse(stream, "404 Not Found");
    };
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: {media}\r\nContent-Length: {}\r\nDocker-Content-Digest: {digest}\r\nConnection: close\r\n\r\n",
        bytes.len()
    )?;
    if method == "HEAD" { Ok(()) } else { stream.write_all(&bytes) }
}
