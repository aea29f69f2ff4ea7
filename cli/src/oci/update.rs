//! `machinen update`: changes the limits of a container.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::Args;
use machinen::fs::FileError;
use serde_json::{Value, json};

use super::{
    client::MonitorClient,
    error::OciError,
    global::GlobalArgs,
    state::{ContainerStatus, StateDir},
};

/// Arguments of `machinen update`.
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// File with the OCI resources, in JSON, instead of the other options; - is stdin
    #[arg(long, short, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight of block I/O, 10 to 1000
    #[arg(long, value_name = "N")]
    blkio_weight: Option<u16>,
    /// Period of the CPU quota, microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_period: Option<u64>,
    /// CPU time in each period, microseconds; -1 is no limit
    #[arg(long, value_name = "MICROSECONDS", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// Weight of the container against others
    #[arg(long, value_name = "N", alias = "cpu-shares")]
    cpu_share: Option<u64>,
    /// CPU time by which a period may exceed the quota, microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_burst: Option<u64>,
    /// 1 lets the container run only when no other wants the CPU
    #[arg(long, value_name = "0|1", allow_negative_numbers = true)]
    cpu_idle: Option<i64>,
    /// CPUs that may be used, such as 0-2,4
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes that may be used
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Limit of memory, bytes or with a unit (k, m, g)
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory: Option<String>,
    /// Memory that is kept for the container, bytes or with a unit
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory_reservation: Option<String>,
    /// Limit of memory and swap together, bytes or with a unit; -1 is no limit
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// Largest number of processes; -1 is no limit
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    #[command(flatten)]
    unsupported: UnsupportedArgs,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Options of runc that are refused by name.
#[derive(Debug, Args)]
struct UnsupportedArgs {
    // No effect, as with runc: no kernel has these limits any more.
    #[arg(long, hide = true)]
    kernel_memory: Option<String>,
    #[arg(long, hide = true)]
    kernel_memory_tcp: Option<String>,
    #[arg(long, hide = true)]
    cpu_rt_period: Option<u64>,
    #[arg(long, hide = true, allow_negative_numbers = true)]
    cpu_rt_runtime: Option<i64>,
    #[arg(long, hide = true)]
    l3_cache_schema: Option<String>,
    #[arg(long, hide = true)]
    mem_bw_schema: Option<String>,
}

impl UnsupportedArgs {
    /// # Errors
    /// One of the options is given.
    fn refuse(&self) -> Result<(), OciError> {
        let real_time = "cgroups of version 2, which the guest has, give no time to real-time processes";
        let cache = "a guest cannot divide the caches and the memory bandwidth of the host's processors";
        for (given, what, reason) in [
            (self.cpu_rt_period.is_some(), "--cpu-rt-period", real_time),
            (self.cpu_rt_runtime.is_some(), "--cpu-rt-runtime", real_time),
            (self.l3_cache_schema.is_some(), "--l3-cache-schema", cache),
            (self.mem_bw_schema.is_some(), "--mem-bw-schema", cache),
        ] {
            if given {
                return Err(OciError::Unsupported { what, reason });
            }
        }
        Ok(())
    }
}

/// # Errors
/// The limits are not understood, or the container does not take them.
pub(super) async fn run(global: &GlobalArgs, args: &UpdateArgs) -> Result<(), OciError> {
    args.unsupported.refuse()?;
    let resources = match &args.resources {
        Some(path) => read(path)?,
        None => args.described()?,
    };
    let state = StateDir::find(&global.root, &args.id)?;
    let monitor = MonitorClient::running(&state).await?;
    match monitor.status().await? {
        status @ ContainerStatus::Stopped => Err(OciError::NotRunning { id: args.id.clone(), status }),
        _ => monitor.update(resources).await,
    }
}

fn read(path: &Path) -> Result<Vec<u8>, OciError> {
    let text = match path == Path::new("-") {
        true => io::read_to_string(io::stdin()).map(String::into_bytes),
        false => fs::read(path),
    };
    Ok(text.map_err(FileError::at("read", path))?)
}

impl UpdateArgs {
    /// The limits in the form of the runtime-spec (config-linux.md, "Control groups").
    fn described(&self) -> Result<Vec<u8>, OciError> {
        let mut resources = json!({});
        let mut set = |group: &str, name: &str, value: Option<Value>| {
            if let Some(value) = value {
                resources[group][name] = value;
            }
        };
        set("blockIO", "weight", self.blkio_weight.map(Value::from));
        set("cpu", "period", self.cpu_period.map(Value::from));
        set("cpu", "quota", self.cpu_quota.map(Value::from));
        set("cpu", "shares", self.cpu_share.map(Value::from));
        set("cpu", "burst", self.cpu_burst.map(Value::from));
        set("cpu", "idle", self.cpu_idle.map(Value::from));
        set("cpu", "cpus", self.cpuset_cpus.clone().map(Value::from));
        set("cpu", "mems", self.cpuset_mems.clone().map(Value::from));
        set("memory", "limit", bytes("--memory", self.memory.as_deref())?);
        set("memory", "reservation", bytes("--memory-reservation", self.memory_reservation.as_deref())?);
        set("memory", "swap", bytes("--memory-swap", self.memory_swap.as_deref())?);
        set("pids", "limit", self.pids_limit.map(Value::from));
        serde_json::to_vec(&resources).map_err(OciError::Encode)
    }
}

/// Reads a number of bytes, which may have a unit of 1024, as Docker's and runc's options have.
///
/// # Errors
/// The text is no such number.
pub(crate) fn bytes(what: &'static str, text: Option<&str>) -> Result<Option<Value>, OciError> {
    let Some(text) = text else { return Ok(None) };
    let lower = text.to_lowercase();
    let number = lower.trim_end_matches('b').trim_end_matches('i');
    let digits = number.trim_end_matches(['k', 'm', 'g', 't']);
    let shift = match &number[digits.len()..] {
        "" => Some(0),
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        "t" => Some(40),
        _ => None,
    };
    let value = digits.parse::<i64>().ok().zip(shift);
    let value = value.and_then(|(value, shift)| value.checked_mul(1 << shift)).filter(|value| *value >= -1);
    let takes = "bytes, with one of the units k, m, g and t if wanted";
    let wrong = || OciError::Argument { what, text: text.to_owned(), takes };
    value.map(|value| Some(Value::from(value))).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let read = |text| bytes("--memory", Some(text));
        for (text, value) in [
            ("-1", -1_i64),
            ("4096", 4096),
            ("1k", 1024),
            ("64M", 64 << 20),
            ("2GiB", 2 << 30),
            ("3mb", 3 << 20),
        ] {
            assert_eq!(read(text).unwrap(), Some(Value::from(value)), "{text}");
        }
        for text in ["", "m", "1mk", "1.5g", "-2", "99999999999t"] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains("--memory") && error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
