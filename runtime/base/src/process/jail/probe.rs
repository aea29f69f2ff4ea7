//! A probe of a jail: a shell that tries what a taken-over program would, and reports what succeeds.
//!
//! The shell uses its built-in commands only, because a jailed program can start no other.

use super::Jail;
use crate::process::{ProcessError, ProcessExit, Spawn};

/// What each line that a script prints says is a hole. A shell's own variables are no environment.
const SCRIPT: &str = r#"
for file in /etc/passwd /etc/shadow /etc/hostname /root /home /run /tmp /var /sys /dev /boot /usr/bin/env \
    /proc/cmdline /proc/keys /proc/sys /proc/2 /proc/1/root/etc/passwd; do
    [ -e $file ] && echo "sees $file"
done
for dir in / /usr/lib /proc /etc; do
    echo x > $dir/probe && echo "writes to $dir"
done
[ $$ = 1 ] || echo "has pid $$ of the host"
[ $PPID = 0 ] || echo "knows its parent $PPID"
kill -0 2 && echo "signals another process"
IFS= read -r environment < /proc/self/environ
[ -n "$environment" ] && echo "has the environment $environment"
while read -r name value rest; do
    case $name in
        Uid:) [ $value -ge 1879048192 ] || echo "is user $value" ;;
        NoNewPrivs:) [ $value = 1 ] || echo "can gain privileges" ;;
        CapEff: | CapBnd:) [ $value = $CAPABILITIES ] || echo "has $name $value" ;;
    esac
done < /proc/self/status
cd .. && [ -e etc/passwd ] && echo "leaves its root"
exit 0
"#;

/// Tries what a program in `jail` must not be able to do, and returns what succeeded. `capabilities` are those that it may
/// have, as a mask. Blocks.
///
/// # Errors
/// The shell cannot be started.
pub fn probe(jail: &Jail, capabilities: u64) -> Result<Vec<String>, ProcessError> {
    let script = SCRIPT.replace("$CAPABILITIES", &format!("{capabilities:016x}"));
    let shell = |script: &str| Spawn::new("/bin/sh").args(["-c", script]).jail(jail.clone()).run();
    let output = shell(&script)?;
    let mut holes: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    if !output.exit.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        holes.push(format!("the probe {}: {said}", output.exit));
    }
    // A subshell is another process.
    let forked = shell("(exit 0); exit 0")?;
    if jail.system_calls.is_some() && forked.exit != ProcessExit::Signal(libc::SIGSYS) {
        holes.push(format!("a program that starts another one {}", forked.exit));
    }
    Ok(holes)
}
