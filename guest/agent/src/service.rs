//! The control calls, translated: decode, call, encode. What they do is elsewhere.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use machinen_protocol::api::{self, Agent};
use ttrpc::r#async::TtrpcContext;

use crate::{agent::Parts, configure, container::Container, error::Failure};

#[derive(Debug)]
pub(crate) struct Service {
    parts: Arc<Parts>,
}

impl Service {
    pub(crate) fn new(parts: Arc<Parts>) -> Self {
        Self { parts }
    }
}

/// Work that must not stop half-way when the host hangs up or its deadline passes.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> ttrpc::Result<T> {
    let done = tokio::spawn(work).await;
    // The release build aborts on a panic, and nobody aborts these tasks.
    done.map_err(|err| ttrpc::Error::Others(err.to_string()))?.map_err(Into::into)
}

#[async_trait::async_trait]
impl Agent for Service {
    async fn configure(
        &self,
        _: &TtrpcContext,
        request: api::ConfigureRequest,
    ) -> ttrpc::Result<api::ConfigureResponse> {
        configure::configure(&self.parts, &request).map_err(|err| Failure::from(err).into())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> ttrpc::Result<api::CreateContainerResponse> {
        let parts = Arc::clone(&self.parts);
        whole(async move {
            let place = parts.containers.reserve(&request.container_id)?;
            let (container, phases) = Container::create(&parts, request).await?;
            let pid = container.init().pid().as_raw().unsigned_abs();
            place.fill(container);
            Ok(api::CreateContainerResponse { pid, phases: phases.into_messages(), ..Default::default() })
        })
        .await
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let parts = Arc::clone(&self.parts);
        whole(async move {
            parts.containers.get(&request.container_id)?.start().await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::WaitProcessResponse> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        let process = container.process(&request.exec_id).map_err(Failure::from)?;
        let ended = process.ended().await.map_err(Failure::from)?;
        Ok(api::WaitProcessResponse {
            exit_status: ended.code,
            exited_at_ns: nanoseconds(ended.at),
            stdout_bytes: ended.stdout_bytes,
            stderr_bytes: ended.stderr_bytes,
            oom_killed: ended.oom_killed,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: api::SignalProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        let signal = i32::try_from(request.signal).unwrap_or(i32::MAX);
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        if request.all {
            container.cgroup().signal_all(signal).map_err(Failure::from)?;
        } else {
            let process = container.process(&request.exec_id).map_err(Failure::from)?;
            process.signal(signal).map_err(Failure::from)?;
        }
        Ok(api::Empty::new())
    }

    async fn end_stdin(&self, _: &TtrpcContext, request: api::EndStdinRequest) -> ttrpc::Result<api::Empty> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        let process = container.process(&request.exec_id).map_err(Failure::from)?;
        process.end_stdin(request.total_bytes).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::ListProcessesResponse> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        let pids = container.cgroup().pids().map_err(Failure::from)?;
        let processes = pids
            .into_iter()
            .map(|pid| api::ProcessInfo { pid: pid.as_raw().unsigned_abs(), ..Default::default() });
        Ok(api::ListProcessesResponse { processes: processes.collect(), ..Default::default() })
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let parts = Arc::clone(&self.parts);
        whole(async move {
            if let Some((place, container)) = parts.containers.take(&request.container_id)? {
                container.delete().await?;
                place.clear();
            }
            Ok(api::Empty::new())
        })
        .await
    }

    async fn shutdown(&self, call: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        self.parts.shutdown.send_replace(Some(call.mh.stream_id));
        Ok(api::Empty::new())
    }
}

fn nanoseconds(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).ok().and_then(|since| i64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}
