//! The calls that concern the cgroup of a running container.

use std::time::Duration;

use machinen_protocol::api::{
    CgroupFile, ReadCgroupRequest, WaitOutOfMemoryRequest, WaitOutOfMemoryResponse, WriteCgroupRequest,
};

use super::{AgentError, Client, QUICK, container_request, finish, nothing};

/// The agent's own deadline for freezing, and some.
const FREEZE: Duration = Duration::from_secs(30);
/// For what callers ask again and again, and would rather miss than wait for.
const SOON: Duration = Duration::from_secs(10);

impl Client {
    /// Freezes a container: no process of it runs when this returns.
    ///
    /// # Errors
    /// It has ended, or a process cannot be frozen; all of them run on then.
    pub async fn pause_container(&self, container: &str) -> Result<(), AgentError> {
        call!(self.pause_container(container_request(container)), Some(FREEZE)).map(nothing)
    }

    /// # Errors
    /// It has ended.
    pub async fn resume_container(&self, container: &str) -> Result<(), AgentError> {
        call!(self.resume_container(container_request(container)), Some(QUICK)).map(nothing)
    }

    /// The content of those of the cgroup's files that exist.
    ///
    /// # Errors
    /// No such container.
    pub async fn read_cgroup(&self, container: &str, names: &[&str]) -> Result<Vec<CgroupFile>, AgentError> {
        let request = ReadCgroupRequest {
            container_id: container.to_owned(),
            names: names.iter().map(|&name| name.to_owned()).collect(),
            ..ReadCgroupRequest::default()
        };
        call!(self.read_cgroup(request), Some(SOON)).map(|answer| answer.files)
    }

    /// Writes files of the cgroup in the order given, all or none.
    ///
    /// # Errors
    /// The guest's kernel does not take a value, or has no such file.
    pub async fn write_cgroup(&self, container: &str, files: Vec<CgroupFile>) -> Result<(), AgentError> {
        let request =
            WriteCgroupRequest { container_id: container.to_owned(), files, ..WriteCgroupRequest::default() };
        call!(self.write_cgroup(request), Some(QUICK)).map(nothing)
    }

    /// Resolves when more than `seen` processes were killed for want of memory, or the init has ended: no deadline.
    ///
    /// # Errors
    /// No such container.
    pub async fn wait_out_of_memory(
        &self,
        container: &str,
        seen: u64,
    ) -> Result<WaitOutOfMemoryResponse, AgentError> {
        let request = WaitOutOfMemoryRequest {
            container_id: container.to_owned(),
            seen,
            ..WaitOutOfMemoryRequest::default()
        };
        call!(self.wait_out_of_memory(request), None)
    }
}
