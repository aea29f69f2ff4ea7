//! The disk that a guest restores from: the files of a checkpoint, unchanged, behind the metadata of a file
//! system.
//!
//! ```text
//!   guest ── reads ──> QEMU ── NBD over a socket pair ──> thread: metadata from memory, images from their files;
//!                                                         a part is verified before any byte of it is served
//! ```
//! No data is copied, and memory that the guest fetches later is not read in advance, so the cost of a
//! restore does not grow with it. The thread ends with the connection, which ends when the disk is detached
//! or the VM ends.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use machinen_vm::DiskBacking;
use nbd::server::{Export, handshake, transmission};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{
    CheckpointError,
    digest::{self, PART},
    erofs::{self, Layout},
    files::{open_image, verify_opened},
    manifest::CheckpointManifest,
};

/// The name of the only export in the list that `nbd` serves, by which QEMU selects it.
const EXPORT: &str = "rustnbd";
/// How many verified parts are kept.
const VERIFIED_PARTS: usize = 8;

/// A disk that can be attached to a VM. Clones are handles of the same disk.
#[derive(Debug, Clone)]
pub(crate) struct ImageDisk(Arc<DiskContent>);

#[derive(Debug)]
struct DiskContent {
    metadata: Vec<u8>,
    images: Vec<DiskImage>,
    size: u64,
    /// The damage for which a read of the guest was refused.
    fault: Mutex<Option<CheckpointError>>,
}

/// One file of the checkpoint, on the disk.
#[derive(Debug)]
struct DiskImage {
    /// Offset of the file on the disk, bytes.
    at: u64,
    size: u64,
    file: File,
    path: PathBuf,
    /// Digests of the parts; empty if the image was verified as a whole.
    parts: Vec<String>,
}

impl ImageDisk {
    /// Opens all images and compares them with their digests, except memory, which is compared when it is
    /// read. Blocks.
    ///
    /// # Errors
    /// An image is missing or was changed.
    pub(crate) fn open(dir: &Path, manifest: &CheckpointManifest) -> Result<Self, CheckpointError> {
        allow_many_files();
        let opened = manifest.files.iter().map(|image| Ok((image, open_image(dir, image)?)));
        let opened = opened.collect::<Result<Vec<_>, CheckpointError>>()?;
        let named: Vec<_> = manifest.files.iter().map(|image| (image.name.as_str(), image.size)).collect();
        let too_large = || CheckpointError::TooLarge { dir: dir.to_owned() };
        let Layout { metadata, offsets, size } = erofs::layout(&named).ok_or_else(too_large)?;
        let images = opened.into_iter().zip(offsets).map(|((image, (path, file)), at)| {
            if !image.is_memory() || image.parts.is_empty() {
                verify_opened(image, &path, &file)?;
            }
            let parts = match image.parts.is_empty() && image.size <= PART {
                true => {
                    digest::of_parts(&file, 0..image.size).map_err(CheckpointError::file("read", &path))?
                }
                false => image.parts.clone(),
            };
            Ok(DiskImage { at, size: image.size, file, path, parts })
        });
        let images = images.collect::<Result<_, CheckpointError>>()?;
        Ok(Self(Arc::new(DiskContent { metadata, images, size, fault: Mutex::new(None) })))
    }

    /// Serves the disk on a socket, in a thread of its own.
    ///
    /// # Errors
    /// No socket or thread can be created.
    pub(crate) fn serve(&self) -> io::Result<DiskBacking> {
        let (ours, theirs) = UnixStream::pair()?;
        let content = Arc::clone(&self.0);
        thread::Builder::new().name("checkpoint-disk".to_owned()).spawn(move || {
            // When QEMU is killed it closes the socket without an end of the NBD session.
            if let Err(error) = serve(&ours, content) {
                tracing::debug!("the disk of a checkpoint is no longer served: {error}");
            }
        })?;
        Ok(DiskBacking::Nbd { socket: theirs.into(), export: EXPORT })
    }

    /// Returns the damage for which a read of the guest was refused, if any.
    pub(crate) fn fault(&self) -> Option<CheckpointError> {
        self.0.fault.lock().expect("no panic while held").take()
    }
}

/// Raises the soft limit RLIMIT_NOFILE, because some hundred processes have more images than a process may
/// open by default.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    // If the limit cannot be raised, the image that cannot be opened becomes the error.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn serve(mut socket: &UnixStream, content: Arc<DiskContent>) -> io::Result<()> {
    let size = content.size;
    handshake(&mut socket, |_| Ok(Export { size, readonly: true, ..Export::<()>::default() }))?;
    transmission(socket, Reader { content, at: 0, verified: VecDeque::new() })
}

