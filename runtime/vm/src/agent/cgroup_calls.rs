//! The calls for the cgroup and the secrets of a running container.

use std::time::Duration;

use machinen_protocol::api::{
    CgroupFile, ListProcessesResponse, ReadCgroupRequest, Secret, SetSecretsRequest, WaitOutOfMemoryRequest,
    WaitOutOfMemoryResponse, WriteCgroupRequest,
};

use super::{AgentError, Client, QUICK, container_request, finish, nothing};

/// A little longer than the agent's own deadline for freezing.
const FREEZE: Duration = Duration::from_secs(30);
/// For calls that are repeated regularly, so that a missing answer is better than a late one.
const SOON: Duration = Duration::from_secs(10);

impl Client {
    /// Freezes a container: none of its processes runs when this returns.
    ///
    /// # Errors
    /// The container has ended, or a process cannot be frozen; all of them continue to run then.
    pub async fn pause_container(&self, container: &str) -> Result<(), AgentError> {
        call!(self.pause_container(container_request(container)), Some(FREEZE)).map(nothing)
    }

    /// # Errors
    /// The container has ended.
    pub async fn resume_container(&self, container: &str) -> Result<(), AgentError> {
        call!(self.resume_container(container_request(container)), Some(QUICK)).map(nothing)
    }

    /// Returns the content of those files of the cgroup that exist.
    ///
    /// # Errors
    /// The container does not exist.
    pub async fn read_cgroup(&self, container: &str, names: &[&str]) -> Result<Vec<CgroupFile>, AgentError> {
        let request = ReadCgroupRequest {
            container_id: container.to_owned(),
            names: names.iter().map(|&name| name.to_owned()).collect(),
            ..ReadCgroupRequest::default()
        };
        call!(self.read_cgroup(request), Some(SOON)).map(|answer| answer.files)
    }

    /// Lists the processes of a container. What the guest says of them is not checked.
    ///
    /// # Errors
    /// The container does not exist or has ended.
    pub async fn list_processes(&self, container: &str) -> Result<ListProcessesResponse, AgentError> {
        call!(self.list_processes(container_request(container)), Some(SOON))
    }

    /// Writes and removes secrets of a container, all or none of them. The caller has checked them.
    ///
    /// # Errors
    /// The container has ended, has something else in the place of its secrets, or has no room for them.
    pub async fn set_secrets(
        &self,
        container: &str,
        secrets: Vec<Secret>,
        removed: Vec<String>,
    ) -> Result<(), AgentError> {
        let container_id = container.to_owned();
        let request = SetSecretsRequest { container_id, secrets, removed, ..SetSecretsRequest::default() };
        call!(self.set_secrets(request), Some(SOON)).map(nothing)
    }

    /// Writes files of the cgroup in the given order, all or none of them.
    ///
    /// # Errors
    /// The guest's kernel refuses a value, or has no such file.
    pub async fn write_cgroup(&self, container: &str, files: Vec<CgroupFile>) -> Result<(), AgentError> {
        let request =
            WriteCgroupRequest { container_id: container.to_owned(), files, ..WriteCgroupRequest::default() };
        call!(self.write_cgroup(request), Some(QUICK)).map(nothing)
    }

    /// Resolves when more than `seen` processes were killed because the container was out of memory, or the
    /// init has ended. There is no deadline.
    ///
    /// # Errors
    /// The container does not exist.
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
