//! containerd's checkpoint request, and where a container is to go on from, decoded.
//!
//! runc's options are what every client knows. They come under their name of today, and from `ctr` of containerd 1.x,
//! which knows the runtime by name and this one not, under that of the first shim's; the fields are the same.

use std::path::PathBuf;

use containerd_shim_protos::{
    api::{CheckpointTaskRequest, CreateTaskRequest},
    shim::oci::{CheckpointOptions, Options as CreateOptions},
    ttrpc,
};
use machinen::{checkpoint::Options, pod::Checkpoint};
use protobuf::Message as _;

use crate::error::invalid;

const TYPES: [&str; 2] = ["containerd.runc.v1.CheckpointOptions", "containerd.linux.runc.CheckpointOptions"];
const CREATE_TYPE: &str = "containerd.runc.v1.Options";
/// What runc does with the cgroups: here a container has one of its own, whatever is asked for.
const CGROUPS_MODES: [&str; 7] = ["", "ignore", "cg_none", "props", "soft", "full", "strict"];

/// # Errors
/// Options of another kind, or that this version does not have.
pub fn decode(req: &CheckpointTaskRequest) -> ttrpc::Result<Checkpoint> {
    let options = match req.options.as_ref() {
        None => CheckpointOptions::default(),
        Some(any) if any.type_url.is_empty() => CheckpointOptions::default(),
        Some(any) => {
            let name = any.type_url.rsplit('/').next().unwrap_or_default();
            if !TYPES.contains(&name) {
                return invalid(format!("checkpoint options come as {}, not as {name:?}", TYPES[0]));
            }
            match CheckpointOptions::parse_from_bytes(&any.value) {
                Ok(options) => options,
                Err(error) => return invalid(format!("the checkpoint options cannot be decoded: {error}")),
            }
        }
    };
    if let Some(kind) = options.empty_namespaces.iter().find(|kind| *kind != "network") {
        return invalid(format!("namespace {kind:?} cannot be emptied; network can"));
    }
    if !CGROUPS_MODES.contains(&options.cgroups_mode.as_str()) {
        return invalid(format!("cgroups mode {:?} is unknown", options.cgroups_mode));
    }
    let path = |path: &str| Some(path).filter(|path| !path.is_empty()).map(Into::into);
    Ok(Checkpoint {
        path: req.path.clone().into(),
        also: path(&options.image_path),
        work: path(&options.work_path),
        exit: options.exit,
        options: Options {
            tcp_established: options.open_tcp,
            ext_unix_sk: options.external_unix_sockets,
            shell_job: options.terminal,
            file_locks: options.file_locks,
        },
    })
}

/// The directory that a new container goes on from. containerd 2 tells what its client names in runc's options
/// (`criu_image_path`); earlier ones do so for runc only, and hand the options on.
///
/// # Errors
/// Options that cannot be decoded.
pub fn restored_from(req: &CreateTaskRequest) -> ttrpc::Result<Option<PathBuf>> {
    let named = |dir: &str| Some(dir).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let options = req.options.as_ref().filter(|any| any.type_url.rsplit('/').next() == Some(CREATE_TYPE));
    let (None, Some(any)) = (named(&req.checkpoint), options) else { return Ok(named(&req.checkpoint)) };
    match CreateOptions::parse_from_bytes(&any.value) {
        Ok(options) => Ok(named(&options.criu_image_path)),
        Err(error) => invalid(format!("the task options cannot be decoded: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use protobuf::{MessageField, well_known_types::any::Any};

    use super::*;

    fn request(type_url: &str, options: &CheckpointOptions) -> CheckpointTaskRequest {
        let options = Any {
            type_url: type_url.to_owned(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        };
        CheckpointTaskRequest {
            path: "/p".to_owned(),
            options: MessageField::some(options),
            ..Default::default()
        }
    }

    #[test]
    fn options_come_under_either_name_or_not_at_all() {
        let options = CheckpointOptions {
            exit: true,
            open_tcp: true,
            image_path: "/i".to_owned(),
            ..Default::default()
        };
        for name in TYPES {
            let decoded = decode(&request(name, &options)).unwrap();
            assert!(decoded.exit && decoded.options.tcp_established && !decoded.options.file_locks);
            assert_eq!((decoded.path, decoded.also), ("/p".into(), Some("/i".into())));
        }
        let none = CheckpointTaskRequest { path: "/p".to_owned(), ..Default::default() };
        let decoded = decode(&none).unwrap();
        assert!(!decoded.exit && decoded.also.is_none());
    }

    #[test]
    fn a_container_goes_on_from_what_either_field_names() {
        let options = CreateOptions { criu_image_path: "/o".to_owned(), ..Default::default() };
        let request = |checkpoint: &str, type_url: &str, value: Vec<u8>| CreateTaskRequest {
            checkpoint: checkpoint.to_owned(),
            options: MessageField::some(Any { type_url: type_url.to_owned(), value, ..Default::default() }),
            ..Default::default()
        };
        let bytes = options.write_to_bytes().unwrap();
        assert_eq!(restored_from(&request("", CREATE_TYPE, bytes.clone())).unwrap(), Some("/o".into()));
        assert_eq!(restored_from(&request("/c", CREATE_TYPE, bytes)).unwrap(), Some("/c".into()));
        assert_eq!(restored_from(&request("", "x.Options", vec![0xff])).unwrap(), None);
        assert_eq!(restored_from(&CreateTaskRequest::default()).unwrap(), None);
        assert!(restored_from(&request("", CREATE_TYPE, vec![0xff])).is_err());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let default = CheckpointOptions::default();
        let namespaces = CheckpointOptions { empty_namespaces: vec!["pid".to_owned()], ..Default::default() };
        let mode = CheckpointOptions { cgroups_mode: "odd".to_owned(), ..Default::default() };
        for (name, options) in [("x.Options", &default), (TYPES[0], &namespaces), (TYPES[0], &mode)] {
            assert!(decode(&request(name, options)).is_err(), "{options:?}");
        }
    }
}
