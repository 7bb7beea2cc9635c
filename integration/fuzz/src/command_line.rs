//! The command line.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

#[allow(dead_code, unused)]
#[path = "../../../runtime/src/args.rs"]
mod words;

/// Words separated by NUL, as a command line is.
pub fn args(data: &[u8]) {
    let all: Vec<OsString> = data.split(|b| *b == 0).map(|w| OsString::from_vec(w.to_vec())).collect();
    let args = words::Args::parse(all.clone());
    assert_eq!(args.all, all, "no word is lost");
    assert!(args.verb_at <= all.len() && all.ends_with(&args.rest));
    let _ = args.id();
    for flag in [words::TRACE, "image-path", "leave-running"] {
        let without = args.without(flag);
        assert_eq!(without.verb, args.verb);
        assert_eq!(without.rest, args.rest, "what follows the flags stays");
        assert!(without.value(flag).is_none(), "{flag} is still there: {without:?}");
        let others = |a: &words::Args| a.flags.iter().filter(|(n, _)| *n != flag).map(|(n, v)| (n.clone(), v.clone())).collect::<Vec<_>>();
        assert_eq!(others(&without), others(&args), "other flags stay");
        let _ = args.switch(flag);
    }
}
