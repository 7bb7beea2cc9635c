//! What CRIU says in its log. The lower runtime says that CRIU failed; why, a person would have to look up there.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::args::Args;

/// What CRIU says at its end in any case.
const ENDS: &[&str] = &["finished successfully", "FAILED"];

/// Errors that CRIU goes on after, and those that only repeat that it failed.
const NO_CAUSE: &[&str] =
    &["rlimit: Can't setup", "exited, status=", "Dumping FAILED", "Restoring FAILED", "failed with -1"];

/// CRIU's working folder of a job with this command line.
pub fn folder(args: &Args) -> Option<PathBuf> {
    args.value("work-path").filter(|p| !p.is_empty()).map(PathBuf::from)
}

/// CRIU's log in there and its text, unless it is of a job before `since`. `verb` is `dump` or `restore`.
pub fn read(args: &Args, verb: &str, since: SystemTime) -> Option<(PathBuf, String)> {
    let path = folder(args)?.join(format!("{verb}.log"));
    // The times of files lag behind a little.
    let changed = fs::metadata(&path).and_then(|m| m.modified()).ok()?;
    let is_new = changed + Duration::from_secs(1) > since;
    let text = is_new.then(|| fs::read(&path).ok())??;
    Some((path, String::from_utf8_lossy(&text).into_owned()))
}

/// The first error in a log's text that something depended on.
fn first_error(text: &str) -> Option<&str> {
    let errors = text.lines().filter_map(|l| l.split_once(" Error (")?.1.split_once("): "));
    errors.map(|(_, says)| says.trim()).find(|says| !NO_CAUSE.iter().any(|n| says.contains(n)))
}

/// What CRIU's log says of why it failed.
fn logged(args: &Args, verb: &str, since: SystemTime) -> Option<String> {
    let (path, text) = read(args, verb, since)?;
    let why = match first_error(&text) {
        _ if !ENDS.iter().any(|end| text.contains(end)) => {
            format!("it was killed in the middle of the {verb}")
        }
        why => why?.to_string(),
    };
    Some(format!("CRIU: {why} (see {})", path.display()))
}

/// Whether the lower runtime's last line is that its connection with CRIU broke. Its log is `log` where no other was asked for.
fn unanswered(args: &Args, log: &Path) -> Option<String> {
    let text = fs::read_to_string(args.global.get("log").map_or(log, Path::new)).ok()?;
    text.lines().last()?.contains("unixpacket").then(|| "CRIU: it was killed before it had answered".into())
}

/// One line on why CRIU failed in a job that began at `since`, if its log or the lower runtime's says so.
pub fn cause(args: &Args, verb: &str, since: SystemTime, log: &Path) -> Option<String> {
    logged(args, verb, since).or_else(|| unanswered(args, log))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_with_consequences_is_the_cause() {
        let log = "(00.035206) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                   tar: Error is not recoverable: exiting now\n\
                   (00.104487) Error (criu/util.c:656): exited, status=2\n\
                   (00.104502) Error (criu/filesystems.c:426): Can't dump tmpfs content\n\
                   (00.175102) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        assert_eq!(first_error(log), Some("Can't dump tmpfs content"));
        assert_eq!(first_error("(00.1) Warn  (criu/seize.c:404): Unexpected\n"), None);
    }

    #[test]
    fn the_log_is_where_the_lower_runtime_puts_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_str().unwrap();
        let parse = |words: &[&str]| Args::parse(words.iter().map(Into::into).collect());
        let log = "(00.2) Error (criu/files-reg.c:2184): File x has bad size 1 (expect 2)\n\
                   (00.3) Error (criu/cr-restore.c:2548): Restoring FAILED.\n";
        let now = SystemTime::now();
        let none = Path::new("/nowhere");
        fs::write(folder.path().join("restore.log"), log).unwrap();
        let cause = cause(&parse(&["restore", "--work-path", root, "c1"]), "restore", now, none).unwrap();
        assert!(
            cause.starts_with("CRIU: File x has bad size 1 (expect 2) (see ") && cause.contains(root),
            "{cause}"
        );
        assert_eq!(super::cause(&parse(&["--root", root, "checkpoint", "c2"]), "dump", now, none), None);
        let args = parse(&["restore", "--work-path", root, "c1"]);
        assert_eq!(
            super::cause(&args, "restore", now + Duration::from_secs(60), none),
            None,
            "an earlier job's"
        );
        // It says how it ends, unless it is killed; what it could go on after is not the cause then.
        fs::write(folder.path().join("restore.log"), "(00.2) Error (criu/x.c:1): harmless\n(00.3) Forking\n")
            .unwrap();
        let cause = super::cause(&args, "restore", now, none).unwrap();
        assert!(cause.starts_with("CRIU: it was killed in the middle of the restore (see "), "{cause}");
        // Or after it had come to its end, or before it had a log.
        let log = folder.path().join("log").display().to_string();
        fs::write(&log, "{\"level\":\"error\",\"msg\":\"read unixpacket @->@: EOF\"}\n").unwrap();
        let args = parse(&["--log", &log, "--root", root, "restore", "c2"]);
        assert_eq!(
            super::cause(&args, "restore", now, none).unwrap(),
            "CRIU: it was killed before it had answered"
        );
    }
}
