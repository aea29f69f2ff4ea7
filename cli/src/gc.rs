//! `machinen gc`: removes what is left over, and reports what it has removed and what it could not.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use machinen::{
    config::Config,
    container_disk::sweep_archives,
    error::chain,
    fs::{FileError, if_exists, remove_dir_if_exists, try_lock},
    rootdisk::{PruneOptions, RootdiskCache},
    template::TemplateStore,
};
use serde_json::json;

use crate::{
    boot::{BUNDLES, CONTAINER, IMAGE_KEY},
    build,
    failure::Failure,
    find, fork,
    image::ImageCache,
    oci::{
        GlobalArgs, OciError,
        pod::PodDir,
        state::{PODS, StateDir},
    },
    output::VerbOutput,
};

/// Arguments of `machinen gc`.
#[derive(Debug, Args)]
pub(crate) struct GcArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Only print what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Images and disks that were used within this time stay, such as 12h or 30days
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration, default_value = "7days")]
    unused_for: Duration,
}

/// What was done, or would be.
#[derive(Debug, Default)]
struct Collected {
    removed: Vec<String>,
    failed: Vec<(String, String)>,
}

impl Collected {
    fn note(&mut self, what: &Path, done: Result<bool, impl std::error::Error>) {
        let shown = what.display().to_string();
        match done {
            Ok(true) => self.removed.push(shown),
            Ok(false) => {}
            Err(error) => self.failed.push((shown, chain(&error))),
        }
    }

    fn output(self, dry_run: bool) -> VerbOutput {
        let verb = if dry_run { "would remove" } else { "removed" };
        let lines = self.removed.iter().map(|path| format!("{verb} {path}"));
        let lines = lines.chain(self.failed.iter().map(|(path, error)| format!("failed {path}: {error}")));
        let failed: Vec<_> =
            self.failed.iter().map(|(path, error)| json!({ "path": path, "error": error })).collect();
        let value = json!({ "removed": self.removed, "failed": failed, "dryRun": dry_run });
        VerbOutput { ok: self.failed.is_empty(), ..VerbOutput::lines(lines.collect::<Vec<_>>(), value) }
    }
}

/// # Errors
/// A directory cannot be listed. What was removed before is removed.
pub(crate) fn run(global: &GlobalArgs, args: &GcArgs, config: &Config) -> Result<VerbOutput, Failure> {
    let mut collected = Collected::default();
    for root in find::roots(global)? {
        pods(&root, args.dry_run, &mut collected)?;
    }
    builds(&config.boot.dir, args.dry_run, &mut collected)?;
    let in_use = bundles(&config.boot.dir.join(BUNDLES), args.dry_run, &mut collected)?;
    if config.boot.dir.exists() {
        let images = ImageCache::open(&config.boot.dir)?.prune(&in_use, args.unused_for, args.dry_run)?;
        images.removed.iter().for_each(|path| collected.note(path, Ok::<_, FileError>(true)));
        images.failed.into_iter().for_each(|(path, error)| collected.note(&path, Err(error)));
    }
    let cache = RootdiskCache::open(&config.rootdisk.dir)?;
    let options = PruneOptions { older_than: Some(args.unused_for), keep_bytes: None, dry_run: args.dry_run };
    for disk in cache.prune(&options)?.removed {
        collected.note(&disk.path, Ok::<_, FileError>(true));
    }
    if !args.dry_run {
        sweep_archives(cache.dir())?;
    }
    for path in fork::left_over(&config.rootdisk.dir, args.dry_run)? {
        collected.note(&path, Ok::<_, FileError>(true));
    }
    templates(config, args.dry_run, &mut collected)?;
    Ok(collected.output(args.dry_run))
}

/// Templates whose holder is gone, or that no start can use any more.
fn templates(config: &Config, dry_run: bool, collected: &mut Collected) -> Result<(), Failure> {
    let templates = TemplateStore::at(&config.template.dir);
    for template in templates.list()?.iter().filter(|it| !it.alive || !it.manifest.shape.is_current()) {
        let path = config.template.dir.join(&template.key);
        let removed = if dry_run { Ok(()) } else { templates.remove(&template.key) };
        collected.note(&path, removed.map(|()| true));
    }
    Ok(())
}

/// Containers and unfinished images of builds that were killed.
fn builds(boot_dir: &Path, dry_run: bool, collected: &mut Collected) -> Result<(), Failure> {
    let runtime = event_loop()?;
    for build in build::left(boot_dir)? {
        let paths = build.paths();
        match if dry_run { Ok(()) } else { runtime.block_on(build.remove()) } {
            Ok(()) => paths.iter().for_each(|path| collected.note(path, Ok::<_, FileError>(true))),
            Err(error) => collected.note(build.path(), Err(error)),
        }
    }
    Ok(())
}

fn event_loop() -> Result<tokio::runtime::Runtime, OciError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(OciError::io("start the event loop"))
}

