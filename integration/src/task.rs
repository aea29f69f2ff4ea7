//! A container's task, as containerd's clients see it.

use anyhow::{Context, Result, ensure};

use crate::containerd::Containerd;

/// The task of a container of a private containerd, by the container's id.
#[derive(Debug, Clone, Copy)]
pub struct Task<'a> {
    containerd: &'a Containerd,
    id: &'a str,
}

/// A row of `ctr tasks list`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub pid: u32,
    pub status: String,
}

impl Containerd {
    pub fn task<'a>(&'a self, id: &'a str) -> Task<'a> {
        Task { containerd: self, id }
    }
}

impl Task<'_> {
    /// The task's row in the list of tasks, if the task exists.
    ///
    /// # Errors
    /// `ctr tasks list` fails, or its output is not a table of id, pid and status.
    pub fn find(&self) -> Result<Option<Listed>> {
        let list = self.containerd.ctr_ok(&["tasks", "list"])?;
        let mut rows = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let Some(row) = rows.find(|row| row.first() == Some(&self.id)) else { return Ok(None) };
        let [_, pid, status] = row[..] else { anyhow::bail!("odd list of tasks:\n{list}") };
        let pid = pid.parse().with_context(|| format!("odd pid {pid:?}"))?;
        Ok(Some(Listed { pid, status: status.to_owned() }))
    }

    /// # Errors
    /// As for [`Task::find`], or there is no such task.
    pub fn listed(&self) -> Result<Listed> {
        self.find()?.with_context(|| format!("no task {}", self.id))
    }

    /// # Errors
    /// As for [`Task::listed`].
    pub fn status(&self) -> Result<String> {
        Ok(self.listed()?.status)
    }

    /// Kills the task with SIGKILL, and waits until containerd reports its exit.
    ///
    /// # Errors
    /// The task cannot be killed, or is not stopped after its exit.
    pub fn kill(&self) -> Result<()> {
        let from = self.containerd.log().position();
        self.containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", self.id])?;
        self.containerd.log().wait_for_event(from, "/tasks/exit")?;
        let status = self.status()?;
        ensure!(status == "STOPPED", "the killed task {} is {status}", self.id);
        Ok(())
    }

    /// Deletes the stopped task and its container; the task must report this exit code.
    ///
    /// # Errors
    /// The exit code differs, or the container cannot be deleted.
    pub fn delete(&self, code: i32) -> Result<()> {
        let deleted = self.containerd.ctr_output(&["tasks", "delete", self.id])?;
        let reported = deleted.error_text().contains(&format!("exit code {code}")) || deleted.status == code;
        ensure!(reported, "deleting {} should report the exit code {code}: {deleted}", self.id);
        self.containerd.ctr_ok(&["containers", "delete", self.id]).map(drop)
    }
}
