//! A tolerant reader of runc's command line. It finds what phos-runc must know (verb, id, a few flags) and leaves
//! everything else as it is: the lower runtime gets the words it would have got.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::state::valid_id;

/// phos-runc's own flag: the file that a timeline of the job is written to.
pub const TRACE: &str = "trace";

/// Global flags that take a value.
const GLOBAL_VALUES: &[&str] = &["log", "log-format", "root", "criu", "rootless", "cgroup-manager"];

/// Flags that take a value, by verb. All others are switches.
fn verb_values(verb: &str) -> &'static [&'static str] {
    match verb {
        "create" | "run" => {
            &["bundle", "b", "console-socket", "pidfd-socket", "pid-file", "preserve-fds", "config", "f"]
        }
        "checkpoint" => &[
            TRACE,
            "image-path",
            "work-path",
            "parent-path",
            "status-fd",
            "page-server",
            "manage-cgroups-mode",
            "empty-ns",
            "network-lock",
        ],
        "restore" => &[
            TRACE,
            "image-path",
            "work-path",
            "bundle",
            "b",
            "pid-file",
            "console-socket",
            "manage-cgroups-mode",
            "empty-ns",
            "lsm-profile",
            "lsm-mount-context",
            "network-lock",
        ],
        _ => &[],
    }
}

/// A command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args {
    /// Every word behind the program's name.
    pub all: Vec<OsString>,
    /// How many of them stand before the verb.
    pub verb_at: usize,
    /// The verb, "" if there is none.
    pub verb: String,
    /// Global flags by name without dashes; a switch has an empty value.
    pub global: BTreeMap<String, OsString>,
    /// The verb's flags, likewise. Of a repeated one, the last counts.
    pub flags: BTreeMap<String, OsString>,
    /// Words that are no flags: the container's id first.
    pub rest: Vec<OsString>,
}

/// Splits `--name=value`, `-name` and so on; `None` if the word is no flag.
fn flag(word: &OsStr) -> Option<(String, Option<OsString>)> {
    let bytes = word.as_bytes();
    let body = bytes.strip_prefix(b"--").or(bytes.strip_prefix(b"-")).filter(|b| !b.is_empty())?;
    let (name, value) = match body.iter().position(|b| *b == b'=') {
        Some(at) => (&body[..at], Some(OsStr::from_bytes(&body[at + 1..]).to_os_string())),
        None => (body, None),
    };
    Some((String::from_utf8_lossy(name).into_owned(), value))
}

impl Args {
    /// Reads the words behind the program's name.
    pub fn parse(all: Vec<OsString>) -> Self {
        let mut args = Args { all, ..Args::default() };
        let mut i = take(&args.all, 0, GLOBAL_VALUES, &mut args.global);
        args.verb_at = i;
        if let Some(verb) = args.all.get(i) {
            args.verb = verb.to_string_lossy().into_owned();
            i = take(&args.all, i + 1, verb_values(&args.verb), &mut args.flags);
            args.rest = args.all[i..].to_vec();
        }
        args
    }

    /// The container's id, if it is one: what is wrong with another, the lower runtime says.
    pub fn id(&self) -> Option<&str> {
        self.rest.first().and_then(|id| id.to_str()).filter(|id| valid_id(id))
    }

    /// Takes a flag of the verb out of the command line, with its value, wherever and however often it stands there.
    pub fn without(&self, flag_name: &str) -> Args {
        let mut words = self.all[..(self.verb_at + 1).min(self.all.len())].to_vec();
        let end = self.all.len() - self.rest.len();
        let mut i = words.len();
        while i < end {
            // A flag's value may look like a flag.
            let (name, length) = match flag(&self.all[i]) {
                Some((name, None)) if verb_values(&self.verb).contains(&name.as_str()) => (name, 2),
                Some((name, _)) => (name, 1),
                None => (String::new(), 1),
            };
            let next = (i + length).min(end);
            if name != flag_name {
                words.extend_from_slice(&self.all[i..next]);
            }
            i = next;
        }
        words.extend_from_slice(&self.rest);
        Args::parse(words)
    }

    /// The same command line with one more flag of the verb; what it said of that flag counts no more.
    pub fn with(&self, flag_name: &str, value: &OsStr) -> Args {
        let mut words = self.without(flag_name).all;
        let at = (self.verb_at + 1).min(words.len());
        words.splice(at..at, [format!("--{flag_name}").into(), value.to_os_string()]);
        Args::parse(words)
    }

