//! `machinen rootdisk`: manages the cache of disks.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::{Args, Subcommand};
use machinen::{
    config,
    error::{ErrorKind, HasKind},
    rootdisk::{
        DiskState, ListedDisk, PruneOptions, PrunedDisks, Rootdisk, RootdiskCache, RootdiskError,
        RootdiskKey, RootdiskProgress, RootfsSource,
    },
};
use serde_json::{Value, json};

use super::{
    output::{Align, TextTable, VerbOutput},
    prefix::{self, PrefixError},
    text::{ago, human},
};

/// Arguments of `machinen rootdisk`.
#[derive(Debug, Args)]
pub(crate) struct RootdiskArgs {
    /// The cache's directory instead of the configured one
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(subcommand)]
    command: RootdiskCommand,
}

#[derive(Debug, Subcommand)]
enum RootdiskCommand {
    /// List the disks, the most recently used first
    Ls,
    /// Convert a root file system now, so that the first start from it is quick
    #[command(
        long_about = "Convert a root file system now, so that the first start from it is quick.\n\nPATH is a \
        directory. Several PATHs are the layers of an overlay, the top one first, which must not change any more; \
        a start from a snapshot of the same layers finds the disk at once."
    )]
    Build {
        /// Directory, or layers of an overlay with the top one first
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
        /// PATH is a committed layer of a snapshotter even if there is only one
        #[arg(long)]
        layers: bool,
        /// Minimum size of the disk, with K, M, G or T (powers of 1024); the configured one if not given
        #[arg(long, value_name = "SIZE", value_parser = size)]
        min_size: Option<u64>,
    },
    /// Read disks and compare all that is in them with their keys; a damaged one will be built again
    #[command(
        long_about = "Read disks and compare all that is in them with their keys. A damaged one is not used any \
        more: the next start that needs it builds it again. The exit status is 1 if a disk is damaged."
    )]
    Verify {
        /// Keys or their first digits; all disks if none is given
        #[arg(value_name = "KEY")]
        keys: Vec<String>,
    },
    /// Remove disks that no container uses: all of them, or those that meet all the conditions given
    Prune {
        /// Only those that have not been used for this time, such as 12h or 7days
        #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
        older_than: Option<Duration>,
        /// Only as many, the least recently used first, as needed to leave at most this much in the cache,
        /// with K, M, G or T
        #[arg(long, value_name = "SIZE", value_parser = size)]
        keep: Option<u64>,
        /// Only print what would be removed
        #[arg(long)]
        dry_run: bool,
    },
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootdiskCliError {
    #[error(transparent)]
    Key(#[from] PrefixError),
    #[error("cannot find the current directory")]
    Directory(#[source] std::io::Error),
    #[error(transparent)]
    Rootdisk(#[from] RootdiskError),
}

impl HasKind for RootdiskCliError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Key(error) => error.kind(),
            Self::Directory(error) => ErrorKind::of_io(error),
            Self::Rootdisk(error) => error.kind(),
        }
    }
}

/// Runs one of the commands; prints progress on stderr.
///
/// # Errors
/// As the functions of [`RootdiskCache`], or a key does not name exactly one disk.
pub(crate) fn run(
    args: RootdiskArgs,
    config: &config::RootdiskConfig,
) -> Result<VerbOutput, RootdiskCliError> {
    let cache = RootdiskCache::open(args.dir.as_deref().unwrap_or(&config.dir))?;
    match args.command {
        RootdiskCommand::Ls => {
            let listed = cache.list()?;
            Ok(VerbOutput::new(table(&listed), listed.iter().map(listed_json).collect::<Value>()))
        }
        RootdiskCommand::Build { paths, layers, min_size } => {
            let paths = paths.iter().map(std::path::absolute).collect::<Result<Vec<_>, _>>();
            let paths = paths.map_err(RootdiskCliError::Directory)?;
            let source = match &paths[..] {
                [dir] if !layers => RootfsSource::Dir(dir.clone()),
                _ => RootfsSource::Overlay { lowers: paths },
            };
            let mut options = config.base_disks();
            options.min_size = min_size.unwrap_or(options.min_size);
            let disk = cache
                .get_or_build(&source, &options, &mut |progress: RootdiskProgress| eprintln!("{progress}"))?;
            Ok(VerbOutput::lines([disk.key], built_json(&disk)))
        }
        RootdiskCommand::Verify { keys } => verify(&cache, &keys),
        RootdiskCommand::Prune { older_than, keep, dry_run } => {
            Ok(pruned(&cache.prune(&PruneOptions { older_than, keep_bytes: keep, dry_run })?, dry_run))
        }
    }
}

