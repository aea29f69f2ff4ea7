//! The guest kernel's answers to programs: system calls, 32-bit programs, packet filters, network devices,
//! and which of its device events a container receives.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::{DeleteResponse, Empty};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    paths,
    process::{Invocation, Output},
    served::Served,
    setup::{Setup, Value as Toml},
};
use serde_json::json;

use crate::{
    checkpoint::request,
    harness::{self, NEWEST, on_newest_containerd},
};

on_newest_containerd!(
    what_programs_look_for,
    a_program_of_32_bit,
    no_socket_leads_to_the_host,
    network_devices,
    events_of_the_vms_own_disks_are_hidden,
);

const CALLS: (&str, &str) = ("calls.py", include_str!("kernel/calls.py"));
const DEVICES: (&str, &str) = ("devices.py", include_str!("kernel/devices.py"));
const EVENTS: (&str, &str) = ("events.py", include_str!("kernel/events.py"));
const VSOCK: (&str, &str) = ("vsock.py", include_str!("kernel/vsock.py"));
const LINKS: (&str, &str) = ("links.py", include_str!("kernel/links.py"));

/// A specification that runs the first of the scripts, with the rights that administrators have.
fn script(
    containerd: &Containerd,
    scripts: &[(&str, &str)],
    arguments: &[&str],
) -> Result<(Bundle, PathBuf)> {
    let bundle = Bundle::with_workloads(containerd)?;
    for (name, text) in scripts {
        fs::write(bundle.rootfs().join(name), text)?;
    }
    let (name, _) = scripts.first().context("no script")?;
    let path = format!("/{name}");
    let command = [&["python3.13", path.as_str()], arguments].concat();
    let config = bundle.config(&command, |spec| {
        let process = &mut spec["process"];
        process["env"] = json!(["PATH=/usr/bin:/bin", "LC_ALL=C", "PYTHONDONTWRITEBYTECODE=1"]);
        let rights = process["capabilities"].as_object_mut().expect("an object");
        for list in rights.values_mut() {
            let list = list.as_array_mut().expect("an array");
            list.extend(
                ["NET_ADMIN", "NET_RAW", "SYS_ADMIN", "MKNOD"].map(|name| format!("CAP_{name}").into()),
            );
        }
        spec["linux"]["resources"] = json!({ "devices": [{ "allow": true, "access": "rwm" }] });
    })?;
    Ok((bundle, config))
}

fn what_programs_look_for(containerd: &mut Containerd) -> Result<()> {
    let (_bundle, config) = script(containerd, &[CALLS], &[])?;
    let output = containerd.run_spec(&config).output()?;
    ensure!(output.text() == "asked\n", "not there: {output}");
    Ok(())
}

/// `vm.io_uring` of the configuration.
#[test]
fn io_uring_can_be_turned_off() {
    let setup = Setup::new().set("vm", "io_uring", Toml::flag(false));
    harness::run_with(NEWEST, &setup, |containerd| {
        let (_bundle, config) = script(containerd, &[CALLS], &["io_uring", "pidfd"])?;
        let output = containerd.run_spec(&config).output()?;
        ensure!(output.text() == "io_uring: [Errno 1] Operation not permitted\nasked\n", "{output}");
        Ok(())
    });
}

fn a_program_of_32_bit(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let program = bundle.rootfs().join("bin/of-32-bit");
    let text = b"of 32 bit\n";
    let write = |text_at: u32| {
        let mut code = vec![0xb8, 4, 0, 0, 0, 0xbb, 1, 0, 0, 0, 0xb9]; // mov eax, write; mov ebx, 1; mov ecx, ...
        code.extend(text_at.to_le_bytes());
        code.extend([0xba, 10, 0, 0, 0, 0xcd, 0x80]); // mov edx, 10; int 0x80
        code.extend([0xb8, 1, 0, 0, 0, 0xbb, 7, 0, 0, 0, 0xcd, 0x80]); // mov eax, exit; mov ebx, 7; int 0x80
        code
    };
    fs::write(&program, elf32(write, text))?;
    Invocation::new("chmod").arg("755").arg(&program).run()?.ok()?;
    let output = containerd.run_spec(&bundle.config(&["of-32-bit"], |_| ())?).output()?;
    ensure!(output.status == 7 && output.text() == "of 32 bit\n", "{output}");
    Ok(())
}

/// The host listens on vsock for its own guests, and a container is not the guest.
fn no_socket_leads_to_the_host(containerd: &mut Containerd) -> Result<()> {
    for channel in ["auto", "vsock"] {
        containerd.configure(&Setup::new().set("vm", "channel", Toml::text(channel)))?;
        let (_bundle, config) = script(containerd, &[VSOCK], &[])?;
        let output = containerd.run_spec(&config).output()?;
        let refused = "[Errno 1] Operation not permitted";
        let wanted = format!("by_socket: {refused}\nby_io_uring: {refused}\n");
        ensure!(output.text() == wanted, "with the channel {channel}: {output}");
    }
    // A program of 32 bit has a second way: socketcall(SYS_SOCKET, { AF_VSOCK, SOCK_STREAM, 0 }).
    let bundle = Bundle::busybox(containerd)?;
    let program = bundle.rootfs().join("bin/socketcall");
    let call = |arguments_at: u32| {
        let mut code = vec![0xb8, 102, 0, 0, 0, 0xbb, 1, 0, 0, 0, 0xb9]; // mov eax, socketcall; mov ebx, 1; mov ecx, ...
        code.extend(arguments_at.to_le_bytes());
        code.extend([0xcd, 0x80, 0xf7, 0xd8, 0x89, 0xc3]); // int 0x80; neg eax; mov ebx, eax
        code.extend([0xb8, 1, 0, 0, 0, 0xcd, 0x80]); // mov eax, exit; int 0x80
        code
    };
    fs::write(&program, elf32(call, &[40, 1, 0].map(u32::to_le_bytes).concat()))?;
    Invocation::new("chmod").arg("755").arg(&program).run()?.ok()?;
    let output = containerd.run_spec(&bundle.config(&["socketcall"], |_| ())?).output()?;
    ensure!(output.status == libc::EPERM, "the exit status is the error: {output}");
    Ok(())
}

