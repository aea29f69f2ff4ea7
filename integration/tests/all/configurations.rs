//! A configuration of machinen that a client names for its containers, in the place of the host's.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api,
    protobuf::{Message as _, MessageField, well_known_types::any::Any},
};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    ctr::Run,
    setup::{Setup, Value},
    shim::{Client, Shim, V3},
};
use ttrpc::Code;

use crate::{
    fork::{fork, sh},
    harness::{IMAGE, fails_saying, on_every_containerd, on_newest_containerd, works},
    shim::fill,
};

on_every_containerd!(the_file_that_a_client_names, files_that_cannot_be_used);
on_newest_containerd!(
    a_fork_has_the_configuration_of_its_source,
    every_form_of_start,
    a_create_that_names_another_file,
    info_of_a_handler,
);

/// Less than the host's configuration gives a VM.
const MEMORY_MIB: u64 = 300;

/// The kernel of a VM with that memory sees less of it, and that of another VM more.
const MOST_KIB: u64 = MEMORY_MIB << 10;

fn small() -> Setup {
    Setup::new().set("vm", "memory_mib", Value::number(MEMORY_MIB))
}

/// What the command line calls a container; other containerds of the host may have one with the same id.
fn known(containerd: &Containerd, id: &str) -> String {
    format!("{}/{id}", containerd.namespace())
}

fn with<'a>(run: Run<'a>, file: &Path) -> Run<'a> {
    run.flag("--runtime-config-path").flag(file)
}

/// The memory of the VM in which a command runs, KiB.
const MEMORY: &str = "awk '/^MemTotal/ { print $2 }' /proc/meminfo";

fn is_small(kib: &str) -> Result<bool> {
    let kib: u64 = kib.trim().parse().with_context(|| format!("odd memory {kib:?}"))?;
    Ok(kib < MOST_KIB)
}

fn the_file_that_a_client_names(containerd: &mut Containerd) -> Result<()> {
    let file = containerd.configuration("small.toml", &small())?;
    let command = ["sh", "-c", MEMORY];
    let memory = with(containerd.run(IMAGE, &command), &file).ok()?;
    ensure!(is_small(&memory)?, "the file has no effect: {memory}");
    let memory = containerd.run(IMAGE, &command).ok()?;
    ensure!(!is_small(&memory)?, "the file has an effect on others: {memory}");

    // What is there says which configuration it has, whatever the command line has.
    let run = with(containerd.run(IMAGE, &["sleep", "1000"]), &file).detached().flag("--null-io");
    run.ok()?;
    let debug = containerd.machinen(&["debug", &known(containerd, run.container())])?.run()?.ok()?.text();
    ensure!(debug.contains(&format!("configuration {}\n", file.display())), "{debug}");
    let check = containerd.machinen(&["check"])?.env("MACHINEN_CONFIG", &file).run()?.text();
    ensure!(check.contains(&format!("that of {}", file.display())), "{check}");
    containerd.task(run.container()).kill()?;
    containerd.task(run.container()).delete(137)
}

fn files_that_cannot_be_used(containerd: &mut Containerd) -> Result<()> {
    let run = |file: &Path| with(containerd.run(IMAGE, &["echo", "well"]), file);
    let file = containerd.root().join("odd.toml");
    let named = file.display().to_string();
    fails_saying(containerd, &run(&file), &["cannot read the configuration file", &named, "No such file"])?;
    fs::create_dir(&file)?;
    fails_saying(containerd, &run(&file), &["cannot read the configuration file", &named, "directory"])?;
    fs::remove_dir(&file)?;
    fs::write(&file, "[vm]\nmemory = 300\n")?;
    fails_saying(containerd, &run(&file), &[&named, "is not valid", "unknown field `memory`"])?;
    fs::write(&file, "[vm\n")?;
    fails_saying(containerd, &run(&file), &[&named, "is not valid"])?;
    fails_saying(containerd, &run(Path::new("odd.toml")), &["\"odd.toml\" is not absolute"])?;
    works(containerd)?;
    containerd.configuration("odd.toml", &Setup::new())?;
    let printed = run(&file).ok()?;
    ensure!(printed == "well\n", "the corrected file: {printed}");
    Ok(())
}

fn a_fork_has_the_configuration_of_its_source(containerd: &mut Containerd) -> Result<()> {
    let file = containerd.configuration("small.toml", &small())?;
    let source = with(containerd.run(IMAGE, &["sleep", "1000"]), &file).detached().flag("--null-io");
    source.ok()?;
    let (source, new) = (source.container().to_owned(), containerd.new_id());
    fork(containerd, &[&source, &new])?;
    let memory = sh(containerd, &new, MEMORY)?;
    ensure!(is_small(&memory)?, "the fork has another VM: {memory}");
    let debug = containerd.machinen(&["debug", &known(containerd, &new)])?.run()?.ok()?.text();
    ensure!(debug.contains(&format!("configuration {}\n", file.display())), "{debug}");
    for id in [source, new] {
        containerd.task(&id).kill()?;
        containerd.task(&id).delete(137)?;
    }
    Ok(())
}

/// A field of a protobuf message whose content is bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).expect("a short field");
    let long = if length < 0x80 { vec![length] } else { vec![length | 0x80, 1] };
    [&[number << 3 | 2], &long[..], bytes].concat()
}

/// The options that name a file, in an Any.
fn options(file: &Path) -> Any {
    Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value: field(2, file.as_os_str().as_encoded_bytes()),
        ..Default::default()
    }
}