fn pruned(pruned: &PrunedDisks, dry_run: bool) -> VerbOutput {
    let bytes: u64 = pruned.removed.iter().map(|disk| disk.allocated).sum();
    let mut lines = Vec::new();
    for (verb, disks) in [("removed", &pruned.removed), ("in use", &pruned.in_use)] {
        lines.extend(disks.iter().map(|disk| format!("{verb} {} {}", disk.key, human(disk.allocated))));
    }
    lines.push(format!("{} {}", if dry_run { "would free" } else { "freed" }, human(bytes)));
    let keys = |disks: &[ListedDisk]| disks.iter().map(|disk| disk.key.to_string()).collect::<Vec<_>>();
    let value = json!({
        "removed": keys(&pruned.removed), "inUse": keys(&pruned.in_use), "bytes": bytes, "dryRun": dry_run,
    });
    VerbOutput::lines(lines, value)
}

fn verify(cache: &RootdiskCache, keys: &[String]) -> Result<VerbOutput, RootdiskCliError> {
    let listed = cache.list()?;
    let chosen: Vec<RootdiskKey> = if keys.is_empty() {
        listed.iter().filter(|disk| disk.state != DiskState::Unfinished).map(|disk| disk.key).collect()
    } else {
        let find = |key: &String| prefix::find(&listed, |disk| disk.key.to_string(), key, "rootdisk");
        keys.iter().map(|key| find(key).map(|disk| disk.key)).collect::<Result<_, _>>()?
    };
    let (mut lines, mut values, mut ok) = (Vec::new(), Vec::new(), true);
    for key in chosen {
        eprintln!("verifying {key}");
        let damage = cache.verify(key)?.err().map(|unusable| unusable.to_string());
        ok &= damage.is_none();
        lines.push(format!("{key} {}", damage.as_deref().unwrap_or("ok")));
        values.push(json!({ "key": key.to_string(), "ok": damage.is_none(), "damage": damage }));
    }
    Ok(VerbOutput { ok, ..VerbOutput::lines(lines, values) })
}

fn table(listed: &[ListedDisk]) -> String {
    let mut table = TextTable::new([
        ("KEY", Align::Left),
        ("SIZE", Align::Right),
        ("ON DISK", Align::Right),
        ("CREATED", Align::Left),
        ("USED", Align::Left),
        ("USERS", Align::Right),
        ("STATE", Align::Left),
        ("SOURCE", Align::Left),
    ]);
    for disk in listed {
        let created =
            disk.metadata.as_ref().map(|metadata| UNIX_EPOCH + Duration::from_secs(metadata.created));
        table.row([
            disk.key.to_string()[..16].to_owned(),
            human(disk.size),
            human(disk.allocated),
            ago(created),
            ago(disk.used),
            disk.users.len().to_string(),
            state(&disk.state).to_owned(),
            disk.metadata.as_ref().map(|metadata| metadata.source.clone()).unwrap_or_default(),
        ]);
    }
    table.to_string()
}

fn state(state: &DiskState) -> &'static str {
    match state {
        DiskState::Ready => "ready",
        DiskState::Unfinished => "unfinished",
        DiskState::Damaged(_) => "damaged",
    }
}

