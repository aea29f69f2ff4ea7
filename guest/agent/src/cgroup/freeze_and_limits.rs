//! Controls the cgroup of a running container: freezes its processes, reads and changes its limits and
//! counters, and reports kills by the OOM killer.
//!
//! The host knows the names and contents of the files, and the guest only passes them on: code that the guest
//! does not have does not slow down its first call.

use std::{
    fs, io,
    io::{Read, Write},
    time::Duration,
};

use machinen_protocol::api::CgroupFile;

use super::{Cgroup, CgroupError, has_line, is_gone};

/// How long processes may take to freeze. A process in an uninterruptible system call cannot be frozen.
pub(super) const FREEZE_DEADLINE: Duration = Duration::from_secs(10);

/// Most bytes that are read of a cgroup file; no file is this long.
const MAX_CONTENT: u64 = 64 << 10;

impl Cgroup {
    /// Freezes all processes, and returns when the kernel reports it. SIGKILL still ends them.
    ///
    /// # Errors
    /// The kernel refuses, or cannot freeze one of them: all of them continue then.
    pub(crate) async fn freeze(&self) -> Result<(), CgroupError> {
        self.begin_to_freeze()?;
        let frozen = self.watch("cgroup.events", |text| has_line(text, "frozen 1").then_some(()));
        match tokio::time::timeout(FREEZE_DEADLINE, frozen).await {
            Ok(frozen) => frozen.map(drop),
            Err(_) => self.thaw().and(Err(CgroupError::NotFrozen)),
        }
    }

    /// Begins to freeze all processes. Those that are stopped by ptrace freeze when they are let go.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn begin_to_freeze(&self) -> Result<(), CgroupError> {
        self.set("cgroup.freeze", "1")
    }

    /// Whether all processes are frozen.
    pub(crate) fn is_frozen(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events")).is_ok_and(|text| has_line(&text, "frozen 1"))
    }

    /// Lets all processes continue.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn thaw(&self) -> Result<(), CgroupError> {
        self.set("cgroup.freeze", "0")
    }

    /// Reads files; those that do not exist are left out.
    ///
    /// # Errors
    /// A name is not that of a cgroup file, or a file cannot be read.
    pub(crate) fn read_files(&self, names: &[String]) -> Result<Vec<CgroupFile>, CgroupError> {
        let mut files = Vec::new();
        for name in names {
            if let Some(content) = self.read(name)? {
                files.push(CgroupFile { name: name.clone(), content, ..Default::default() });
            }
        }
        Ok(files)
    }

    /// Writes files in the order given; when the kernel refuses one, the files before it get their old
    /// content back.
    ///
    /// # Errors
    /// A name is not that of a cgroup file, the kernel has no such file, or refuses the value.
    pub(crate) fn write_files(&self, files: &[CgroupFile]) -> Result<(), CgroupError> {
        let mut undo: Vec<(&str, String)> = Vec::new();
        for file in files {
            let old =
                self.read(&file.name)?.ok_or_else(|| CgroupError::NoFile { name: file.name.clone() })?;
            if let Err(err) = self.set(&file.name, &file.content) {
                for (name, old) in undo.into_iter().rev() {
                    // The first failure is reported.
                    let _ = self.set(name, &old);
                }
                return Err(err);
            }
            undo.push((&file.name, old));
        }
        Ok(())
    }

    /// Waits until the OOM killer has killed more than `seen` processes, and returns their number. Never
    /// returns without a memory controller.
    ///
    /// # Errors
    /// The count cannot be read.
    pub(crate) async fn out_of_memory(&self, seen: u64) -> Result<u64, CgroupError> {
        let more = |text: &str| Some(oom_kills(text)).filter(|&killed| killed > seen);
        match self.watch("memory.events", more).await? {
            Some(killed) => Ok(killed),
            None => std::future::pending().await,
        }
    }

    /// How many processes the OOM killer has killed.
    pub(crate) fn oom_kills(&self) -> u64 {
        // 0 without a memory controller, as on some test hosts.
        fs::read_to_string(self.path.join("memory.events")).map_or(0, |text| oom_kills(&text))
    }

    pub(super) fn read(&self, name: &str) -> Result<Option<String>, CgroupError> {
        let path = self.path.join(checked(name)?);
        let read = || {
            let mut content = String::new();
            fs::File::open(&path)?.take(MAX_CONTENT).read_to_string(&mut content)?;
            Ok(content)
        };
        match read() {
            Ok(content) => Ok(Some(content)),
            // EOPNOTSUPP: the file is compiled in, but disabled, as pressure files can be.
            Err(err) if is_gone(&err) || err.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
            Err(source) => Err(CgroupError::Read { path, source }),
        }
    }

    pub(super) fn set(&self, name: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(checked(name)?);
        let open = fs::OpenOptions::new().write(true).open(path);
        open.and_then(|mut file| file.write_all(value.as_bytes())).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CgroupError::NoFile { name: name.to_owned() },
            _ => CgroupError::Set { name: name.to_owned(), value: value.trim_end().to_owned(), source },
        })
    }
}

fn oom_kills(events: &str) -> u64 {
    events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
}

/// Checks that a name is that of a file in the cgroup's own directory.
fn checked(name: &str) -> Result<&str, CgroupError> {
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    // All of these are named `controller.name`.
    if plain && name.contains('.') && !name.starts_with('.') && !name.contains("..") {
        Ok(name)
    } else {
        Err(CgroupError::FileName { name: name.chars().take(64).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cgroups_own_files_have_names() {
        for name in ["memory.max", "hugetlb.2MB.max", "cpuset.cpus.effective"] {
            assert!(checked(name).is_ok(), "{name}");
        }
        for name in ["", ".", "..", "memory", "../memory.max", "child/memory.max", "a..b", ".x", "io max.x"] {
            assert!(checked(name).is_err(), "{name}");
        }
    }

    #[test]
    fn kills_are_not_mistaken_for_other_events() {
        assert_eq!(oom_kills("low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n"), 5);
        assert_eq!(oom_kills("oom_group_kill 6\n"), 0);
    }
}
