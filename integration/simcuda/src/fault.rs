//! Calls that fail on purpose.
//!
//! `SIMCUDA_FAIL=FUNCTION:N:CODE[,…]`: the Nth call of that exported function from now on (`*`: every one) returns the CUDA
//! error CODE without doing anything; with `hang` for CODE it never returns. `simcuda_fail` replaces the rules at run time.

use std::ffi::{CStr, c_char};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once};

use crate::code::{Code, INVALID_VALUE, SUCCESS};

/// One rule.
struct Rule {
    function: String,
    /// Calls until it strikes; 0: always.
    after: u64,
    /// None: hang.
    code: Option<Code>,
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
        let code = match words.next()? {
            "hang" => None,
            n => Some(n.parse().ok()?),
        };
        words.next().is_none().then_some(Rule { function, after, code })
    });
    rules.collect()
}

fn arm(rules: Vec<Rule>) {
    let mut current = RULES.lock().unwrap_or_else(|e| e.into_inner());
    ARMED.store(!rules.is_empty(), Ordering::SeqCst);
    *current = rules;
}

/// The code with which this call must fail. Does not return if it must hang.
pub fn due(function: &str) -> Option<Code> {
    static ENVIRONMENT: Once = Once::new();
    ENVIRONMENT.call_once(|| {
        if let Some(rules) = std::env::var("SIMCUDA_FAIL").ok().and_then(|text| parse(&text)) {
            arm(rules);
        }
    });
    if !ARMED.load(Ordering::Relaxed) {
        return None;
    }
    let code = {
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
        rule.code
    };
    if code.is_none() {
        loop {
            std::thread::park();
        }
    }
    code
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
        for bad in ["cuA", "cuA:0:1", "cuA:1:x", "cuA:1:2:3"] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }
}
