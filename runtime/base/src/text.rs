//! Text that is not to be trusted, made fit to be shown: the words of a guest, of a VMM, of a checkpoint.
//! All of them pass through [`printable`] before they become part of an error, a log line or an output.

/// The most bytes of one text that are shown.
pub const MAX_SHOWN: usize = 1 << 10;

/// What stands for the rest of a text that was cut.
const CUT: &str = "…";

/// The text in one line of at most [`MAX_SHOWN`] bytes. Characters that a terminal acts upon or that cannot be
/// seen are escaped as in Rust: control characters, line ends, and those that change the direction of text.
pub fn printable(text: &str) -> String {
    let mut shown = String::new();
    // The end of the last character after which there is room for the mark.
    let mut cut_at = 0;
    for char in text.chars() {
        match char {
            '\'' | '"' | '\\' => shown.push(char),
            _ => shown.extend(char.escape_debug()),
        }
        if shown.len() > MAX_SHOWN {
            shown.truncate(cut_at);
            shown.push_str(CUT);
            return shown;
        }
        if shown.len() <= MAX_SHOWN - CUT.len() {
            cut_at = shown.len();
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ordinary_text_is_unchanged() {
        for text in ["", "no container c7: \"a\\b\" isn't there", "Größe 5 µs, 文字"] {
            assert_eq!(printable(text), text);
        }
        let longest = "x".repeat(MAX_SHOWN);
        assert_eq!(printable(&longest), longest);
    }

    #[test]
    fn what_a_terminal_acts_upon_is_escaped() {
        for (text, shown) in [
            ("a\x1b[2Jb\x07", "a\\u{1b}[2Jb\\u{7}"),
            ("x\nlevel=fatal\r", "x\\nlevel=fatal\\r"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("a\u{202e}b\u{2066}\u{200b}", "a\\u{202e}b\\u{2066}\\u{200b}"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }

    #[test]
    fn long_text_is_cut() {
        let shown = printable(&"ä\n".repeat(4 << 20));
        assert!(shown.len() <= MAX_SHOWN && shown.len() > MAX_SHOWN - 10 && shown.ends_with(CUT), "{shown}");
    }

    proptest! {
        #[test]
        fn any_text_is_bounded_and_printable(text in "\\PC{0,20}|[\\x00-\\x{10ffff}]{0,2000}") {
            let shown = printable(&text);
            prop_assert!(shown.len() <= MAX_SHOWN);
            prop_assert!(!shown.chars().any(char::is_control));
        }
    }
}
