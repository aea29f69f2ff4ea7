//! The outcome of each step of each program, as a table.

use std::{collections::BTreeMap, fmt, fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use machinen_integration::paths;

use crate::program::{Program, Runtime, Step};

/// Longest note of an error, in characters.
const MOST: usize = 600;

/// The outcome of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed(Duration),
    /// The step failed as it must, with this error.
    Refused(String),
    Failed(String),
    /// The step was not tried, for this reason.
    NotTried(String),
}

/// A program with a runtime.
#[derive(Debug)]
pub(crate) struct Row {
    program: String,
    runtime: Runtime,
    steps: BTreeMap<Step, Outcome>,
}

#[derive(Debug, Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
}

impl Outcome {
    /// The outcome of a step that took this long. `refusal` is the expected part of its error, if it must
    /// fail.
    pub(crate) fn of(result: Result<()>, took: Duration, refusal: Option<&str>) -> Self {
        match (result, refusal) {
            (Ok(()), None) => Self::Passed(took),
            (Ok(()), Some(text)) => Self::Failed(format!("was to be refused with {text:?}, and was not")),
            (Err(error), Some(text)) if format!("{error:#}").contains(text) => Self::Refused(text.to_owned()),
            (Err(error), Some(text)) => Self::Failed(format!("was to be refused with {text:?}: {error:#}")),
            (Err(error), None) => Self::Failed(format!("{error:#}")),
        }
    }

    /// The note below the table.
    fn note(&self) -> Option<String> {
        match self {
            Self::Passed(_) => None,
            Self::Refused(text) => Some(format!("refused, as expected: {text}")),
            Self::Failed(error) => Some(format!("FAIL: {}", one_line(error))),
            Self::NotTried(reason) => Some(format!("n-a: {reason}")),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed(took) => f.pad(&format!("{:.1} s", took.as_secs_f64())),
            Self::Refused(_) => f.pad("refused"),
            Self::Failed(_) => f.pad("FAIL"),
            Self::NotTried(_) => f.pad("n-a"),
        }
    }
}

impl Row {
    pub(crate) fn new(program: &Program, runtime: Runtime) -> Self {
        Self { program: program.name.clone(), runtime, steps: BTreeMap::new() }
    }

    /// Notes an outcome, and shows it.
    pub(crate) fn set(&mut self, step: Step, outcome: Outcome) {
        let note = outcome.note().unwrap_or_else(|| format!("ok, {outcome}"));
        println!("   {} {} {}: {note}", self.program, self.runtime.name(), step.name());
        self.steps.insert(step, outcome);
    }

    /// Notes that the step was not tried for this reason, unless its outcome is known already.
    pub(crate) fn unless(&mut self, step: Step, reason: &str) {
        self.steps.entry(step).or_insert_with(|| Outcome::NotTried(reason.to_owned()));
    }

    /// Whether this outcome of a step makes the run fail. runc is only there for comparison.
    fn is_failure(&self, outcome: &Outcome) -> bool {
        self.runtime == Runtime::Machinen && matches!(outcome, Outcome::Failed(_))
    }

    /// Notes that the steps without an outcome were not tried, for this reason.
    pub(crate) fn fill(&mut self, reason: &str) {
        Step::ALL.into_iter().for_each(|step| self.unless(step, reason));
    }
}

impl Report {
    pub(crate) fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Whether no step has made the run fail.
    pub(crate) fn passed(&self) -> bool {
        !self.rows.iter().any(|row| row.steps.values().any(|outcome| row.is_failure(outcome)))
    }

    /// Writes the table to `target/programs`.
    ///
    /// # Errors
    /// The files cannot be written.
    pub(crate) fn save(&self) -> Result<PathBuf> {
        let file = paths::workspace().join("target/programs/report.txt");
        fs::create_dir_all(file.parent().context("no directory")?)?;
        fs::write(&file, self.to_string()).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }
}

/// An error, with the output of programs, as one line of bounded length.
fn one_line(error: &str) -> String {
    let lines: Vec<_> =
        error.lines().map(str::trim).filter(|line| !["", "stdout:", "stderr:"].contains(line)).collect();
    let line = lines.join(" | ");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line,
    }
}

/// Columns of the table; a failure's text is in the notes below it.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<12} {:<9}", "program", "runtime")?;
        Step::ALL.iter().try_for_each(|step| write!(f, "{:>11}", step.name()))?;
        writeln!(f)?;
        for row in &self.rows {
            write!(f, "{:<12} {:<9}", row.program, row.runtime.name())?;
            row.steps.values().try_for_each(|outcome| write!(f, "{outcome:>11}"))?;
            writeln!(f)?;
        }
        writeln!(f)?;
        // What has made the run fail comes last, where it is seen in a long log.
        for failures in [false, true] {
            for row in &self.rows {
                for (step, outcome) in &row.steps {
                    let Some(note) = outcome.note().filter(|_| row.is_failure(outcome) == failures) else {
                        continue;
                    };
                    writeln!(f, "{} {} {}: {note}", row.program, row.runtime.name(), step.name())?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    fn outcome(result: Result<()>, refusal: Option<&str>) -> Outcome {
        Outcome::of(result, Duration::from_secs(1), refusal)
    }

    fn report(runtime: Runtime, outcome: Outcome) -> Report {
        let steps = BTreeMap::from([(Step::Start, outcome)]);
        Report { rows: vec![Row { program: "one".to_owned(), runtime, steps }] }
    }

    #[test]
    fn a_refusal_must_match_what_is_expected() {
        let refused = outcome(Err(anyhow!("criu: ctty inheritance").context("cannot")), Some("ctty"));
        assert_eq!(refused, Outcome::Refused("ctty".to_owned()));
        assert!(matches!(outcome(Err(anyhow!("no VM")), Some("ctty")), Outcome::Failed(_)));
        assert!(matches!(outcome(Ok(()), Some("ctty")), Outcome::Failed(_)));
        assert!(matches!(outcome(Ok(()), None), Outcome::Passed(_)));
        assert!(matches!(outcome(Err(anyhow!("no VM")), None), Outcome::Failed(_)));
    }

    #[test]
    fn only_failures_in_microvms_count() {
        let failed = || Outcome::Failed("no VM".to_owned());
        assert!(!report(Runtime::Machinen, failed()).passed());
        assert!(report(Runtime::Runc, failed()).passed());
        assert!(report(Runtime::Machinen, Outcome::Refused("ctty".to_owned())).passed());
        assert!(report(Runtime::Machinen, Outcome::NotTried("no criu".to_owned())).passed());
    }

    #[test]
    fn an_error_is_one_line_of_a_bounded_length() {
        assert_eq!(one_line("status 1\n  stdout: \n  stderr: no VM\n"), "status 1 | stderr: no VM");
        assert_eq!(one_line(&"é".repeat(MOST + 1)).chars().count(), MOST + 4);
    }

    #[test]
    fn failures_are_the_last_notes() {
        let failed = || Outcome::Failed("x".to_owned());
        let mut both = report(Runtime::Machinen, failed());
        both.rows.extend(report(Runtime::Runc, failed()).rows);
        let text = both.to_string();
        assert_eq!(text.lines().last(), Some("one machinen start: FAIL: x"));
    }
}
