//! The volumes of a checkpointed container: what the manifest records of them, and which volumes of a new container
//! take their places.
//!
//! Their files are not part of a checkpoint. A restore mounts the volumes of the new configuration where those of the
//! checkpoint were, and CRIU opens files in them by their names.

use std::path::{Path, PathBuf};

use machinen_base::text::printable;
use machinen_protocol::{
    api::{CheckpointFacts, ExternalMount},
    shares::ShareEntry,
};
use serde::{Deserialize, Serialize};

use super::CheckpointError;
use crate::shares::{SharedVolume, Volume};

/// A volume of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestVolume {
    /// The path in the container's configuration.
    pub destination: PathBuf,
    /// Whether the source is a single file, and not a directory.
    pub is_file: bool,
    /// Whether the container may not write to it.
    pub read_only: bool,
    /// Where it is mounted: the destination without links of the image. None if the container has unmounted it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mounted_at: Option<PathBuf>,
}

/// Takes the mounts of volumes out of the guest's report, and combines them with what the host knows of the volumes.
///
/// # Errors
/// The report names a volume that the container does not have, or another mount at the same place.
pub(crate) fn record(
    facts: &mut CheckpointFacts,
    shared: &[SharedVolume],
) -> Result<Vec<ManifestVolume>, CheckpointError> {
    let mut volumes: Vec<_> = shared.iter().map(ManifestVolume::unmounted).collect();
    let (mounts, others): (Vec<_>, Vec<_>) =
        std::mem::take(&mut facts.mounts).into_iter().partition(|mount| entry(mount).is_some());
    for (number, mount) in mounts.iter().enumerate() {
        let at = &mount.destination;
        let is_covered = mounts[..number].iter().chain(&others).any(|other| other.destination == *at);
        if is_covered {
            return Err(CheckpointError::CoveredVolume { destination: printable(at) });
        }
        let place = shared.iter().position(|volume| entry(mount) == Some(volume.entry));
        let volume =
            place.and_then(|place| volumes.get_mut(place)).ok_or_else(|| CheckpointError::Guest {
                what: format!("the container has no volume {}", printable(&mount.source)),
            })?;
        volume.mounted_at = Some(at.into());
    }
    facts.mounts = others;
    Ok(volumes)
}

/// Checks that the volumes of a new container can take the places of those of the checkpoint.
///
/// # Errors
/// The first volume that is missing, is not in the checkpoint, or differs in kind.
pub(crate) fn check(recorded: &[ManifestVolume], configured: &[Volume]) -> Result<(), CheckpointError> {
    for volume in recorded {
        let destination = || printable(&volume.destination.to_string_lossy());
        let Some(found) = configured.iter().find(|found| found.destination == volume.destination) else {
            return Err(CheckpointError::NoVolume { destination: destination() });
        };
        if found.is_file != volume.is_file {
            let (path, is_file) = (found.path.clone(), found.is_file);
            return Err(CheckpointError::VolumeKind { destination: destination(), path, is_file });
        }
        if volume.read_only && !found.options.read_only {
            return Err(CheckpointError::ReadOnlyVolume { destination: destination() });
        }
    }
    let is_new = |number: usize, volume: &Volume| {
        let same = |destination: &Path| destination == volume.destination;
        !recorded.iter().any(|recorded| same(&recorded.destination))
            || configured[..number].iter().any(|earlier| same(&earlier.destination))
    };
    match configured.iter().enumerate().find(|(number, volume)| is_new(*number, volume)) {
        Some((_, volume)) => Err(CheckpointError::NewVolume { destination: volume.destination.clone() }),
        None => Ok(()),
    }
}

/// The mounts that a restore makes in the guest.
pub(crate) fn mounts(recorded: &[ManifestVolume], shared: &[SharedVolume]) -> Vec<ExternalMount> {
    let mount = |volume: &ManifestVolume| {
        let shared = shared.iter().find(|shared| shared.destination == volume.destination)?;
        Some(ExternalMount {
            destination: volume.mounted_at.as_ref()?.display().to_string(),
            source: shared.entry.path().display().to_string(),
            ..Default::default()
        })
    };
    recorded.iter().filter_map(mount).collect()
}

fn entry(mount: &ExternalMount) -> Option<ShareEntry> {
    ShareEntry::of_path(Path::new(&mount.source))
}

