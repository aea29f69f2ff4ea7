//! Adapts the mounts of an OCI configuration, and adds those of the host's files.
//!
//! The agent itself serves the volumes, so nothing here may look at one: the call would wait for itself.

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use machinen_protocol::shares::ShareEntry;
use nix::sys::stat::{SFlag, fstat};
use pathrs::Root;
use serde_json::{Value, json};

use super::oci::{SpecError, items, path_value};

/// The option of a tmpfs that starts with what the image has in its place.
const COPY_UP: &str = "tmpcopyup";

/// A small file that the host has sent: it is at `source` in the agent's directory, and mounted at
/// `destination` in the container.
#[derive(Debug, Clone)]
pub(crate) struct FileMount {
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
}

/// A place of the root file system itself where the configuration mounts something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountPoint {
    pub(crate) path: PathBuf,
    /// The mount is a file, not a directory.
    pub(crate) is_file: bool,
}

/// Changes what libcontainer would misread. `bind_sysfs_of_vm`: the container may not mount a sysfs.
pub(super) fn adapt(spec: &mut Value, root: &Root, bind_sysfs_of_vm: bool) {
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        // The source is optional and has no meaning for a file system without a device, but libcontainer
        // requires one.
        if mount["source"].as_str().is_none_or(str::is_empty) {
            mount["source"] = mount["type"].clone();
        }
        match mount["type"].as_str() {
            // libcontainer knows mounts of the cgroup hierarchy by the name that they have in v1.
            Some("cgroup2") => mount["type"] = "cgroup".into(),
            Some("sysfs") if bind_sysfs_of_vm => bind_sysfs(mount),
            Some("bind") if entry(mount).is_some() => {
                let destination = PathBuf::from(mount["destination"].as_str().unwrap_or_default());
                mount["destination"] = path_value(&resolve_links(root, &destination));
            }
            _ => {}
        }
    }
    add_modes(&mut spec["mounts"], root);
}

/// Refuses a proc or sysfs whose place in the image is a link, or a file: what the container trusts would be elsewhere.
///
/// # Errors
/// There is one, in runc's words.
pub(super) fn refuse_links(mounts: &Value, root: &Root) -> Result<(), SpecError> {
    for mount in items(mounts) {
        let Some(kind @ ("proc" | "sysfs")) = mount["type"].as_str() else { continue };
        // What is not there becomes a directory.
        let Ok(place) = root.resolve_nofollow(destination(mount)) else { continue };
        let is_directory = fstat(place.as_fd())
            .is_ok_and(|found| SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR);
        if !is_directory {
            return Err(SpecError::NoDirectory { kind: kind.to_owned(), path: destination(mount) });
        }
    }
    Ok(())
}

/// Gives each tmpfs without a mode that of the directory in its place, as runc does.
fn add_modes(mounts: &mut Value, root: &Root) {
    let mode = |mount: &Value| {
        let has_mode = items(&mount["options"]).filter_map(Value::as_str).any(|it| it.starts_with("mode="));
        let is_below = above(mounts, &destination(mount)).is_some_and(|it| destination(it) != Path::new("/"));
        if mount["type"] != "tmpfs" || has_mode || is_below {
            return None;
        }
        // What is not there becomes a directory that nobody has chosen a mode for.
        let found = fstat(root.resolve(destination(mount)).ok()?.as_fd()).ok()?;
        Some(format!("mode={:o}", found.st_mode & 0o7777))
    };
    let modes: Vec<_> = items(mounts).map(mode).collect();
    for (mount, mode) in mounts.as_array_mut().into_iter().flatten().zip(modes) {
        let Some(mode) = mode else { continue };
        match mount["options"].as_array_mut() {
            Some(options) => options.push(mode.into()),
            None => mount["options"] = json!([mode]),
        }
    }
}

/// Whether /dev is a read-only tmpfs.
pub(super) fn has_read_only_dev(mounts: &Value) -> bool {
    let is_dev = |mount: &&Value| destination(mount) == Path::new("/dev") && mount["type"] == "tmpfs";
    items(mounts)
        .filter(is_dev)
        .last()
        .is_some_and(|mount| items(&mount["options"]).any(|option| option == "ro"))
}

/// Removes runc's option `tmpcopyup`, and returns the places of the mounts that have it.
///
/// # Errors
/// The mount cannot be filled.
pub(super) fn take_copy_ups(spec: &mut Value) -> Result<Vec<PathBuf>, SpecError> {
    let mut taken = Vec::new();
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        let Some(options) = mount["options"].as_array_mut() else { continue };
        let before = options.len();
        options.retain(|option| option != COPY_UP);
        if options.len() < before {
            let is_read_only = options.iter().any(|option| option == "ro");
            let path = destination(mount);
            if is_read_only || mount["type"] != "tmpfs" {
                let reason = if is_read_only { "it is read-only" } else { "it is no tmpfs" };
                return Err(SpecError::CopyUp { path, reason });
            }
            taken.push(path);
        }
    }
    match taken
        .iter()
        .find(|path| above(&spec["mounts"], path).is_some_and(|mount| destination(mount) != Path::new("/")))
    {
        Some(path) => Err(SpecError::CopyUp { path: path.clone(), reason: "it is below another mount" }),
        None => Ok(taken),
    }
}

