//! Decodes containerd's checkpoint request, and the directory that a new container is restored from.
//!
//! All clients use runc's options. `ctr` of containerd 1.x, which knows the runtime runc but not this one,
//! uses the type name of the first shim; the fields are the same.

use std::path::PathBuf;

use containerd_shim_protos::{api::CheckpointTaskRequest, shim::oci::CheckpointOptions, ttrpc};
use machinen::{checkpoint::DumpOptions, pod::CheckpointRequest};
use protobuf::Message as _;

use crate::{error::invalid, options::RuntimeOptions};

const TYPES: [&str; 2] = ["containerd.runc.v1.CheckpointOptions", "containerd.linux.runc.CheckpointOptions"];
/// What runc does with the cgroups. Here a container always has a cgroup of its own, so the mode has no
/// effect.
const CGROUPS_MODES: [&str; 7] = ["", "ignore", "cg_none", "props", "soft", "full", "strict"];

/// # Errors
/// The options have another type, or ask for something that this version does not support.
pub(crate) fn decode(req: &CheckpointTaskRequest) -> ttrpc::Result<CheckpointRequest> {
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
    Ok(CheckpointRequest {
        path: req.path.clone().into(),
        also: path(&options.image_path),
        work: path(&options.work_path),
        exit: options.exit,
        options: DumpOptions {
            tcp_established: options.open_tcp,
            ext_unix_sk: options.external_unix_sockets,
            shell_job: options.terminal,
            file_locks: options.file_locks,
        },
    })
}

/// Returns the directory that a new container is restored from. containerd 2 sets the field `checkpoint` of the request
/// from runc's options (`criu_image_path`); earlier versions do so for runc only, and pass the options on.
pub(crate) fn restored_from(checkpoint: &str, options: RuntimeOptions) -> Option<PathBuf> {
    Some(checkpoint).filter(|dir| !dir.is_empty()).map(PathBuf::from).or(options.checkpoint)
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
    fn options_have_either_type_name_or_are_absent() {
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
    fn a_container_is_restored_from_the_directory_in_either_field() {
        let options =
            |dir: Option<&str>| RuntimeOptions { checkpoint: dir.map(Into::into), ..Default::default() };
        assert_eq!(restored_from("", options(Some("/o"))), Some("/o".into()));
        assert_eq!(restored_from("/c", options(Some("/o"))), Some("/c".into()));
        assert_eq!(restored_from("", options(None)), None);
    }

    #[test]
    fn invalid_options_are_refused() {
        let default = CheckpointOptions::default();
        let namespaces = CheckpointOptions { empty_namespaces: vec!["pid".to_owned()], ..Default::default() };
        let mode = CheckpointOptions { cgroups_mode: "odd".to_owned(), ..Default::default() };
        for (name, options) in [("x.Options", &default), (TYPES[0], &namespaces), (TYPES[0], &mode)] {
            assert!(decode(&request(name, options)).is_err(), "{options:?}");
        }
    }
}
