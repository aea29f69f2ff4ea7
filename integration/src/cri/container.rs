//! A container of a pod, made, used and removed as kubelet does.

use std::{collections::HashMap, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Client, IMAGE, Pod, Refusal, api, eventually, pod::runtime_default};

/// How long an added process may take, in seconds.
const EXEC_SECONDS: i64 = 60;

/// A container.
#[derive(Debug)]
pub struct Container<'a> {
    pod: &'a Pod,
    id: String,
    log: PathBuf,
}

/// One line of a container's log, in the format of CRI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// False for a part of a line.
    pub full: bool,
    pub text: String,
}

impl<'a> Container<'a> {
    pub(super) fn create(
        pod: &'a Pod,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut api::ContainerConfig),
    ) -> Result<Self> {
        // The same name again is a restart in place.
        let attempt = pod.node.number();
        let security = api::LinuxContainerSecurityContext {
            namespace_options: pod.namespaces(),
            seccomp: Some(runtime_default()),
            ..Default::default()
        };
        let mut config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: name.to_owned(), attempt }),
            image: Some(api::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path: format!("{name}/{attempt}.log"),
            labels: HashMap::from([("io.kubernetes.container.name".to_owned(), name.to_owned())]),
            linux: Some(api::LinuxContainerConfig {
                resources: Some(api::LinuxContainerResources { oom_score_adj: 1000, ..Default::default() }),
                security_context: Some(security),
            }),
            ..Default::default()
        };
        change(&mut config);
        let log = PathBuf::from(&pod.config.log_directory).join(&config.log_path);
        fs::create_dir_all(log.parent().context("no directory")?)?;
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.id().to_owned(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let id = pod.client().create_container(request)?.container_id;
        Ok(Self { pod, id, log })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn client(&self) -> &Client {
        self.pod.client()
    }

    /// # Errors
    /// containerd refuses the call.
    pub fn start(&self) -> Result<(), Refusal> {
        let request = api::StartContainerRequest { container_id: self.id.clone() };
        self.pod.client().start_container(request).map(drop)
    }

    /// # Errors
    /// containerd refuses the call.
    pub fn status(&self) -> Result<api::ContainerStatus> {
        let request = api::ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        self.pod.client().container_status(request)?.status.context("no status")
    }

    /// # Errors
    /// The container is not known.
    pub fn runs(&self) -> Result<bool> {
        Ok(self.status()?.state() == api::ContainerState::ContainerRunning)
    }

    /// Waits for the container's end.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait(&self) -> Result<api::ContainerStatus> {
        eventually("the container ends", || {
            let status = self.status()?;
            Ok((status.state() == api::ContainerState::ContainerExited).then_some(status))
        })
    }

    /// Runs a command in the container, whatever its status.
    ///
    /// # Errors
    /// containerd refuses the call.
    pub fn exec(&self, command: &[&str], timeout: i64) -> Result<api::ExecSyncResponse, Refusal> {
        self.pod.client().exec_sync(api::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout,
        })
    }

    /// Runs a script of the shell in the container, and returns what it prints.
    ///
    /// # Errors
    /// The script fails; its output is quoted.
    pub fn shell(&self, script: &str) -> Result<String> {
        let reply = self.exec(&["sh", "-c", script], EXEC_SECONDS)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (code, out, err) = (reply.exit_code, text(&reply.stdout), text(&reply.stderr));
        ensure!(code == 0, "`{script}` ended with {code}: {out}{err}");
        Ok(out)
    }

    /// The container's log so far.
    ///
    /// # Errors
    /// The log cannot be read, or does not have the format of CRI.
    pub fn log(&self) -> Result<Vec<LogLine>> {
        let text =
            fs::read_to_string(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        text.lines().map(|line| parse(line).with_context(|| format!("odd line {line:?}"))).collect()
    }

    /// Waits until a line is in the log.
    ///
    /// # Errors
    /// It does not come in time.
    pub fn wait_for_log(&self, text: &str) -> Result<()> {
        eventually(&format!("{text:?} is logged"), || {
            Ok(self.log()?.iter().any(|line| line.text == text).then_some(()))
        })
    }

    /// Where the log is, for tests that rotate it.
    pub fn log_file(&self) -> &PathBuf {
        &self.log
    }

    /// # Errors
    /// containerd refuses the call.
    pub fn stop(&self, grace: i64) -> Result<(), Refusal> {
        let request = api::StopContainerRequest { container_id: self.id.clone(), timeout: grace };
        self.pod.client().stop_container(request).map(drop)
    }

    /// # Errors
    /// containerd refuses the call.
    pub fn remove(&self) -> Result<(), Refusal> {
        let request = api::RemoveContainerRequest { container_id: self.id.clone() };
        self.pod.client().remove_container(request).map(drop)
    }
}

impl Pod {
    fn namespaces(&self) -> Option<api::NamespaceOption> {
        self.config.linux.clone()?.security_context?.namespace_options
    }
}

fn parse(line: &str) -> Option<LogLine> {
    let mut parts = line.splitn(4, ' ');
    let time = parts.next()?;
    // As in 2026-11-29T12:00:00.123456789Z, or with another time zone.
    let rfc3339 = time.len() >= 20 && time.as_bytes()[10] == b'T';
    let (stream, tag, text) = (parts.next()?, parts.next()?, parts.next()?);
    (rfc3339 && ["stdout", "stderr"].contains(&stream) && ["F", "P"].contains(&tag)).then(|| LogLine {
        stream: stream.to_owned(),
        full: tag == "F",
        text: text.to_owned(),
    })
}
