//! containerd's Task and Sandbox services on a [`Pod`]: the requests, the metrics, and the events that it reports; and the
//! services by which the command line inspects a pod and gives it secrets.
//!
//! The owner of a pod serves them on a socket: the shim, and the command line's monitor.
//!
//! [`Pod`]: machinen::pod::Pod

#![warn(missing_docs)]

mod checkpoint;
mod error;
pub mod events;
mod id;
mod inspection;
mod metrics;
pub mod options;
mod pod_config;
mod sandbox;
mod secrets;
mod service;
mod stand_in;
mod stdio;

use std::{collections::HashMap, sync::Arc};

use containerd_shim_protos::{
    sandbox_async::create_sandbox, shim_async::create_task, ttrpc::r#async::Service,
};
use machinen::pod::Pod;
use tokio::sync::Notify;

use api::{create_inspection, create_secrets};
use inspection::InspectionService;
use sandbox::SandboxService;
use secrets::SecretsService;
use service::TaskService;

/// Generated messages and the ttrpc services of `proto/inspection.proto` and `proto/secrets.proto`.
#[allow(
    clippy::all,
    clippy::allow_attributes,
    clippy::unwrap_used,
    missing_debug_implementations,
    missing_docs,
    rust_2018_idioms,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]
pub mod api {
    mod generated {
        include!(concat!(env!("OUT_DIR"), "/inspection/api.rs"));
    }
    pub use generated::inspection::*;
    pub use generated::inspection_ttrpc::{Inspection, InspectionClient, create_inspection};
    mod generated_secrets {
        include!(concat!(env!("OUT_DIR"), "/secrets/api.rs"));
    }
    pub use generated_secrets::secrets::{SecretValue, SetSecretsRequest, SetSecretsResponse};
    pub use generated_secrets::secrets_ttrpc::{Secrets, SecretsClient, create_secrets};
}

/// The name of the task API since containerd 2.0.
const TASK_V3: &str = "containerd.task.v3.Task";
/// The name of the same methods and messages in containerd 1.x.
const TASK_V2: &str = "containerd.task.v2.Task";

/// The task API of a pod under both of its names, the sandbox API, and the services for the command line ([`api`]). `ended`
/// is notified when containerd has requested a shutdown and no container is left, or a shutdown of the sandbox.
pub fn services(pod: Pod, ended: Arc<Notify>) -> HashMap<String, Service> {
    let inspection = create_inspection(Arc::new(InspectionService::new(pod.clone())));
    let secrets = create_secrets(Arc::new(SecretsService::new(pod.clone())));
    let sandbox = create_sandbox(Arc::new(SandboxService::new(pod.clone(), Arc::clone(&ended))));
    let service = TaskService::new(pod, ended);
    let mut services = create_task(Arc::new(service.clone()));
    let v2 = create_task(Arc::new(service)).remove(TASK_V3).map(|service| (TASK_V2.to_owned(), service));
    services.extend(v2);
    services.extend(sandbox);
    services.extend(inspection);
    services.extend(secrets);
    services
}
