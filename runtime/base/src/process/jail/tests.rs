//! What a program inside a jail sees and can do.

use super::*;
use crate::process::{ProcessExit, Spawn};

const NOT_AN_ACCOUNT: u32 = 0x7000_0001;

fn identity() -> RunAs {
    RunAs { uid: NOT_AN_ACCOUNT, gid: NOT_AN_ACCOUNT, groups: vec![7] }
}

/// A jail that also shows the programs of scripts.
fn with_programs() -> Jail {
    let files = JailFiles { readable: vec!["/usr/bin".into()], ..JailFiles::default() };
    Jail { files: Some(files), ..Jail::strict(identity()) }
}

/// What a shell script prints inside `jail`.
fn printed(jail: Jail, script: &str) -> String {
    let output = Spawn::new("/bin/sh").args(["-c", script]).env("PATH", "/usr/bin").jail(jail).run().unwrap();
    String::from_utf8(output.success().unwrap().stdout).unwrap()
}

#[test]
fn a_strict_child_has_no_privileges_and_no_network() {
    let script = "id -u; id -g; id -G; grep -E 'CapEff|CapPrm|CapInh|CapBnd|CapAmb|NoNewPrivs' /proc/self/status; \
        cat /proc/self/oom_score_adj; tail -n +3 /proc/self/net/dev | wc -l";
    let jail = Jail { oom_score_adj: Some(321), ..with_programs() };
    let none = "0000000000000000";
    let expected = format!(
        "1879048193\n1879048193\n1879048193 7\nCapInh:\t{none}\nCapPrm:\t{none}\nCapEff:\t{none}\n\
         CapBnd:\t{none}\nCapAmb:\t{none}\nNoNewPrivs:\t1\n321\n1\n"
    );
    assert_eq!(printed(jail, script), expected);
}

#[test]
fn only_the_given_capabilities_are_kept() {
    let jail = Jail { capabilities: Some(vec![1, 21]), ..with_programs() };
    let kept = "0000000000200002";
    let script = "grep -E 'CapEff|CapPrm|CapBnd' /proc/self/status";
    assert_eq!(printed(jail, script), format!("CapPrm:\t{kept}\nCapEff:\t{kept}\nCapBnd:\t{kept}\n"));
}

#[test]
fn a_system_call_that_is_not_allowed_kills() {
    let run = |calls| {
        let jail = Jail { system_calls: Some(calls), ..with_programs() };
        Spawn::new("/bin/mkdir").args(["/x"]).jail(jail).run().unwrap()
    };
    let basic = || SystemCalls::basic().and(&[libc::SYS_prctl]);
    assert_eq!(run(basic()).exit, ProcessExit::Signal(libc::SIGSYS));
    let output = run(basic().and(&[libc::SYS_mkdir]));
    assert!(String::from_utf8(output.stderr).unwrap().contains("Read-only file system"));
    let output = run(basic().and_missing(&[libc::SYS_mkdir]));
    assert!(String::from_utf8(output.stderr).unwrap().contains("Function not implemented"));
    // mkdir(1) passes a mode of 0777.
    let output = run(basic().and_with_argument(libc::SYS_mkdir, 1, 0o777, 0o777));
    assert!(String::from_utf8(output.stderr).unwrap().contains("Read-only file system"));
    let output = run(basic().and_with_argument(libc::SYS_mkdir, 1, 0o777, 0o700));
    assert_eq!(output.exit, ProcessExit::Signal(libc::SIGSYS));
}

#[test]
fn limits_are_those_of_the_jail() {
    let limits = ResourceLimits {
        file_size: Some(4096),
        open_files: Some(99),
        processes: Some(30),
        locked_memory: Some(0),
        cpu_seconds: None,
    };
    let script = "grep -E '^Max (core|file size|open|proc|locked)' /proc/self/limits | tr -s ' ' | sort";
    assert_eq!(
        printed(Jail { limits, ..with_programs() }, script),
        "Max core file size 1 1 bytes \nMax file size 4096 4096 bytes \nMax locked memory 0 0 bytes \n\
         Max open files 99 99 files \nMax processes 30 30 processes \n"
    );
}

