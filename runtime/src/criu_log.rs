//! What CRIU says in its log. The lower runtime says that CRIU failed; why, a person would have to look up there.

use std::fs;
use std::path::{Path, PathBuf};

use crate::args::Args;

/// Errors that CRIU goes on after, and those that only repeat that it failed.
const NO_CAUSE: &[&str] =
    &["rlimit: Can't setup", "exited, status=", "Dumping FAILED", "Restoring FAILED", "failed with -1"];

/// CRIU's log of a job with this command line. `verb` is `dump` or `restore`.
fn path(args: &Args, verb: &str) -> Option<PathBuf> {
    let folder = match args.value("work-path").filter(|p| !p.is_empty()) {
        Some(named) => PathBuf::from(named),
        // The lower runtime's own choice.
        None => Path::new(args.global.get("root")?).join(args.id()?).join("criu.work"),
    };
    Some(folder.join(format!("{verb}.log")))
}

/// The first error in a log's text that something depended on.
fn first_error(text: &str) -> Option<&str> {
    let errors = text.lines().filter_map(|l| l.split_once(" Error (")?.1.split_once("): "));
    errors.map(|(_, says)| says.trim()).find(|says| !NO_CAUSE.iter().any(|n| says.contains(n)))
}

/// One line on why CRIU failed, if its log says so.
pub fn cause(args: &Args, verb: &str) -> Option<String> {
    let path = path(args, verb)?;
    let text = String::from_utf8_lossy(&fs::read(&path).ok()?).into_owned();
    Some(format!("CRIU: {} (see {})", first_error(&text)?, path.display()))
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
        let log = "(00.2) Error (criu/files-reg.c:2184): File x has bad size 1 (expect 2)\n";
        fs::create_dir_all(folder.path().join("c1/criu.work")).unwrap();
        fs::write(folder.path().join("c1/criu.work/dump.log"), log).unwrap();
        fs::write(folder.path().join("restore.log"), log).unwrap();
        for (args, verb) in [
            (parse(&["--root", root, "checkpoint", "c1"]), "dump"),
            (parse(&["restore", "--work-path", root, "c1"]), "restore"),
        ] {
            let cause = cause(&args, verb).unwrap();
            assert!(
                cause.starts_with("CRIU: File x has bad size 1 (expect 2) (see ") && cause.contains(root),
                "{cause}"
            );
        }
        assert_eq!(cause(&parse(&["checkpoint", "c1"]), "dump"), None);
    }
}
