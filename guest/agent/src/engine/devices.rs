//! Restricts the devices that a container may open, with a BPF program on its cgroup (cgroup v2 has no
//! control files for devices).
//!
//! Containers of one pod share the kernel, where the disks of all of them are devices.

use std::path::Path;

use serde_json::Value;

use super::oci::{SpecError, items};
use crate::cgroup::Instruction;

/// A rule of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// None matches both.
    kind: Option<DeviceKind>,
    /// None matches any number.
    major: Option<i32>,
    minor: Option<i32>,
    /// A set of [`MKNOD`], [`READ`] and [`WRITE`].
    access: i32,
}

/// Values of the kernel's BPF_DEVCG_DEV_* (bpf.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceKind {
    Block = 1,
    Char = 2,
}

/// Has an entry for each character device of the kernel, named by its numbers.
const KNOWN: &str = "/sys/dev/char";

/// Values of the kernel's BPF_DEVCG_ACC_* (bpf.h).
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// The program for a spec's `linux.resources.devices`. Later rules take precedence. Two parts are implied, as with
/// runc: everything is denied first, and last every container may create any node and use harmless devices.
///
/// # Errors
/// The number of a rule that cannot be parsed.
pub(super) fn program(rules: &Value) -> Result<Vec<Instruction>, usize> {
    let given = rules.as_array().into_iter().flatten().enumerate();
    let given = given.map(|(number, rule)| parse(rule).ok_or(number)).collect::<Result<Vec<_>, _>>()?;
    Ok(compile(&ordered(given)))
}

/// Refuses a character device that this kernel does not have: a node for it could not be opened. A privileged container has
/// a node for each device of the host, most of which it never opens.
///
/// # Errors
/// There is such a device.
pub(super) fn refuse_missing(linux: &Value) -> Result<(), SpecError> {
    let rules = items(&linux["resources"]["devices"]).filter_map(parse);
    let about_all = |rule: &Rule| (rule.kind, rule.major, rule.minor) == (None, None, None);
    if rules.filter(about_all).last().is_some_and(|rule| rule.allow) {
        return Ok(());
    }
    for device in items(&linux["devices"]) {
        let number = |name: &str| device[name].as_i64().unwrap_or(-1);
        let (major, minor) = (number("major"), number("minor"));
        let is_char = device["type"].as_str().is_some_and(|kind| ["c", "u"].contains(&kind));
        if is_char && !Path::new(KNOWN).join(format!("{major}:{minor}")).exists() {
            let path = device["path"].as_str().unwrap_or_default().to_owned();
            return Err(SpecError::NoDevice { path, major, minor });
        }
    }
    Ok(())
}

/// The program for a spec that denies everything, and allows no device that is not allowed anyway, as most do.
pub(crate) fn usual_program() -> Vec<Instruction> {
    compile(&ordered(Vec::new()))
}

/// Appends the default rules. Docker's configurations rely on runc's order: they deny everything, and allow only some of
/// the devices that every container has.
fn ordered(given: Vec<Rule>) -> Vec<Rule> {
    let char = |major, minor| Rule {
        allow: true,
        kind: Some(DeviceKind::Char),
        major: Some(major),
        minor,
        access: ALL,
    };
    let make = |kind| Rule { allow: true, kind: Some(kind), major: None, minor: None, access: MKNOD };
    let defaults = [
        make(DeviceKind::Char),
        make(DeviceKind::Block),
        // null, zero, full, random, urandom; tty, console, ptmx; pts
        char(1, Some(3)),
        char(1, Some(5)),
        char(1, Some(7)),
        char(1, Some(8)),
        char(1, Some(9)),
        char(5, Some(0)),
        char(5, Some(1)),
        char(5, Some(2)),
        char(136, None),
    ];
    let decides = |rule: &Rule| !defaults.iter().any(|default| default.covers(rule));
    given.into_iter().filter(decides).chain(defaults).collect()
}

impl Rule {
    /// Whether this rule, which allows something, decides about all that an earlier rule would decide about.
    fn covers(&self, earlier: &Self) -> bool {
        let has_access = if earlier.allow { earlier.access & !self.access == 0 } else { self.access == ALL };
        let has = |own: Option<i32>, other| own.is_none() || own == other;
        let has_kind = self.kind.is_none() || self.kind == earlier.kind;
        has_access && has_kind && has(self.major, earlier.major) && has(self.minor, earlier.minor)
    }
}