impl ManifestVolume {
    fn unmounted(shared: &SharedVolume) -> Self {
        Self {
            destination: shared.destination.clone(),
            is_file: shared.entry.is_file,
            read_only: shared.read_only,
            mounted_at: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use machinen_base::mounts::TreeOptions;

    use super::*;

    fn shared(number: u32, destination: &str) -> SharedVolume {
        let entry = ShareEntry { number, is_file: false };
        SharedVolume { entry, destination: destination.into(), read_only: number == 7 }
    }

    fn facts(mounts: &[(&str, &str)]) -> CheckpointFacts {
        let mounts = mounts.iter().map(|(destination, source)| ExternalMount {
            destination: (*destination).to_owned(),
            source: (*source).to_owned(),
            ..Default::default()
        });
        CheckpointFacts { mounts: mounts.collect(), ..Default::default() }
    }

    fn volume(destination: &str, is_file: bool, read_only: bool) -> Volume {
        let source = Arc::new(std::fs::File::open("/").unwrap().into());
        let options = TreeOptions { recursive: true, read_only, follows_host: false };
        Volume {
            path: "/srv".into(),
            destination: destination.into(),
            source,
            is_file,
            options,
            mappings: None,
        }
    }

    #[test]
    fn volumes_move_to_those_of_the_new_container() {
        let mut report = facts(&[
            ("/run/data", "/run/machinen-shares/dir-4"),
            ("/etc/hosts", ""),
            ("/ro", "/run/machinen-shares/dir-7"),
        ]);
        let ours = [shared(4, "/var/run/data"), shared(7, "/ro"), shared(9, "/unmounted")];
        let recorded = record(&mut report, &ours).unwrap();
        assert_eq!(report, facts(&[("/etc/hosts", "")]));
        let places: Vec<_> = recorded.iter().map(|volume| volume.mounted_at.as_deref()).collect();
        assert_eq!(places, [Some(Path::new("/run/data")), Some(Path::new("/ro")), None]);
        assert_eq!(recorded.iter().map(|volume| volume.read_only).collect::<Vec<_>>(), [false, true, false]);
        let theirs = [shared(0, "/unmounted"), shared(1, "/ro"), shared(2, "/var/run/data")];
        let expected =
            facts(&[("/run/data", "/run/machinen-shares/dir-2"), ("/ro", "/run/machinen-shares/dir-1")]);
        assert_eq!(mounts(&recorded, &theirs), expected.mounts);
    }

    #[test]
    fn the_manifest_keeps_its_words() {
        let text = r#"[{"destination":"/link/data","is_file":false,"read_only":true,"mounted_at":"/run/data"},{"destination":"/f","is_file":true,"read_only":false}]"#;
        let volumes: Vec<ManifestVolume> = serde_json::from_str(text).unwrap();
        assert!(volumes[0].read_only && volumes[0].mounted_at.as_deref() == Some(Path::new("/run/data")));
        assert!(volumes[1].is_file && volumes[1].mounted_at.is_none());
        assert_eq!(serde_json::to_string(&volumes).unwrap(), text);
    }

    #[test]
    fn a_report_that_cannot_be_true_is_refused() {
        let ours = [shared(4, "/data")];
        let mut foreign = facts(&[("/data", "/run/machinen-shares/dir-5")]);
        assert!(matches!(record(&mut foreign, &ours), Err(CheckpointError::Guest { .. })));
        let mut twice = facts(&[("/data", "/run/machinen-shares/dir-4"), ("/data", "")]);
        assert!(matches!(record(&mut twice, &ours), Err(CheckpointError::CoveredVolume { .. })));
    }

    #[test]
    fn other_volumes_are_refused_by_name() {
        let recorded = |read_only| {
            let (destination, mounted_at) = ("/data".into(), Some("/data".into()));
            [ManifestVolume { destination, is_file: false, read_only, mounted_at }]
        };
        let check = |recorded: &[ManifestVolume], configured: &[Volume]| {
            check(recorded, configured).map_err(|error| error.to_string())
        };
        assert_eq!(check(&recorded(false), &[volume("/data", false, false)]), Ok(()));
        assert_eq!(check(&recorded(false), &[volume("/data", false, true)]), Ok(()));
        assert_eq!(check(&recorded(true), &[volume("/data/", false, true)]), Ok(()));
        let refused = |recorded: &[ManifestVolume], configured: &[Volume], words: &str| {
            let error = check(recorded, configured).unwrap_err();
            assert!(error.contains("/data") && error.contains(words), "{error}");
        };
        refused(&recorded(false), &[], "add a bind mount");
        refused(&[], &[volume("/data", false, false)], "remove the mount");
        let two = [volume("/data", false, false), volume("/data", false, false)];
        refused(&recorded(false), &two, "remove the mount");
        refused(
            &recorded(false),
            &[volume("/data", true, false)],
            "/srv, the source of the volume /data, is a file",
        );
        refused(&recorded(true), &[volume("/data", false, false)], "add the option ro");
    }
}
