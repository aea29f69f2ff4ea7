//! A verb that stays until a process of a container has ended.

use std::{pin::pin, process::ExitCode};

use machinen::error::chain;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::{client::MonitorClient, console::Relay, error::OciError};

/// The signals that are passed on to the process. Those of a terminal's keys reach this process too, if the process in
/// the container has no terminal of its own.
const PASSED_ON: [i32; 6] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM];

/// Starts a process (`start`), waits until it has ended, and returns its exit status. Signals are passed on to it.
///
/// # Errors
/// The process cannot be started, or its monitor is lost.
pub(crate) async fn follow(
    monitor: &MonitorClient,
    exec: &str,
    relay: Option<Relay>,
    start: impl AsyncFnOnce() -> Result<(), OciError>,
) -> Result<u32, OciError> {
    let (sender, mut signals) = mpsc::unbounded_channel();
    for number in PASSED_ON {
        let mut received = signal(SignalKind::from_raw(number)).map_err(OciError::io("watch signals"))?;
        let sender = sender.clone();
        tokio::spawn(async move { while received.recv().await.is_some() && sender.send(number).is_ok() {} });
    }
    let status = until_end(monitor, exec, relay.as_ref(), start, &mut signals).await;
    if let Some(relay) = relay {
        relay.finish();
    }
    status
}

/// Like [`follow`] for a process without a terminal, to which no signals are passed on.
///
/// # Errors
/// The process cannot be started, or its monitor is lost.
pub(crate) async fn follow_quietly(
    monitor: &MonitorClient,
    exec: &str,
    start: impl AsyncFnOnce() -> Result<(), OciError>,
) -> Result<u32, OciError> {
    let (_, mut none) = mpsc::unbounded_channel();
    until_end(monitor, exec, None, start, &mut none).await
}

async fn until_end(
    monitor: &MonitorClient,
    exec: &str,
    relay: Option<&Relay>,
    start: impl AsyncFnOnce() -> Result<(), OciError>,
    signals: &mut mpsc::UnboundedReceiver<i32>,
) -> Result<u32, OciError> {
    let mut size = pin!(async {
        match relay {
            Some(relay) => relay.follow_size().await,
            None => std::future::pending().await,
        }
    });
    // Requested before the start, so that the monitor has the request when the process ends and is removed.
    let mut ended = pin!(monitor.wait(exec));
    let mut started = pin!(start());
    let (mut has_started, mut early) = (false, None);
    loop {
        tokio::select! {
            biased;
            status = &mut ended, if early.is_none() => match status {
                Ok(status) if has_started => break Ok(status),
                status => early = Some(status),
            },
            result = &mut started, if !has_started => match (result, early.take()) {
                (Err(error), _) => break Err(error),
                (Ok(()), Some(status)) => break status,
                (Ok(()), None) => has_started = true,
            },
            Some(signal) = signals.recv() => {
                if let Err(error) = monitor.kill(exec, signal.cast_unsigned(), false).await {
                    eprintln!("machinen: signal {signal} was not passed on: {}", chain(&error));
                }
            }
            () = &mut size => {}
        }
    }
}

/// The exit code of a verb for a process's exit status.
pub(crate) fn exit_code(status: u32) -> ExitCode {
    ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX))
}