fn parse(rule: &Value) -> Option<Rule> {
    let kind = match rule["type"].as_str() {
        None | Some("a" | "") => None,
        Some("b") => Some(DeviceKind::Block),
        Some("c" | "u") => Some(DeviceKind::Char),
        Some(_) => return None,
    };
    let number = |value: &Value| match value.as_i64() {
        None | Some(-1) => Some(None),
        Some(number) => i32::try_from(number).ok().filter(|number| *number >= 0).map(Some),
    };
    let access = match rule["access"].as_str() {
        None | Some("") => ALL,
        Some(text) => text.chars().try_fold(0, |access, letter| match letter {
            'm' => Some(access | MKNOD),
            'r' => Some(access | READ),
            'w' => Some(access | WRITE),
            _ => None,
        })?,
    };
    let (major, minor) = (number(&rule["major"])?, number(&rule["minor"])?);
    Some(Rule { allow: rule["allow"].as_bool().unwrap_or(false), kind, major, minor, access })
}

// Registers: the context arrives in 1, the result is returned in 0.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// The last matching rule decides, so the rules are tried in reverse order; without a match, access is
/// denied.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut code = vec![
        // struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }, access_type = access << 16 |
        // kind
        load(KIND, CONTEXT, 0),
        move_register(ACCESS, KIND),
        shift_right(ACCESS, 16),
        and(KIND, 0xffff),
        load(MAJOR, CONTEXT, 4),
        load(MINOR, CONTEXT, 8),
    ];
    for rule in rules.iter().rev() {
        let mut body = Vec::new();
        // A request that does not match jumps over the rest of the rule.
        let mut differs = Vec::new();
        for (register, wanted) in
            [(KIND, rule.kind.map(|kind| kind as i32)), (MAJOR, rule.major), (MINOR, rule.minor)]
        {
            if let Some(wanted) = wanted {
                differs.push(body.len());
                body.push(jump_if_not_equal(register, wanted));
            }
        }
        if rule.access != ALL {
            body.push(move_register(SCRATCH, ACCESS));
            // A request is allowed if it has only bits of the rule, and denied if it has any of them.
            body.push(and(SCRATCH, if rule.allow { ALL & !rule.access } else { rule.access }));
            differs.push(body.len());
            body.push(if rule.allow { jump_if_not_equal(SCRATCH, 0) } else { jump_if_equal(SCRATCH, 0) });
        }
        body.extend([move_value(RESULT, rule.allow.into()), EXIT]);
        let (end, matches_all) = (body.len(), differs.is_empty());
        for at in differs {
            body[at] |= jump_distance(end - at - 1);
        }
        code.extend(body);
        if matches_all {
            // The kernel refuses a program with unreachable instructions.
            return code;
        }
    }
    code.extend([move_value(RESULT, 0), EXIT]);
    code
}

const EXIT: Instruction = 0x95;

const fn instruction(code: u8, to: u8, from: u8, offset: u16, value: i32) -> Instruction {
    code as u64
        | (to as u64) << 8
        | (from as u64) << 12
        | (offset as u64) << 16
        | (value.cast_unsigned() as u64) << 32
}

fn jump_distance(instructions: usize) -> Instruction {
    // A rule has fewer than ten of them.
    (instructions as u64) << 16
}

fn load(to: u8, from: u8, offset: u16) -> Instruction {
    instruction(0x61, to, from, offset, 0)
}

fn move_register(to: u8, from: u8) -> Instruction {
    instruction(0xbf, to, from, 0, 0)
}

fn move_value(to: u8, value: i32) -> Instruction {
    instruction(0xb7, to, 0, 0, value)
}

fn shift_right(register: u8, bits: i32) -> Instruction {
    instruction(0x77, register, 0, 0, bits)
}

fn and(register: u8, value: i32) -> Instruction {
    instruction(0x57, register, 0, 0, value)
}

fn jump_if_equal(register: u8, value: i32) -> Instruction {
    instruction(0x15, register, 0, 0, value)
}