/// What containerd 2.3 and newer write.
fn bootstrap(shim: &Shim<'_>, namespace: &str, options: Option<Any>) -> Result<Vec<u8>> {
    let extension = options.map(|options| Ok::<_, anyhow::Error>(field(1, &options.write_to_bytes()?)));
    let extension = extension.transpose()?.map(|extension| field(8, &extension)).unwrap_or_default();
    // The third is the level of the log.
    Ok([field(1, shim.id.as_bytes()), field(2, namespace.as_bytes()), vec![3 << 3, 4], extension].concat())
}

/// The configuration that the server of a shim has in its environment.
fn configuration(shim: &Shim<'_>) -> Result<String> {
    let pid = fs::read_to_string(shim.bundle.join("shim.pid"))?;
    let environment = fs::read_to_string(format!("/proc/{}/environ", pid.trim()))?;
    let mut variables = environment.split('\0');
    let named = variables.find_map(|variable| variable.strip_prefix("MACHINEN_CONFIG="));
    Ok(named.context("no configuration")?.to_owned())
}

fn every_form_of_start(containerd: &mut Containerd) -> Result<()> {
    let (file, hosts) =
        (containerd.configuration("small.toml", &small())?, containerd.root().join("machinen.toml"));
    let namespace = containerd.namespace();
    // runc's options with systemd_cgroup, as nerdctl sends them to every runtime.
    let runc = [field(1, b"containerd.runc.v1.Options"), field(2, &[8 << 3, 1])].concat();
    let forms = |shim: &Shim<'_>| {
        Ok::<_, anyhow::Error>([
            (options(&file).write_to_bytes()?, &file),
            (bootstrap(shim, namespace, Some(options(&file)))?, &file),
            (bootstrap(shim, namespace, None)?, &hosts),
            (runc.clone(), &hosts),
            (Vec::new(), &hosts),
        ])
    };
    for place in 0..5 {
        let shim = Shim::new(containerd)?;
        let (input, wanted) = forms(&shim)?[place].clone();
        let printed = shim.start_with(&input)?;
        ensure!(printed.status == 0 && printed.stderr.is_empty(), "form {place}: {printed:?}");
        let found = configuration(&shim)?;
        ensure!(Path::new(&found) == wanted, "form {place} has the configuration {found}");
        let address = String::from_utf8(printed.stdout)?;
        shim.shut_down(&Client::connect(address.trim(), V3)?)?;
    }
    // Refusals leave nothing but the caller's log, and the next attempt works.
    let shim = Shim::new(containerd)?;
    let missing = containerd.root().join("missing.toml");
    let body = Any { value: field(3, b"NoPivotRoot = true\n"), ..options(&missing) };
    for (input, words) in [
        (options(&missing).write_to_bytes()?, missing.to_str().context("odd path")?),
        (bootstrap(&shim, namespace, Some(options(&missing)))?, missing.to_str().context("odd path")?),
        (body.write_to_bytes()?, "\"NoPivotRoot = true\", without a ConfigPath"),
        (vec![0xff], "cannot be decoded"),
    ] {
        let printed = shim.start_with(&input)?;
        ensure!(printed.status != 0 && printed.stdout.is_empty(), "{printed:?}");
        ensure!(printed.stderr.contains(words), "{words:?} is missing: {printed:?}");
        let left: Vec<_> = fs::read_dir(&shim.bundle)?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.len() == 2, "left: {left:?}");
    }
    shim.shut_down(&Client::connect(&shim.serve()?, V3)?)
}

/// It is refused before anything is made, and the shim takes the next request.
fn a_create_that_names_another_file(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let file = containerd.configuration("small.toml", &small())?;
    let other = containerd.root().join("other.toml");
    let shim = Shim::new(containerd)?;
    fill(&shim, &rootfs, &["true"])?;
    let printed = shim.start_with(&options(&file).write_to_bytes()?)?;
    ensure!(printed.status == 0 && printed.stderr.is_empty(), "{printed:?}");
    let client = Client::connect(String::from_utf8(printed.stdout)?.trim(), V3)?;
    let request = |file: &Path| api::CreateTaskRequest {
        options: MessageField::some(options(file)),
        ..shim.create_request()
    };
    let (code, message) = client.refused("Create", &request(&other))?;
    let named = [&file, &other].iter().all(|file| message.contains(&file.display().to_string()));
    ensure!(code == Code::INVALID_ARGUMENT && named, "{code:?}: {message}");
    client.ok::<api::CreateTaskResponse>("Create", &request(&file))?;
    let delete = api::DeleteRequest { id: shim.id.clone(), ..Default::default() };
    client.ok::<api::DeleteResponse>("Delete", &delete)?;
    shim.shut_down(&client)
}

/// What runs the guests depends on the configuration.
fn info_of_a_handler(containerd: &mut Containerd) -> Result<()> {
    let shim = Shim::new(containerd)?;
    let file = containerd.configuration("odd.toml", &Setup::new().set("vm", "accel", Value::text("odd")))?;
    for (input, is_named) in [(options(&file).write_to_bytes()?, true), (Vec::new(), false)] {
        let (printed, info) = shim.info_with(&input)?;
        ensure!(printed.status == 0 && printed.stderr.is_empty(), "{printed:?}");
        let accelerator = info.annotations.get("io.machinen.accelerator").context("no accelerator")?;
        ensure!(accelerator.contains(&file.display().to_string()) == is_named, "{accelerator}");
    }
    Ok(fs::remove_dir_all(&shim.bundle)?)
}
