//! Translates sets of the host's CPUs and memory nodes to the guest's.
//!
//! A cpuset names CPUs of the host. The VM has other CPUs, usually fewer, and they are not bound to CPUs of
//! the host, so only the number of CPUs in the set is kept. The guest's CPUs are chosen such that containers
//! of one VM with disjoint sets share none of the guest's CPUs, as long as there are enough.

use std::collections::BTreeSet;

use oci_spec::runtime::{LinuxCpu, LinuxResources};

use super::resources::ResourcesError;

/// No CPU or node of any host has a number this high (the kernel's largest NR_CPUS on x86).
const LIMIT: u32 = 8192;

/// The cgroup files that hold sets of CPUs and of nodes.
pub const CPU_FILES: [&str; 2] = ["cpuset.cpus", "cpuset.cpus.exclusive"];
/// The cgroup file with the memory nodes.
pub const NODE_FILE: &str = "cpuset.mems";

/// The format of a set, for error messages.
const FORMAT: &str = "numbers below 8192 and ranges of them, such as 0-3,8";

/// A set of numbers that is not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuSet(BTreeSet<u32>);

impl CpuSet {
    /// Parses the kernel's list format (cpuset(7), "List format"). Elements may be empty and have blanks
    /// around them, as the kernel allows. Returns None if `text` has another format, or names no number.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = BTreeSet::new();
        for element in text.split(',').map(str::trim).filter(|element| !element.is_empty()) {
            let (range, pattern) = match element.split_once(':') {
                Some((range, pattern)) => (range, Some(pattern.split_once('/')?)),
                None => (element, None),
            };
            let (first, last) = match range.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                // Only a range can have a pattern.
                None if pattern.is_some() => return None,
                None => (number(range)?, number(range)?),
            };
            let (used, group) = match pattern {
                Some((used, group)) => (number(used)?, number(group)?),
                None => (1, 1),
            };
            if first > last || last >= LIMIT || used > group || used == 0 {
                return None;
            }
            numbers.extend((first..=last).filter(|number| (number - first) % group < used));
        }
        (!numbers.is_empty()).then_some(Self(numbers))
    }

    /// The number of CPUs in the set.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The numbers, in ascending order.
    pub fn numbers(&self) -> impl Iterator<Item = u32> {
        self.0.iter().copied()
    }

    /// The numbers of both sets.
    pub fn union(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// The numbers that both sets have; None if there are none.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let common: BTreeSet<u32> = self.0.intersection(&other.0).copied().collect();
        (!common.is_empty()).then_some(Self(common))
    }

    /// Returns CPUs of a guest with `cpus` CPUs that stand for this set: as many as the set has, or all. Each
    /// number is mapped to the guest's CPU of that number modulo `cpus`, or to the next one that is free.
    pub fn in_guest(&self, cpus: u32) -> Self {
        let cpus = cpus.max(1);
        let mut chosen = BTreeSet::new();
        for number in self.0.iter().take(cpus as usize) {
            let free = (0..cpus).map(|step| (number + step) % cpus).find(|cpu| !chosen.contains(cpu));
            chosen.extend(free);
        }
        Self(chosen)
    }
}

