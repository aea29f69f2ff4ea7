//! Copies CRIU's images from the disk that a guest has written to a directory of files.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use machinen_base::fs::{create_private_dir, if_exists};
use machinen_protocol::api::{CheckpointImagesResponse, ImageFile};
use tokio::sync::mpsc;

use super::{
    CheckpointError,
    hash_pipeline::{self, CopiedRange},
    manifest::{CheckpointManifest, MANIFEST},
    report::ImageReport,
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
    let DumpImages { disk, size, mut located } = images;
    let mut written = Written::begin(dir)?;
    let mut report = ImageReport::new(size);
    manifest.files = hash_pipeline::run(|copied| {
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
    })?;
    manifest.files.sort_by(|a, b| a.name.cmp(&b.name));
    let bytes = manifest.files.iter().map(|file| file.size).sum();
    let files = manifest.files.len();
    written.manifest(&manifest)?;
    written.keep()?;
    Ok(SavedCheckpoint { files, bytes })
}

/// Copies a checkpoint to another directory, by hard links if possible, since images are never changed.
/// Blocks.
///
/// # Errors
/// A failure leaves nothing of the copy.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    let manifest = CheckpointManifest::read(from)?;
    let mut written = Written::begin(to)?;
    manifest.files.iter().try_for_each(|image| written.copy(&image.name, &from.join(&image.name)))?;
    written.manifest(&manifest)?;
    written.keep()
}

/// Copies CRIU's own log and statistics to a directory that may hold other files. Blocks.
///
/// # Errors
/// The directory cannot be created or written.
pub(crate) fn copy_reports(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    fs::create_dir_all(to).map_err(CheckpointError::file("create", to))?;
    for name in ["dump.log", "stats-dump"] {
        let (from, to) = (from.join(name), to.join(name));
        if_exists(fs::copy(&from, &to)).map_err(CheckpointError::file("write", to))?;
    }
    Ok(())
}

/// Files that are removed when this is dropped, unless they are kept.
#[derive(Debug)]
struct Written {
    dir: PathBuf,
    made_dir: bool,
    files: Vec<PathBuf>,
    kept: bool,
}

impl Written {
    fn begin(dir: &Path) -> Result<Self, CheckpointError> {
        let made_dir = create_private_dir(dir).map_err(CheckpointError::file("create", dir))?;
        let this = Self { dir: dir.to_owned(), made_dir, files: Vec::new(), kept: false };
        if fs::read_dir(dir).map_err(CheckpointError::file("read", dir))?.next().is_some() {
            return Err(CheckpointError::NotEmpty { path: dir.to_owned() });
        }
        Ok(this)
    }

    fn create(&mut self, name: &str) -> Result<(File, PathBuf), CheckpointError> {
        let path = self.dir.join(name);
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(CheckpointError::file("create", &path))?;
        self.files.push(path.clone());
        Ok((file, path))
    }

    /// Adds a file, which is on stable storage, under another name.
    fn copy(&mut self, name: &str, source: &Path) -> Result<(), CheckpointError> {
        let path = self.dir.join(name);
        if fs::hard_link(source, &path).is_ok() {
            self.files.push(path);
            return Ok(());
        }
        // The directories are on different file systems.
        let (mut file, path) = self.create(name)?;
        let mut source = File::open(source).map_err(CheckpointError::file("open", source))?;
        let copied = io::copy(&mut source, &mut file).and_then(|_| file.sync_all());
        copied.map_err(CheckpointError::file("write", &path))
    }

    fn manifest(&mut self, manifest: &CheckpointManifest) -> Result<(), CheckpointError> {
        let (mut file, path) = self.create(MANIFEST)?;
        let mut text = serde_json::to_vec_pretty(manifest)
            .map_err(|source| CheckpointError::Manifest { path: path.clone(), source })?;
        text.push(b'\n');
        let written = file.write_all(&text).and_then(|()| file.sync_all());
        written.map_err(CheckpointError::file("write", &path))
    }

    fn keep(mut self) -> Result<(), CheckpointError> {
        let sync = |dir: &Path| File::open(dir).and_then(|dir| dir.sync_all());
        sync(&self.dir).map_err(CheckpointError::file("write", &self.dir))?;
        if self.made_dir
            && let Some(parent) = self.dir.parent()
        {
            sync(parent).map_err(CheckpointError::file("write", parent))?;
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
        let mut removed: Vec<_> = self.files.iter().map(fs::remove_file).collect();
        if self.made_dir {
            removed.push(fs::remove_dir(&self.dir));
        }
        for error in removed.into_iter().filter_map(Result::err) {
            let dir = self.dir.display();
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
            vec![file("a", 1, &[]), file("a", 1, &[])],
            vec![file("a", 1 << 40, &[])],
            vec![file("a", 10, &[(0, 64 << 10, 10)])],
            vec![file("a", 10, &[(0, u64::MAX - 3, 10)])],
            vec![file("a", 10, &[(5, 0, 6)])],
            vec![file("a", 10, &[(5, 0, 2), (4, 0, 1)])],
            (0..9).map(|n| file(&format!("f{n}"), 60 << 10, &[(0, 0, 60 << 10)])).collect(),
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
        sender.try_send(answer(vec![file("b", 1, &[(0, 0, 1)]), piece(0, digest::PART)], false)).unwrap();
        sender.try_send(answer(vec![piece(digest::PART, size), file("a", 0, &[])], true)).unwrap();
        drop(sender);
        let saved =
            save(DumpImages { disk: Arc::new(disk), size: 8 << 20, located }, manifest(), &path).unwrap();
        assert_eq!(saved, SavedCheckpoint { files: 3, bytes: size + 1 });
        let files = CheckpointManifest::read(&path).unwrap().files;
        assert_eq!(
            files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>(),
            ["a", "b", "pages-1.img"]
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
        let one = || vec![file("a", 1, &[(0, 0, 1)])];
        let cases = [
            // This is what arrives when the guest has ended.
            vec![answer(one(), false)],
            vec![answer(one(), false), answer(vec![], false)],
            vec![answer(one(), true), answer(vec![file("b", 1, &[])], true)],
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
            vec![piece("a", part)],
            vec![piece("a", part), piece("b", size)],
            vec![piece("a", part), piece("a", part), piece("a", size)],
            vec![piece("a", part), ImageFile { size: 2 * part, ..piece("a", 2 * part) }],
            vec![piece("a", 2 * part), piece("a", part), piece("a", size)],
            vec![piece("a", part + 1), piece("a", size)],
            vec![piece("a", 0), piece("a", size)],
            vec![piece("a", size + 1)],
            vec![piece("a", part), ImageFile { located: size, ..file("a", size, &[(0, 0, part)]) }],
            vec![ImageFile { located: part, ..file("a", size, &[(part, 0, part)]) }, piece("a", size)],
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
    fn a_directory_in_use_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "x").unwrap();
        let error = save(images(vec![file("a", 1, &[])]), manifest(), dir.path()).unwrap_err();
        assert!(matches!(error, CheckpointError::NotEmpty { .. }), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_half_way_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let mut images =
            images(vec![file("a", 1, &[(0, 0, 1)]), file("b", 1 << 15, &[(0, 1 << 15, 1 << 15)])]);
        // The disk is shorter than its announced size.
        images.disk.set_len(40 << 10).unwrap();
        images.size = 64 << 10;
        assert!(save(images, manifest(), &path).is_err());
        assert!(!path.exists());
    }
}