/// Mounts the files that the host has sent.
pub(super) fn add_files(spec: &mut Value, root: &Root, files: Vec<FileMount>) {
    if !spec["mounts"].is_array() {
        spec["mounts"] = json!([]);
    }
    let mounts = files.into_iter().map(|file| {
        json!({
            "destination": path_value(&resolve_links(root, &file.destination)),
            "type": "bind",
            "source": path_value(&file.source),
            "options": ["rbind", "rprivate"],
        })
    });
    if let Some(all) = spec["mounts"].as_array_mut() {
        all.extend(mounts);
    }
}

/// A place in a volume where the configuration mounts something else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PointInVolume {
    /// The path of the volume in the VM.
    pub(crate) volume: PathBuf,
    /// Relative to the volume.
    pub(crate) point: MountPoint,
    /// The path in the container.
    pub(crate) destination: PathBuf,
}

/// The mounts that are not below another mount.
pub(super) fn mount_points(mounts: &Value) -> Vec<MountPoint> {
    let without_above = items(mounts).filter(|mount| above(mounts, &destination(mount)).is_none());
    without_above.map(|mount| MountPoint { path: destination(mount), is_file: is_file(mount) }).collect()
}

/// The mounts that are below a volume.
pub(super) fn points_in_volumes(mounts: &Value) -> Vec<PointInVolume> {
    let in_volume = |mount: &Value| {
        let destination = destination(mount);
        let above = above(mounts, &destination)?;
        let volume = entry(above)?.path();
        let path = destination.strip_prefix(self::destination(above)).ok()?.to_owned();
        Some(PointInVolume { volume, point: MountPoint { path, is_file: is_file(mount) }, destination })
    };
    items(mounts).filter_map(in_volume).collect()
}

/// The nearest mount above a path.
fn above<'a>(mounts: &'a Value, path: &Path) -> Option<&'a Value> {
    let is_above = |mount: &&Value| destination(mount) != path && path.starts_with(destination(mount));
    items(mounts).filter(is_above).max_by_key(|mount| destination(mount).components().count())
}

fn destination(mount: &Value) -> PathBuf {
    PathBuf::from(mount["destination"].as_str().unwrap_or_default())
}

fn is_file(mount: &Value) -> bool {
    match entry(mount) {
        Some(entry) => entry.is_file,
        None => mount["type"] == "bind" && source(mount).is_some_and(Path::is_file),
    }
}

/// The volumes that are mounted, by their paths in the VM.
pub(super) fn volumes(mounts: &Value) -> Vec<PathBuf> {
    items(mounts).filter_map(entry).map(ShareEntry::path).collect()
}

/// The volume that a mount shows.
fn entry(mount: &Value) -> Option<ShareEntry> {
    source(mount).and_then(ShareEntry::of_path)
}

fn source(mount: &Value) -> Option<&Path> {
    mount["source"].as_str().map(Path::new)
}

/// Resolves all links in a path, also dangling ones. libcontainer creates missing files and directories, but not the
/// targets of links, and /etc/resolv.conf often is a link. A link that leads out of the root leads to the root.
fn resolve_links(root: &Root, path: &Path) -> PathBuf {
    /// The kernel follows as many (path_resolution(7)).
    const MAX_LINKS: usize = 40;
    let names = |path: &Path| path.components().map(|it| it.as_os_str().to_owned()).collect::<Vec<_>>();
    let mut resolved = PathBuf::from("/");
    // The next name is the last one.
    let mut rest: Vec<_> = names(path).into_iter().rev().collect();
    let mut links = 0;
    while let Some(name) = rest.pop() {
        match name.as_encoded_bytes() {
            b"/" => resolved = PathBuf::from("/"),
            b"." => {}
            b".." => drop(resolved.pop()),
            _ => {
                let next = resolved.join(&name);
                match root.readlink(&next) {
                    Ok(target) if links < MAX_LINKS => {
                        links += 1;
                        rest.extend(names(&target).into_iter().rev());
                    }
                    _ => resolved = next,
                }
            }
        }
    }
    resolved
}

