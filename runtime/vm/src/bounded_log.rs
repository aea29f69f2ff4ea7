//! A bounded record of what an untrusted program prints, which is always read to its end.
//!
//! The guest's console and QEMU's stderr must neither block their writer nor fill the host's disk or memory.
//! So only the first and the last [`KEPT`] bytes are kept, with the number of bytes that were left out
//! between them.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write as _},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::Notify,
};

/// Bytes that are kept of the beginning, and as many of the end.
const KEPT: usize = 64 << 10;
/// Bytes at the end that are searched for an excerpt, and the largest number of lines and bytes of an
/// excerpt.
const SEARCHED: usize = 16 << 10;
const EXCERPT_LINES: usize = 12;
const EXCERPT_BYTES: usize = 1 << 10;
/// The guest kernel's panic message: its cause is printed before it, a long call trace after it.
const PANIC: &str = "Kernel panic - not syncing";
/// Lines after the panic message that an excerpt includes.
const AFTER_PANIC: usize = 2;

/// The record, shared between the task that reads the output and those that quote it.
#[derive(Debug, Clone, Default)]
pub(super) struct BoundedLog(Arc<SharedLog>);

#[derive(Debug, Default)]
struct SharedLog {
    kept: Mutex<KeptBytes>,
    /// Notified when there is more, or the source has ended.
    changed: Notify,
}

#[derive(Debug, Default)]
struct KeptBytes {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    dropped: u64,
    ended: bool,
}

/// A piece of what a program has printed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogPiece {
    /// What was printed; empty if there is no more.
    pub bytes: Vec<u8>,
    /// How many bytes were printed up to the end of this piece.
    pub end: u64,
    /// How many bytes before this piece are not kept any more.
    pub left_out: u64,
}

