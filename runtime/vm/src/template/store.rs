//! The directory of templates: finding, listing, checking and removing them.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use machinen_base::{
    fs::{
        FileError, create_private_dirs, if_exists, remove_dir_if_exists, remove_if_exists, try_lock,
        try_lock_shared,
    },
    memfd,
    process::{kill_foreign, parent_of},
};

use super::{
    TemplateError, TemplateShape, hash, holder,
    manifest::{TemplateManifest, VERSION},
    paths::TemplatePaths,
    working_set::WorkingSet,
};
use crate::VmSnapshot;

/// How long after a failure starts boot without requesting the template again.
const RETRY: Duration = Duration::from_secs(600);

/// How many clones in a row may be lost before the template is taken to be the cause. One may be lost for another
/// reason, such as a host that is too busy.
const LOST_CLONES: u64 = 3;

/// How long a killed holder may take to end.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// The templates in one directory.
#[derive(Debug, Clone)]
pub struct TemplateStore {
    dir: PathBuf,
}

/// The state of a shape's template.
#[derive(Debug)]
pub enum FoundTemplate {
    /// The template can be cloned.
    Ready(Box<ReadyTemplate>),
    /// A builder is working on it.
    Building,
    /// There is no template, and no process builds one.
    Absent,
    /// It could not be built, or not be cloned, a short while ago, for this reason.
    Failed(String),
}

/// A template that is ready to be cloned. It stays usable while this value exists, even if its holder ends.
#[derive(Debug)]
pub struct ReadyTemplate {
    /// The description of the template.
    pub manifest: TemplateManifest,
    /// The state that clones start from.
    pub snapshot: VmSnapshot,
}

/// A template in a listing.
#[derive(Debug)]
pub struct ListedTemplate {
    /// The name of the template; see [`TemplateShape::key`].
    pub key: String,
    /// The description of the template.
    pub manifest: TemplateManifest,
    /// Its holder is running.
    pub alive: bool,
    /// When the template was cloned last; None if that cannot be read.
    pub used: Option<SystemTime>,
}

impl ListedTemplate {
    /// Bytes of memory that the template takes by now: at most its VM's memory, because its size is sealed. Clones make
    /// it grow, whose pods are charged for that.
    fn taken(&self) -> u64 {
        let memory = format!("/proc/{}/fd/{}", self.manifest.pid, holder::MEMORY);
        let now = fs::metadata(memory).map_or(0, |memory| memory.blocks() * 512);
        let most = (u64::from(self.manifest.memory_mib) << 20).max(self.manifest.allocated);
        now.clamp(self.manifest.allocated, most) + self.manifest.original_memory
    }
}

impl TemplateStore {
    /// Names the directory, which is not accessed yet and need not exist.
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn names(&self, key: &str) -> TemplatePaths {
        TemplatePaths::new(&self.dir, key)
    }

    /// Makes the directory, which only root may access.
    pub(super) fn create(&self) -> Result<(), TemplateError> {
        create_private_dirs(&self.dir).map_err(FileError::at("make the directory", &self.dir))?;
        self.trusted().map(|_| ())
    }

    /// Whether the directory exists. It is an error if other users may change it.
    fn trusted(&self) -> Result<bool, TemplateError> {
        let found =
            if_exists(fs::symlink_metadata(&self.dir)).map_err(FileError::at("look at", &self.dir))?;
        match found {
            None => Ok(false),
            Some(dir)
                if dir.is_dir()
                    && dir.uid() == nix::unistd::geteuid().as_raw()
                    && dir.mode() & 0o077 == 0 =>
            {
                Ok(true)
            }
            Some(_) => Err(TemplateError::Open { dir: self.dir.clone() }),
        }
    }

    /// Looks for a template of this shape, and records that it is used.
    ///
    /// # Errors
    /// The directory cannot be trusted or read.
    pub fn find(&self, shape: &TemplateShape) -> Result<FoundTemplate, TemplateError> {
        if !self.trusted()? {
            return Ok(FoundTemplate::Absent);
        }
        let key = shape.key();
        let names = self.names(&key);
        if let Some(reason) = failure(&names) {
            return Ok(FoundTemplate::Failed(reason));
        }
        if !is_locked(&names.lock())? {
            return Ok(FoundTemplate::Absent);
        }
        let manifest = match read(&names.manifest())? {
            StoredManifest::Template(manifest) if manifest.shape == *shape => manifest,
            StoredManifest::Template(_) | StoredManifest::Missing => return Ok(FoundTemplate::Building),
            StoredManifest::Damaged => {
                tracing::warn!(path = %names.manifest().display(), "the manifest of a template is damaged");
                return Ok(FoundTemplate::Absent);
            }
        };
        match open(*manifest, &names) {
            Ok(template) => {
                // If the time cannot be set, the template is only among the first to be removed when room is
                // needed.
                drop(File::open(names.lock()).and_then(|lock| lock.set_modified(SystemTime::now())));
                Ok(FoundTemplate::Ready(Box::new(template)))
            }
            // The holder has just ended, or the manifest is of a holder that ended before.
            Err(error) => {
                tracing::debug!(key, "template not usable: {error}");
                Ok(FoundTemplate::Absent)
            }
        }
    }

