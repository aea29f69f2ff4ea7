//! containerd's Task service on a [`Pod`]: the requests, the metrics, and the events that it reports.
//!
//! The owner of a pod serves it on a socket: today the shim.
//!
//! [`Pod`]: machinen::pod::Pod

#![warn(missing_docs)]

mod checkpoint;
mod error;
pub mod events;
mod id;
mod metrics;
mod service;
mod stand_in;
mod stdio;

use std::{collections::HashMap, sync::Arc};

use containerd_shim_protos::{shim_async::create_task, ttrpc::r#async::Service};
use machinen::pod::Pod;
use tokio::sync::Notify;

use service::TaskService;

/// The name of the task API since containerd 2.0.
const TASK_V3: &str = "containerd.task.v3.Task";
/// The name of the same methods and messages in containerd 1.x.
const TASK_V2: &str = "containerd.task.v2.Task";

/// The task API of a pod under both of its names. `ended` is notified when containerd has requested a shutdown and no
/// container is left.
pub fn services(pod: Pod, ended: Arc<Notify>) -> HashMap<String, Service> {
    let service = TaskService::new(pod, ended);
    let mut services = create_task(Arc::new(service.clone()));
    let v2 = create_task(Arc::new(service)).remove(TASK_V3).map(|service| (TASK_V2.to_owned(), service));
    services.extend(v2);
    services
}
