//! Additional processes in a container.

use machinen_protocol::api;

use super::{Guest, Output, Spec, context, process};

impl Guest {
    /// Creates a container that only waits.
    pub(crate) async fn idle(&self, id: &str, spec: &Spec) {
        self.create(id, spec).await.unwrap();
        self.start_container(id).await.unwrap();
    }

    /// Runs the process of a spec in a container, without streams.
    pub(crate) async fn exec(&self, id: &str, exec: &str, spec: &Spec) -> ttrpc::Result<api::Empty> {
        self.exec_with(id, exec, spec, api::Stdio::default()).await
    }

    pub(crate) async fn exec_with(
        &self,
        id: &str,
        exec: &str,
        spec: &Spec,
        stdio: api::Stdio,
    ) -> ttrpc::Result<api::Empty> {
        let request = api::ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: serde_json::to_vec(&spec.json["process"]).unwrap(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.agent.exec_process(context(), &request).await
    }

    pub(crate) async fn delete_exec(&self, id: &str, exec: &str) -> ttrpc::Result<api::Empty> {
        self.agent.delete_process(context(), &process(id, exec)).await
    }

    pub(crate) async fn resize(
        &self,
        id: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> ttrpc::Result<api::Empty> {
        let request = api::ResizeTerminalRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            width,
            height,
            ..Default::default()
        };
        self.agent.resize_terminal(context(), &request).await
    }

    /// Runs a process in a container to its end; returns its output and its status.
    pub(crate) async fn run_in(&mut self, id: &str, exec: &str, spec: &Spec, input: &[u8]) -> Output {
        let (stdin, mut to_stdin) = self.stream().await;
        let (stdout, mut from_stdout) = self.stream().await;
        let (stderr, mut from_stderr) = self.stream().await;
        let stdio = api::Stdio { stdin, stdout, stderr, ..Default::default() };
        self.exec_with(id, exec, spec, stdio).await.unwrap();
        let streams = (&mut to_stdin, &mut from_stdout, &mut from_stderr);
        let output = self.converse(id, exec, input, streams).await;
        self.delete_exec(id, exec).await.unwrap();
        output
    }
}
