//! What the host lacks for containers of an ordinary user, and what to do about it.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use machinen::{process::find_program, sys};
use nix::unistd::{Uid, User, geteuid};

/// Kernel settings that keep an ordinary user from making a user namespace: the file, the value that does, and the remedy.
const SETTINGS: [(&str, &str, &str); 3] = [
    ("kernel/unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or a profile of AppArmor that permits userns to Podman",
    ),
    ("user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=10000"),
];

/// The programs that give a user namespace its further users and groups.
const MAPPERS: [&str; 2] = ["newuidmap", "newgidmap"];

/// What the containers of the ordinary user go without, or what keeps the user from having any.
pub(super) fn lacks(user: u32) -> Vec<String> {
    let account = User::from_uid(Uid::from_raw(user)).ok().flatten();
    let name = account.map_or_else(|| user.to_string(), |account| account.name);
    let mut lacks = match geteuid().is_root() {
        // Inside of the namespace its maps say what it has.
        true => of_maps("/proc/self/uid_map", "/proc/self/gid_map"),
        false => [of_settings(Path::new("/proc/sys")), of_mappers()].concat(),
    };
    if !geteuid().is_root() || !lacks.is_empty() {
        lacks.extend(of_ranges(Path::new("/etc"), user, &name));
    }
    if !sys::tap::is_usable() {
        lacks.push(
            "VMs have no network, because /dev/net/tun cannot be opened (`sudo chmod 666 /dev/net/tun`)"
                .to_owned(),
        );
    }
    lacks.extend(of_kvm(Path::new("/dev/kvm"), &name));
    lacks
}

/// What a user namespace lacks whose maps are in these files.
fn of_maps(uids: &str, gids: &str) -> Vec<String> {
    let maps_others = |map: &str| {
        let text = fs::read_to_string(map).unwrap_or_default();
        let count = |line: &str| line.split_ascii_whitespace().nth(2)?.parse::<u64>().ok();
        text.lines().filter_map(count).sum::<u64>() > 1
    };
    match maps_others(uids) && maps_others(gids) {
        true => Vec::new(),
        false => vec![
            "QEMU runs as this user, because the user namespace has no others (the programs newuidmap and newgidmap of the \
             Debian package uidmap give them, with /etc/subuid and /etc/subgid)"
                .to_owned(),
        ],
    }
}

fn of_settings(sysctls: &Path) -> Vec<String> {
    let forbids = |(file, value, remedy): &(&str, &str, &str)| {
        let is_set = fs::read_to_string(sysctls.join(file)).is_ok_and(|text| text.trim() == *value);
        is_set.then(|| {
            format!(
                "the kernel may refuse user namespaces, because {} is {value} ({remedy})",
                file.replace('/', ".")
            )
        })
    };
    SETTINGS.iter().filter_map(forbids).collect()
}

/// The programs must be executable as root.
fn of_mappers() -> Vec<String> {
    let lacks = |name: &&str| {
        let program = find_program(Path::new(name));
        match fs::metadata(&program) {
            Err(_) => Some(format!("{name} is not found (Debian package uidmap)")),
            // Others have the capability as an attribute of the file instead.
            Ok(status) if status.permissions().mode() & 0o4000 == 0 && !has_capabilities(&program) => {
                Some(format!("{} has no rights (`sudo chmod u+s {0}`)", program.display()))
            }
            Ok(_) => None,
        }
    };
    MAPPERS.iter().filter_map(lacks).collect()
}

fn has_capabilities(program: &Path) -> bool {
    rustix::fs::getxattr(program, "security.capability", &mut [0_u8; 64]).is_ok()
}

/// The files of ranges name users by their names or numbers (subuid(5)).
fn of_ranges(etc: &Path, user: u32, name: &str) -> Vec<String> {
    let has_range = |file: &str| {
        let text = fs::read_to_string(etc.join(file)).unwrap_or_default();
        let owner = |line: &str| line.split(':').next().map(str::to_owned);
        text.lines().filter_map(owner).any(|owner| owner == name || owner == user.to_string())
    };
    let files = [("subuid", "--add-subuids"), ("subgid", "--add-subgids")];
    let missing = files.into_iter().filter(|(file, _)| !has_range(file));
    missing
        .map(|(file, option)| {
            format!("/etc/{file} has no range for {name} (`sudo usermod {option} 100000-165535 {name}`)")
        })
        .collect()
}

/// Without the device VMs run, and are slower.
fn of_kvm(device: &Path, name: &str) -> Option<String> {
    let opened = File::options().read(true).write(true).open(device);
    let is_refused = opened.is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied);
    is_refused.then(|| {
        format!("VMs are slow, because {} cannot be opened (`sudo usermod -aG kvm {name}`)", device.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("kernel")).unwrap();
        fs::write(path("kernel/unprivileged_userns_clone"), "0\n").unwrap();
        fs::write(path("kernel/apparmor_restrict_unprivileged_userns"), "0\n").unwrap();
        let lacks = of_settings(dir.path());
        assert!(lacks.len() == 1 && lacks[0].contains("kernel.unprivileged_userns_clone is 0"), "{lacks:?}");
        fs::write(path("subuid"), "other:100000:65536\n1001:165536:65536\n").unwrap();
        let lacks = of_ranges(dir.path(), 1001, "ann");
        assert!(lacks.len() == 1 && lacks[0].contains("--add-subgids 100000-165535 ann"), "{lacks:?}");
        fs::write(path("subgid"), "ann:100000:65536\n").unwrap();
        assert!(of_ranges(dir.path(), 1001, "ann").is_empty());
        assert_eq!(of_ranges(dir.path(), 1002, "bob").len(), 2);
        let (one, more) = (path("one").display().to_string(), path("more").display().to_string());
        fs::write(&one, "0 1001 1\n").unwrap();
        fs::write(&more, "0 1001 1\n1 100000 65536\n").unwrap();
        assert!(of_maps(&more, &more).is_empty() && of_maps(&more, &one)[0].contains("uidmap"));
        assert_eq!(of_kvm(&path("none"), "ann"), None);
    }
}
