//! For whom this process works, and what that keeps it from.

use machinen::owner;
use nix::unistd::{Uid, User, geteuid};

/// Why something may not be allowed to this process, as a clause of a message; None for the host's root.
pub(crate) fn missing() -> Option<String> {
    let user = owner::user()?;
    let name = User::from_uid(Uid::from_raw(user)).ok().flatten().map(|user| user.name);
    Some(missing_of(geteuid().is_root(), user, name.as_deref()))
}

fn missing_of(is_root: bool, user: u32, name: Option<&str>) -> String {
    let name = name.map(|name| format!(" ({name})")).unwrap_or_default();
    match is_root {
        false => format!(
            "this is user {user}{name}, without a user namespace: try again with sudo, or as an ordinary user below `podman unshare`"
        ),
        true => format!(
            "this is root of a user namespace, user {user}{name} outside of it, as under rootless Podman: `machinen check` \
             says what is missing"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_and_a_way_out_are_named() {
        let user = missing_of(false, 1001, Some("ann"));
        assert!(user.contains("user 1001 (ann)") && user.contains("sudo"), "{user}");
        let podman = missing_of(true, 1001, None);
        assert!(podman.contains("user 1001 outside") && podman.contains("rootless Podman"), "{podman}");
    }
}
