//! Filters of system calls (seccomp(2)).

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// A filter that makes fallocate(2) with FALLOC_FL_PUNCH_HOLE a success without effect for one descriptor.
pub(super) fn no_holes(fd: i32) -> BpfProgram {
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
    let equals =
        |argument, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
    let rule = equals(0, u64::from(fd.cast_unsigned()))
        .and_then(|fd| equals(1, punch).map(|mode| vec![fd, mode]))
        .and_then(SeccompRule::new);
    let filter = rule.and_then(|rule| {
        let rules = [(libc::SYS_fallocate, vec![rule])].into_iter().collect();
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(0), TargetArch::x86_64)
    });
    filter.and_then(TryInto::try_into).expect("a constant rule for a supported architecture")
}
