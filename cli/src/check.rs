//! `machinen check`: whether and how this host can run VMs, and what is missing.

mod user;

use std::{error::Error, process::ExitCode};

use clap::Args;
use machinen::{
    accel::{self, AccelError, Accelerator},
    assets::Assets,
    config::Config,
    confined,
    error::chain,
    host_cgroup::HostCgroups,
    owner, pool,
    process::{Jail, ReservedUser, Spawn, SystemCalls, ToolOutput, find_program},
    rootdisk::{RootdiskCache, mke2fs_version},
    sys,
    vm::{ChannelKind, HostSupport, choose_channel, qemu_version, try_vhost},
};
use nix::unistd::geteuid;
use serde::Serialize;

use crate::rights;

const NAMESPACE: &str = "an ordinary user, as root of a user namespace";

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The result of one check.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    verdict: CheckVerdict,
    /// One sentence; if something is missing, it says what to do about that.
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum CheckVerdict {
    Ok,
    /// Containers can run, but slower or with fewer features.
    Note,
    /// No container can run.
    Missing,
}

/// Prints one line for each finding; fails when something is missing without which no container can run.
pub(crate) fn run(args: &CheckArgs, config: &Config) -> ExitCode {
    let findings = [
        user(),
        configuration(config),
        accelerator(config),
        qemu(config),
        mke2fs(config),
        assets(config),
        channel(config),
        network(config),
        outside(config),
        cgroup(),
        cache(config),
        warm_pool(config),
        jail(),
        landlock(),
    ];
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings).expect("plain data"));
    } else {
        for Finding { what, verdict, text } in &findings {
            let mark = match verdict {
                CheckVerdict::Ok => "ok",
                CheckVerdict::Note => "note",
                CheckVerdict::Missing => "MISSING",
            };
            println!("{mark:<9}{what:<10}{text}");
        }
    }
    match findings.iter().any(|finding| finding.verdict == CheckVerdict::Missing) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

fn found(what: &'static str, result: Result<String, impl Error + 'static>) -> Finding {
    match result {
        Ok(text) => Finding { what, verdict: CheckVerdict::Ok, text },
        Err(error) => Finding { what, verdict: CheckVerdict::Missing, text: chain(&error) },
    }
}

fn user() -> Finding {
    let (Some(user), Some(missing)) = (owner::user(), rights::missing()) else {
        return Finding { what: "user", verdict: CheckVerdict::Ok, text: "root".to_owned() };
    };
    let lacks = user::lacks(user);
    let (verdict, who) = match (geteuid().is_root(), lacks.is_empty()) {
        (false, _) => (CheckVerdict::Missing, missing),
        (true, true) => (CheckVerdict::Ok, NAMESPACE.to_owned()),
        (true, false) => (CheckVerdict::Note, NAMESPACE.to_owned()),
    };
    let text = [who].into_iter().chain(lacks).collect::<Vec<_>>().join("; ");
    Finding { what: "user", verdict, text }
}

/// The file that this configuration is from. The other findings are those of pods that have the same one.
fn configuration(config: &Config) -> Finding {
    let file = config.file.display();
    let text = match config.file.exists() {
        true => format!("that of {file}"),
        false => format!("all keys have their defaults, because {file} does not exist"),
    };
    let others = "handlers of containerd with another ConfigPath: MACHINEN_CONFIG=FILE machinen check";
    Finding { what: "config", verdict: CheckVerdict::Ok, text: format!("{text}; {others}") }
}

fn accelerator(config: &Config) -> Finding {
    let wanted = config.vm.accel;
    let verdict = accel::verdict_anew(owner::run_dir())
        .and_then(|verdict| Ok((verdict.choose(wanted)?, verdict.describe(wanted)?)));
    match verdict {
        Ok((Accelerator::Tcg { .. }, text)) => Finding { what: "accel", verdict: CheckVerdict::Note, text },
        verdict => found("accel", verdict.map(|(_, text)| text)),
    }
}

/// The accelerator of VMs, by what [`accelerator`] has found out.
fn chosen_accel(config: &Config) -> Result<Accelerator, AccelError> {
    accel::verdict(owner::run_dir())?.choose(config.vm.accel)
}

fn qemu(config: &Config) -> Finding {
    let version = qemu_version(&config.vm.qemu);
    found("qemu", version.map(|version| format!("{} is QEMU {version}", config.vm.qemu.display())))
}

fn mke2fs(config: &Config) -> Finding {
    let version = mke2fs_version(&config.rootdisk.mke2fs);
    found(
        "mke2fs",
        version.map(|version| format!("{} is version {version}", config.rootdisk.mke2fs.display())),
    )
}

fn assets(config: &Config) -> Finding {
    let assets = Assets::find(&config.assets.dir);
    found("guest", assets.map(|found| format!("{} and {}", found.kernel.display(), found.image.display())))
}

