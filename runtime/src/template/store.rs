//! The directory of templates: finding, listing, checking and removing them.
//!
//! ```text
//!   KEY.lock     held by the builder, then by the holder; its time is that of the last clone
//!   KEY.json     the manifest; counts only while the lock is held
//!   KEY.used     a fifo that each clone's owner has open for writing: its end tells the holder that no clone is left
//!   KEY.failed   why the last attempt to build failed
//!   KEY.vm/      while the template's VM runs
//! ```

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{
    Shape, TemplateError, hash, holder,
    manifest::{TemplateManifest, VERSION},
};
use crate::{memfd, process::kill_foreign, vm::VmSnapshot};

/// A failure counts for so long; then a start asks for another attempt.
const RETRY: Duration = Duration::from_secs(600);

/// A holder that was killed is gone at once.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// The templates in one directory.
#[derive(Debug, Clone)]
pub struct TemplateStore {
    dir: PathBuf,
}

/// What there is of a shape.
#[derive(Debug)]
pub enum Found {
    Ready(Box<Template>),
    /// Somebody is at it.
    Building,
    Absent,
    /// It could not be built a short while ago, or not be cloned.
    Failed(String),
}

/// A template that is ready to be cloned; it stays so while this exists, whatever becomes of its holder.
#[derive(Debug)]
pub struct Template {
    pub manifest: TemplateManifest,
    pub saved: VmSnapshot,
}

/// A template as a person wants to know of it.
#[derive(Debug)]
pub struct ListedTemplate {
    pub key: String,
    pub manifest: TemplateManifest,
    /// Its holder lives.
    pub alive: bool,
    pub used: Option<SystemTime>,
}

/// The files of one template.
#[derive(Debug)]
pub(super) struct TemplatePaths {
    base: PathBuf,
}

impl TemplatePaths {
    pub(super) fn new(dir: &Path, key: &str) -> Self {
        Self { base: dir.join(key) }
    }

    pub(super) fn manifest(&self) -> PathBuf {
        self.base.with_extension("json")
    }

    pub(super) fn unpublished(&self) -> PathBuf {
        self.base.with_extension("json.new")
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.base.with_extension("lock")
    }

    pub(super) fn used(&self) -> PathBuf {
        self.base.with_extension("used")
    }

    pub(super) fn failed(&self) -> PathBuf {
        self.base.with_extension("failed")
    }

    pub(super) fn vm(&self) -> PathBuf {
        self.base.with_extension("vm")
    }
}

impl TemplateStore {
    /// Nothing is touched; the directory need not exist.
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn names(&self, key: &str) -> TemplatePaths {
        TemplatePaths::new(&self.dir, key)
    }