/// The smallest i386 program: file header, one program header, code, which is made for the address of the data, data.
fn elf32(code: impl Fn(u32) -> Vec<u8>, data: &[u8]) -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let length = u32::try_from(data.len()).expect("few data");
    let code = code(BASE + HEADERS + u32::try_from(code(0).len()).expect("a short program"));
    let size = HEADERS + u32::try_from(code.len()).expect("a short program") + length;
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    // e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags
    file.extend([2, 0, 3, 0]);
    file.extend([1, BASE + HEADERS, 52, 0, 0].into_iter().flat_map(u32::to_le_bytes));
    // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    file.extend([52_u16, 32, 1, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    // p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_flags, p_align
    file.extend([1, 0, BASE, BASE, size, size, 5, 0x1000].into_iter().flat_map(u32::to_le_bytes));
    file.extend(code);
    file.extend(data);
    file
}

fn network_devices(containerd: &mut Containerd) -> Result<()> {
    let (_bundle, config) = script(containerd, &[DEVICES, LINKS], &[])?;
    let output = containerd.run_spec(&config).output()?;
    // No driver makes a device at its own initiative.
    ensure!(output.text() == "there are lo\nasked\n", "{output}");
    Ok(())
}

/// The events that the listener of `events.py` has received since the last question.
fn events(served: &Served<'_>, question: &str) -> Result<String> {
    let (status, events) = served.shell(&format!("echo {question} >/dev/shm/ask; cat /dev/shm/answer"))?;
    ensure!(status == 0, "status {status}: {events}");
    Ok(events)
}

/// The listener receives no events of the VM's devices, and all events of its own.
fn listens(served: &Served<'_>) -> Result<()> {
    let of_the_vm = events(served, "")?;
    ensure!(of_the_vm.is_empty(), "the listener received events of the VM: {of_the_vm}");
    let own = events(served, "act")?;
    for event in ["add", "remove"] {
        for device in ["block/loop77", "net/of-a-test"] {
            let line = format!("{event}@/devices/virtual/{device}");
            ensure!(own.lines().any(|seen| seen == line), "{line} was not received: {own}");
        }
    }
    Ok(())
}

fn events_of_the_vms_own_disks_are_hidden(containerd: &mut Containerd) -> Result<()> {
    let (_bundle, config) = script(containerd, &[EVENTS, LINKS], &[])?;
    let mut source = Served::of(containerd, &config)?;
    let printed = containerd.root().join("printed");
    source.create(|request| request.stdout = format!("file://{}", printed.display()))?;
    source.begin()?;
    let ready = "for n in $(seq 1200); do [ -p /dev/shm/answer ] && exit 0; usleep 50000; done; exit 1";
    ensure!(source.exec_to("ready", &["sh", "-c", ready], "")? == 0, "the container does not get ready");
    listens(&source)?;
    // Disks of another container are attached to this VM and removed.
    let other = Bundle::busybox(containerd)?;
    let mut other = source.in_same_vm(containerd, &other.config(&["true"], |_| ())?)?;
    other.create(|_| ())?;
    other.begin()?;
    other.wait("")?;
    other.client.ok::<DeleteResponse>("Delete", &other.delete(""))?;
    fs::remove_dir_all(&other.shim.bundle)?;
    // The disk of a checkpoint is attached and removed too. Events that waited in the listener's socket would
    // make the checkpoint fail.
    let dir = containerd.root().join("images");
    source.client.ok::<Empty>("Checkpoint", &request(&source, &dir, None)?)?;
    listens(&source)?;
    source.end()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    fs::remove_dir_all(&dir)?;
    listens(&restored)?;
    restored.client.ok::<Empty>("Checkpoint", &request(&restored, &dir, None)?)?;
    listens(&restored)?;
    restored.end()?;
    fs::remove_file(&printed)?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// The script that `make test` runs names the program and the missing option.
#[test]
fn the_table_of_requirements_is_checked() {
    let check = |config: &str| -> Result<Output> {
        let path = tempfile::NamedTempFile::new()?;
        fs::write(&path, config)?;
        let script = paths::workspace().join("scripts/kernel-requirements");
        // The script needs no cache, but prints the one that it would use.
        Invocation::new(script).env("HOME", "/").arg(path.path()).run()
    };
    let built = fs::read_to_string(paths::assets().join("kernel.config")).expect("scripts/kernel makes it");
    let output = check(&built).expect("it runs");
    assert!(output.status == 0, "{output}");
    let without = built.replace("CONFIG_CGROUP_CPUACCT=y\n", "");
    let with = format!("{without}CONFIG_MPTCP=y\n");
    let output = check(&with).expect("it runs");
    let printed = output.error_text();
    assert!(output.status != 0, "{output}");
    for line in ["java misses CONFIG_CGROUP_CPUACCT (required)", "CONFIG_MPTCP is there"] {
        assert!(printed.contains(line), "{line:?} is missing: {output}");
    }
}