fn channel(config: &Config) -> Finding {
    let host = HostSupport::detect(&config.vm.vhost_device_vsock);
    // Without an accelerator no VM starts, which is a finding of its own.
    let accel = chosen_accel(config).unwrap_or(Accelerator::Kvm);
    let (verdict, text) = match choose_channel(config.vm.channel, accel, &host) {
        ChannelKind::KernelVsock => (CheckVerdict::Ok, "vsock by the host's kernel".to_owned()),
        ChannelKind::VhostUserVsock { daemon } => {
            (CheckVerdict::Ok, format!("vsock by {}", daemon.display()))
        }
        ChannelKind::Serial if accel != Accelerator::Kvm => (CheckVerdict::Ok, "serial port".to_owned()),
        ChannelKind::Serial => (
            CheckVerdict::Note,
            "serial port; `modprobe vhost_vsock` gives containers a faster one".to_owned(),
        ),
    };
    Finding { what: "channel", verdict, text }
}

/// What moves the packets of networks.
fn network(config: &Config) -> Finding {
    let wanted = config.vm.vhost_net_devices.min(config.vm.network_devices);
    let (verdict, text) = match (sys::tap::is_usable(), wanted, chosen_accel(config), try_vhost()) {
        (false, ..) => (
            CheckVerdict::Note,
            format!("containers have none, because {} cannot be opened", sys::tap::DEVICE),
        ),
        (true, 1.., Ok(Accelerator::Kvm), Ok(())) => {
            (CheckVerdict::Ok, "the host's kernel moves packets (vhost-net)".to_owned())
        }
        (true, 1.., Ok(Accelerator::Kvm), Err(error)) => (
            CheckVerdict::Note,
            format!(
                "QEMU moves packets, because /dev/vhost-net cannot be opened ({error}): `modprobe vhost_net`"
            ),
        ),
        (true, ..) => (CheckVerdict::Ok, "QEMU moves packets (vm.vhost_net_devices)".to_owned()),
    };
    Finding { what: "network", verdict, text }
}

/// Whether containers without a network namespace can be connected with the outside.
fn outside(config: &Config) -> Finding {
    let program = find_program(&config.network.pasta);
    let (verdict, text) = match program.is_file() {
        true => (
            CheckVerdict::Ok,
            format!("{} publishes ports (annotation io.machinen.ports)", program.display()),
        ),
        false => (
            CheckVerdict::Note,
            format!(
                "{} not found; with the Debian package passt, containers without a network namespace can have \
                 connections to the outside and published ports",
                config.network.pasta.display()
            ),
        ),
    };
    Finding { what: "pasta", verdict, text }
}

/// Whether clones are kept ready for the next starts.
fn warm_pool(config: &Config) -> Finding {
    let (size, reserve) = (config.pool.size, config.pool.memory_reserve_percent);
    let (verdict, text) = match (size, pool::has_room(config)) {
        (0, _) => (CheckVerdict::Note, "no clone is kept ready for the next start (pool.size)".to_owned()),
        (_, Ok(())) => (
            CheckVerdict::Ok,
            format!(
                "{size} kept ready while at least {reserve} % of the host's memory is available (pool.size, pool.memory_reserve_percent)"
            ),
        ),
        (_, Err(error)) => (CheckVerdict::Note, format!("no clone is kept ready: {}", chain(&error))),
    };
    Finding { what: "pool", verdict, text }
}

/// Runs a program with all restrictions that QEMU and the other child processes have.
fn jail() -> Finding {
    let tried = ReservedUser::reserve().map_err(|error| chain(&error)).and_then(|user| {
        let system_calls = Some(SystemCalls::basic());
        let jail = Jail { system_calls, ..Jail::strict(user.run_as(Vec::new())) };
        let ran = Spawn::new("/bin/true").jail(jail).run().and_then(ToolOutput::success);
        ran.map_err(|error| chain(&error))
    });
    let (verdict, text) = match tried {
        Ok(_) => (
            CheckVerdict::Ok,
            "child processes get users, roots, namespaces and system call filters of their own".to_owned(),
        ),
        Err(text) => (CheckVerdict::Missing, format!("child processes cannot be confined: {text}")),
    };
    Finding { what: "jail", verdict, text }
}

/// Tries what the threads that unpack a guest's bytes are kept from.
fn landlock() -> Finding {
    let (verdict, text) = match confined::holds() {
        Ok(true) => (CheckVerdict::Ok, "what guests send is unpacked by threads that reach no other file".to_owned()),
        Ok(false) => (
            CheckVerdict::Note,
            "not in this kernel (Linux 5.19, security module landlock); what guests send is unpacked without it".to_owned(),
        ),
        Err(error) => (CheckVerdict::Note, format!("threads cannot be restricted: {error}")),
    };
    Finding { what: "landlock", verdict, text }
}

fn cgroup() -> Finding {
    let (verdict, text) = match HostCgroups::detect() {
        Ok(found) if found.missing().is_empty() => (CheckVerdict::Ok, found.to_string()),
        Ok(found) => {
            let missing = found.missing().join(", ");
            (CheckVerdict::Note, format!("{found}; containers cannot have limits of {missing} on the host"))
        }
        Err(error) => (CheckVerdict::Note, format!("limits are not enforced on the host: {}", chain(&error))),
    };
    Finding { what: "cgroup", verdict, text }
}

fn cache(config: &Config) -> Finding {
    let opened = RootdiskCache::open(&config.rootdisk.dir);
    found("rootdisk", opened.map(|cache| format!("cache in {}", cache.dir().display())))
}
