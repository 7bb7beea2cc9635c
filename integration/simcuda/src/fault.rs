//! Calls that fail on purpose.
//!
//! `SIMCUDA_FAIL=FUNCTION:N:CODE[,…]`: the Nth call of that exported function from now on (`*`: every one) returns the CUDA
//! error CODE without doing anything; with `hang` for CODE it never returns, with `hangN` it takes N seconds longer than it would.
//! `simcuda_fail` replaces the rules at run time, and so does [`Outside`], from another process. `SIMCUDA_CALLS=FILE` appends to FILE the name of every function that is called.

use std::collections::BTreeSet;
use std::ffi::{CStr, c_char};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

use crate::code::{Code, INVALID_VALUE, SUCCESS};

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Fails(Code),
    /// None: for ever.
    Hangs(Option<Duration>),
}

/// One rule.
struct Rule {
    function: String,
    /// Calls until it strikes; 0: always.
    after: u64,
    fate: Fate,
}

/// Bytes of text in [`Outside`].
pub const TEXT: usize = 1024;

/// What another process may do, in the process's control block (see `checkpoint`): write rules and count `asked` up; the names
/// of the functions that are called from then on come back in `called`, each once, with a space behind it.
#[repr(C)]
pub struct Outside {
    pub asked: AtomicU32,
    pub rules: [AtomicU8; TEXT],
    pub called: [AtomicU8; 2 * TEXT],
}

/// The control block's part, once there is one.
pub static OUTSIDE: AtomicUsize = AtomicUsize::new(0);
/// The control block that the rules came from: a process that was restored has another one, and no rules.
static BLOCK: AtomicU64 = AtomicU64::new(0);
/// The last count that was seen.
static SEEN: AtomicU32 = AtomicU32::new(0);
/// Calls are written down.
static RECORDING: AtomicBool = AtomicBool::new(false);
/// What was called, and whether it goes to a file.
static CALLED: Mutex<(BTreeSet<String>, Option<File>)> = Mutex::new((BTreeSet::new(), None));

fn outside() -> Option<&'static Outside> {
    // SAFETY: null or the address of a mapping that is never unmapped; all its fields are atomics.
    unsafe { (OUTSIDE.load(Ordering::Acquire) as *const Outside).as_ref() }
}

/// Takes over rules that another process has written.
fn look_outside() {
    let Some(block) = outside() else { return };
    let asked = block.asked.load(Ordering::Acquire);
    if asked == SEEN.load(Ordering::Relaxed) || SEEN.swap(asked, Ordering::SeqCst) == asked {
        return;
    }
    let bytes: Vec<u8> =
        block.rules.iter().map(|b| b.load(Ordering::Relaxed)).take_while(|b| *b != 0).collect();
    block.called.iter().for_each(|b| b.store(0, Ordering::Relaxed));
    CALLED.lock().unwrap_or_else(|e| e.into_inner()).0.clear();
    RECORDING.store(true, Ordering::SeqCst);
    BLOCK.store(crate::checkpoint::block_inode(), Ordering::SeqCst);
    arm(std::str::from_utf8(&bytes).ok().and_then(parse).unwrap_or_default());
}

/// Writes a call down, the first time.
fn record(function: &str) {
    let mut called = CALLED.lock().unwrap_or_else(|e| e.into_inner());
    if !called.0.insert(function.to_owned()) {
        return;
    }
    if let Some(file) = &mut called.1 {
        let _ = file.write_all(format!("{function}\n").as_bytes());
    }
    if let Some(block) = outside() {
        let free = block.called.iter().position(|b| b.load(Ordering::Relaxed) == 0).unwrap_or(2 * TEXT);
        if free + function.len() + 2 < 2 * TEXT {
            let text = function.bytes().chain([b' ']);
            block.called[free..].iter().zip(text).for_each(|(to, from)| to.store(from, Ordering::Relaxed));
        }
    }
}

static ARMED: AtomicBool = AtomicBool::new(false);
static RULES: Mutex<Vec<Rule>> = Mutex::new(Vec::new());

fn parse(text: &str) -> Option<Vec<Rule>> {
    let rules = text.split(',').filter(|rule| !rule.is_empty()).map(|rule| {
        let mut words = rule.split(':');
        let function = words.next()?.to_owned();
        let after = match words.next()? {
            "*" => 0,
            n => n.parse().ok().filter(|n| *n > 0)?,
        };
        let code = words.next()?;
        let fate = match code.strip_prefix("hang") {
            Some("") => Fate::Hangs(None),
            Some(seconds) => Fate::Hangs(Some(Duration::from_secs(seconds.parse().ok()?))),
            None => Fate::Fails(code.parse().ok()?),
        };
        words.next().is_none().then_some(Rule { function, after, fate })
    });
    rules.collect()
}

fn arm(rules: Vec<Rule>) {
    let mut current = RULES.lock().unwrap_or_else(|e| e.into_inner());
    ARMED.store(!rules.is_empty(), Ordering::SeqCst);
    *current = rules;
}

/// The code with which this call must fail. Does not return if it must hang for ever.
pub fn due(function: &str) -> Option<Code> {
    static ENVIRONMENT: Once = Once::new();
    ENVIRONMENT.call_once(|| {
        if let Some(rules) = std::env::var("SIMCUDA_FAIL").ok().and_then(|text| parse(&text)) {
            arm(rules);
        }
        if let Some(path) = std::env::var_os("SIMCUDA_CALLS") {
            CALLED.lock().unwrap_or_else(|e| e.into_inner()).1 =
                File::options().create(true).append(true).open(path).ok();
            RECORDING.store(true, Ordering::SeqCst);
        }
    });
    look_outside();
    if RECORDING.load(Ordering::Relaxed) {
        record(function);
    }
    if !ARMED.load(Ordering::Relaxed) {
        return None;
    }
    let block = BLOCK.load(Ordering::Relaxed);
    if block != 0 && block != crate::checkpoint::block_inode() {
        BLOCK.store(0, Ordering::SeqCst);
        arm(Vec::new());
        return None;
    }
    let fate = {
        let mut rules = RULES.lock().unwrap_or_else(|e| e.into_inner());
        let rule = rules.iter_mut().find(|r| r.function == function)?;
        match rule.after {
            0 => {}
            1 => rule.function.clear(),
            _ => {
                rule.after -= 1;
                return None;
            }
        }
        rule.fate
    };
    match fate {
        Fate::Fails(code) => Some(code),
        Fate::Hangs(Some(time)) => {
            std::thread::sleep(time);
            None
        }
        Fate::Hangs(None) => loop {
            std::thread::park();
        },
    }
}

/// Replaces all rules; an empty text ends them. Not a function of the driver.
///
/// # Safety
/// `rules` is a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn simcuda_fail(rules: *const c_char) -> Code {
    // SAFETY: the caller's contract.
    match unsafe { CStr::from_ptr(rules) }.to_str().ok().and_then(parse) {
        Some(rules) => {
            arm(rules);
            SUCCESS
        }
        None => INVALID_VALUE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_call_fails_once_and_a_star_every_one() {
        arm(parse("cuA:2:700,cuB:*:1").unwrap());
        let seen: Vec<_> = ["cuA", "cuB", "cuA", "cuA", "cuB", "cuC"].map(due).into();
        assert_eq!(seen, [None, Some(1), Some(700), None, Some(1), None]);
        arm(Vec::new());
        assert_eq!(due("cuB"), None);
        for bad in ["cuA", "cuA:0:1", "cuA:1:x", "cuA:1:2:3", "cuA:1:hangx"] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }
}
