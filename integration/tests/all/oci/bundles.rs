//! Bundles that are unusual, wrong, old or new.

use std::fs;

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::mount, oci::Oci, runtime::Runtime};
use serde_json::{Value, json};

use super::with_oci;

/// As runc since 1.3.
#[test]
fn of_several_variables_the_last_one_counts() {
    super::run(Runtime::Machinen, |oci| {
        let output = run(oci, &["env"], |spec| {
            spec["process"]["env"] = json!(["A=1", "PATH=/bin", "HOME=/x", "A=2", "HOME="]);
        })?;
        ensure!(output.text() == "PATH=/bin\nA=2\nHOME=/root\n", "{output}");
        Ok(())
    });
}

with_oci!(
    unusual,
    programs_by_path,
    mounts_and_their_places,
    masked_system_calls,
    wrong,
    broken,
    changed_after_its_creation,
    a_bundle_in_the_current_directory,
    a_root_that_is_the_bundle,
    a_proc_in_the_place_of_a_link,
    newer_system_calls,
);

/// The name of a case, its change of the specification, and the text that is expected.
type Case = (&'static str, fn(&mut Value), &'static str);

/// Runs a container with a changed specification.
fn run(
    oci: &Oci,
    command: &[&str],
    change: impl FnOnce(&mut Value),
) -> Result<machinen_integration::process::Output> {
    let dir = oci.bundle_dir("b");
    if fs::exists(&dir)? {
        fs::remove_dir_all(&dir)?;
    }
    oci.bundle("b", command, change)?;
    oci.output(&["run", "--bundle", &dir, "b"])
}

fn unusual(oci: &Oci) -> Result<()> {
    let same: fn(&mut Value) = |_| {};
    let cases: [Case; 9] = [
        ("echo $(hostname)", |spec| spec["hostname"] = json!("named"), "named\n"),
        (
            "echo unknown",
            |spec| {
                spec["unknown"] = json!({ "field": 1 });
                spec["linux"]["unknown"] = json!([1, 2]);
                spec["annotations"] = json!({ "org.example": "" });
            },
            "unknown\n",
        ),
        (
            "grep -c ' /twice ' /proc/mounts; cat /twice/second 2> /dev/null || echo second",
            |spec| {
                let mounts = spec["mounts"].as_array_mut().expect("a list");
                mounts.push(mount("/twice", "tmpfs", "tmpfs", &["size=1m"]));
                mounts.push(mount("/twice", "tmpfs", "tmpfs", &["size=2m"]));
            },
            "2\nsecond\n",
        ),
        (
            "id -u; id -g",
            |spec| spec["process"]["user"] = json!({ "uid": 4711, "gid": 4712 }),
            "4711\n4712\n",
        ),
        ("pwd", |spec| spec["process"]["cwd"] = json!("/not/there/yet"), "/not/there/yet\n"),
        (
            "echo ${#BIG}",
            |spec| {
                let big = format!("BIG={}", "x".repeat(100_000));
                spec["process"]["env"] = json!(["PATH=/bin", big, "A=1", "A=2"]);
            },
            "100000\n",
        ),
        ("echo slave", |spec| spec["linux"]["rootfsPropagation"] = json!("rslave"), "slave\n"),
        ("echo private", |spec| spec["linux"]["rootfsPropagation"] = json!("rprivate"), "private\n"),
        ("echo $A", same, "\n"),
    ];
    for (script, change, wanted) in cases {
        let output = run(oci, &["sh", "-c", script], change)?;
        ensure!(output.status == 0 && output.text() == wanted, "{script}: {output}");
    }
    // Versions of the specification that the runtime does not know may have more fields.
    for version in ["1.0.0", "1.0.2-dev", "1.2.0"] {
        let output = run(oci, &["echo", version], |spec| spec["ociVersion"] = json!(version))?;
        ensure!(output.text() == format!("{version}\n"), "{output}");
    }
    Ok(())
}

/// The program is found by the container's PATH, which need not begin with a slash, and by a path from its cwd.
fn programs_by_path(oci: &Oci) -> Result<()> {
    let output = run(oci, &["busybox", "echo", "found"], |spec| {
        spec["process"]["env"] = json!(["PATH=/no/such/directory:/bin"]);
    })?;
    ensure!(output.text() == "found\n", "{output}");
    let output = run(oci, &["bin/busybox", "echo", "found"], |_| {})?;
    ensure!(output.text() == "found\n", "{output}");
    let output = run(oci, &["./busybox", "pwd"], |spec| spec["process"]["cwd"] = json!("/bin"))?;
    ensure!(output.text() == "/bin\n", "{output}");
    let output = run(oci, &["busybox", "true"], |spec| spec["process"]["env"] = json!([]))?;
    ensure!(
        output.status == 1 && output.error_text().contains("executable file not found in $PATH"),
        "{output}"
    );
    Ok(())
}

