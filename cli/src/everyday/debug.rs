//! `machinen debug`: all that is known of a pod, for a person who looks for the cause of a trouble.
//!
//! Each part is asked for by itself, and one that cannot be had says why: a guest that does not answer is the usual reason
//! to look.

use clap::Args;
use machinen::text::printable;

use super::{console, top};
use crate::{
    find::{self, FindError, FoundContainer, PodClient, age_of, memory_of},
    oci::GlobalArgs,
    text::{duration, human},
};

/// Arguments of `machinen debug`.
#[derive(Debug, Args)]
pub(crate) struct DebugArgs {
    /// Id or name of a pod or of one of its containers, or the beginning of the id
    #[arg(value_name = "POD")]
    container: String,
}

/// # Errors
/// The container does not exist, or stdout cannot be written.
pub(super) async fn run(global: &GlobalArgs, args: &DebugArgs) -> Result<(), FindError> {
    let meant = find::one(global, &args.container).await?;
    let mut pod = find::all(global).await?;
    pod.retain(|container| container.socket == meant.socket);
    print_vm(&meant);
    print_configuration(&meant).await;
    for container in &pod {
        print_container(container).await;
    }
    println!("\nconsole of the guest:");
    if let Err(error) = console::print_last(&meant).await {
        println!("  {}", machinen::error::chain(&error));
    }
    Ok(())
}

fn print_vm(container: &FoundContainer) {
    match container.vm {
        Some(vm) => {
            let used = memory_of(vm.pid).map_or_else(|| "-".to_owned(), |memory| human(memory.pss));
            let most = human(u64::from(vm.memory_mib) << 20);
            let age = age_of(vm.pid).map_or_else(|| "-".to_owned(), duration);
            println!("VM: pid {}, {used} of {most}, {} vCPUs, since {age}", vm.pid, vm.vcpus);
        }
        None => println!("VM: there is none, or its owner does not answer"),
    }
    println!("owner listens at {}", container.socket.0.display());
}

/// The file of the configuration that the pod was started with; `-` if its owner does not answer.
async fn print_configuration(container: &FoundContainer) {
    let described = match PodClient::connect(&container.socket) {
        Ok(pod) => pod.describe().await,
        Err(error) => Err(error),
    };
    let file = described.map(|pod| pod.config).unwrap_or_default();
    println!("configuration {}", if file.is_empty() { "-".to_owned() } else { printable(&file) });
}

async fn print_container(container: &FoundContainer) {
    let text = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), printable);
    println!("\ncontainer {}", printable(&container.id));
    println!("  name {}, image {}", text(&container.name), text(&container.image));
    println!("  {}, pid on the host {}", printable(&container.status), container.pid);
    println!("  bundle {}", container.bundle.display());
    if let Some(problem) = &container.problem {
        println!("  {}", printable(problem));
    }
    if let Err(error) = print_use(container).await {
        println!("  {}", machinen::error::chain(&error));
    }
}

async fn print_use(container: &FoundContainer) -> Result<(), FindError> {
    let pod = PodClient::connect(&container.socket)?;
    let metrics = pod.metrics(&container.id).await?;
    let cpu = metrics.cpu.usage_usec as f64 / 1e6;
    let (memory, killed) = (&metrics.memory, metrics.memory_events.oom_kill);
    let most = if memory.usage_limit == u64::MAX { "-".to_owned() } else { human(memory.usage_limit) };
    println!(
        "  CPU time {cpu:.2}s, memory {} of {most}, {killed} killed for lack of memory",
        human(memory.usage)
    );
    for interface in &metrics.network {
        let (received, sent) = (human(interface.rx_bytes), human(interface.tx_bytes));
        println!("  {}: {received} received, {sent} sent", printable(&interface.name));
    }
    let listed = pod.processes(&container.id).await?;
    top::table(&listed).lines().for_each(|line| println!("  {line}"));
    Ok(())
}
