//! Scopes of systemd: how systemd is asked over D-Bus to make the cgroup of a pod, to limit it and to remove it.
//!
//! On a host with systemd, the cgroups belong to systemd. It writes the limits that it knows again whenever it is
//! reloaded, so limits that only the kernel has would be lost then.
//!
//! ```text
//!   start   StartTransientUnit with this process, the end of that job (JobRemoved)
//!   limit   SetUnitProperties with what the kernel has already
//!   stop    StopUnit of a scope without processes, the end of that job
//! ```
//! systemd is reached by the D-Bus daemon. What it sends on a socket of its own (`/run/systemd/private`) has a sender that is
//! no unique name, which zbus refuses.

use std::{future::Future, path::Path, time::Duration};

use futures_util::StreamExt as _;
use machinen_base::owner;
use oci_spec::runtime::{LinuxPids, LinuxResources};
use tokio::{runtime::Handle, time::timeout};
use zbus::{Connection, Error, OwnedObjectPath, Variant, connection::Builder};

use crate::spec::cpus::{self, CpuSet};

/// Exists if systemd is the host's init (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// How long systemd may take for one request with its job. It answers in milliseconds, unless it reloads or the host is busy.
const DEADLINE: Duration = Duration::from_secs(30);

/// A limit that is none.
const INFINITY: u64 = u64::MAX;

/// Microseconds.
const SECOND: u64 = 1_000_000;

/// Why systemd does not make, limit or remove a scope.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// The connection fails.
    #[error("cannot reach systemd by the D-Bus daemon; install one (Debian's package dbus)")]
    Connect(#[source] Error),
    /// systemd answers with an error.
    #[error("systemd does not {action} {unit}")]
    Refused {
        /// What was asked of systemd.
        action: &'static str,
        /// The name of the scope.
        unit: String,
        /// The cause.
        source: Error,
    },
    /// systemd has begun, and has not succeeded.
    #[error("systemd does not {action} {unit}: its job ended as {result:?} (journalctl -u {unit})")]
    Job {
        /// What was asked of systemd.
        action: &'static str,
        /// The name of the scope.
        unit: String,
        /// The result of the job, as systemd names it.
        result: String,
    },
    /// systemd does not answer.
    #[error("systemd has not answered the request to {action} {unit} in {} s", DEADLINE.as_secs())]
    Late {
        /// What was asked of systemd.
        action: &'static str,
        /// The name of the scope.
        unit: String,
    },
}

type Properties<'a> = Vec<(&'a str, Variant<'a>)>;

