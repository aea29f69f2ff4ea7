//! Settings of a network namespace (sysctls below /proc/sys/net) that have been changed there, as the CNI's plugin
//! `tuning` does. The guest gets them.
//!
//! The kernel reports no change of a setting, so they are read when a container is created or started. Which of them were
//! changed is known by comparison with a namespace that has had no other user. Settings of single interfaces (`conf`, `neigh`)
//! are not among them: the guest's interfaces have their own.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{fd::BorrowedFd, unix::fs::PermissionsExt as _},
    path::Path,
};

use machinen_base::netns;

const ROOT: &str = "/proc/sys/net";
const DIRS: [&str; 3] = ["core", "ipv4", "ipv6"];
/// Root can read and write the setting. Others are the same for all namespaces, or no settings.
const READ_WRITE: u32 = 0o600;

/// Values by the paths of the settings below /proc/sys/net.
pub(super) type Settings = BTreeMap<String, String>;

/// What is read of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reread {
    /// After the kernel has reported a change, of which there can be many.
    Interfaces,
    /// These too.
    Settings,
}

/// The settings of a namespace that were changed.
#[derive(Debug, Default)]
pub(super) struct ChangedSettings {
    /// Those of a new namespace, once they have been read.
    usual: Option<Settings>,
    /// With the values that they have now, which may be the usual ones again.
    changed: Settings,
}

impl ChangedSettings {
    /// Those that the last call of [`Self::read`] has found.
    pub(super) fn last(&self) -> &Settings {
        &self.changed
    }

    /// Reads the namespace. `usual` is a namespace without any change.
    ///
    /// # Errors
    /// A namespace cannot be entered, or /proc is not mounted.
    pub(super) fn read(&mut self, namespace: BorrowedFd<'_>, usual: BorrowedFd<'_>) -> io::Result<()> {
        let usual = match &mut self.usual {
            Some(usual) => usual,
            none => none.insert(netns::inside(usual, settings)?),
        };
        for (name, value) in netns::inside(namespace, settings)? {
            if self.changed.contains_key(&name) || usual.get(&name).is_some_and(|usual| *usual != value) {
                self.changed.insert(name, value);
            }
        }
        Ok(())
    }
}

/// The settings of the calling thread's namespace.
fn settings() -> io::Result<Settings> {
    let mut found = Settings::new();
    for dir in DIRS {
        let entries = match fs::read_dir(Path::new(ROOT).join(dir)) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let metadata = entry.metadata()?;
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|_| metadata.is_file()) else { continue };
            if metadata.permissions().mode() & READ_WRITE != READ_WRITE {
                continue;
            }
            // Some fail to be read as long as something else is not configured.
            if let Ok(value) = fs::read_to_string(entry.path()) {
                found.insert(format!("{dir}/{name}"), value.trim_end().to_owned());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn only_what_differs_is_found_also_when_it_is_usual_again() {
        let new = || netns::inside_new(|| Ok(())).unwrap().0;
        let (namespace, usual) = (new(), new());
        let mut changed = ChangedSettings::default();
        let mut read = || {
            changed.read(namespace.as_fd(), usual.as_fd()).unwrap();
            changed.last().clone()
        };
        assert_eq!(read(), Settings::new());
        let path = Path::new(ROOT).join("core/somaxconn");
        let set = |value: &str| netns::inside(namespace.as_fd(), || fs::write(&path, value)).unwrap();
        let value = |value: &str| Settings::from([("core/somaxconn".to_owned(), value.to_owned())]);
        set("777");
        assert_eq!(read(), value("777"));
        set("4096");
        assert_eq!(read(), value("4096"));
    }
}