impl std::fmt::Display for CpuSet {
    /// Formats the set as the kernel's list.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut rest = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if_eq(&(last + 1)) {
                last = next;
            }
            match last {
                last if last == first => write!(f, "{comma}{first}")?,
                last => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

/// Parses digits only, without a sign.
fn number(text: &str) -> Option<u32> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// Parses the set in a field; an empty text is no set.
///
/// # Errors
/// The text is not a set. The error names the field.
pub fn set(field: &'static str, text: Option<&str>) -> Result<Option<CpuSet>, ResourcesError> {
    let Some(text) = text.filter(|text| !text.trim().is_empty()) else { return Ok(None) };
    let invalid = || ResourcesError::Invalid {
        field,
        value: format!("{:?}", text.chars().take(80).collect::<String>()),
        expected: FORMAT,
    };
    CpuSet::parse(text).map(Some).ok_or_else(invalid)
}

/// The set of CPUs that a container is limited to.
///
/// # Errors
/// The text is not a set.
pub fn of(cpu: &LinuxCpu) -> Result<Option<CpuSet>, ResourcesError> {
    set("cpu.cpus", cpu.cpus().as_deref())
}

/// Translates the content of a cgroup file from the host's numbers to the guest's. Returns None for a file
/// that holds no set.
pub fn file_in_guest(name: &str, content: &str, cpus: u32) -> Option<String> {
    if CPU_FILES.contains(&name) {
        return Some(CpuSet::parse(content).map_or_else(String::new, |set| set.in_guest(cpus).to_string()));
    }
    // The guest has one node.
    (name == NODE_FILE).then(|| CpuSet::parse(content).map_or_else(String::new, |_| "0".to_owned()))
}

/// Replaces the host's CPUs and nodes by those of a guest with `cpus` CPUs. Texts that are not a set were
/// refused before.
pub fn translate(resources: &mut LinuxResources, cpus: u32) {
    if let Some(cpu) = resources.cpu().clone() {
        let mut cpu = cpu;
        if let Some(text) = cpu.cpus().clone() {
            cpu.set_cpus(file_in_guest(CPU_FILES[0], &text, cpus).filter(|text| !text.is_empty()));
        }
        if let Some(text) = cpu.mems().clone() {
            cpu.set_mems(file_in_guest(NODE_FILE, &text, cpus).filter(|text| !text.is_empty()));
        }
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut unified) = resources.unified().clone() {
        for (name, content) in &mut unified {
            if let Some(translated) = file_in_guest(name, content, cpus) {
                *content = translated;
            }
        }
        resources.set_unified(Some(unified));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn guest(text: &str, cpus: u32) -> String {
        CpuSet::parse(text).unwrap().in_guest(cpus).to_string()
    }

    #[test]
    fn a_set_has_as_many_cpus_as_before_or_all() {
        for (set, cpus, expected) in [
            ("0", 1, "0"),
            ("1", 1, "0"),
            ("0-1", 1, "0"),
            ("4-7", 2, "0-1"),
            ("4-7", 4, "0-3"),
            ("4-7", 8, "4-7"),
            ("2,5", 8, "2,5"),
            // Both numbers map to 0, so the second takes the next CPU.
            ("0,4", 4, "0-1"),
            ("3,7", 4, "0,3"),
            ("0-7:1/2", 8, "0,2,4,6"),
            ("8191", 3, "1"),
            (" 0-1 ,,3\n", 4, "0-1,3"),
        ] {
            assert_eq!(guest(set, cpus), expected, "{set} of {cpus}");
        }
    }

    #[test]
    fn sets_without_a_cpu_in_common_stay_apart() {
        for (one, other, cpus) in [("0", "1", 2), ("2-3", "4-5", 4), ("8", "9", 2), ("0-3", "4-7", 8)] {
            let [one, other] = [one, other].map(|set| CpuSet::parse(set).unwrap().in_guest(cpus).0);
            assert!(one.is_disjoint(&other), "{one:?} {other:?}");
        }
    }

    #[test]
    fn other_texts_are_not_a_set() {
        for text in [
            "a",
            "5-2",
            "1-",
            "-1",
            "-",
            "0-99999999999",
            "8192",
            ",",
            "",
            " ",
            "0-1-2",
            "0x1",
            "1 2",
            "+1",
            "all",
            "1:1/2",
            "0-3:1",
            "0-3:0/2",
            "0-3:3/2",
            "0-3:1/0",
            "0-3:a/b",
            "0;1",
            "٣",
        ] {
            assert_eq!(CpuSet::parse(text), None, "{text:?}");
        }
        let error = set("cpu.cpus", Some("5-2")).unwrap_err().to_string();
        assert_eq!(
            error,
            "linux.resources.cpu.cpus has the value \"5-2\"; it takes numbers below 8192 and ranges of them, such as \
             0-3,8"
        );
        assert_eq!(set("cpu.cpus", Some("")), Ok(None));
    }

    #[test]
    fn every_member_with_a_set_is_translated() {
        let mut resources: LinuxResources = serde_json::from_str(
            r#"{"cpu": {"cpus": "4-7", "mems": "1", "shares": 5},
                "unified": {"cpuset.cpus": "6", "cpuset.mems": "0-1", "cpuset.cpus.exclusive": "", "memory.high": "7"}}"#,
        )
        .unwrap();
        translate(&mut resources, 2);
        let cpu = resources.cpu().clone().unwrap();
        assert_eq!(
            (cpu.cpus().as_deref(), cpu.mems().as_deref(), cpu.shares()),
            (Some("0-1"), Some("0"), Some(5))
        );
        let unified = resources.unified().clone().unwrap();
        let file = |name: &str| unified[name].as_str();
        assert_eq!((file("cpuset.cpus"), file("cpuset.mems"), file("memory.high")), ("0", "0", "7"));
        assert_eq!(file("cpuset.cpus.exclusive"), "");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn the_number_of_cpus_is_kept_up_to_that_of_the_guest(numbers in prop::collection::btree_set(0_u32..64, 1..20), cpus in 1_u32..20) {
            let guest = CpuSet(numbers.clone()).in_guest(cpus);
            prop_assert_eq!(guest.count(), numbers.len().min(cpus as usize));
            prop_assert!(guest.0.iter().all(|&cpu| cpu < cpus));
            prop_assert_eq!(CpuSet::parse(&guest.to_string()), Some(guest));
        }

        #[test]
        fn any_text_is_understood_or_refused(text in "[0-9,:/ -]{0,12}") {
            if let Some(set) = CpuSet::parse(&text) {
                prop_assert!(set.count() <= LIMIT as usize);
            }
        }
    }
}