    /// All templates, with and without a running holder.
    ///
    /// # Errors
    /// The directory cannot be trusted or read.
    pub fn list(&self) -> Result<Vec<ListedTemplate>, TemplateError> {
        let mut listed = Vec::new();
        if !self.trusted()? {
            return Ok(listed);
        }
        let reading = || FileError::at("read the directory", &self.dir);
        for entry in fs::read_dir(&self.dir).map_err(reading())? {
            let path = entry.map_err(reading())?.path();
            let key = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let StoredManifest::Template(manifest) = read(&path)? else { continue };
            let manifest = *manifest;
            let lock = self.names(&key).lock();
            let alive = is_locked(&lock)?;
            let used = fs::metadata(&lock).and_then(|lock| lock.modified()).ok();
            listed.push(ListedTemplate { key, manifest, alive, used });
        }
        listed.sort_by_key(|template| std::cmp::Reverse(template.used));
        Ok(listed)
    }

    /// Reads all of a template and compares it with what was built; false if it has changed.
    ///
    /// # Errors
    /// The template is gone or cannot be read.
    pub fn verify(&self, listed: &ListedTemplate) -> Result<bool, TemplateError> {
        let memory = |source| TemplateError::Memory { action: "read the memory", source };
        let template = open(listed.manifest.clone(), &self.names(&listed.key)).map_err(memory)?;
        let file = File::from(template.snapshot.memory);
        let digest = hash::digest(&file, &template.snapshot.devices).map_err(memory)?;
        Ok(digest == listed.manifest.sha256)
    }

    /// Ends the holder and removes the template's files. Its clones keep running.
    ///
    /// # Errors
    /// The holder does not end, or a file cannot be removed.
    pub fn remove(&self, key: &str) -> Result<(), TemplateError> {
        let names = self.names(key);
        if let Some(pid) = holder::find(&self.dir, key) {
            kill_foreign(pid, || holder::find(&self.dir, key) == Some(pid), END_DEADLINE)
                .map_err(FileError::at("end the holder of", names.manifest()))?;
        }
        for path in names.all() {
            remove_if_exists(&path).map_err(FileError::at("remove", path))?;
        }
        remove_dir_if_exists(&names.vm()).map_err(FileError::at("remove", names.vm()))?;
        Ok(())
    }

