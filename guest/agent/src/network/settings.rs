//! Settings of the containers' network namespace below /proc/sys/net, which have been changed on the host.

use std::{collections::HashMap, fs, io, path::Path};

use super::NetworkError;
use crate::console;

/// Sets them, by their paths below /proc/sys/net. The calling thread is in the containers' namespace. One that this kernel
/// does not have is reported on the console.
///
/// # Errors
/// A path is not one of a namespace's settings, or the kernel refuses a value.
pub(super) fn set_all(settings: &HashMap<String, String>) -> Result<(), NetworkError> {
    if let Some(name) = settings.keys().find(|name| !is_valid(name)) {
        return Err(NetworkError::SettingName(name.chars().take(64).collect()));
    }
    for (name, value) in settings {
        let path = Path::new("/proc/sys/net").join(name);
        match fs::write(&path, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => {
                console::say(&format!(
                    "the kernel has no setting net/{name}, which the host's namespace has"
                ));
            }
            Err(source) => {
                let path = path.display().to_string();
                return Err(NetworkError::Setting { path, value: value.clone(), source });
            }
            Ok(()) => {}
        }
    }
    Ok(())
}

fn is_valid(name: &str) -> bool {
    let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    name.split_once('/').is_some_and(|(dir, setting)| {
        matches!(dir, "core" | "ipv4" | "ipv6") && !setting.is_empty() && setting.bytes().all(is_valid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_settings_of_a_namespace_are_valid() {
        for (name, valid) in [
            ("core/somaxconn", true),
            ("ipv4/tcp_l3mdev_accept", true),
            ("ipv4/../../kernel/x", false),
            ("ipv4/conf/all", false),
            ("kernel/panic", false),
            ("ipv4/", false),
            ("ipv4", false),
        ] {
            assert_eq!(is_valid(name), valid, "{name}");
        }
    }
}