#[test]
fn a_child_that_has_used_its_time_is_killed_also_as_the_first_of_its_pid_namespace() {
    let limits = ResourceLimits { cpu_seconds: Some(1), ..ResourceLimits::default() };
    let jail = Jail { limits, ..Jail::strict(identity()) };
    let output = Spawn::new("/bin/sh").args(["-c", "while :; do :; done"]).jail(jail).run().unwrap();
    assert_eq!(output.exit, ProcessExit::Signal(libc::SIGKILL));
}

#[test]
fn the_environment_is_only_what_is_given() {
    let output = Spawn::new("/usr/bin/env").env("GIVEN", "1").jail(Jail::strict(identity()));
    assert_eq!(output.run().unwrap().success().unwrap().stdout, b"GIVEN=1\n");
}

#[test]
fn the_session_keyring_is_a_new_one() {
    // A user that no other process has sees only the keys that it possesses.
    let user = RunAs { uid: NOT_AN_ACCOUNT + 1, ..identity() };
    let jail = Jail { new_keyring: true, identity: Some(user), ..Jail::default() };
    assert_eq!(printed(jail, "grep -c ' _ses: empty' /proc/keys"), "1\n");
}

#[test]
fn a_strict_child_sees_nothing_but_its_program_and_libraries() {
    let script = "cd /; echo *; echo /usr/* /etc/* /proc/[0-9]* /home/* /tmp/*; echo $$; \
        cat /proc/cmdline /proc/keys; ls /proc/self/task/../../2; touch /x /usr/lib/x; cd ..; pwd; ls /proc/1/root/";
    let files = JailFiles { readable: vec!["/usr/bin".into(), "/nowhere".into()], ..JailFiles::default() };
    let jail = Jail { files: Some(files), ..Jail::strict(identity()) };
    let output = Spawn::new("/bin/sh").args(["-c", script]).env("PATH", "/usr/bin").jail(jail).run().unwrap();
    let (stdout, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    let lines: Vec<_> = stdout.lines().collect();
    assert_eq!(lines[0], "etc lib lib64 proc usr", "{stderr}");
    assert_eq!(lines[1], "/usr/bin /usr/lib /usr/lib64 /etc/ld.so.cache /proc/1 /home/* /tmp/*");
    assert_eq!(&lines[2..], ["1", "/", "etc", "lib", "lib64", "proc", "usr"]);
    assert_eq!(stderr.matches("No such file or directory").count(), 3, "{stderr}");
    assert_eq!(stderr.matches("Read-only file system").count(), 2, "{stderr}");
}

#[test]
fn a_working_directory_is_the_only_writable_one() {
    let dir = tempfile::tempdir().unwrap();
    let owner = identity();
    std::os::unix::fs::chown(dir.path(), Some(owner.uid), Some(owner.gid)).unwrap();
    let files = JailFiles {
        readable: vec!["/usr/bin".into()],
        working_dir: Some(dir.path().to_owned()),
        ..JailFiles::default()
    };
    let jail = Jail { files: Some(files), ..Jail::strict(owner) };
    assert_eq!(
        printed(jail, "echo here > file; pwd; cat file; echo ../*"),
        "/own\nhere\n../etc ../lib ../lib64 ../own ../proc ../usr\n"
    );
    assert_eq!(std::fs::read_to_string(dir.path().join("file")).unwrap(), "here\n");
}

#[test]
fn a_device_can_be_opened_and_only_that() {
    let files = JailFiles {
        readable: vec!["/usr/bin".into(), "/dev/zero".into()],
        devices: vec!["/dev/null".into()],
        ..JailFiles::default()
    };
    let jail = Jail { files: Some(files), ..Jail::strict(identity()) };
    let script = "echo x > /dev/null && echo opened; cat /dev/zero 2>&1; exit 0";
    assert_eq!(printed(jail, script), "opened\ncat: /dev/zero: Permission denied\n");
}
