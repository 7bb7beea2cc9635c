//! Text of others that is shown to a person.

/// Most characters of a text of somebody else's that are shown.
const LONGEST: usize = 300;

/// One line, no control characters (a terminal obeys them), not endless.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        assert_eq!(plain("a\u{1b}]0;x\u{7}\nb\u{9b}c é"), "a ]0;x  b c é");
        assert_eq!(plain(&"x".repeat(1000)).len(), LONGEST);
    }
}
