//! The last part of what a program prints, which usually says why the program has failed.

/// What stands for the part that was left out.
const CUT: &str = "… ";

/// A bounded copy of the end of a stream.
#[derive(Debug)]
pub struct OutputTail {
    kept: usize,
    bytes: Vec<u8>,
    is_cut: bool,
}

impl OutputTail {
    /// Keeps at most `kept` bytes.
    pub fn new(kept: usize) -> Self {
        Self { kept, bytes: Vec::new(), is_cut: false }
    }

    /// Adds what was printed next.
    pub fn push(&mut self, more: &[u8]) {
        self.bytes.extend_from_slice(more);
        let excess = self.bytes.len().saturating_sub(self.kept);
        self.is_cut |= excess > 0;
        self.bytes.drain(..excess);
    }

    /// The lines with `; ` between them, without empty ones. They may have control characters.
    pub fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.bytes);
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        format!("{}{}", if self.is_cut { CUT } else { "" }, lines.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_long_output_is_kept_in_one_line() {
        let mut tail = OutputTail::new(1000);
        assert_eq!(tail.text(), "");
        tail.push(b"\n one \n\ntwo\xff\n");
        assert_eq!(tail.text(), "one; two\u{fffd}");
        (0..1000).for_each(|_| tail.push(&[b'x'; 100]));
        tail.push(b"the cause\n");
        let text = tail.text();
        assert!(text.starts_with("… x") && text.ends_with("xthe cause") && text.len() < 1010, "{text}");
    }
}