    /// A flag of the verb.
    pub fn value(&self, name: &str) -> Option<&OsStr> {
        self.flags.get(name).map(OsString::as_os_str)
    }

    /// Whether a switch of the verb is on.
    pub fn switch(&self, name: &str) -> bool {
        self.flags.get(name).is_some_and(|v| v != "false" && v != "0")
    }
}

/// Reads flags from word `from` on, up to the first word that is none; returns its number.
fn take(all: &[OsString], from: usize, values: &[&str], into: &mut BTreeMap<String, OsString>) -> usize {
    let mut i = from;
    while let Some(word) = all.get(i) {
        if word == "--" {
            return i + 1;
        }
        let Some((name, value)) = flag(word) else { return i };
        i += 1;
        let value = match value {
            Some(value) => value,
            None if values.contains(&name.as_str()) => {
                let value = all.get(i).cloned().unwrap_or_default();
                i += 1;
                value
            }
            None => OsString::new(),
        };
        into.insert(name, value);
    }
    i.min(all.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(line: &str) -> Args {
        Args::parse(line.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn what_the_engines_type_is_understood() {
        let a = parse(
            "--root /r --log /b/log.json --log-format json --systemd-cgroup create --bundle /b --pid-file /p -console-socket /s c1",
        );
        assert_eq!((a.verb.as_str(), a.id()), ("create", Some("c1")));
        assert_eq!(a.global["root"], "/r");
        assert_eq!(a.value("bundle"), Some(OsStr::new("/b")));
        assert_eq!(a.verb_at, 7);
        let a = parse(
            "restore --image-path /i --work-path=/w --detach --pid-file /p -no-subreaper --bundle /b c2",
        );
        assert_eq!((a.verb.as_str(), a.id()), ("restore", Some("c2")));
        assert!(a.switch("detach") && a.switch("no-subreaper"));
        assert_eq!(a.value("work-path"), Some(OsStr::new("/w")));
        let a = parse("checkpoint --image-path U --leave-running --leave-running --tcp-established c3");
        assert_eq!(a.id(), Some("c3"));
        assert!(a.switch("leave-running"));
        assert_eq!(parse("checkpoint --help").id(), None);
        assert_eq!(parse("restore --lsm-mount-context").id(), None);
        assert_eq!(parse("--version").verb, "");
        assert_eq!(parse("").verb, "");
        assert_eq!(parse("run -b /b -- c4").id(), Some("c4"));
        assert!(!parse("checkpoint --leave-running=false c").switch("leave-running"));
    }

    #[test]
    fn a_flag_is_taken_out_with_its_value() {
        let line = |l: &str, name: &str| {
            parse(l).without(name).all.iter().map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
        };
        let full = "--root /r checkpoint --trace /t --image-path /i --trace=/u --leave-running c";
        assert_eq!(line(full, TRACE), "--root /r checkpoint --image-path /i --leave-running c");
        assert_eq!(line(full, "leave-running"), full.replace(" --leave-running", ""));
        assert_eq!(
            line("checkpoint --image-path --trace -- --trace", TRACE),
            "checkpoint --image-path --trace -- --trace"
        );
        assert_eq!(line("", TRACE), "");
    }

    #[test]
    fn a_flag_that_is_added_is_the_only_one_of_its_name() {
        let with = |l: &str| {
            let with = parse(l).with("work-path", "/w".as_ref());
            assert_eq!(with.value("work-path"), Some(OsStr::new("/w")));
            with.all.iter().map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(with("--root /r restore -d c"), "--root /r restore --work-path /w -d c");
        assert_eq!(with("restore --work-path= -d -- c"), "restore --work-path /w -d -- c");
    }

    proptest! {
        #[test]
        fn no_word_is_lost_and_nothing_panics(words in prop::collection::vec("[-a-z=]{0,8}", 0..8)) {
            let words: Vec<OsString> = words.into_iter().map(OsString::from).collect();
            let args = Args::parse(words.clone());
            prop_assert_eq!(&args.all, &words);
            prop_assert!(args.verb_at <= words.len());
            prop_assert!(words.ends_with(&args.rest));
        }
    }
}