fn jump_if_not_equal(register: u8, value: i32) -> Instruction {
    instruction(0x55, register, 0, 0, value)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Runs a program as the kernel does, for the few instructions that are used.
    fn allows(code: &[Instruction], kind: DeviceKind, major: i32, minor: i32, access: i32) -> bool {
        let context = [access << 16 | kind as i32, major, minor];
        let mut registers = [0_i64; 8];
        let mut at = 0;
        loop {
            let instruction = code[at];
            let (to, from) = ((instruction >> 8 & 15) as usize, (instruction >> 12 & 15) as usize);
            let offset = (instruction >> 16 & 0xffff) as usize;
            let value = i64::from((instruction >> 32) as u32 as i32);
            at += 1;
            match instruction as u8 {
                0x61 => registers[to] = i64::from(context[offset / 4]),
                0xbf => registers[to] = registers[from],
                0xb7 => registers[to] = value,
                0x77 => registers[to] >>= value,
                0x57 => registers[to] &= value,
                0x15 if registers[to] == value => at += offset,
                0x55 if registers[to] != value => at += offset,
                0x15 | 0x55 => {}
                0x95 => return registers[0] != 0,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn by_default_only_harmless_devices() {
        for rules in [json!(null), json!([{"allow": false, "access": "rwm"}])] {
            let code = program(&rules).unwrap();
            assert_eq!(code, usual_program());
            assert!(allows(&code, DeviceKind::Char, 1, 3, READ | WRITE));
            assert!(allows(&code, DeviceKind::Char, 136, 77, READ | WRITE));
            assert!(allows(&code, DeviceKind::Block, 8, 0, MKNOD));
            assert!(!allows(&code, DeviceKind::Block, 8, 0, READ));
            assert!(!allows(&code, DeviceKind::Block, 8, 0, READ | MKNOD));
            assert!(!allows(&code, DeviceKind::Char, 1, 1, READ));
        }
    }

    #[test]
    fn a_rule_that_decides_nothing_is_left_out() {
        // containerd's, and Docker's.
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "access": "m"},
            {"allow": true, "type": "b", "access": "m"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 9, "access": "r"},
            {"allow": false, "type": "c", "major": 5, "minor": 2, "access": "w"},
            {"allow": true, "type": "c", "major": 136, "access": "rwm"},
        ]);
        assert_eq!(program(&rules).unwrap(), usual_program());
        for rule in [
            json!({"allow": true, "type": "c", "access": "r"}),
            json!({"allow": false, "type": "c", "access": "m"}),
            json!({"allow": true, "type": "b", "major": 1, "minor": 3, "access": "rwm"}),
            json!({"allow": true, "type": "c", "major": 1, "access": "rwm"}),
            json!({"allow": true, "major": 1, "minor": 3, "access": "rwm"}),
        ] {
            assert_ne!(program(&json!([rule])).unwrap(), usual_program(), "{rule}");
        }
    }

    #[test]
    fn later_rules_take_precedence() {
        let code = program(&json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "minor": 16, "access": "r"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
            {"allow": false, "type": "c", "major": 10, "minor": 229, "access": "w"},
        ]))
        .unwrap();
        assert!(allows(&code, DeviceKind::Block, 8, 16, READ));
        assert!(!allows(&code, DeviceKind::Block, 8, 16, READ | WRITE));
        assert!(!allows(&code, DeviceKind::Block, 8, 0, READ));
        assert!(allows(&code, DeviceKind::Char, 10, 229, READ));
        assert!(!allows(&code, DeviceKind::Char, 10, 229, READ | WRITE));
    }

    #[test]
    fn the_devices_of_every_container_follow_all_rules() {
        let deny = json!({"allow": false, "access": "rwm"});
        let allowed = json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"});
        let code = program(&json!([deny, allowed, deny])).unwrap();
        assert!(allows(&code, DeviceKind::Char, 1, 3, READ | WRITE));
        assert!(allows(&code, DeviceKind::Char, 1, 7, MKNOD));
        assert!(!allows(&code, DeviceKind::Char, 10, 229, READ));
    }

    #[test]
    fn a_device_of_the_kernel_and_those_of_a_privileged_container_are_not_refused() {
        let device = |major| json!([{"path": "/dev/x", "type": "c", "major": major, "minor": 3}]);
        let all = json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
        assert!(refuse_missing(&json!({"devices": device(1)})).is_ok());
        assert!(refuse_missing(&json!({"devices": device(511)})).is_err());
        assert!(refuse_missing(&json!({"devices": device(511), "resources": {"devices": all}})).is_ok());
    }

    #[test]
    fn a_privileged_container_may_use_all_devices() {
        let code = program(&json!([{"allow": true, "access": "rwm"}])).unwrap();
        assert!(allows(&code, DeviceKind::Block, 8, 0, READ | WRITE));
    }

    #[test]
    fn invalid_rules_are_named_by_number() {
        assert_eq!(program(&json!([{"allow": true}, {"type": "x"}])), Err(1));
        assert_eq!(program(&json!([{"access": "q"}])), Err(0));
        assert_eq!(program(&json!([{"major": -2}])), Err(0));
    }
}
