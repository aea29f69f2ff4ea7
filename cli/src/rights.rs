//! Whether this process is the host's root, which owners of VMs have to be.

use std::fs;

use nix::unistd::{User, geteuid};

/// Why this process is not the host's root, as a clause of a message; None if it is.
pub(crate) fn missing() -> Option<String> {
    let uid = geteuid();
    let name = User::from_uid(uid).ok().flatten().map(|user| user.name);
    missing_of(uid.as_raw(), name.as_deref(), &fs::read_to_string("/proc/self/uid_map").unwrap_or_default())
}

fn missing_of(uid: u32, name: Option<&str>, uid_map: &str) -> Option<String> {
    if uid != 0 {
        let name = name.map(|name| format!(" ({name})")).unwrap_or_default();
        return Some(format!("machinen needs root, and this is user {uid}{name}: try again with sudo"));
    }
    // Only the initial user namespace maps all users (user_namespaces(7)). Root of another one is an ordinary user of the host.
    let mut words = uid_map.split_ascii_whitespace();
    let (Some("0"), Some(outside)) = (words.next(), words.next()) else { return None };
    (outside != "0").then(|| {
        format!(
            "machinen needs the host's root, and this is root of a user namespace, user {outside} outside of it, as under \
             rootless Podman: try again with sudo"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_root_of_the_host_is_root() {
        let all = "         0          0 4294967295\n";
        assert_eq!(missing_of(0, Some("root"), all), None);
        // As in a container whose users are those of the host.
        assert_eq!(missing_of(0, Some("root"), "0 0 65536\n"), None);
        assert_eq!(missing_of(0, None, ""), None);
        let user = missing_of(1001, Some("ann"), all).unwrap();
        assert!(user.contains("user 1001 (ann)") && user.contains("sudo"), "{user}");
        let podman = missing_of(0, Some("root"), "0 1001 1\n1 100000 65536\n").unwrap();
        assert!(podman.contains("user 1001 outside") && podman.contains("rootless Podman"), "{podman}");
    }
}