/// The part of systemd's interface (org.freedesktop.systemd1(5)) that is used here.
#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Variant<'_>)],
        auxiliary: &[(&str, &[(&str, Variant<'_>)])],
    ) -> zbus::Result<OwnedObjectPath>;

    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    fn set_unit_properties(
        &self,
        name: &str,
        runtime: bool,
        properties: &[(&str, Variant<'_>)],
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: String, result: String) -> zbus::Result<()>;
}

/// Whether systemd is the host's init.
pub(super) fn is_available() -> bool {
    Path::new(BOOTED).is_dir()
}

/// Makes the scope `unit` in `slice` with the process `pid`, which is in the scope afterwards. Blocks.
///
/// # Errors
/// systemd refuses, or does not answer. The process may be in the scope all the same then.
pub(super) fn start(unit: &str, slice: &str, pid: u32) -> Result<(), ScopeError> {
    let action = "make the scope";
    wait(action, unit, async {
        let connection = connect().await?;
        let properties: Properties<'_> = vec![
            ("Description", Variant::from(format!("pod of machinen, process {pid}"))),
            ("Slice", Variant::from(slice)),
            ("PIDs", Variant::from(vec![pid])),
            ("Delegate", Variant::from(true)),
            ("DefaultDependencies", Variant::from(false)),
            ("CollectMode", Variant::from("inactive-or-failed")),
            ("CPUAccounting", Variant::from(true)),
            ("IOAccounting", Variant::from(true)),
            ("MemoryAccounting", Variant::from(true)),
            ("TasksAccounting", Variant::from(true)),
            // Else systemd's DefaultTasksMax would limit a pod without a limit.
            ("TasksMax", Variant::from(INFINITY)),
        ];
        let begin = || {
            let properties = &properties;
            job(&connection, action, unit, move |manager| async move {
                manager.start_transient_unit(unit, "replace", properties, &[]).await
            })
        };
        match begin().await {
            // A pod whose shim was killed has left it, without processes, and systemd has not noticed that yet.
            Err(error) if error.is("org.freedesktop.systemd1.UnitExists") => {
                end(&connection, unit).await?;
                begin().await
            }
            result => result,
        }
    })
}

/// Tells systemd the limits that the kernel has got for the scope already. `weight` is the content of `cpu.weight`. Blocks.
///
/// # Errors
/// systemd refuses, or does not answer.
pub(super) fn limit(unit: &str, limits: &LinuxResources, weight: Option<u64>) -> Result<(), ScopeError> {
    let action = "limit the scope";
    let properties = properties(limits, weight);
    if properties.is_empty() {
        return Ok(());
    }
    wait(action, unit, async {
        let connection = connect().await?;
        let refused = |source| ScopeError::Refused { action, unit: unit.to_owned(), source };
        let manager = ManagerProxy::new(&connection).await.map_err(refused)?;
        manager.set_unit_properties(unit, true, &properties).await.map_err(refused)
    })
}

/// Removes the scope, from which all processes have gone, with its cgroup. Blocks.
///
/// # Errors
/// systemd refuses, or does not answer.
pub(super) fn stop(unit: &str) -> Result<(), ScopeError> {
    wait("remove the scope", unit, async { end(&connect().await?, unit).await })
}

async fn end(connection: &Connection, unit: &str) -> Result<(), ScopeError> {
    let action = "remove the scope";
    let stopped =
        job(connection, action, unit, |manager| async move { manager.stop_unit(unit, "replace").await });
    match stopped.await {
        // systemd removes a scope by itself when its last process has gone.
        Err(error) if error.is("org.freedesktop.systemd1.NoSuchUnit") => Ok(()),
        result => result,
    }
}

/// Asks for a job of systemd, and waits for its end.
async fn job<'c, F>(
    connection: &'c Connection,
    action: &'static str,
    unit: &str,
    ask: impl FnOnce(ManagerProxy<'c>) -> F,
) -> Result<(), ScopeError>
where
    F: Future<Output = zbus::Result<OwnedObjectPath>>,
{
    let refused = |source| ScopeError::Refused { action, unit: unit.to_owned(), source };
    let manager = ManagerProxy::new(connection).await.map_err(refused)?;
    // Before the job begins, because it may end before the answer with its name is here.
    let mut ends = manager.receive_job_removed().await.map_err(refused)?;
    let job = ask(manager).await.map_err(refused)?;
    while let Some(end) = ends.next().await {
        let end = end.args().map_err(refused)?;
        if end.job == job {
            return match end.result.as_str() {
                "done" => Ok(()),
                result => Err(ScopeError::Job { action, unit: unit.to_owned(), result: result.to_owned() }),
            };
        }
    }
    Err(refused(Error::Failure("the connection was closed".to_owned())))
}

/// What libcgroups has written, in systemd's words. The bounds of `limits` are those of `HostLimits`.
fn properties(limits: &LinuxResources, weight: Option<u64>) -> Properties<'static> {
    let mut properties: Properties<'static> = Vec::new();
    let mut set = |name: &'static str, value: Variant<'static>| properties.push((name, value));
    let number = |limit: i64| {
        Variant::from(u64::try_from(limit).ok().filter(|_| limit != i64::MAX).unwrap_or(INFINITY))
    };
    if let Some(memory) = limits.memory() {
        if let Some(limit) = memory.limit() {
            set("MemoryMax", number(limit));
        }
        // Memory and swap together in the specification, and swap alone in cgroups of version 2.
        if let (Some(both), Some(limit)) = (memory.swap(), memory.limit()) {
            set("MemorySwapMax", number(if both == i64::MAX { both } else { both - limit }));
        }
    }
    if let Some(cpu) = limits.cpu() {
        if let Some((quota, period)) = cpu.quota().zip(cpu.period()) {
            let each_second =
                u64::try_from(quota).map_or(INFINITY, |quota| quota.saturating_mul(SECOND) / period.max(1));
            set("CPUQuotaPerSecUSec", Variant::from(each_second));
            set("CPUQuotaPeriodUSec", Variant::from(period));
        }
        if let Some(weight) = weight.filter(|_| cpu.shares().is_some()) {
            set("CPUWeight", Variant::from(weight));
        }
        if let Some(cpus) = cpus::of(cpu).ok().flatten() {
            set("AllowedCPUs", Variant::from(mask(&cpus)));
        }
    }
    if let Some(limit) = limits.pids().as_ref().map(LinuxPids::limit) {
        set("TasksMax", number(limit));
    }
    properties
}

/// A bit for each CPU, the lowest first.
fn mask(cpus: &CpuSet) -> Vec<u8> {
    let mut mask = Vec::new();
    for cpu in cpus.numbers() {
        let byte = cpu as usize / 8;
        mask.resize(mask.len().max(byte + 1), 0);
        mask[byte] |= 1 << (cpu % 8);
    }
    mask
}

async fn connect() -> Result<Connection, ScopeError> {
    let bus = owner::user().map_or_else(Builder::system, |user| Builder::session().user_id(user));
    bus.build().await.map_err(ScopeError::Connect)
}

/// Runs a conversation with systemd from a thread for blocking calls.
fn wait(
    action: &'static str,
    unit: &str,
    conversation: impl Future<Output = Result<(), ScopeError>>,
) -> Result<(), ScopeError> {
    let bounded = Handle::current().block_on(async { timeout(DEADLINE, conversation).await });
    bounded.unwrap_or_else(|_| Err(ScopeError::Late { action, unit: unit.to_owned() }))
}

impl ScopeError {
    /// Whether systemd has answered with this error of D-Bus.
    fn is(&self, name: &str) -> bool {
        matches!(self, Self::Refused { source: Error::MethodError(found, ..), .. } if found.as_str() == name)
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxResources;
    use serde_json::json;

    use super::*;

    fn of(limits: serde_json::Value, weight: Option<u64>) -> Vec<(&'static str, Variant<'static>)> {
        properties(&serde_json::from_value::<LinuxResources>(limits).unwrap(), weight)
    }

    #[test]
    fn systemd_is_told_what_the_kernel_has() {
        let limits = json!({
            "memory": {"limit": 100, "swap": 150},
            "cpu": {"quota": 75_000, "period": 100_000, "shares": 512, "cpus": "0,9-10"},
            "pids": {"limit": 1024},
        });
        let expected = vec![
            ("MemoryMax", Variant::from(100_u64)),
            ("MemorySwapMax", Variant::from(50_u64)),
            ("CPUQuotaPerSecUSec", Variant::from(750_000_u64)),
            ("CPUQuotaPeriodUSec", Variant::from(100_000_u64)),
            ("CPUWeight", Variant::from(59_u64)),
            ("AllowedCPUs", Variant::from(vec![1_u8, 6])),
            ("TasksMax", Variant::from(1024_u64)),
        ];
        assert_eq!(of(limits, Some(59)), expected);
    }

    #[test]
    fn limits_that_are_removed_are_infinite() {
        let limits = json!({
            "memory": {"limit": i64::MAX, "swap": i64::MAX},
            "cpu": {"quota": -1, "period": 100_000},
            "pids": {"limit": -1},
        });
        let expected = vec![
            ("MemoryMax", Variant::from(INFINITY)),
            ("MemorySwapMax", Variant::from(INFINITY)),
            ("CPUQuotaPerSecUSec", Variant::from(INFINITY)),
            ("CPUQuotaPeriodUSec", Variant::from(100_000_u64)),
            ("TasksMax", Variant::from(INFINITY)),
        ];
        assert_eq!(of(limits, Some(100)), expected);
        assert_eq!(of(json!({}), Some(100)), vec![]);
    }
}