impl BoundedLog {
    /// Reads `source` to its end. The first bytes are written to `log` at once, the kept last ones when the
    /// source ends.
    ///
    /// # Errors
    /// The log cannot be written. The source has been read to its end nevertheless.
    pub(super) async fn read(
        self,
        mut source: impl AsyncRead + Unpin,
        mut log: Option<File>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; 4096];
        let mut outcome = Ok(());
        loop {
            // A source that fails is treated as one that has ended.
            let count = source.read(&mut buffer).await.unwrap_or(0);
            if count == 0 {
                break;
            }
            let head = self.lock().push(&buffer[..count]);
            self.0.changed.notify_waiters();
            if let (Some(file), Ok(())) = (&mut log, &outcome) {
                outcome = file.write_all(&buffer[..head]);
            }
        }
        self.lock().ended = true;
        self.0.changed.notify_waiters();
        if let (Some(mut file), Ok(())) = (log, &outcome) {
            outcome = file.write_all(&self.lock().end());
        }
        outcome
    }

    /// The last lines, or those around a kernel panic, as text fit for an error message; empty if nothing was
    /// printed.
    pub(super) fn excerpt(&self) -> String {
        let kept = self.lock();
        let bytes: Vec<u8> = kept.head.iter().chain(&kept.tail).copied().collect();
        excerpt(&bytes)
    }

    /// What was printed after the first `from` bytes, at most [`KEPT`] bytes of it. With `wait` an empty piece means
    /// that the source has ended.
    pub(super) async fn after(&self, from: u64, wait: bool) -> LogPiece {
        loop {
            let changed = self.0.changed.notified();
            let mut changed = std::pin::pin!(changed);
            // From here on no notification is missed.
            changed.as_mut().enable();
            {
                let kept = self.lock();
                let piece = kept.after(from);
                if !piece.bytes.is_empty() || kept.ended || !wait {
                    return piece;
                }
            }
            changed.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, KeptBytes> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeptBytes {
    /// Returns how many of the bytes are part of the head.
    fn push(&mut self, bytes: &[u8]) -> usize {
        let head = bytes.len().min(KEPT - self.head.len());
        self.head.extend_from_slice(&bytes[..head]);
        self.tail.extend(&bytes[head..]);
        let excess = self.tail.len().saturating_sub(KEPT);
        self.tail.drain(..excess);
        self.dropped += excess as u64;
        head
    }

    fn after(&self, from: u64) -> LogPiece {
        let head = self.head.len() as u64;
        if from < head {
            let bytes = self.head[usize::try_from(from).unwrap_or(usize::MAX)..].to_vec();
            return LogPiece { bytes, end: head, left_out: 0 };
        }
        let start = head + self.dropped;
        let end = start + self.tail.len() as u64;
        let skipped = usize::try_from(from.saturating_sub(start)).unwrap_or(usize::MAX);
        let bytes = self.tail.iter().skip(skipped).copied().collect();
        LogPiece { bytes, end, left_out: start.saturating_sub(from) }
    }

    /// The bytes to log after the head.
    fn end(&mut self) -> Vec<u8> {
        let mut end = Vec::new();
        if self.dropped > 0 {
            end.extend_from_slice(format!("\n[{} bytes left out]\n", self.dropped).as_bytes());
        }
        end.extend(&self.tail);
        end
    }
}

fn excerpt(bytes: &[u8]) -> String {
    let end = &bytes[bytes.len().saturating_sub(SEARCHED)..];
    let text: String =
        String::from_utf8_lossy(end).chars().filter(|c| *c == '\n' || !c.is_control()).collect();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = match lines.iter().rposition(|line| line.contains(PANIC)) {
        Some(panic) => lines.len().min(panic + 1 + AFTER_PANIC),
        None => lines.len(),
    };
    let mut excerpt = lines[last.saturating_sub(EXCERPT_LINES)..last].join("\n");
    let mut excess = excerpt.len().saturating_sub(EXCERPT_BYTES);
    while !excerpt.is_char_boundary(excess) {
        excess += 1;
    }
    excerpt.split_off(excess)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn captured(bytes: &[u8]) -> (BoundedLog, Vec<u8>) {
        let bounded_log = BoundedLog::default();
        let file = tempfile::NamedTempFile::new().unwrap();
        bounded_log.clone().read(bytes, Some(file.reopen().unwrap())).await.unwrap();
        (bounded_log, std::fs::read(file.path()).unwrap())
    }

    #[tokio::test]
    async fn both_ends_of_a_long_output_are_kept() {
        let mut flood = vec![b'a'; KEPT];
        flood.extend(vec![b'x'; 1_000_000]);
        flood.extend(vec![b'b'; KEPT]);
        let (_, log) = captured(&flood).await;
        let mut expected = vec![b'a'; KEPT];
        expected.extend(b"\n[1000000 bytes left out]\n");
        expected.extend(vec![b'b'; KEPT]);
        assert!(log == expected);
    }

    #[tokio::test]
    async fn pieces_lead_from_the_beginning_to_the_end() {
        let mut flood = vec![b'a'; KEPT];
        flood.extend(vec![b'x'; 1000]);
        flood.extend(vec![b'b'; KEPT]);
        let (log, _) = captured(&flood).await;
        let first = log.after(0, true).await;
        assert_eq!((first.bytes.len(), first.end, first.left_out), (KEPT, KEPT as u64, 0));
        let second = log.after(first.end, true).await;
        assert_eq!((second.bytes, second.end, second.left_out), (vec![b'b'; KEPT], flood.len() as u64, 1000));
        let last = log.after(second.end, true).await;
        assert_eq!((last.bytes, last.end), (Vec::new(), second.end));
        assert_eq!(log.after(u64::MAX, true).await.bytes, b"");
    }

    #[tokio::test]
    async fn a_piece_that_is_waited_for_arrives_when_it_is_printed() {
        use tokio::io::AsyncWriteExt as _;
        let (mut printer, source) = tokio::io::duplex(64);
        let log = BoundedLog::default();
        assert_eq!(log.after(0, false).await, LogPiece::default());
        let reader = tokio::spawn(log.clone().read(source, None));
        let (piece, written) = tokio::join!(log.after(0, true), printer.write_all(b"hello"));
        written.unwrap();
        assert_eq!(piece.bytes, b"hello");
        drop(printer);
        assert_eq!(log.after(5, true).await.bytes, b"");
        reader.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_short_output_is_kept_whole() {
        let (bounded_log, log) = captured(b"one\r\n\x1b[31mtwo\n\n").await;
        assert_eq!(log, b"one\r\n\x1b[31mtwo\n\n");
        assert_eq!(bounded_log.excerpt(), "one\n[31mtwo");
    }

    #[test]
    fn an_excerpt_is_the_last_lines() {
        let many: String = (0..10_000).map(|n| format!("line {n}\n")).collect();
        let text = excerpt(many.as_bytes());
        assert_eq!(text.lines().count(), EXCERPT_LINES);
        assert!(text.ends_with("line 9999"));
        assert_eq!(excerpt(&vec![b'y'; 1 << 20]).len(), EXCERPT_BYTES);
        assert_eq!(excerpt(b""), "");
        assert!(excerpt("ä".repeat(5000).as_bytes()).len() <= EXCERPT_BYTES);
    }

    #[test]
    fn a_panic_is_in_the_excerpt_with_what_led_to_it() {
        let mut text = "early\n".repeat(100) + "the reason\n[1.0] Kernel panic - not syncing: x\n";
        text += &"a trace\n".repeat(100);
        let text = excerpt(text.as_bytes());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), EXCERPT_LINES);
        assert_eq!(&lines[8..], ["the reason", "[1.0] Kernel panic - not syncing: x", "a trace", "a trace"]);
    }
}