/// Cases of runc's own tests.
fn mounts_and_their_places(oci: &Oci) -> Result<()> {
    let dir = oci.bundle_dir("m");
    let bundle = oci.bundle("m", &["true"], |_| {})?;
    fs::create_dir(bundle.rootfs().join("given"))?;
    fs::set_permissions(bundle.rootfs().join("given"), std::os::unix::fs::PermissionsExt::from_mode(0o2710))?;
    std::os::unix::fs::symlink("/gone/deep", bundle.rootfs().join("jump"))?;
    let file = oci.file("mounted");
    fs::write(&file, "mounted\n")?;
    let file = file.display().to_string();
    let script = "stat -c %a /given /other; cat /gone/deep/x/f; touch /dev/f 2> /dev/null || echo read-only; \
                  echo x > /dev/null && echo device";
    oci.configure(&bundle, "m", &["sh", "-c", script], |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("a list");
        mounts.retain(|mount| mount["destination"] != "/dev");
        mounts.insert(1, mount("/dev", "tmpfs", "tmpfs", &["nosuid", "mode=755", "ro"]));
        mounts.push(mount("/given", "tmpfs", "tmpfs", &[]));
        mounts.push(mount("/other", "tmpfs", "tmpfs", &["mode=700"]));
        mounts.push(mount("/jump/x/f", "bind", &file, &["bind"]));
    })?;
    let output = oci.output(&["run", "--bundle", &dir, "m"])?.ok()?;
    ensure!(output.text() == "2710\n700\nmounted\nread-only\ndevice\n", "{output}");
    Ok(())
}

/// A rule whose two values differ: the first is the mask.
fn masked_system_calls(oci: &Oci) -> Result<()> {
    const NEW_MOUNTS: u64 = libc::CLONE_NEWNS as u64;
    const NEW_NAMES: u64 = libc::CLONE_NEWUTS as u64;
    let script = "unshare -m true 2> /dev/null || echo refused; unshare -m -u true && echo both; unshare -u true && echo one";
    let script = script.replace("unshare", "busybox unshare");
    let output = run(oci, &["sh", "-c", &script], |spec| {
        for set in ["bounding", "effective", "permitted"] {
            let set = spec["process"]["capabilities"][set].as_array_mut().expect("a list");
            set.push(json!("CAP_SYS_ADMIN"));
        }
        let mask = json!({
            "index": 0, "value": NEW_MOUNTS | NEW_NAMES, "valueTwo": NEW_MOUNTS, "op": "SCMP_CMP_MASKED_EQ",
        });
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{ "names": ["unshare"], "action": "SCMP_ACT_ERRNO", "args": [mask] }],
        });
    })?;
    ensure!(output.text() == "refused\nboth\none\n", "{output}");
    Ok(())
}

/// Each is refused before anything of the container runs, and nothing is left of it.
fn wrong(oci: &Oci) -> Result<()> {
    let cases: [Case; 7] = [
        ("no program", |spec| spec["process"]["args"] = json!([]), "args"),
        (
            "no such program",
            |spec| spec["process"]["args"] = json!(["no-such"]),
            "executable file not found in $PATH",
        ),
        ("a directory", |spec| spec["process"]["args"] = json!(["/etc"]), "/etc"),
        ("no rootfs", |spec| spec["root"]["path"] = json!("no-such-directory"), "no-such-directory"),
        ("an empty cwd", |spec| spec["process"]["cwd"] = json!(""), "cwd"),
        ("a relative cwd", |spec| spec["process"]["cwd"] = json!("tmp"), "cwd"),
        (
            "a mount's source",
            |spec| {
                let mounts = spec["mounts"].as_array_mut().expect("a list");
                mounts.push(mount("/data", "bind", "/no/such/source", &["bind"]));
            },
            "/no/such/source",
        ),
    ];
    for (name, change, text) in cases {
        let output = run(oci, &["true"], change)?;
        ensure!(
            output.status == 1 && output.error_text().to_lowercase().contains(&text.to_lowercase()),
            "{name}: {output}"
        );
        super::is_gone(oci, "b")?;
    }
    Ok(())
}

fn broken(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("b", &["true"], |_| {})?;
    let dir = oci.bundle_dir("b");
    for text in ["", "{", "[]", "{}", r#"{"ociVersion": 1}"#, r#"{"ociVersion": "1.0.0", "process": "x"}"#] {
        bundle.config_text(text)?;
        let output = oci.output(&["create", "--bundle", &dir, "b"])?;
        ensure!(output.status == 1 && !output.error_text().is_empty(), "{text}: {output}");
        super::is_gone(oci, "b")?;
    }
    Ok(())
}

/// What counts is the file as it was when the container was created.
fn changed_after_its_creation(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("b", &["echo", "first"], |_| {})?;
    let container = oci.create("b")?;
    let pid = oci.pid("b")?;
    oci.configure(&bundle, "b", &["echo", "second"], |_| {})?;
    oci.ok(&["start", "b"])?;
    oci.wait(pid)?;
    oci.ok(&["delete", "b"])?;
    let output = container.wait()?;
    ensure!(output.text() == "first\n", "{output}");
    Ok(())
}