/// The state of one NBD session.
struct Reader {
    content: Arc<DiskContent>,
    at: u64,
    /// The parts that were read last, the latest first. A guest that reads here and there would otherwise have each small
    /// piece cost the reading and hashing of a whole part.
    verified: VecDeque<VerifiedPart>,
}

/// A part of an image whose digest was compared.
struct VerifiedPart {
    /// The index of the image, and the number of the part.
    place: (usize, u64),
    bytes: Vec<u8>,
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let content = Arc::clone(&self.content);
        let (from, rest) = (self.at, content.size.saturating_sub(self.at));
        let limit = usize::try_from(rest).unwrap_or(usize::MAX).min(into.len());
        let into = &mut into[..limit];
        let count = match content.images.partition_point(|image| image.at <= from).checked_sub(1) {
            _ if into.is_empty() => 0,
            None => copy_available(&content.metadata[from as usize..], into),
            Some(index) => self.read_image(index, into)?,
        };
        self.at += count as u64;
        Ok(count)
    }
}

impl Reader {
    fn read_image(&mut self, index: usize, into: &mut [u8]) -> io::Result<usize> {
        let content = Arc::clone(&self.content);
        let image = &content.images[index];
        let at = self.at - image.at;
        let Some(rest) = image.size.checked_sub(at).filter(|rest| *rest > 0) else {
            // The rest of the file's last block.
            let count = erofs::BLOCK.min(into.len());
            let count = count.min(erofs::BLOCK - (at % erofs::BLOCK as u64) as usize);
            into[..count].fill(0);
            return Ok(count);
        };
        let fault = |what: &str| {
            let path = image.path.clone();
            tracing::error!(path = %path.display(), "an image of a checkpoint {what}");
            let fault = CheckpointError::Changed { path, what: what.to_owned() };
            self.content.fault.lock().expect("no panic while held").get_or_insert(fault);
            io::Error::from_raw_os_error(libc::EIO)
        };
        if image.parts.is_empty() {
            let count = usize::try_from(rest).unwrap_or(usize::MAX).min(into.len());
            image.file.read_exact_at(&mut into[..count], at).map_err(|_| fault("cannot be read"))?;
            return Ok(count);
        }
        let place = (index, at / PART);
        if self.verified.front().is_none_or(|part| part.place != place) {
            let known = self.verified.iter().position(|part| part.place == place);
            let part = match known.and_then(|known| self.verified.remove(known)) {
                Some(part) => part,
                None => {
                    // Its allocation is used again.
                    let oldest = match self.verified.len() {
                        VERIFIED_PARTS => self.verified.pop_back(),
                        _ => None,
                    };
                    let mut bytes = oldest.map(|part| part.bytes).unwrap_or_default();
                    let part = digest::read_part(&image.file, image.size, place.1, &mut bytes);
                    let part = part.map_err(|_| fault("cannot be read"))?;
                    if Some(&digest::of_part(part)) != image.parts.get(place.1 as usize) {
                        return Err(fault("has different content"));
                    }
                    VerifiedPart { place, bytes }
                }
            };
            self.verified.push_front(part);
        }
        let part = self.verified.front().expect("it was put there");
        Ok(copy_available(&part.bytes[(at % PART) as usize..], into))
    }
}

/// Copies as much as is available and fits; returns the number of bytes.
fn copy_available(from: &[u8], into: &mut [u8]) -> usize {
    let count = from.len().min(into.len());
    into[..count].copy_from_slice(&from[..count]);
    count
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match to {
            SeekFrom::Start(at) => self.at = at,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        }
        Ok(self.at)
    }
}

/// Writes are never requested from a read-only export, but the NBD library requires the trait.
impl Write for Reader {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nbd::client;

    use super::*;
    use crate::checkpoint::ImageDigest;

    /// Writes a checkpoint with these files, which include memory.
    fn saved(dir: &Path, files: &[(&str, Vec<u8>)]) -> CheckpointManifest {
        let digests = files.iter().map(|(name, content)| {
            let path = dir.join(name);
            fs::write(&path, content).unwrap();
            let (file, size) = (File::open(path).unwrap(), content.len() as u64);
            let parts = if size > PART { digest::of_parts(&file, 0..size).unwrap() } else { Vec::new() };
            ImageDigest {
                name: (*name).to_owned(),
                size,
                sha256: digest::of_file(&file, size).unwrap(),
                parts,
            }
        });
        CheckpointManifest { files: digests.collect(), ..CheckpointManifest::default() }
    }

