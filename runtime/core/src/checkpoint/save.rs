//! Copies CRIU's images from the disk that a guest has written to a directory of files.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use machinen_base::{confined::confined, fs::if_exists};
use machinen_protocol::api::{CheckpointImagesResponse, ImageFile};
use tokio::sync::mpsc;

use super::{
    CheckpointError,
    directory::CheckpointDir,
    hash_pipeline::{self, CopiedRange},
    manifest::{CheckpointManifest, ImageDigest, MANIFEST, MAX_SIZE, REPORTS},
    report::ImageReport,
    staged::StagedCheckpoint,
};

/// Images on a disk, with the guest's report about them.
#[derive(Debug)]
pub(crate) struct DumpImages {
    pub disk: Arc<File>,
    /// Size of the disk, bytes.
    pub size: u64,
    /// The guest's report, in pieces. It is incomplete if the channel closes before the last piece.
    pub located: mpsc::Receiver<CheckpointImagesResponse>,
}

/// The size of a checkpoint that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedCheckpoint {
    /// Number of the files with images.
    pub files: usize,
    /// Bytes of the images, holes included.
    pub bytes: u64,
}

/// Writes the checkpoint into `dir`, which is created or must be empty. Everything is on stable storage when
/// this returns. Blocks.
///
/// # Errors
/// A failure leaves nothing of the checkpoint.
pub(crate) fn save(
    images: DumpImages,
    mut manifest: CheckpointManifest,
    dir: &Path,
) -> Result<SavedCheckpoint, CheckpointError> {
    let mut written = Written::begin(dir)?;
    // The guest names the images and their places.
    let opened = written.dir.descriptor().map_err(CheckpointError::file("open", dir))?;
    let received = confined(&[opened.as_fd()], || receive(images, &mut written));
    manifest.files = received.map_err(CheckpointError::file("confine the writing of", dir))??;
    manifest.files.sort_by(|a, b| a.name.cmp(&b.name));
    let bytes = manifest.files.iter().map(|file| file.size).sum();
    let files = manifest.files.len();
    written.manifest(&manifest)?;
    written.keep()?;
    Ok(SavedCheckpoint { files, bytes })
}

/// Writes the images that the guest reports. Blocks.
fn receive(images: DumpImages, written: &mut Written) -> Result<Vec<ImageDigest>, CheckpointError> {
    let DumpImages { disk, size, mut located } = images;
    let mut report = ImageReport::new(size);
    hash_pipeline::run(|copied| {
        let mut current = None;
        while let Some(answer) = located.blocking_recv() {
            report.accept(&answer)?;
            for image in answer.files {
                let from = report.accept_image(&image)?;
                let (file, path) = match current.take() {
                    Some(begun) if from > 0 => begun,
                    _ => written.create(&image.name).map(|(file, path)| (Arc::new(file), Arc::from(path)))?,
                };
                copy_pieces(&image, &disk, &file).map_err(CheckpointError::file("write", &*path))?;
                let (name, size, to) = (image.name, image.size, image.located);
                let copy = CopiedRange {
                    file: Arc::clone(&file),
                    path: Arc::clone(&path),
                    name,
                    size,
                    bytes: from..to,
                };
                current = Some((file, path));
                if !copied(copy) {
                    return Ok(());
                }
            }
        }
        report.finish()
    })
}

/// Copies a checkpoint to another directory, by hard links if possible, since images are never changed. An earlier
/// checkpoint in that directory is replaced. Blocks.
///
/// # Errors
/// A failure leaves nothing of the copy.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    let manifest = CheckpointManifest::read(from)?;
    let from = CheckpointDir::open(from)?;
    let place = StagedCheckpoint::prepare(to)?;
    let mut written = Written::begin(place.dir())?;
    manifest.files.iter().try_for_each(|image| written.copy(&image.name, &from))?;
    written.manifest(&manifest)?;
    written.keep()?;
    place.commit()
}

/// Copies CRIU's own log and statistics to a directory that may hold other files. Blocks.
///
/// # Errors
/// The directory cannot be created or written, or belongs to another user.
pub(crate) fn copy_reports(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    fs::create_dir_all(to).map_err(CheckpointError::file("create", to))?;
    let (from, to) = (CheckpointDir::open(from)?, CheckpointDir::open(to)?);
    for name in REPORTS {
        let source = if_exists(from.open_file(name));
        let source = source.map_err(CheckpointError::file("open", from.path().join(name)))?;
        let Some(mut source) = source else { continue };
        let copied = to.replace(name).and_then(|mut file| io::copy(&mut source, &mut file));
        copied.map_err(CheckpointError::file("write", to.path().join(name)))?;
    }
    Ok(())
}

