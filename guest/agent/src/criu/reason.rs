//! Extracts from CRIU's log why it has failed: the first error, without those of its callers and of its
//! clean-up.

use std::{fs, path::Path};

use nix::unistd::Pid;

use super::task::Task;

/// Most bytes of CRIU's log that a message quotes.
const MAX_QUOTE: usize = 400;
/// Errors of CRIU's probes at its start, which a container's device rules cause.
const PROBES: [&str; 1] = ["tun: Unable to create tun"];
/// Explanations of CRIU's errors that do not explain themselves.
const MEANINGS: [(&str, &str); 9] = [
    ("send_fds failed", "an open file that cannot be passed on, such as an io_uring"),
    ("Unknown socket collected (family 40)", "an AF_VSOCK socket"),
    ("Unknown shit", "memory of memfd_secret(2), or a mapped file of a kind that cannot be saved"),
    ("Unsupported proto 262", "a socket of MPTCP"),
    ("Unsupported proto 132", "a socket of SCTP"),
    (
        "Can't dump that handle",
        "a watch on a file that has no handle, as in /proc and /sys, or one that was removed",
    ),
    ("Can't lookup mount=", "an open file on a mount that the container does not have, or not any more"),
    ("Can't stat fd", "an open file of /proc of a process that has ended"),
    (
        "doesn't have a proper root mount",
        "a mount of a namespace, or of a part of a file system that is not mounted itself",
    ),
];

/// The reason of a failure, to follow the sentence that says what has failed; empty without a log.
pub(super) fn quote(log: &Path) -> String {
    read(log).map(|log| Reason::of(&log).to_string()).unwrap_or_default()
}

/// The reason of a failed dump, with the process that caused it, by its pid in the container.
pub(super) fn quote_of_dump(log: &Path) -> String {
    let Some(log) = read(log) else { return String::new() };
    let reason = Reason::of(&log);
    match reason.pid.and_then(Task::find) {
        Some(task) => format!(": {task}{}", reason.with_pid(task.inner)),
        None => reason.to_string(),
    }
}

fn read(log: &Path) -> Option<String> {
    Some(String::from_utf8_lossy(&fs::read(log).ok()?).into_owned())
}

/// The cause of a failure, according to a log.
#[derive(Debug, PartialEq, Eq)]
struct Reason {
    text: String,
    /// Pid of the dumped process, in the agent's pid namespace.
    pid: Option<Pid>,
}

impl Reason {
    fn of(log: &str) -> Self {
        let (mut lines_before, mut current) = (Vec::new(), None);
        let mut lines = log.lines();
        for line in lines.by_ref() {
            if let Some(error) = error(line) {
                if PROBES.iter().any(|probe| error.contains(probe)) {
                    continue;
                }
                lines_before.push(error);
                let pid = named_pid(error).or(current);
                let pid = pid.or_else(|| lines.filter_map(self::error).find_map(named_pid));
                return Self { text: one_line(&lines_before.join("; ")), pid };
            }
            current = line.contains("Dumping task (pid: ").then(|| named_pid(line)).flatten().or(current);
            // A program that CRIU runs reports its own error right before CRIU does.
            match line.starts_with('(') || line.starts_with("pie: ") || line.trim().is_empty() {
                true => lines_before.clear(),
                false => lines_before.push(line.trim()),
            }
        }
        // The last line shows at least how far CRIU came.
        let last = log.lines().last().map(|line| format!("its log ends with {line:?}"));
        Self { text: last.unwrap_or_default(), pid: None }
    }

    /// Formats the reason with the container's pid in place of CRIU's, which is one of the VM's.
    fn with_pid(&self, inner: Pid) -> String {
        let Some(pid) = self.pid else { return self.to_string() };
        let (pid, inner) = (pid.to_string(), inner.to_string());
        let words = self.text.split_whitespace().map(|word| if word == pid { inner.as_str() } else { word });
        Self { text: words.collect::<Vec<_>>().join(" "), pid: None }.to_string()
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { text, .. } = self;
        if text.is_empty() {
            return Ok(());
        }
        let end = text.char_indices().map(|(at, _)| at).find(|at| *at > MAX_QUOTE).unwrap_or(text.len());
        write!(f, ": {}", text[..end].trim_end_matches('.'))?;
        match MEANINGS.iter().find(|(words, _)| text.contains(words)) {
            Some((_, meaning)) => write!(f, " ({meaning})"),
            None => Ok(()),
        }
    }
}

/// Replaces the tabs in some of CRIU's messages.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The message of a line such as "(00.012345)     42: Error (criu/file.c:10): the reason".
fn error(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once("Error (")?;
    let (_, reason) = rest.split_once("): ")?;
    Some(reason.trim())
}

/// The pid in messages such as "Dump files (pid: 42) failed with -1", "Can't dump nested uts namespace for
/// 42" and "zombie 42 (comm sh) found".
fn named_pid(text: &str) -> Option<Pid> {
    let number = |text: &str| {
        let digits = text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
        text[..digits].parse().ok().filter(|pid| *pid > 0).map(Pid::from_raw)
    };
    let after = |words: &str| text.split_once(words).and_then(|(_, rest)| number(rest));
    let last =
        || text.contains(" namespace for ").then(|| text.rsplit(' ').next().and_then(number)).flatten();
    after("(pid: ").or_else(|| after("zombie ")).or_else(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Excerpts of CRIU 4.1.1's logs for containers that it cannot dump or restore.
    const LOGS: [(&str, &str, i32, &str); 9] = include!("logs/table.rs");

    #[test]
    fn the_cause_is_quoted_and_nothing_after_it() {
        for (name, log, pid, text) in LOGS {
            let reason = Reason::of(log);
            assert_eq!(
                (reason.pid.map_or(0, Pid::as_raw), reason.to_string().as_str()),
                (pid, text),
                "{name}"
            );
        }
    }

    #[test]
    fn the_error_of_a_program_that_criu_runs_is_quoted() {
        let of = |log| Reason::of(log).to_string();
        assert_eq!(of("tar: no\n(00.1) Error (x.c:1): it failed\n"), ": tar: no; it failed");
        assert_eq!(of("tar: odd\n(00.1) fine\n(00.1) Error (x.c:1): it failed.\n"), ": it failed");
        assert_eq!(of("(0) a\n(0) fine\n"), ": its log ends with \"(0) fine\"");
        assert_eq!(of(""), "");
        let long = format!("(0) Error (x.c:1): {}", "ä".repeat(1000));
        assert!(of(&long).len() < MAX_QUOTE + 10);
    }

    #[test]
    fn the_pid_is_the_containers() {
        let reason = Reason::of("(0) Error (x.c:1): Can't dump nested uts namespace for 13383\n");
        assert_eq!(reason.with_pid(Pid::from_raw(7)), ": Can't dump nested uts namespace for 7");
    }
}
