//! The output of a verb, as text or as JSON, and whether the verb has found a problem.

use std::{
    fmt::{Display, Write as _},
    process::ExitCode,
};

use serde_json::Value;

/// The result of a verb.
#[derive(Debug)]
pub(super) struct VerbOutput {
    pub(super) text: String,
    pub(super) value: Value,
    /// False if the verb has found a problem; then the exit status is 1.
    pub(super) ok: bool,
}

impl VerbOutput {
    pub(super) fn new(text: impl Into<String>, value: impl Into<Value>) -> Self {
        Self { text: text.into(), value: value.into(), ok: true }
    }

    /// One item per line.
    pub(super) fn lines<T: Display>(lines: impl IntoIterator<Item = T>, value: impl Into<Value>) -> Self {
        let mut text = String::new();
        for line in lines {
            writeln!(text, "{line}").expect("a String takes any text");
        }
        Self::new(text, value)
    }

    pub(super) fn print(self, json: bool) -> ExitCode {
        if json {
            println!("{:#}", self.value);
        } else {
            print!("{}", self.text);
        }
        if self.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// The alignment of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Rows below a header, each column as wide as its widest cell.
#[derive(Debug)]
pub(super) struct TextTable<const N: usize> {
    align: [Align; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> TextTable<N> {
    pub(super) fn new(columns: [(&str, Align); N]) -> Self {
        let rows = vec![columns.map(|(head, _)| head.to_owned())];
        Self { align: columns.map(|(_, align)| align), rows }
    }

    pub(super) fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }
}

impl<const N: usize> Display for TextTable<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; N] = std::array::from_fn(width);
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), align) in row.iter().zip(widths).zip(self.align) {
                match align {
                    Align::Left => write!(line, "{cell:<width$}  ")?,
                    Align::Right => write!(line, "{cell:>width$}  ")?,
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let mut table =
            TextTable::new([("KEY", Align::Left), ("SIZE", Align::Right), ("STATE", Align::Left)]);
        assert_eq!(table.to_string(), "KEY  SIZE  STATE\n");
        table.row(["abcdef".into(), "1.5MiB".into(), "ready".into()]);
        table.row(["a".into(), "0B".into(), String::new()]);
        assert_eq!(table.to_string(), "KEY       SIZE  STATE\nabcdef  1.5MiB  ready\na           0B\n");
    }

    #[test]
    fn lines_end_with_newlines() {
        let output = VerbOutput::lines(["a", "b"], Value::Null);
        assert!(output.ok && output.text == "a\nb\n");
    }
}