/// Pods without a monitor and without a container, which a creation that was killed has left.
fn pods(root: &Path, dry_run: bool, collected: &mut Collected) -> Result<(), Failure> {
    let dir = root.join(PODS);
    let entries = if_exists(fs::read_dir(&dir)).map_err(FileError::at("list", &dir))?;
    let runtime = event_loop()?;
    for path in entries.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())) {
        let pod = PodDir { path: path.clone() };
        let removed = runtime.block_on(async {
            if !is_left(root, &pod)? {
                return Ok::<_, OciError>(false);
            }
            if !dry_run {
                pod.remove().await?;
            }
            Ok(true)
        });
        collected.note(&path, removed);
    }
    Ok(())
}

fn is_left(root: &Path, pod: &PodDir) -> Result<bool, OciError> {
    let _locked = pod.lock()?;
    // Without a record its creation may be under way.
    let Some(record) = pod.record()? else { return Ok(false) };
    if record.monitor.exists() {
        return Ok(false);
    }
    for state in StateDir::all(root)? {
        if state.record()?.is_some_and(|record| record.pod == *pod) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes bundles of `machinen boot` whose containers are gone; returns the images that the others use.
fn bundles(dir: &Path, dry_run: bool, collected: &mut Collected) -> Result<BTreeSet<String>, Failure> {
    let mut in_use = BTreeSet::new();
    let entries = if_exists(fs::read_dir(dir)).map_err(FileError::at("list", dir))?;
    for path in entries.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())) {
        let removed = remove_bundle(&path, dry_run);
        if !matches!(removed, Ok(true)) {
            in_use.extend(fs::read_to_string(path.join(IMAGE_KEY)).ok());
        }
        collected.note(&path, removed);
    }
    Ok(in_use)
}

fn remove_bundle(path: &Path, dry_run: bool) -> Result<bool, FileError> {
    let file = File::open(path).map_err(FileError::at("open", path))?;
    // Its container is being created, or `machinen boot` waits for it.
    if !try_lock(&file).map_err(FileError::at("lock", path))? || has_container(path) {
        return Ok(false);
    }
    if !dry_run {
        remove_dir_if_exists(path).map_err(FileError::at("remove", path))?;
    }
    Ok(true)
}

/// Whether the container of a bundle exists. One whose record cannot be read does.
fn has_container(bundle: &Path) -> bool {
    let Ok(state) = fs::read(bundle.join(CONTAINER)) else { return false };
    let state = PathBuf::from(std::ffi::OsStr::from_bytes(&state));
    let (Some(root), Some(id)) = (state.parent(), state.file_name().and_then(|id| id.to_str())) else {
        return false;
    };
    match StateDir::find(root, id) {
        Ok(state) => {
            state.record().map_or(true, |record| record.is_none_or(|record| record.bundle == bundle))
        }
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use machinen::pod::ContainerId;

    use super::*;

    #[test]
    fn a_bundle_without_its_container_is_removed_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (bundles_dir, root) = (dir.path().join("bundles"), dir.path().join("root"));
        let bundle = |name: &str, state: &Path| {
            let path = bundles_dir.join(name);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join(CONTAINER), state.as_os_str().as_bytes()).unwrap();
            fs::write(path.join(IMAGE_KEY), name).unwrap();
            path
        };
        let gone = bundle("gone", &root.join("gone"));
        let exists = bundle("exists", &root.join("exists"));
        let creating = bundle("creating", &root.join("creating"));
        StateDir::reserve(&root, ContainerId::parse("exists").unwrap()).unwrap();
        let held = File::open(&creating).unwrap();
        assert!(try_lock(&held).unwrap());
        let collect = |dry_run| {
            let mut collected = Collected::default();
            let in_use = bundles(&bundles_dir, dry_run, &mut collected).unwrap();
            assert!(collected.failed.is_empty(), "{collected:?}");
            assert_eq!(in_use, ["creating".to_owned(), "exists".to_owned()].into());
            collected.removed
        };
        assert_eq!(collect(true), [gone.display().to_string()]);
        assert!(gone.exists());
        assert_eq!(collect(false), [gone.display().to_string()]);
        assert!(!gone.exists() && exists.exists() && creating.exists());
        assert_eq!(collect(false), Vec::<String>::new());
    }

    #[test]
    fn what_could_not_be_removed_is_reported_and_the_status_is_1() {
        let mut collected = Collected::default();
        let cause = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        collected.note("/x".as_ref(), Err(FileError::new("remove", "/x", cause)));
        collected.note("/y".as_ref(), Ok::<_, FileError>(true));
        let output = collected.output(false);
        assert!(!output.ok);
        assert_eq!(output.text, "removed /y\nfailed /x: cannot remove /x: permission denied\n");
        assert_eq!(output.value["failed"][0]["path"], "/x");
    }
}
