//! containerd's log while it grows: shims log into it, and it shows the events that they have sent.

use std::{
    fmt,
    io::BufRead,
    sync::{Condvar, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Longest wait for a line.
const DEADLINE: Duration = Duration::from_secs(60);

/// The lines so far.
#[derive(Debug, Default)]
pub struct Log {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    ended: bool,
}

impl Log {
    /// Number of lines so far.
    pub fn position(&self) -> usize {
        self.state.lock().expect("the log's reader does not panic").lines.len()
    }

    /// Lines after a position.
    pub fn since(&self, from: usize) -> Vec<String> {
        self.state.lock().expect("the log's reader does not panic").lines[from..].to_vec()
    }

    /// Waits for a line after a position, and returns it.
    ///
    /// # Errors
    /// The line did not come in time, or the log ended before.
    pub fn wait_for(&self, from: usize, wanted: impl FnMut(&str) -> bool) -> Result<String> {
        self.wait_within(DEADLINE, from, wanted)
    }

    /// The same with the caller's deadline.
    ///
    /// # Errors
    /// The line did not come in time, or the log ended before.
    pub fn wait_within(
        &self,
        time: Duration,
        from: usize,
        mut wanted: impl FnMut(&str) -> bool,
    ) -> Result<String> {
        let end = Instant::now() + time;
        let mut state = self.state.lock().expect("the log's reader does not panic");
        let mut next = from;
        loop {
            if let Some(line) = state.lines[next..].iter().find(|line| wanted(line)) {
                return Ok(line.clone());
            }
            next = state.lines.len();
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || state.ended {
                bail!("containerd did not log what was awaited within {time:?}");
            }
            state = self.changed.wait_timeout(state, left).expect("the log's reader does not panic").0;
        }
    }

    /// Waits until containerd has passed on a shim's event, e.g. `/tasks/exit`.
    ///
    /// # Errors
    /// As for [`Log::wait_for`].
    pub fn wait_for_event(&self, from: usize, topic: &str) -> Result<String> {
        self.wait_for(from, |line| event(line) == Some(topic))
    }

    /// Topics of the shims' events after a position, in order.
    pub fn events(&self, from: usize) -> Vec<String> {
        self.since(from).iter().filter_map(|line| event(line)).map(str::to_owned).collect()
    }

    pub(crate) fn fill(&self, source: impl BufRead) {
        for line in source.split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            self.state.lock().expect("the log's readers do not panic").lines.push(line);
            self.changed.notify_all();
        }
        self.state.lock().expect("the log's readers do not panic").ended = true;
        self.changed.notify_all();
    }
}

/// The whole log, without the lines of every start of containerd.
impl fmt::Display for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let telling = |line: &&String| {
            !line.contains("loading plugin") && !line.contains("level=trace") && !line.contains("ttrpc")
        };
        self.since(0).iter().filter(telling).try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// The topic, if the line reports that containerd has passed on an event.
fn event(line: &str) -> Option<&str> {
    let (_, tail) = line.split_once("topic=")?;
    line.contains("event forwarded").then(|| tail.split(' ').next())?
}