/// Replaces a sysfs mount by a bind mount of the VM's. A sysfs shows a network namespace, and only the owner
/// of that namespace may mount one.
fn bind_sysfs(mount: &mut Value) {
    let options: Vec<Value> = items(&mount["options"]).cloned().chain(["rbind".into()]).collect();
    mount["type"] = "bind".into();
    mount["source"] = crate::network::sysfs().into();
    mount["options"] = options.into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_on_the_root_file_system_are_known() {
        let mounts = json!([
            {"destination": "/dev", "type": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts"},
            {"destination": "/devices", "type": "tmpfs"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/proc/self/status"},
            {"destination": "/d", "type": "bind", "source": "/run/machinen-shares/dir-1"},
            {"destination": "/f", "type": "bind", "source": "/run/machinen-shares/file-2"},
        ]);
        let found: Vec<_> =
            mount_points(&mounts).into_iter().map(|point| (point.path, point.is_file)).collect();
        let points =
            [("/dev", false), ("/devices", false), ("/etc/hosts", true), ("/d", false), ("/f", true)];
        assert_eq!(found, points.map(|(path, is_file)| (PathBuf::from(path), is_file)));
        let paths = ["/run/machinen-shares/dir-1", "/run/machinen-shares/file-2"];
        assert_eq!(volumes(&mounts), paths.map(PathBuf::from));
        assert_eq!(points_in_volumes(&mounts), []);
    }

    #[test]
    fn a_proc_in_the_place_of_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/elsewhere", dir.path().join("sys")).unwrap();
        std::fs::create_dir(dir.path().join("proc")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let root = Root::open(dir.path()).unwrap();
        let refused = |path: &str, kind: &str| {
            refuse_links(&json!([{"destination": path, "type": kind}]), &root)
                .err()
                .map(|err| err.to_string())
        };
        for (path, kind) in [("/proc", "proc"), ("/new", "sysfs"), ("/sys", "tmpfs"), ("/sys", "bind")] {
            assert_eq!(refused(path, kind), None, "{path}");
        }
        for (path, kind) in [("/sys", "sysfs"), ("/file", "proc")] {
            let error = refused(path, kind).unwrap();
            assert!(
                error.contains(path) && error.contains("must be mounted on ordinary directory"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_tmpfs_has_the_mode_of_the_directory_in_its_place() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        for (name, mode) in [("tmp", 0o1770), ("dev", 0o700), ("dev/shm", 0o711)] {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let mount =
            |path: &str, options: Value| json!({"destination": path, "type": "tmpfs", "options": options});
        let mut spec = json!({"mounts": [
            mount("/tmp", json!(["nosuid"])), mount("/dev", Value::Null), mount("/dev/shm", json!([])),
            mount("/tmp", json!(["mode=500"])), mount("/none", json!([])),
            {"destination": "/tmp", "type": "bind", "source": "/x", "options": []},
        ]});
        adapt(&mut spec, &Root::open(dir.path()).unwrap(), false);
        let options: Vec<_> = items(&spec["mounts"]).map(|mount| mount["options"].clone()).collect();
        let expected = [
            json!(["nosuid", "mode=1770"]),
            json!(["mode=700"]),
            json!([]),
            json!(["mode=500"]),
            json!([]),
            json!([]),
        ];
        assert_eq!(options, expected);
    }

    #[test]
    fn links_lead_to_where_the_mount_is_to_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let link = |target: &str, name: &str| {
            std::os::unix::fs::symlink(target, dir.path().join(name)).unwrap();
        };
        std::fs::create_dir(dir.path().join("d")).unwrap();
        link("/gone/deep", "d/jump");
        link("../run/file", "d/file");
        link("/../../out", "out");
        link("loop", "loop");
        let root = Root::open(dir.path()).unwrap();
        for (path, expected) in [
            ("/d/jump/x/y", "/gone/deep/x/y"),
            ("/d/file", "/run/file"),
            ("d/./plain/../x", "/d/x"),
            ("/out/x", "/out/x"),
            ("/loop", "/loop"),
        ] {
            assert_eq!(resolve_links(&root, path.as_ref()), Path::new(expected), "{path}");
        }
    }

    #[test]
    fn a_read_only_dev_is_the_last_one() {
        let dev =
            |kind: &str, options: Value| json!({"destination": "/dev", "type": kind, "options": options});
        let (ro, rw) = (dev("tmpfs", json!(["nosuid", "ro"])), dev("tmpfs", json!(["rw"])));
        assert!(has_read_only_dev(&json!([rw, ro])));
        assert!(!has_read_only_dev(&json!([ro, rw])));
        assert!(!has_read_only_dev(&json!([dev("bind", json!(["ro"]))])) && !has_read_only_dev(&Value::Null));
    }

    #[test]
    fn mount_points_in_volumes_are_known() {
        let mounts = json!([
            {"destination": "/d", "type": "bind", "source": "/run/machinen-shares/dir-1"},
            {"destination": "/d/tmp", "type": "tmpfs"},
            {"destination": "/d/a/b", "type": "bind", "source": "/run/machinen-shares/file-2"},
            {"destination": "/d/tmp/in-memory", "type": "tmpfs"},
        ]);
        let point = |path: &str, is_file| PointInVolume {
            volume: "/run/machinen-shares/dir-1".into(),
            point: MountPoint { path: path.into(), is_file },
            destination: Path::new("/d").join(path),
        };
        assert_eq!(points_in_volumes(&mounts), [point("tmp", false), point("a/b", true)]);
    }
}