/// Files that are removed when this is dropped, unless they are kept.
#[derive(Debug)]
struct Written {
    dir: CheckpointDir,
    made_dir: bool,
    files: Vec<String>,
    kept: bool,
}

impl Written {
    fn begin(path: &Path) -> Result<Self, CheckpointError> {
        let (dir, made_dir) = CheckpointDir::open_or_create(path)?;
        let this = Self { dir, made_dir, files: Vec::new(), kept: false };
        match this.dir.names().map_err(CheckpointError::file("read", path))?.pop() {
            None => Ok(this),
            Some(other) => Err(CheckpointError::NotEmpty { path: path.to_owned(), other }),
        }
    }

    fn create(&mut self, name: &str) -> Result<(File, PathBuf), CheckpointError> {
        let path = self.dir.path().join(name);
        let file = self.dir.create(name).map_err(CheckpointError::file("create", &path))?;
        self.files.push(name.to_owned());
        Ok((file, path))
    }

    /// Adds a file of another checkpoint, which is on stable storage.
    fn copy(&mut self, name: &str, from: &CheckpointDir) -> Result<(), CheckpointError> {
        if self.dir.link_from(from, name).is_ok() {
            self.files.push(name.to_owned());
            return Ok(());
        }
        // The directories are on different file systems.
        let (mut file, path) = self.create(name)?;
        let mut source =
            from.open_file(name).map_err(CheckpointError::file("open", from.path().join(name)))?;
        let copied = io::copy(&mut source, &mut file).and_then(|_| file.sync_all());
        copied.map_err(CheckpointError::file("write", &path))
    }

    fn manifest(&mut self, manifest: &CheckpointManifest) -> Result<(), CheckpointError> {
        let (mut file, path) = self.create(MANIFEST)?;
        let mut text = serde_json::to_vec_pretty(manifest)
            .map_err(|source| CheckpointError::Manifest { path: path.clone(), source })?;
        text.push(b'\n');
        if text.len() as u64 > MAX_SIZE {
            return Err(CheckpointError::LargeManifest { path });
        }
        let written = file.write_all(&text).and_then(|()| file.sync_all());
        written.map_err(CheckpointError::file("write", &path))
    }

    fn keep(mut self) -> Result<(), CheckpointError> {
        self.dir.sync().map_err(CheckpointError::file("write", self.dir.path()))?;
        if self.made_dir
            && let Some(parent) = self.dir.path().parent()
        {
            let parent_dir = File::open(parent).and_then(|dir| dir.sync_all());
            parent_dir.map_err(CheckpointError::file("write", parent))?;
        }
        self.kept = true;
        Ok(())
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let mut removed: Vec<_> = self.files.iter().map(|name| self.dir.remove(name)).collect();
        if self.made_dir {
            removed.push(fs::remove_dir(self.dir.path()));
        }
        for error in removed.into_iter().filter_map(Result::err) {
            let dir = self.dir.path().display();
            tracing::warn!(%dir, "cannot remove a part of a checkpoint that failed: {error}");
        }
    }
}

