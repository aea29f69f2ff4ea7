//! Sets of the host's CPUs and memory nodes, translated to the guest's.
//!
//! A cpuset names CPUs of the host. The VM has other CPUs, usually fewer, and they are not bound to CPUs of the host:
//! what lasts of a set is how many CPUs it has. Which of the guest's CPUs stand for it is chosen so that containers of
//! one VM whose sets have nothing in common share none of the guest's CPUs as long as there are enough.

use std::collections::BTreeSet;

use oci_spec::runtime::{LinuxCpu, LinuxResources};

use super::resources::ResourcesError;

/// Numbers from here on name no CPU or node of any host (the kernel's largest NR_CPUS on x86).
const LIMIT: u32 = 8192;

/// The files of a cgroup that hold sets of CPUs and of nodes.
pub const CPU_FILES: [&str; 2] = ["cpuset.cpus", "cpuset.cpus.exclusive"];
pub const NODE_FILE: &str = "cpuset.mems";

/// What a set has to look like.
const FORMAT: &str = "numbers below 8192 and ranges of them, such as 0-3,8";

/// A set of numbers that is not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set(BTreeSet<u32>);

impl Set {
    /// Reads the kernel's list format (cpuset(7), "List format"). Elements may be empty and have blanks around them,
    /// as the kernel allows. None if `text` is something else, or names nothing.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = BTreeSet::new();
        for element in text.split(',').map(str::trim).filter(|element| !element.is_empty()) {
            let (range, pattern) = match element.split_once(':') {
                Some((range, pattern)) => (range, Some(pattern.split_once('/')?)),
                None => (element, None),
            };
            let (first, last) = match range.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                // Only a range has a pattern.
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

    /// How many CPUs it names.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The CPUs of a guest with `cpus` of them that stand for the set: as many as it has, or all. Each number falls on
    /// the guest's CPU of that number modulo `cpus`, or on the next one that is free.
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

impl std::fmt::Display for Set {
    /// In the kernel's list format.
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

/// Digits only.
fn number(text: &str) -> Option<u32> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// A set that is one, or an error that names the field. An empty text is no set.
///
/// # Errors
/// It is neither.
pub fn set(field: &'static str, text: Option<&str>) -> Result<Option<Set>, ResourcesError> {
    let Some(text) = text.filter(|text| !text.trim().is_empty()) else { return Ok(None) };
    let invalid = || ResourcesError::Invalid {
        field,
        value: format!("{:?}", text.chars().take(80).collect::<String>()),
        expected: FORMAT,
    };
    Set::parse(text).map(Some).ok_or_else(invalid)
}

/// The set of CPUs that a container is limited to by either of its fields.
///
/// # Errors
/// One of them is no set.
pub fn of(cpu: &LinuxCpu) -> Result<Option<Set>, ResourcesError> {
    set("cpu.cpus", cpu.cpus().as_deref())
}

/// What a file of the cgroup has to hold for a content that is the host's; None for a file without CPUs or nodes.
pub fn file_in_guest(name: &str, content: &str, cpus: u32) -> Option<String> {
    if CPU_FILES.contains(&name) {
        return Some(Set::parse(content).map_or_else(String::new, |set| set.in_guest(cpus).to_string()));
    }
    // The guest has one node.
    (name == NODE_FILE).then(|| Set::parse(content).map_or_else(String::new, |_| "0".to_owned()))
}

/// Puts the CPUs and the node of a guest with `cpus` CPUs in the place of the host's. What is no set stays: it has been
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
        Set::parse(text).unwrap().in_guest(cpus).to_string()
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
            // Both fall on 0; the second one takes the next.
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
            let [one, other] = [one, other].map(|set| Set::parse(set).unwrap().in_guest(cpus).0);
            assert!(one.is_disjoint(&other), "{one:?} {other:?}");
        }
    }

    #[test]
    fn nonsense_is_no_set() {
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
            assert_eq!(Set::parse(text), None, "{text:?}");
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
    fn every_place_of_a_set_is_translated() {
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
        fn no_cpu_is_lost_and_none_invented(numbers in prop::collection::btree_set(0_u32..64, 1..20), cpus in 1_u32..20) {
            let guest = Set(numbers.clone()).in_guest(cpus);
            prop_assert_eq!(guest.count(), numbers.len().min(cpus as usize));
            prop_assert!(guest.0.iter().all(|&cpu| cpu < cpus));
            prop_assert_eq!(Set::parse(&guest.to_string()), Some(guest));
        }

        #[test]
        fn any_text_is_understood_or_refused(text in "[0-9,:/ -]{0,12}") {
            if let Some(set) = Set::parse(&text) {
                prop_assert!(set.count() <= LIMIT as usize);
            }
        }
    }
}
