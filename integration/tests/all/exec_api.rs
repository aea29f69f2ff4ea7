//! Exec, terminals and stdin in the task API, without containerd's client.

use std::{fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt};

use anyhow::{Result, ensure};
use containerd_shim_protos::{api, protobuf::MessageField};
use machinen_integration::{containerd::Containerd, served::Served};
use nix::{sys::stat::Mode, unistd::mkfifo};
use ttrpc::Code;

use crate::harness::on_newest_containerd;

on_newest_containerd!(
    states_and_refusals,
    stdin_is_closed_by_close_io,
    created_processes_do_not_delay_the_end
);

fn states_and_refusals(containerd: &mut Containerd) -> Result<()> {
    let served = Served::idle(containerd)?;
    let Served { client, pid, .. } = &served;
    let refused = |method: &str, code: Code, refusal: (Code, String)| {
        ensure!(refusal.0 == code, "{method} answers {refusal:?} instead of {code:?}");
        Ok(())
    };
    let sleep = served.exec("e", &["sleep", "1000"]);
    client.ok::<api::Empty>("Exec", &sleep)?;
    served.is("e", api::Status::CREATED, 0)?;
    refused("Exec", Code::ALREADY_EXISTS, client.refused("Exec", &sleep)?)?;
    refused("Exec", Code::INVALID_ARGUMENT, client.refused("Exec", &served.exec("", &["true"]))?)?;
    refused("Exec", Code::INVALID_ARGUMENT, client.refused("Exec", &served.exec("x", &[]))?)?;
    let nonsense = api::ExecProcessRequest { spec: MessageField::none(), ..served.exec("x", &["true"]) };
    refused("Exec", Code::INVALID_ARGUMENT, client.refused("Exec", &nonsense)?)?;
    refused("Kill", Code::FAILED_PRECONDITION, client.refused("Kill", &served.kill("e", 9))?)?;
    let started: api::StartResponse = client.ok("Start", &served.start("e"))?;
    ensure!(started.pid == *pid, "{started:?} instead of the container's {pid}");
    served.is("e", api::Status::RUNNING, *pid)?;
    refused("Start", Code::FAILED_PRECONDITION, client.refused("Start", &served.start("e"))?)?;
    refused("Delete", Code::FAILED_PRECONDITION, client.refused("Delete", &served.delete("e"))?)?;
    let resize = api::ResizePtyRequest {
        id: served.shim.id.clone(),
        exec_id: "e".to_owned(),
        width: 80,
        height: 25,
        ..Default::default()
    };
    refused("ResizePty", Code::FAILED_PRECONDITION, client.refused("ResizePty", &resize)?)?;
    client.ok::<api::Empty>("Kill", &served.kill("e", 15))?;
    let exit = served.wait("e")?;
    ensure!(exit.exit_status == 143 && exit.exited_at.seconds > 1_700_000_000, "{exit:?}");
    served.is("e", api::Status::STOPPED, *pid)?;
    refused("Kill", Code::NOT_FOUND, client.refused("Kill", &served.kill("e", 9))?)?;
    let deleted: api::DeleteResponse = client.ok("Delete", &served.delete("e"))?;
    ensure!(deleted.exit_status == 143 && deleted.pid == *pid, "{deleted:?}");
    for (method, refusal) in [
        ("Start", client.refused("Start", &served.start("e"))?),
        ("Kill", client.refused("Kill", &served.kill("e", 9))?),
        ("Delete", client.refused("Delete", &served.delete("e"))?),
        (
            "State",
            client.refused(
                "State",
                &api::StateRequest {
                    id: served.shim.id.clone(),
                    exec_id: "e".to_owned(),
                    ..Default::default()
                },
            )?,
        ),
    ] {
        refused(method, Code::NOT_FOUND, refusal)?;
    }
    // A process that cannot be executed has ended without having run.
    for (command, status) in [("no-such-command", 127), ("/bin/not-executable", 126)] {
        client.ok::<api::Empty>("Exec", &served.exec("e", &[command]))?;
        client.refused("Start", &served.start("e"))?;
        ensure!(served.wait("e")?.exit_status == status, "{command} ends with {:?}", served.wait("e")?);
        let deleted: api::DeleteResponse = client.ok("Delete", &served.delete("e"))?;
        ensure!(deleted.exit_status == status, "{deleted:?}");
    }
    // The init is not affected by any of this, and a signal to all reaches every process.
    client.ok::<api::Empty>("Exec", &sleep)?;
    client.ok::<api::StartResponse>("Start", &served.start("e"))?;
    served.is("", api::Status::RUNNING, *pid)?;
    client.ok::<api::Empty>("Kill", &api::KillRequest { all: true, ..served.kill("", 9) })?;
    ensure!(served.wait("e")?.exit_status == 137 && served.wait("")?.exit_status == 137, "not killed");
    refused("Exec", Code::FAILED_PRECONDITION, client.refused("Exec", &served.exec("f", &["true"]))?)?;
    client.ok::<api::DeleteResponse>("Delete", &served.delete(""))?;
    served.shim.shut_down(client)
}

fn stdin_is_closed_by_close_io(containerd: &mut Containerd) -> Result<()> {
    let served = Served::idle(containerd)?;
    let client = &served.client;
    let stdin = served.shim.bundle.join("stdin");
    mkfifo(&stdin, Mode::S_IRWXU)?;
    let script = "n=$(cat | wc -c); exit $n";
    let request = api::ExecProcessRequest {
        stdin: stdin.display().to_string(),
        ..served.exec("e", &["sh", "-c", script])
    };
    client.ok::<api::Empty>("Exec", &request)?;
    client.ok::<api::StartResponse>("Start", &served.start("e"))?;
    for text in ["four", "and", "five"] {
        // Writers come and go; only CloseIO closes stdin.
        OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&stdin)?
            .write_all(text.as_bytes())?;
    }
    served.is("e", api::Status::RUNNING, served.pid)?;
    let close = api::CloseIORequest {
        id: served.shim.id.clone(),
        exec_id: "e".to_owned(),
        stdin: true,
        ..Default::default()
    };
    client.ok::<api::Empty>("CloseIO", &close)?;
    let exit = served.wait("e")?;
    ensure!(exit.exit_status == 11, "{exit:?}");
    client.ok::<api::DeleteResponse>("Delete", &served.delete("e"))?;
    served.end()
}

fn created_processes_do_not_delay_the_end(containerd: &mut Containerd) -> Result<()> {
    let served = Served::idle(containerd)?;
    let client = &served.client;
    client.ok::<api::Empty>("Exec", &served.exec("e", &["true"]))?;
    let deleted: api::DeleteResponse = client.ok("Delete", &served.delete("e"))?;
    ensure!(deleted.exit_status == 0 && deleted.pid == 0, "{deleted:?}");
    // Neither a process that was not started nor one that has ended prevents the container's end.
    client.ok::<api::Empty>("Exec", &served.exec("e", &["true"]))?;
    client.ok::<api::Empty>("Exec", &served.exec("f", &["true"]))?;
    client.ok::<api::StartResponse>("Start", &served.start("f"))?;
    served.wait("f")?;
    served.end()
}