/// Ranges that no piece covers are holes, also in the copy. The copy shares the disk's blocks if the file
/// system supports it.
fn copy_pieces(image: &ImageFile, mut disk: &File, mut to: &File) -> io::Result<()> {
    to.set_len(image.size)?;
    for piece in &image.extents {
        disk.seek(SeekFrom::Start(piece.physical))?;
        to.seek(SeekFrom::Start(piece.logical))?;
        if io::copy(&mut disk.take(piece.length), &mut to)? != piece.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use machinen_protocol::api::Extent;
    use sha2::{Digest as _, Sha256};

    use super::*;
    use crate::checkpoint::digest;

    fn manifest() -> CheckpointManifest {
        let arch = std::env::consts::ARCH.into();
        CheckpointManifest { format: super::super::FORMAT, arch, ..CheckpointManifest::default() }
    }

    fn file(name: &str, size: u64, extents: &[(u64, u64, u64)]) -> ImageFile {
        let extents = extents.iter().map(|&(logical, physical, length)| Extent {
            logical,
            physical,
            length,
            ..Default::default()
        });
        ImageFile { name: name.into(), size, extents: extents.collect(), located: size, ..Default::default() }
    }

    fn answer(files: Vec<ImageFile>, last: bool) -> CheckpointImagesResponse {
        CheckpointImagesResponse { files, last, ..Default::default() }
    }

    fn images(files: Vec<ImageFile>) -> DumpImages {
        let (sender, located) = mpsc::channel(1);
        sender.try_send(answer(files, true)).unwrap();
        let mut disk = tempfile::tempfile().unwrap();
        disk.write_all(&(0..=255).cycle().take(64 << 10).collect::<Vec<u8>>()).unwrap();
        DumpImages { disk: Arc::new(disk), size: 64 << 10, located }
    }

    #[test]
    fn pieces_and_holes_become_a_file_with_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let image = file("pages-1.img", 10, &[(2, 256, 3), (6, 515, 2)]);
        let saved = save(images(vec![image]), manifest(), &path).unwrap();
        assert_eq!(saved, SavedCheckpoint { files: 1, bytes: 10 });
        let content = [0, 0, 0, 1, 2, 0, 3, 4, 0, 0];
        assert_eq!(fs::read(path.join("pages-1.img")).unwrap(), content);
        let manifest = CheckpointManifest::read(&path).unwrap();
        assert_eq!(manifest.files[0].sha256, format!("{:x}", Sha256::digest(content)));
    }

    #[test]
    fn invalid_reports_are_refused_and_leave_nothing() {
        let cases = [
            vec![],
            vec![file("../x", 1, &[])],
            vec![file("a.img", 1, &[]), file("a.img", 1, &[])],
            vec![file("a.img", 1 << 40, &[])],
            vec![file("a.img", 10, &[(0, 64 << 10, 10)])],
            vec![file("a.img", 10, &[(0, u64::MAX - 3, 10)])],
            vec![file("a.img", 10, &[(5, 0, 6)])],
            vec![file("a.img", 10, &[(5, 0, 2), (4, 0, 1)])],
            (0..9).map(|n| file(&format!("f{n}.img"), 60 << 10, &[(0, 0, 60 << 10)])).collect(),
        ];
        for files in cases {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("new");
            let case = format!("{files:?}");
            let error = save(images(files), manifest(), &path).unwrap_err();
            assert!(matches!(error, CheckpointError::Guest { .. }), "{case}: {error}");
            assert!(!path.exists());
        }
    }

    #[test]
    fn an_image_comes_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let size = 2 * digest::PART + 10;
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(8 << 20).unwrap();
        (&disk).write_all(&vec![9; 8 << 20]).unwrap();
        let piece = |from: u64, located: u64| ImageFile {
            located,
            ..file("pages-1.img", size, &[(from, from + 4096, located - from)])
        };
        let (sender, located) = mpsc::channel(4);
        sender.try_send(answer(vec![file("b.img", 1, &[(0, 0, 1)]), piece(0, digest::PART)], false)).unwrap();
        sender.try_send(answer(vec![piece(digest::PART, size), file("a.img", 0, &[])], true)).unwrap();
        drop(sender);
        let saved =
            save(DumpImages { disk: Arc::new(disk), size: 8 << 20, located }, manifest(), &path).unwrap();
        assert_eq!(saved, SavedCheckpoint { files: 3, bytes: size + 1 });
        let files = CheckpointManifest::read(&path).unwrap().files;
        assert_eq!(
            files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>(),
            ["a.img", "b.img", "pages-1.img"]
        );
        let content = vec![9; size as usize];
        assert!(fs::read(path.join("pages-1.img")).unwrap() == content);
        assert_eq!(files[2].sha256, format!("{:x}", Sha256::digest(&content)));
        assert_eq!(files[2].parts.len(), 3);
        assert_eq!(files[2].parts[2], digest::of_part(&content[..10]));
        assert!(files[0].parts.is_empty() && files[1].parts.is_empty());
    }

    #[test]
    fn a_report_without_its_last_answer_is_refused() {
        let one = || vec![file("a.img", 1, &[(0, 0, 1)])];
        let cases = [
            // This is what arrives when the guest has ended.
            vec![answer(one(), false)],
            vec![answer(one(), false), answer(vec![], false)],
            vec![answer(one(), true), answer(vec![file("b.img", 1, &[])], true)],
            vec![answer(vec![], true)],
            vec![],
        ];
        for answers in cases {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("new");
            let (sender, located) = mpsc::channel(4);
            let case = format!("{answers:?}");
            answers.into_iter().for_each(|answer| sender.try_send(answer).unwrap());
            drop(sender);
            let error = save(DumpImages { located, ..images(vec![]) }, manifest(), &path).unwrap_err();
            assert!(matches!(error, CheckpointError::Guest { .. }), "{case}: {error}");
            assert!(!path.exists(), "{case}");
        }
        // The last answer may repeat what was reported before.
        let dir = tempfile::tempdir().unwrap();
        let (sender, located) = mpsc::channel(4);
        for answer in [answer(one(), false), answer(vec![], true)] {
            sender.try_send(answer).unwrap();
        }
        drop(sender);
        assert!(save(DumpImages { located, ..images(vec![]) }, manifest(), &dir.path().join("new")).is_ok());
    }

    #[test]
    fn pieces_that_do_not_continue_an_image_are_refused() {
        let (part, size) = (digest::PART, 3 * digest::PART);
        let piece = |name: &str, located| ImageFile { located, ..file(name, size, &[]) };
        let cases = [
            vec![piece("a.img", part)],
            vec![piece("a.img", part), piece("b.img", size)],
            vec![piece("a.img", part), piece("a.img", part), piece("a.img", size)],
            vec![piece("a.img", part), ImageFile { size: 2 * part, ..piece("a.img", 2 * part) }],
            vec![piece("a.img", 2 * part), piece("a.img", part), piece("a.img", size)],
            vec![piece("a.img", part + 1), piece("a.img", size)],
            vec![piece("a.img", 0), piece("a.img", size)],
            vec![piece("a.img", size + 1)],
            vec![piece("a.img", part), ImageFile { located: size, ..file("a.img", size, &[(0, 0, part)]) }],
            vec![
                ImageFile { located: part, ..file("a.img", size, &[(part, 0, part)]) },
                piece("a.img", size),
            ],
        ];
        for files in cases {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("new");
            let case = format!("{files:?}");
            let mut images = images(files);
            images.size = 8 << 20;
            let error = save(images, manifest(), &path).unwrap_err();
            assert!(matches!(error, CheckpointError::Guest { .. }), "{case}: {error}");
            assert!(!path.exists());
        }
    }

    #[test]
    fn reports_replace_files_and_follow_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let (from, work) = (dir.path().join("from"), dir.path().join("work"));
        fs::create_dir(&from).unwrap();
        fs::create_dir(&work).unwrap();
        let (target, log) = (dir.path().join("roots"), work.join("dump.log"));
        fs::write(from.join("dump.log"), "the guest's").unwrap();
        fs::write(&target, "root's").unwrap();
        fs::write(work.join("mine"), "x").unwrap();
        std::os::unix::fs::symlink(&target, &log).unwrap();
        // The second time, there is a log already.
        for _ in 0..2 {
            copy_reports(&from, &work).unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), "root's");
            assert!(!log.is_symlink() && fs::read_to_string(&log).unwrap() == "the guest's");
        }
        assert_eq!(fs::read_to_string(work.join("mine")).unwrap(), "x");
    }

    #[test]
    fn a_directory_in_use_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "x").unwrap();
        let error = save(images(vec![file("a.img", 1, &[])]), manifest(), dir.path()).unwrap_err();
        assert!(matches!(error, CheckpointError::NotEmpty { .. }), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_manifest_that_could_not_be_read_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let manifest = |length: u64| CheckpointManifest { kernel: "x".repeat(length as usize), ..manifest() };
        let one = || images(vec![file("a.img", 1, &[(0, 0, 1)])]);
        let error = save(one(), manifest(MAX_SIZE), &path).unwrap_err();
        assert!(matches!(error, CheckpointError::LargeManifest { .. }), "{error}");
        assert!(!path.exists());
        save(one(), manifest(MAX_SIZE - 1024), &path).unwrap();
        CheckpointManifest::read(&path).unwrap();
    }

    #[test]
    fn a_failure_half_way_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let mut images =
            images(vec![file("a.img", 1, &[(0, 0, 1)]), file("b.img", 1 << 15, &[(0, 1 << 15, 1 << 15)])]);
        // The disk is shorter than its announced size.
        images.disk.set_len(40 << 10).unwrap();
        images.size = 64 << 10;
        assert!(save(images, manifest(), &path).is_err());
        assert!(!path.exists());
    }
}
