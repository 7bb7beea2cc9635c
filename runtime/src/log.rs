//! Errors as engines expect them from runc: the text on standard error, and as the last line of the `--log` file.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::args::Args;

/// A moment as RFC 3339 in UTC.
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Civil date from days since 1970-01-01, in eras of 400 years that begin on 1 March.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let month = (5 * doy + 2) / 153;
    let day = doy - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Appends one line to the `--log` file, in the format that was asked for.
fn append(args: &Args, level: &str, text: &str) {
    let Some(path) = args.global.get("log") else { return };
    let time = rfc3339(SystemTime::now());
    let line = if args.global.get("log-format").is_some_and(|f| f == "json") {
        serde_json::json!({"level": level, "msg": text, "time": time}).to_string()
    } else {
        format!("time=\"{time}\" level={level} msg={}", serde_json::json!(text))
    };
    if let Ok(mut file) = File::options().create(true).append(true).open(path) {
        let _ = writeln!(file, "{line}");
    }
}

/// Reports the error that ends this program.
pub fn error(args: &Args, text: &str) {
    append(args, "error", text);
    eprintln!("{text}");
}

/// Puts the cause in front of the error that the lower runtime has written last: engines read that line only, and Podman
/// wants no second one.
pub fn explain(args: &Args, cause: &str) {
    let Some(path) = args.global.get("log") else { return };
    let Ok(text) = fs::read_to_string(path) else { return };
    let (before, last) = match text.trim_end().rsplit_once('\n') {
        Some((before, last)) => (before.len() + 1, last),
        None => (0, text.trim_end()),
    };
    match serde_json::from_str::<serde_json::Value>(last) {
        Ok(mut line) if line["level"] == "error" => {
            let said = line["msg"].as_str().unwrap_or_default().replace('\n', ", ");
            line["msg"] = format!("{cause}: {said}").into();
            if let Ok(mut file) = File::options().write(true).open(path)
                && file.set_len(before as u64).is_ok()
                && file.seek(SeekFrom::End(0)).is_ok()
            {
                let _ = writeln!(file, "{line}");
            }
        }
        _ => append(args, "error", cause),
    }
}

/// Reports something a person should know: only in the log file, since engines parse this program's output.
pub fn warn(args: &Args, text: &str) {
    append(args, "warning", text);
}

/// Only with `--debug`.
pub fn debug(args: &Args, text: &str) {
    if args.global.contains_key("debug") {
        append(args, "debug", text);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn moments_are_written_as_everyone_writes_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_392_000, "2026-11-23T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn the_cause_joins_the_lower_runtimes_own_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let words = ["--log", file.path().to_str().unwrap(), "--log-format", "json", "checkpoint", "c"];
        let args = Args::parse(words.iter().map(Into::into).collect());
        let earlier = r#"{"level":"warning","msg":"w"}"#;
        std::fs::write(
            file.path(),
            format!("{earlier}\n{}\n", r#"{"level":"error","msg":"criu failed\nlog file: x","time":"t"}"#),
        )
        .unwrap();
        explain(&args, "CRIU: why");
        let text = std::fs::read_to_string(file.path()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], earlier);
        let last: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
        assert_eq!(
            (lines.len(), &last["msg"], &last["time"]),
            (2, &"CRIU: why: criu failed, log file: x".into(), &"t".into())
        );
        // A last line that is no error stays.
        std::fs::write(file.path(), format!("{earlier}\n")).unwrap();
        explain(&args, "CRIU: why");
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.starts_with(earlier) && text.lines().count() == 2, "{text}");
    }

    #[test]
    fn the_log_file_gets_exactly_one_json_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let words = ["--log", file.path().to_str().unwrap(), "--log-format", "json", "checkpoint", "c"];
        let args = Args::parse(words.iter().map(Into::into).collect());
        error(&args, "it \"broke\"");
        debug(&args, "not asked for");
        let text = std::fs::read_to_string(file.path()).unwrap();
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["level"], "error");
        assert_eq!(line["msg"], "it \"broke\"");
        assert_eq!(text.lines().count(), 1);
    }
}