fn listed_json(disk: &ListedDisk) -> Value {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    json!({
        "key": disk.key.to_string(),
        "path": disk.path,
        "size": disk.size,
        "allocated": disk.allocated,
        "state": state(&disk.state),
        "users": disk.users,
        "used": disk.used.map(seconds),
        "created": disk.metadata.as_ref().map(|metadata| metadata.created),
        "source": disk.metadata.as_ref().map(|metadata| &metadata.source),
        "files": disk.metadata.as_ref().map(|metadata| metadata.files),
        "content": disk.metadata.as_ref().map(|metadata| metadata.content),
    })
}

fn built_json(disk: &Rootdisk) -> Value {
    let phases =
        disk.phases.iter().map(|(name, time)| json!({ "name": name, "ms": time.as_secs_f64() * 1e3 }));
    json!({
        "key": disk.key.to_string(),
        "path": disk.path,
        "size": disk.size,
        "cached": disk.cached,
        "phases": phases.collect::<Vec<_>>(),
    })
}

/// `512`, `64K`, `10M`, `3G`, `1T`
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("give a number, with K, M, G or T after it for powers of 1024".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "give a number".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the number is too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64k", 64 << 10),
            ("10MiB", 10 << 20),
            ("3G", 3 << 30),
            ("1TB", 1 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "G", "1X", "-1", "1.5G", "99999999999T", "1GG"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[derive(clap::Parser)]
    struct TestCommandLine {
        #[command(flatten)]
        args: RootdiskArgs,
    }

    /// Runs a command line on a cache. Its output goes to the output of the test.
    fn command(dir: &std::path::Path, line: &str) -> Result<bool, RootdiskCliError> {
        let words = ["rootdisk", "--dir", dir.to_str().unwrap()].into_iter().chain(line.split(' '));
        let args = <TestCommandLine as clap::Parser>::try_parse_from(words).unwrap().args;
        run(args, &config::RootdiskConfig::default()).map(|output| output.ok)
    }

    #[test]
    fn a_disk_from_build_to_prune() {
        let dir = tempfile::tempdir().unwrap();
        let (root, cache) = (dir.path().join("root"), dir.path().join("cache"));
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("file"), "text").unwrap();
        let build = format!("build --min-size 8M --layers {}", root.display());
        assert!(command(&cache, &build).unwrap());
        let listed = RootdiskCache::open(&cache).unwrap().list().unwrap();
        let key = listed[0].key.to_string();
        let table = table(&listed);
        assert!(
            table.lines().count() == 2 && table.contains(&key[..16]) && table.contains("8.0MiB"),
            "{table}"
        );
        assert!(table.ends_with(&format!("  ready  1 layers, the top one {}\n", root.display())), "{table}");
        assert_eq!(listed_json(&listed[0])["state"], "ready");

        assert!(command(&cache, &format!("verify {}", &key[..6])).unwrap());
        let other = if key.starts_with('0') { "1" } else { "0" };
        assert!(matches!(
            command(&cache, &format!("verify {other}")),
            Err(RootdiskCliError::Key(PrefixError::NoSuchKey { .. }))
        ));
        let disk = std::fs::OpenOptions::new().write(true).open(&listed[0].path).unwrap();
        disk.set_len(1 << 20).unwrap();
        assert!(!command(&cache, "verify").unwrap());
        assert!(command(&cache, &build).unwrap());
        assert!(command(&cache, "verify --json").unwrap());

        assert!(
            command(&cache, "prune --older-than 1h").unwrap() && command(&cache, "prune --keep 1G").unwrap()
        );
        assert_eq!(RootdiskCache::open(&cache).unwrap().list().unwrap().len(), 1);
        assert!(command(&cache, "prune --json").unwrap());
        assert_eq!(RootdiskCache::open(&cache).unwrap().list().unwrap().len(), 0);
    }
}