    /// Removes all templates, and the files of those that failed or ended; returns their keys. Templates that
    /// are being built stay.
    ///
    /// # Errors
    /// As for [`TemplateStore::remove`]; the directory cannot be read.
    pub fn remove_all(&self) -> Result<Vec<String>, TemplateError> {
        let mut keys = BTreeSet::new();
        if self.trusted()? {
            let reading = || FileError::at("read the directory", &self.dir);
            for entry in fs::read_dir(&self.dir).map_err(reading())? {
                let path = entry.map_err(reading())?.path();
                let key =
                    path.file_prefix().and_then(|key| key.to_str()).filter(|key| TemplateShape::is_key(key));
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

    /// Records that a clone did not become ready, for this reason. When that has happened to several clones in a row, the
    /// template is removed, and starts boot for a while without trying again; true if it was.
    ///
    /// # Errors
    /// The loss cannot be recorded, or the template not be removed.
    pub fn clone_lost(&self, shape: &TemplateShape, reason: &str) -> Result<bool, TemplateError> {
        let key = shape.key();
        let path = self.names(&key).lost();
        let record = || -> io::Result<u64> {
            let mut file = File::options().append(true).create(true).mode(0o600).open(&path)?;
            file.write_all(b".")?;
            Ok(file.metadata()?.len())
        };
        let lost = record().map_err(FileError::at("write", &path))?;
        if lost < LOST_CLONES {
            return Ok(false);
        }
        self.remove(&key)?;
        self.note_failure(&key, reason)?;
        Ok(true)
    }

    /// Forgets lost clones, because one of the template with this key works.
    ///
    /// # Errors
    /// The record of lost clones cannot be removed.
    pub fn clone_works(&self, key: &str) -> Result<(), TemplateError> {
        let path = self.names(key).lost();
        remove_if_exists(&path).map_err(FileError::at("remove", path))?;
        Ok(())
    }

    pub(super) fn note_failure(&self, key: &str, reason: &str) -> Result<(), TemplateError> {
        write(&self.names(key).failed(), reason.as_bytes())
    }

    /// Removes templates that cannot be used any more, and then the least recently used ones, until `needed`
    /// bytes fit.
    pub(super) fn make_room(&self, needed: u64, budget_mib: u64) -> Result<(), TemplateError> {
        let mut kept = self.list()?;
        let (mut room, budget) = (needed, budget_mib << 20);
        if needed > budget {
            return Err(TemplateError::Budget { needed: needed.div_ceil(1 << 20), budget: budget_mib });
        }
        kept.retain(|template| {
            let useful = template.alive && template.manifest.shape.is_current();
            if !useful && let Err(error) = self.remove(&template.key) {
                tracing::warn!("{}", machinen_base::error::chain(&error));
            }
            useful
        });
        for template in kept {
            let taken = template.taken();
            room += taken;
            if room > budget {
                self.remove(&template.key)?;
                room -= taken;
            }
        }
        Ok(())
    }

    /// Takes the lock of a template that is to be built; None if another process holds it. A holder whose
    /// manifest is damaged is ended, because its template cannot be used any more.
    pub(super) fn lock(&self, key: &str) -> Result<Option<File>, TemplateError> {
        if let Some(lock) = self.try_lock(key)? {
            return Ok(Some(lock));
        }
        let damaged = matches!(read(&self.names(key).manifest())?, StoredManifest::Damaged);
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
            .map_err(FileError::at("open", &path))?;
        let locked = try_lock(&file).map_err(FileError::at("lock", path))?;
        Ok(locked.then_some(file))
    }
}

/// Whether a builder or holder has the lock.
fn is_locked(path: &Path) -> Result<bool, TemplateError> {
    let Some(file) = if_exists(File::open(path)).map_err(FileError::at("open", path))? else {
        return Ok(false);
    };
    let free = try_lock_shared(&file).map_err(FileError::at("look at the lock", path))?;
    Ok(!free)
}

/// The content of a manifest's file.
enum StoredManifest {
    /// There is no file.
    Missing,
    /// It is not a manifest of this version.
    Damaged,
    Template(Box<TemplateManifest>),
}

fn read(path: &Path) -> Result<StoredManifest, TemplateError> {
    let Some(bytes) = if_exists(fs::read(path)).map_err(FileError::at("read", path))? else {
        return Ok(StoredManifest::Missing);
    };
    // The version is checked first, because the other fields may differ between versions.
    let version =
        serde_json::from_slice::<serde_json::Value>(&bytes).ok().and_then(|value| value["version"].as_u64());
    if version != Some(VERSION.into()) {
        return Ok(StoredManifest::Damaged);
    }
    Ok(serde_json::from_slice(&bytes).map_or(StoredManifest::Damaged, StoredManifest::Template))
}

/// Writes a file that only root may access.
pub(super) fn write(path: &Path, content: &[u8]) -> Result<(), TemplateError> {
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(content));
    Ok(written.map_err(FileError::at("write", path))?)
}

/// Opens what the holder keeps open.
fn open(manifest: TemplateManifest, names: &TemplatePaths) -> io::Result<ReadyTemplate> {
    let descriptor = |number: i32| {
        let file = File::open(format!("/proc/{}/fd/{number}", manifest.pid))?;
        if memfd::is_sealed(&file) {
            Ok(file)
        } else {
            Err(io::Error::other("the holder's memory is not sealed"))
        }
    };
    // Opened before the memory, since the holder does not replace memory that is in use.
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
    // Another process may have got its pid, until its holder has noticed that it has ended.
    let original = manifest.original.clone().and_then(|original| match parent_of(original.pid) {
        Some(parent) if parent == manifest.pid => Ok(original),
        _ => Err("it has ended".to_owned()),
    });
    let snapshot = VmSnapshot {
        memory: memory.into(),
        devices,
        memory_fd: manifest.memory_fd,
        qemu: manifest.qemu,
        original,
        original_process: None,
        turn: File::options().append(true).create(true).mode(0o600).open(names.turn())?.into(),
        in_use: Some(Arc::new(used.into())),
        unprepared: 0,
        working_set: Some(Arc::new(WorkingSet::read(names.pages(), manifest.memory_fd))),
    };
    Ok(ReadyTemplate { manifest, snapshot })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChannelKind, VmSpec, accel::Accelerator, qemu::argv::tests::spec};

    #[test]
    fn a_template_is_put_aside_when_several_clones_in_a_row_are_lost() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let spec = spec(Accelerator::Kvm, ChannelKind::Serial);
        let spec = VmSpec { qemu: "/bin/sh".into(), kernel: file.clone(), image: file, ..spec };
        let shape = TemplateShape::of(&spec).unwrap().unwrap();
        let store = TemplateStore::at(&dir.path().join("templates"));
        store.create().unwrap();
        let lost = || store.clone_lost(&shape, "it is silent").unwrap();
        assert!(!lost() && !lost());
        store.clone_works(&shape.key()).unwrap();
        assert!(!lost() && !lost() && lost());
        assert!(
            matches!(store.find(&shape).unwrap(), FoundTemplate::Failed(reason) if reason == "it is silent")
        );
    }
}