    /// Returns the bytes of the disk that can be read.
    fn read(disk: &ImageDisk) -> Vec<u8> {
        let DiskBacking::Nbd { socket, .. } = disk.serve().unwrap() else { panic!("not served") };
        let mut socket = UnixStream::from(socket);
        let export = client::handshake(&mut socket, EXPORT.as_bytes()).unwrap();
        assert!(export.readonly && export.size == disk.0.size);
        let (mut client, mut all, mut block) =
            (client::NbdClient::new(&mut socket, &export), Vec::new(), [0; 4096]);
        while (all.len() as u64) < export.size && client.read_exact(&mut block).is_ok() {
            all.extend(block);
        }
        all
    }

    #[test]
    fn the_disk_has_all_files_where_its_metadata_says() {
        let dir = tempfile::tempdir().unwrap();
        let memory: Vec<u8> = (0..3 * PART + 4096).map(|at| (at / 1000) as u8).collect();
        let files = [("core-1.img", vec![7; 900]), ("empty", vec![]), ("pages-1.img", memory)];
        let disk = ImageDisk::open(dir.path(), &saved(dir.path(), &files)).unwrap();
        // The disk uses the open files, whatever happens to their names.
        dir.close().unwrap();
        let all = read(&disk);
        assert_eq!(all.len() as u64, disk.0.size);
        assert!(all.starts_with(&disk.0.metadata));
        for (image, (name, content)) in disk.0.images.iter().zip(&files) {
            assert!(all[image.at as usize..].starts_with(content), "{name}");
        }
        assert!(disk.fault().is_none());
    }

    #[test]
    fn images_may_exceed_the_soft_limit_of_open_files() {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<_> = (0..1500).map(|number| format!("core-{number}.img")).collect();
        let files: Vec<_> = files.iter().map(|name| (name.as_str(), vec![1])).collect();
        let manifest = saved(dir.path(), &files);
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(1024), ..limit }).unwrap();
        let opened = ImageDisk::open(dir.path(), &manifest);
        setrlimit(Resource::Nofile, limit).unwrap();
        assert_eq!(opened.unwrap().0.images.len(), 1500);
    }

    #[test]
    fn parts_that_are_read_in_turn_are_verified_once() {
        let dir = tempfile::tempdir().unwrap();
        let parts = VERIFIED_PARTS as u64 + 1;
        let files = [("pages-1.img", vec![2; (parts * PART) as usize])];
        let disk = ImageDisk::open(dir.path(), &saved(dir.path(), &files)).unwrap();
        let mut reader = Reader { content: Arc::clone(&disk.0), at: 0, verified: VecDeque::new() };
        let mut read = |part: u64| {
            reader.at = disk.0.images[0].at + part * PART + 5;
            let mut bytes = [0; 10];
            reader.read(&mut bytes).map(|_| bytes)
        };
        for part in [0, 1, 0] {
            assert_eq!(read(part).unwrap(), [2; 10]);
        }
        // What was verified is still there, until as many other parts were read.
        File::options()
            .write(true)
            .open(dir.path().join("pages-1.img"))
            .unwrap()
            .write_all_at(b"x", 9)
            .unwrap();
        (1..VERIFIED_PARTS as u64).for_each(|part| assert_eq!(read(part).unwrap(), [2; 10]));
        assert_eq!(read(0).unwrap(), [2; 10]);
        (1..parts).for_each(|part| assert_eq!(read(part).unwrap(), [2; 10]));
        assert!(read(0).is_err());
    }

    #[test]
    fn memory_is_verified_when_it_is_read_and_other_images_before() {
        let dir = tempfile::tempdir().unwrap();
        let files = [("ghost-file-1.img", vec![1; 3 << 20]), ("pages-1.img", vec![2; 3 << 20])];
        let manifest = saved(dir.path(), &files);
        let change = |name: &str, byte| {
            let file = File::options().write(true).open(dir.path().join(name)).unwrap();
            file.write_all_at(&[byte], PART + 77).unwrap();
        };
        change("ghost-file-1.img", 9);
        let error = ImageDisk::open(dir.path(), &manifest).unwrap_err();
        assert!(matches!(error, CheckpointError::Changed { .. }), "{error}");
        change("ghost-file-1.img", 1);
        change("pages-1.img", 9);
        let disk = ImageDisk::open(dir.path(), &manifest).unwrap();
        let wrong = disk.0.images[1].at + PART;
        assert_eq!(read(&disk).len() as u64, wrong);
        let fault = disk.fault().unwrap().to_string();
        assert!(fault.contains("pages-1.img") && fault.contains("different content"), "{fault}");
        // An image without digests of its parts is verified as a whole.
        let mut older = manifest.clone();
        older.files[1].parts.clear();
        assert!(ImageDisk::open(dir.path(), &older).is_err());
        change("pages-1.img", 2);
        assert_eq!(read(&ImageDisk::open(dir.path(), &older).unwrap()).len() as u64, disk.0.size);
    }
}