fn a_bundle_in_the_current_directory(oci: &Oci) -> Result<()> {
    let bundle =
        oci.bundle("b", &["sh", "-c", "cat /etc/passwd | head -n 1; echo x > /written"], |spec| {
            spec["root"] = json!({ "path": "rootfs", "readonly": true });
        })?;
    let run = oci.scripted(&format!("cd {}; exec \"$@\"", bundle.dir().display()), &["run", "b"])?;
    let output = run.run().context("cannot run")?;
    ensure!(output.status == 1 && output.text() == "root:x:0:0:root:/root:/bin/sh\n", "{output}");
    ensure!(output.error_text().contains("Read-only file system"), "{output}");
    Ok(())
}

/// `root.path` is `.`: the configuration is a file of the container.
fn a_root_that_is_the_bundle(oci: &Oci) -> Result<()> {
    for readonly in [true, false] {
        let dir = oci.bundle_dir("b");
        if fs::exists(&dir)? {
            fs::remove_dir_all(&dir)?;
        }
        let script = "ls /config.json; touch /written 2> /dev/null || echo read-only";
        let bundle = oci.bundle("b", &["sh", "-c", script], |spec| {
            spec["root"] = json!({ "path": ".", "readonly": readonly });
        })?;
        let rootfs = bundle.rootfs();
        fs::rename(bundle.dir().join("config.json"), rootfs.join("config.json"))?;
        let output = oci.ok(&["run", "--bundle", &rootfs.display().to_string(), "b"])?;
        let expected = if readonly { "/config.json\nread-only\n" } else { "/config.json\n" };
        ensure!(output == expected, "{output}");
        ensure!(rootfs.join("written").exists() != readonly, "{readonly}");
        ensure!(!rootfs.join("machinen-writable.ext4").exists());
    }
    Ok(())
}

/// What the container trusts would be elsewhere.
fn a_proc_in_the_place_of_a_link(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("b", &["true"], |_| {})?;
    let proc = bundle.rootfs().join("proc");
    if proc.exists() {
        fs::remove_dir(&proc)?;
    }
    std::os::unix::fs::symlink("/tmp", &proc)?;
    oci.fails(&["run", "--bundle", &oci.bundle_dir("b"), "b"], 1, "must be mounted on ordinary directory")?;
    super::is_gone(oci, "b")
}

/// As runc masks it since 1.4.
#[test]
fn a_path_that_is_masked_twice() {
    super::run(Runtime::Machinen, |oci| {
        let script = "for path in /etc /usr; do grep -c \" $path \" /proc/mounts; done";
        let output = run(oci, &["/bin/sh", "-c", script], |spec| {
            spec["linux"]["maskedPaths"] = json!(["/etc", "/root", "/etc"]);
            spec["linux"]["readonlyPaths"] = json!(["/usr", "/home", "/usr"]);
        })?;
        ensure!(output.text() == "1\n1\n", "{output}");
        Ok(())
    });
}

/// A profile that is older than a system call does not forbid it: the call does not exist.
fn newer_system_calls(oci: &Oci) -> Result<()> {
    // The newest that the profile names is rseq, 334. pidfd_open is 434, and mknod is 133.
    let names = "read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask \
        rt_sigreturn ioctl pread64 readv writev access pipe sched_yield mremap madvise dup dup2 dup3 getpid clone fork vfork \
        execve exit wait4 kill uname fcntl getcwd chdir readlink umask sysinfo getuid getgid geteuid getegid getppid \
        sigaltstack arch_prctl gettid futex getdents64 set_tid_address clock_gettime exit_group epoll_create1 epoll_ctl \
        epoll_pwait eventfd2 tgkill openat newfstatat readlinkat faccessat set_robust_list pipe2 prlimit64 getrandom statx rseq \
        socket connect accept accept4 sendto recvfrom sendmsg recvmsg shutdown bind listen getsockopt setsockopt prctl statfs fstatfs \
        fchdir capget capset setgroups sched_getaffinity nanosleep epoll_wait fchown getpgrp mincore timer_settime \
        timer_delete timer_create unlinkat";
    let names: Vec<_> = names.split_whitespace().collect();
    let script = "import os\n\
        for call in lambda: os.pidfd_open(os.getpid()), lambda: os.mkfifo('/fifo'):\n\
        \x20   try: call()\n\
        \x20   except OSError as error: print(error.errno)\n";
    let bundle = oci.bundle("b", &["python3.13", "-c", script], |spec| {
        let rule = json!({ "names": names, "action": "SCMP_ACT_ALLOW" });
        // runc does it for architectures that are named only.
        let architectures = ["SCMP_ARCH_X86_64"];
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "architectures": architectures, "syscalls": [rule],
        });
    })?;
    bundle.add_workloads()?;
    let output = oci.ok(&["run", "--bundle", &oci.bundle_dir("b"), "b"])?;
    ensure!(output == format!("{}\n{}\n", libc::ENOSYS, libc::EPERM), "{output}");
    Ok(())
}
