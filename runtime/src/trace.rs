//! `--trace FILE`: a timeline of a checkpoint or restore that Perfetto and chrome://tracing open.
//!
//! The format is the JSON array form of the Trace Event Format: complete events ("X") with microseconds, and metadata
//! events that name the tracks.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use phos_engine::progress::Span;
use serde_json::{Value, json};

/// The events of a timeline.
fn events(spans: &[Span]) -> Vec<Value> {
    let mut tracks: Vec<&str> = Vec::new();
    let mut events = Vec::new();
    for span in spans {
        let track = tracks.iter().position(|t| *t == span.track).unwrap_or_else(|| {
            tracks.push(&span.track);
            tracks.len() - 1
        });
        events.push(json!({
            "ph": "X", "pid": 1, "tid": track + 1, "name": span.name,
            "ts": span.begin_ms * 1e3, "dur": span.ms * 1e3,
        }));
    }
    let named = |(n, name): (usize, &&str)| json!({ "ph": "M", "pid": 1, "tid": n + 1, "name": "thread_name", "args": { "name": name } });
    let names = tracks.iter().enumerate().map(named);
    names.chain(events.iter().cloned()).collect()
}

/// Writes the timeline.
pub fn write(path: &Path, spans: &[Span]) -> Result<()> {
    let text = serde_json::to_string(&events(spans))?;
    fs::write(path, text).with_context(|| format!("cannot write the timeline {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_span_is_on_its_named_track() {
        let span = |name: &str, track: &str, begin_ms| Span {
            name: name.into(),
            track: track.into(),
            begin_ms,
            ms: 2.0,
        };
        let events =
            events(&[span("park", "p 1", 1.0), span("CRIU", "engine", 3.0), span("attach", "p 1", 5.0)]);
        let tracks: Vec<_> =
            events.iter().filter(|e| e["ph"] == "M").map(|e| e["args"]["name"].clone()).collect();
        assert_eq!(tracks, ["p 1", "engine"]);
        let attach = events.iter().find(|e| e["name"] == "attach").unwrap();
        assert_eq!(
            (attach["tid"].as_u64(), attach["ts"].as_f64(), attach["dur"].as_f64()),
            (Some(1), Some(5e3), Some(2e3))
        );
    }
}