    /// Makes the directory; what is in it is for root alone.
    pub(super) fn create(&self) -> Result<(), TemplateError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(TemplateError::file("make the directory", &self.dir))?;
        self.trusted().map(|_| ())
    }

    /// Whether the directory is there; one that others may change is not believed.
    fn trusted(&self) -> Result<bool, TemplateError> {
        match fs::symlink_metadata(&self.dir) {
            Ok(dir)
                if dir.is_dir()
                    && dir.uid() == nix::unistd::geteuid().as_raw()
                    && dir.mode() & 0o077 == 0 =>
            {
                Ok(true)
            }
            Ok(_) => Err(TemplateError::Open { dir: self.dir.clone() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(TemplateError::file("look at", &self.dir)(error)),
        }
    }

    /// Looks for a template of this shape, and notes that it is used.
    ///
    /// # Errors
    /// The directory is not to be trusted, or cannot be read.
    pub fn find(&self, shape: &Shape) -> Result<Found, TemplateError> {
        if !self.trusted()? {
            return Ok(Found::Absent);
        }
        let key = shape.key();
        let names = self.names(&key);
        if let Some(reason) = failure(&names) {
            return Ok(Found::Failed(reason));
        }
        if !is_locked(&names.lock())? {
            return Ok(Found::Absent);
        }
        let manifest = match read(&names.manifest())? {
            Known::Template(manifest) if manifest.shape == *shape => manifest,
            Known::Template(_) | Known::Nothing => return Ok(Found::Building),
            Known::Damaged => {
                tracing::warn!(path = %names.manifest().display(), "the manifest of a template is damaged");
                return Ok(Found::Absent);
            }
        };
        match open(*manifest, &names) {
            Ok(template) => {
                // A time that is not noted makes it the first to go, no more.
                drop(File::open(names.lock()).and_then(|lock| lock.set_modified(SystemTime::now())));
                Ok(Found::Ready(Box::new(template)))
            }
            // The holder has just ended, or the manifest is of one that ended before.
            Err(error) => {
                tracing::debug!(key, "template not usable: {error}");
                Ok(Found::Absent)
            }
        }
    }

    /// All templates, alive or not.
    ///
    /// # Errors
    /// The directory is not to be trusted, or cannot be read.
    pub fn list(&self) -> Result<Vec<ListedTemplate>, TemplateError> {
        let mut listed = Vec::new();
        if !self.trusted()? {
            return Ok(listed);
        }
        let reading = || TemplateError::file("read the directory", &self.dir);
        for entry in fs::read_dir(&self.dir).map_err(reading())? {
            let path = entry.map_err(reading())?.path();
            let key = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let Known::Template(manifest) = read(&path)? else { continue };
            let manifest = *manifest;
            let lock = self.names(&key).lock();
            let alive = is_locked(&lock)?;
            let used = fs::metadata(&lock).and_then(|lock| lock.modified()).ok();
            listed.push(ListedTemplate { key, manifest, alive, used });
        }
        listed.sort_by_key(|template| std::cmp::Reverse(template.used));
        Ok(listed)
    }

    /// Reads all of a template and compares it with what was built; false when it has changed.
    ///
    /// # Errors
    /// It is gone or cannot be read.
    pub fn verify(&self, listed: &ListedTemplate) -> Result<bool, TemplateError> {
        let memory = |source| TemplateError::Memory { action: "read the memory", source };
        let template = open(listed.manifest.clone(), &self.names(&listed.key)).map_err(memory)?;
        let file = File::from(template.saved.memory);
        let digest = hash::digest(&file, &template.saved.devices).map_err(memory)?;
        Ok(digest == listed.manifest.sha256)
    }

    /// Ends the holder and removes all that there is of a template. Clones of it live on.
    ///
    /// # Errors
    /// The holder does not end, or a file cannot be removed.
    pub fn remove(&self, key: &str) -> Result<(), TemplateError> {
        let names = self.names(key);
        if let Some(pid) = holder::find(&self.dir, key) {
            kill_foreign(pid, || holder::find(&self.dir, key) == Some(pid), END_DEADLINE)
                .map_err(TemplateError::file("end the holder of", names.manifest()))?;
        }
        for path in [names.manifest(), names.unpublished(), names.used(), names.failed(), names.lock()] {
            gone(fs::remove_file(&path)).map_err(TemplateError::file("remove", path))?;
        }
        gone(fs::remove_dir_all(names.vm())).map_err(TemplateError::file("remove", names.vm()))
    }

    /// Removes all templates, and what is left of those that failed or ended; returns their keys. What is being built
    /// stays.
    ///
    /// # Errors
    /// As for [`TemplateStore::remove`]; the directory cannot be read.
    pub fn remove_all(&self) -> Result<Vec<String>, TemplateError> {
        let mut keys = BTreeSet::new();
        if self.trusted()? {
            let reading = || TemplateError::file("read the directory", &self.dir);
            for entry in fs::read_dir(&self.dir).map_err(reading())? {
                let path = entry.map_err(reading())?.path();
                let key = path.file_prefix().and_then(|key| key.to_str()).filter(|key| Shape::is_key(key));
                keys.extend(key.map(str::to_owned));
            }
        }
        let mut removed = Vec::new();
        for key in keys {
            if holder::find(&self.dir, &key).is_some() || !is_locked(&self.names(&key).lock())? {
                self.remove(&key)?;
                removed.push(key);
            }
        }
        Ok(removed)
    }

    /// Notes that a template of this shape is of no use, so that starts boot for a while without trying it again.
    ///
    /// # Errors
    /// It cannot be noted or removed.
    pub fn discard(&self, shape: &Shape, reason: &str) -> Result<(), TemplateError> {
        let key = shape.key();
        self.remove(&key)?;
        self.note_failure(&key, reason)
    }

    pub(super) fn note_failure(&self, key: &str, reason: &str) -> Result<(), TemplateError> {
        write(&self.names(key).failed(), reason.as_bytes())
    }

    /// Removes what is of no use any more, and then the least recently used, until `needed` bytes fit.
    pub(super) fn make_room(&self, needed: u64, budget_mib: u64) -> Result<(), TemplateError> {
        let mut kept = self.list()?;
        let (mut room, budget) = (needed, budget_mib << 20);
        if needed > budget {
            return Err(TemplateError::Budget { needed: needed.div_ceil(1 << 20), budget: budget_mib });
        }
        kept.retain(|template| {
            let useful = template.alive && template.manifest.shape.is_current();
            if !useful && let Err(error) = self.remove(&template.key) {
                tracing::warn!("{}", crate::error::chain(&error));
            }
            useful
        });
        for template in kept {
            room += template.manifest.allocated;
            if room > budget {
                self.remove(&template.key)?;
                room -= template.manifest.allocated;
            }
        }
        Ok(())
    }

    /// The lock of a template to be built; None if somebody else has it. A template that nobody can use any more gives
    /// it up.
    pub(super) fn lock(&self, key: &str) -> Result<Option<File>, TemplateError> {
        if let Some(lock) = self.try_lock(key)? {
            return Ok(Some(lock));
        }
        let damaged = matches!(read(&self.names(key).manifest())?, Known::Damaged);
        if !damaged || holder::find(&self.dir, key).is_none() {
            return Ok(None);
        }
        self.remove(key)?;
        self.try_lock(key)
    }

    fn try_lock(&self, key: &str) -> Result<Option<File>, TemplateError> {
        let path = self.names(key).lock();
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(TemplateError::file("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(TemplateError::file("lock", path)(error.into())),
        }
    }
}

/// Whether a builder or holder has it.
fn is_locked(path: &Path) -> Result<bool, TemplateError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(TemplateError::file("open", path)(error)),
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(TemplateError::file("look at the lock", path)(error.into())),
    }
}

