//! What a program inside a jail sees and can do.

use super::*;
use crate::process::Spawn;

const NOT_AN_ACCOUNT: u32 = 0x7000_0001;

fn identity() -> RunAs {
    RunAs { uid: NOT_AN_ACCOUNT, gid: NOT_AN_ACCOUNT, groups: vec![7] }
}

/// What a shell script prints inside `jail`.
fn printed(jail: Jail, script: &str) -> String {
    let output = Spawn::new("/bin/sh").args(["-c", script]).jail(jail).run().unwrap().success().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_strict_child_has_no_privileges_and_no_network() {
    let script = "id -u; id -g; id -G; grep -E 'CapEff|CapPrm|CapInh|CapBnd|CapAmb|NoNewPrivs' /proc/self/status; \
        cat /proc/self/oom_score_adj; tail -n +3 /proc/net/dev | wc -l";
    let jail = Jail { oom_score_adj: Some(321), ..Jail::strict(identity()) };
    let none = "0000000000000000";
    let expected = format!(
        "1879048193\n1879048193\n1879048193 7\nCapInh:\t{none}\nCapPrm:\t{none}\nCapEff:\t{none}\n\
         CapBnd:\t{none}\nCapAmb:\t{none}\nNoNewPrivs:\t1\n321\n1\n"
    );
    assert_eq!(printed(jail, script), expected);
}

#[test]
fn limits_are_those_of_the_jail() {
    let limits = ResourceLimits {
        file_size: Some(4096),
        open_files: Some(99),
        processes: Some(3),
        locked_memory: Some(0),
    };
    let script = "grep -E '^Max (core|file size|open|proc|locked)' /proc/self/limits | tr -s ' '";
    let text = printed(Jail { limits, ..Jail::strict(identity()) }, script);
    assert_eq!(
        text,
        "Max core file size 1 1 bytes \nMax file size 4096 4096 bytes \nMax processes 3 3 processes \n\
         Max open files 99 99 files \nMax locked memory 0 0 bytes \n"
            .replace(
                "Max core file size 1 1 bytes \nMax file size 4096 4096 bytes \n",
                "Max file size 4096 4096 bytes \nMax core file size 1 1 bytes \n"
            )
    );
}

#[test]
fn the_environment_is_only_what_is_given() {
    let output = Spawn::new("/usr/bin/env").env("GIVEN", "1").jail(Jail::strict(identity()));
    assert_eq!(output.run().unwrap().success().unwrap().stdout, b"GIVEN=1\n");
}

#[test]
fn the_session_keyring_is_a_new_one() {
    let keyring = |jail| printed(jail, "grep -c ' keyring *_ses' /proc/keys; exit 0");
    let fresh = keyring(Jail { new_keyring: true, ..Jail::default() });
    assert_ne!(fresh, "0\n", "the child has a keyring of its own");
}
