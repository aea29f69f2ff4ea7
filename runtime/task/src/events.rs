//! Encodes the events of a pod as containerd's.

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::{
    api,
    events::task::{
        TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
        TaskPaused, TaskResumed, TaskStart,
    },
    topics,
};
use machinen::pod::{
    ProcessId,
    event::{CreatedContainer, PodEvent},
    rootfs::RootfsMount,
    stdio::StdioNames,
};
use protobuf::{
    MessageField,
    well_known_types::{any::Any, timestamp::Timestamp},
};

use crate::stdio;

/// The topic and the body of an event.
///
/// # Errors
/// The body cannot be encoded.
pub fn encode(event: PodEvent) -> (&'static str, protobuf::Result<Any>) {
    match event {
        PodEvent::Created(container) => (topics::TASK_CREATE_EVENT_TOPIC, any(&created(*container))),
        PodEvent::Started { id, pid } => {
            let body = TaskStart { container_id: id.into(), pid, ..Default::default() };
            (topics::TASK_START_EVENT_TOPIC, any(&body))
        }
        PodEvent::Paused { id } => (
            topics::TASK_PAUSED_EVENT_TOPIC,
            any(&TaskPaused { container_id: id.into(), ..Default::default() }),
        ),
        PodEvent::Resumed { id } => (
            topics::TASK_RESUMED_EVENT_TOPIC,
            any(&TaskResumed { container_id: id.into(), ..Default::default() }),
        ),
        PodEvent::Checkpointed { id, path } => {
            let checkpoint = path.display().to_string();
            let body = TaskCheckpointed { container_id: id.into(), checkpoint, ..Default::default() };
            (topics::TASK_CHECKPOINTED_EVENT_TOPIC, any(&body))
        }
        PodEvent::OutOfMemory { id } => {
            (topics::TASK_OOM_EVENT_TOPIC, any(&TaskOOM { container_id: id.into(), ..Default::default() }))
        }
        PodEvent::ExecAdded { id, exec } => {
            let body = TaskExecAdded { container_id: id.into(), exec_id: exec.into(), ..Default::default() };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, any(&body))
        }
        PodEvent::ExecStarted { id, exec, pid } => {
            let (container_id, exec_id) = (id.into(), exec.into());
            let body = TaskExecStarted { container_id, exec_id, pid, ..Default::default() };
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, any(&body))
        }
        PodEvent::Exited { process: ProcessId { container, exec }, pid, exit } => {
            let container_id = String::from(container);
            let body = TaskExit {
                id: exec.map_or_else(|| container_id.clone(), String::from),
                container_id,
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            };
            (topics::TASK_EXIT_EVENT_TOPIC, any(&body))
        }
        PodEvent::Deleted { id, pid, exit } => {
            let body = TaskDelete {
                container_id: id.to_string(),
                id: id.into(),
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            };
            (topics::TASK_DELETE_EVENT_TOPIC, any(&body))
        }
    }
}

fn created(container: CreatedContainer) -> TaskCreate {
    let CreatedContainer { id, pid, bundle, rootfs, stdio, checkpoint } = container;
    TaskCreate {
        container_id: id.into(),
        bundle: bundle.display().to_string(),
        rootfs: rootfs.into_iter().map(mount).collect(),
        io: MessageField::some(io(&stdio)),
        checkpoint: checkpoint.map(|path| path.display().to_string()).unwrap_or_default(),
        pid,
        ..Default::default()
    }
}

fn mount(mount: RootfsMount) -> api::Mount {
    api::Mount {
        type_: mount.kind,
        source: mount.source.display().to_string(),
        options: mount.options,
        ..Default::default()
    }
}

fn io(names: &StdioNames) -> TaskIO {
    TaskIO {
        stdin: stdio::name(names.stdin.as_ref()),
        stdout: stdio::name(names.stdout.as_ref()),
        stderr: stdio::name(names.stderr.as_ref()),
        terminal: names.terminal,
        ..Default::default()
    }
}

/// Packs a message under its bare full name, which is the name of events in containerd's registry of types
/// (containerd, typeurl).
pub fn any<M: protobuf::MessageFull>(message: &M) -> protobuf::Result<Any> {
    let type_url = M::descriptor().full_name().to_owned();
    Ok(Any { type_url, value: message.write_to_bytes()?, ..Default::default() })
}

/// Wall-clock time in protobuf's format; times before 1970 become 1970.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since.as_secs().try_into().unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().try_into().expect("less than a billion"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use machinen::pod::{ContainerId, ExecId, state::ProcessExit, stdio::StreamUri};
    use protobuf::Message;

    use super::*;

    #[test]
    fn an_exit_carries_the_names_containerd_looks_for() {
        let exit = ProcessExit { status: 137, at: UNIX_EPOCH + Duration::from_millis(1500) };
        let container = ContainerId::parse("c").unwrap();
        let added = container.exec(&ExecId::parse("e").unwrap());
        for (process, id) in [(container.init(), "c"), (added, "e")] {
            let (topic, body) = encode(PodEvent::Exited { process, pid: 7, exit });
            let body = body.unwrap();
            assert_eq!((topic, body.type_url.as_str()), ("/tasks/exit", "containerd.events.TaskExit"));
            let decoded = TaskExit::parse_from_bytes(&body.value).unwrap();
            let names = (decoded.id.as_str(), decoded.container_id.as_str());
            assert_eq!((names, decoded.exit_status), ((id, "c"), 137));
            assert_eq!((decoded.exited_at.seconds, decoded.exited_at.nanos), (1, 500_000_000));
        }
    }

    #[test]
    fn a_create_event_has_what_the_caller_asked_for() {
        let mount = RootfsMount {
            kind: "overlay".to_owned(),
            source: "overlay".into(),
            options: vec!["lowerdir=/l".to_owned()],
        };
        let (topic, body) = encode(PodEvent::Created(Box::new(CreatedContainer {
            id: ContainerId::parse("c").unwrap(),
            pid: 7,
            bundle: "/b".into(),
            rootfs: vec![mount],
            stdio: StdioNames {
                stdin: StreamUri::parse("stdin", "/in").ok(),
                terminal: true,
                ..StdioNames::default()
            },
            checkpoint: Some("/cp".into()),
        })));
        let decoded = TaskCreate::parse_from_bytes(&body.unwrap().value).unwrap();
        assert_eq!((topic, decoded.container_id.as_str(), decoded.pid), ("/tasks/create", "c", 7));
        assert_eq!((decoded.bundle.as_str(), decoded.checkpoint.as_str()), ("/b", "/cp"));
        assert_eq!((decoded.io.stdin.as_str(), decoded.io.terminal), ("/in", true));
        assert_eq!(
            (decoded.rootfs[0].type_.as_str(), &decoded.rootfs[0].options[..]),
            ("overlay", &["lowerdir=/l".to_owned()][..])
        );
    }
}