/// What the file of a manifest says.
enum Known {
    /// There is none.
    Nothing,
    /// It is not of this version, or of none.
    Damaged,
    Template(Box<TemplateManifest>),
}

fn read(path: &Path) -> Result<Known, TemplateError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Known::Nothing),
        Err(error) => return Err(TemplateError::file("read", path)(error)),
    };
    // The version is looked at before all else, because the rest may be of another form.
    let version =
        serde_json::from_slice::<serde_json::Value>(&bytes).ok().and_then(|value| value["version"].as_u64());
    if version != Some(VERSION.into()) {
        return Ok(Known::Damaged);
    }
    Ok(serde_json::from_slice(&bytes).map_or(Known::Damaged, Known::Template))
}

/// Writes a file that is for root alone.
pub(super) fn write(path: &Path, content: &[u8]) -> Result<(), TemplateError> {
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(content));
    written.map_err(TemplateError::file("write", path))
}

/// Takes hold of what the holder keeps.
fn open(manifest: TemplateManifest, names: &TemplatePaths) -> io::Result<Template> {
    let descriptor = |number: i32| {
        let file = File::open(format!("/proc/{}/fd/{number}", manifest.pid))?;
        if memfd::is_sealed(&file) {
            Ok(file)
        } else {
            Err(io::Error::other("the holder's memory is not sealed"))
        }
    };
    // Before the memory: what is used is not replaced.
    let used = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(names.used())?;
    let memory = descriptor(holder::MEMORY)?;
    if memory.metadata()?.len() != u64::from(manifest.memory_mib) << 20 {
        return Err(io::Error::other("the holder's memory is of another size"));
    }
    let file = descriptor(holder::DEVICES)?;
    let mut devices = Vec::new();
    file.take(manifest.devices + 1).read_to_end(&mut devices)?;
    if devices.len() as u64 != manifest.devices {
        return Err(io::Error::other("the holder's device state is of another size"));
    }
    let saved = VmSnapshot {
        memory: memory.into(),
        devices,
        memory_fd: manifest.memory_fd,
        qemu: manifest.qemu,
        in_use: Some(Arc::new(used.into())),
    };
    Ok(Template { manifest, saved })
}

/// Why a template could not be built or cloned a short while ago.
fn failure(names: &TemplatePaths) -> Option<String> {
    let path = names.failed();
    let age = fs::metadata(&path).ok()?.modified().ok()?.elapsed().unwrap_or_default();
    if age > RETRY {
        return None;
    }
    fs::read_to_string(path).ok()
}

pub(super) fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
