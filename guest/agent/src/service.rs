//! The control calls, translated: decode, call, encode. What they do is elsewhere.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use machinen_protocol::api::{self, Agent};
use ttrpc::r#async::TtrpcContext;

use crate::{
    agent::Parts,
    configure,
    container::{Container, ContainerError},
    error::Failure,
    shutdown,
    stdio::{Streams, WindowSize},
};

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

    async fn set_clock(&self, _: &TtrpcContext, request: api::SetClockRequest) -> ttrpc::Result<api::Empty> {
        configure::set_clock(&self.parts, request.realtime_ns).map_err(Failure::from)?;
        Ok(api::Empty::new())
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
            oom_killed: ended.oom_kills > 0,
            oom_kills: ended.oom_kills,
            layer_unchanged: request.exec_id.is_empty() && container.layer_unchanged(),
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
        container.signal(&request.exec_id, signal, request.all).map_err(Failure::from)?;
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

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::ExecProcessResponse> {
        let parts = Arc::clone(&self.parts);
        whole(async move {
            let container = parts.containers.get(&request.container_id);
            let pid = match container {
                Ok(container) => container.exec(&parts, request).await?,
                Err(err) => {
                    // The streams of the call go with it.
                    let _ = Streams::claim(&request.stdio.unwrap_or_default(), &parts.unclaimed).await;
                    return Err(err.into());
                }
            };
            Ok(api::ExecProcessResponse { pid: pid.as_raw().unsigned_abs(), ..Default::default() })
        })
        .await
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        container.delete_process(&request.exec_id).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: api::ResizeTerminalRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        let process = container.process(&request.exec_id).map_err(Failure::from)?;
        process.resize(WindowSize::clamped(request.width, request.height)).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn export_layer(
        &self,
        _: &TtrpcContext,
        request: api::ExportLayerRequest,
    ) -> ttrpc::Result<api::ExportLayerResponse> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        let stream = self.parts.unclaimed.claim(request.stream).await;
        let stream =
            stream.ok_or(ContainerError::NoStream { token: request.stream }).map_err(Failure::from)?;
        let total_bytes = container.export_layer(stream).await.map_err(Failure::from)?;
        Ok(api::ExportLayerResponse { total_bytes, ..Default::default() })
    }

    async fn open_view(&self, _: &TtrpcContext, request: api::OpenViewRequest) -> ttrpc::Result<api::Empty> {
        let parts = Arc::clone(&self.parts);
        whole(async move {
            let stream = parts.unclaimed.claim(request.stream).await;
            let stream = stream.ok_or(ContainerError::NoStream { token: request.stream })?;
            parts.containers.get(&request.container_id)?.open_view(&parts, stream).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn checkpoint_container(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointContainerRequest,
    ) -> ttrpc::Result<api::CheckpointContainerResponse> {
        let parts = Arc::clone(&self.parts);
        whole(async move {
            let container = parts.containers.get(&request.container_id)?;
            Ok(container.checkpoint(&parts, request).await?)
        })
        .await
    }

    async fn checkpoint_images(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::CheckpointImagesResponse> {
        let parts = Arc::clone(&self.parts);
        whole(async move {
            let container = parts.containers.get(&request.container_id)?;
            Ok(container.checkpoint_images().await?)
        })
        .await
    }

    async fn pre_dump_container(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let parts = Arc::clone(&self.parts);
        whole(async move {
            let container = parts.containers.get(&request.container_id)?;
            container.pre_dump(&parts, request).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn wait_pages(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        container.pages_fetched().await.map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let parts = Arc::clone(&self.parts);
        whole(async move {
            parts.containers.get(&request.container_id)?.pause().await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        container.resume().map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn read_cgroup(
        &self,
        _: &TtrpcContext,
        request: api::ReadCgroupRequest,
    ) -> ttrpc::Result<api::ReadCgroupResponse> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        let files = container.cgroup().read_files(&request.names).map_err(Failure::from)?;
        Ok(api::ReadCgroupResponse { files, ..Default::default() })
    }

    async fn write_cgroup(
        &self,
        _: &TtrpcContext,
        request: api::WriteCgroupRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        let cgroup = container.live_cgroup().map_err(Failure::from)?;
        cgroup.write_files(&request.files).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn wait_out_of_memory(
        &self,
        _: &TtrpcContext,
        request: api::WaitOutOfMemoryRequest,
    ) -> ttrpc::Result<api::WaitOutOfMemoryResponse> {
        let container = self.parts.containers.get(&request.container_id).map_err(Failure::from)?;
        let (killed, ended) = tokio::select! {
            // A kill is told before the end that it may have brought.
            biased;
            killed = container.cgroup().out_of_memory(request.seen) => (killed.map_err(Failure::from)?, false),
            () = container.init().exited() => (container.cgroup().oom_kills(), true),
        };
        Ok(api::WaitOutOfMemoryResponse { killed, ended, ..Default::default() })
    }

    async fn shutdown(&self, call: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        let (parts, call) = (Arc::clone(&self.parts), call.mh.stream_id);
        whole(async move {
            shutdown::run(&parts).await;
            parts.shutdown.send_replace(Some(call));
            Ok(api::Empty::new())
        })
        .await
    }
}

fn nanoseconds(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).ok().and_then(|since| i64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}
