//! Calls of gRPC over a Unix socket: one message there, one back, a connection each.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BufMut, BytesMut};
use http::HeaderMap;
use prost::Message;
use tokio::net::UnixStream;

/// Longest any call may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A message that is percent-encoded, as gRPC's status messages are.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        let hex = more.get(..2).and_then(|h| std::str::from_utf8(h).ok());
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &more[2..];
            }
            _ => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The status of a call, where these headers have it.
fn checked(headers: &HeaderMap) -> Result<bool> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    match text("grpc-status") {
        Some("0") => Ok(true),
        Some(status) => bail!("status {status}: {}", decoded(text("grpc-message").unwrap_or_default())),
        None => Ok(false),
    }
}

async fn exchange<A: Message + Default>(socket: &Path, path: &str, request: &impl Message) -> Result<A> {
    let stream = UnixStream::connect(socket).await?;
    let (mut client, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    let headers = http::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, mut body) = client.send_request(headers, false)?;
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(request.encoded_len() as u32);
    request.encode(&mut frame)?;
    body.send_data(frame.freeze(), true)?;
    let (head, mut body) = response.await?.into_parts();
    checked(&head.headers)?;
    let mut answer = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        answer.extend_from_slice(&part);
    }
    ensure!(checked(&body.trailers().await?.unwrap_or_default())?, "no status");
    ensure!(answer.len() >= 5, "an answer of {} bytes", answer.len());
    answer.advance(5);
    Ok(A::decode(answer)?)
}

/// A call of `/SERVICE/METHOD`.
pub fn call<A: Message + Default>(socket: &Path, path: &str, request: &impl Message) -> Result<A> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let limited = async { tokio::time::timeout(LIMIT, exchange(socket, path, request)).await };
    runtime.block_on(limited).context("no answer in time")?
}
