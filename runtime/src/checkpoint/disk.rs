//! The disk that a guest restores from: the files of a checkpoint as they are, behind the metadata of a file system.
//!
//! ```text
//!   guest ── reads ──> QEMU ── NBD over a socket pair ──> thread: metadata from memory, images from their files, and each
//!                                                         part of them is checked before a byte of it is given away
//! ```
//! Nothing is copied, and memory that is fetched later is not even read before: what a restore takes does not grow with it.
//! The thread ends with the connection, so with the disk in the VM or the VM.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use nbd::server::{Export, handshake, transmission};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{
    CheckpointError, digest,
    digest::PART,
    erofs::{self, Layout},
    files::{open_image, verify_opened},
    manifest::Manifest,
};
use crate::vm::DiskBacking;

/// What `nbd` lists the only export as, and QEMU looks for it in that list.
const EXPORT: &str = "rustnbd";

/// A disk to be attached; clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct ImageDisk(Arc<Content>);

#[derive(Debug)]
struct Content {
    metadata: Vec<u8>,
    images: Vec<Image>,
    size: u64,
    /// Why the guest was told of an error.
    fault: Mutex<Option<CheckpointError>>,
}

/// One file of the checkpoint, on the disk.
#[derive(Debug)]
struct Image {
    /// Where it begins.
    at: u64,
    size: u64,
    file: File,
    path: PathBuf,
    /// Of its parts; none where it was checked as a whole.
    parts: Vec<String>,
}

impl ImageDisk {
    /// Opens all images. All but memory are compared with their digests now, memory when it is read. Blocks.
    ///
    /// # Errors
    /// An image is missing or not as it was written.
    pub(crate) fn open(dir: &Path, manifest: &Manifest) -> Result<Self, CheckpointError> {
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
            Ok(Image { at, size: image.size, file, path, parts })
        });
        let images = images.collect::<Result<_, CheckpointError>>()?;
        Ok(Self(Arc::new(Content { metadata, images, size, fault: Mutex::new(None) })))
    }

    /// Starts to serve it to whoever is given the result.
    ///
    /// # Errors
    /// No socket or thread can be had.
    pub(crate) fn serve(&self) -> io::Result<DiskBacking> {
        let (ours, theirs) = UnixStream::pair()?;
        let content = Arc::clone(&self.0);
        thread::Builder::new().name("checkpoint-disk".to_owned()).spawn(move || {
            // QEMU closes the socket without a word when it is killed.
            if let Err(error) = serve(&ours, content) {
                tracing::debug!("the disk of a checkpoint is not read any more: {error}");
            }
        })?;
        Ok(DiskBacking::Nbd { socket: theirs.into(), export: EXPORT })
    }

    /// What was wrong with the checkpoint, if the guest could not read of it for that reason.
    pub(crate) fn fault(&self) -> Option<CheckpointError> {
        self.0.fault.lock().expect("no panic while held").take()
    }
}

/// Some hundred processes have more images than a process has files open, unless it asks (RLIMIT_NOFILE's soft limit).
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    // Where it is refused, the image that cannot be opened is the error.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn serve(mut socket: &UnixStream, content: Arc<Content>) -> io::Result<()> {
    let size = content.size;
    handshake(&mut socket, |_| Ok(Export { size, readonly: true, ..Export::<()>::default() }))?;
    transmission(socket, Reader { content, at: 0, buffer: Vec::new(), buffered: None })
}

/// One client's place on the disk.
struct Reader {
    content: Arc<Content>,
    at: u64,
    /// The part that was checked last, and of which image it is which.
    buffer: Vec<u8>,
    buffered: Option<(usize, u64)>,
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let content = Arc::clone(&self.content);
        let (from, rest) = (self.at, content.size.saturating_sub(self.at));
        let limit = usize::try_from(rest).unwrap_or(usize::MAX).min(into.len());
        let into = &mut into[..limit];
        let count = match content.images.partition_point(|image| image.at <= from).checked_sub(1) {
            _ if into.is_empty() => 0,
            None => give(&content.metadata[from as usize..], into),
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
            // What is left of the block.
            let count = erofs::BLOCK.min(into.len());
            let count = count.min(erofs::BLOCK - (at % erofs::BLOCK as u64) as usize);
            into[..count].fill(0);
            return Ok(count);
        };
        let fault = |what: &str| {
            let path = image.path.clone();
            tracing::error!(path = %path.display(), "an image of a checkpoint {what} now");
            let fault = CheckpointError::Changed { path, what: what.to_owned() };
            self.content.fault.lock().expect("no panic while held").get_or_insert(fault);
            io::Error::from_raw_os_error(libc::EIO)
        };
        if image.parts.is_empty() {
            let count = usize::try_from(rest).unwrap_or(usize::MAX).min(into.len());
            image.file.read_exact_at(&mut into[..count], at).map_err(|_| fault("cannot be read"))?;
            return Ok(count);
        }
        let number = at / PART;
        if self.buffered != Some((index, number)) {
            self.buffered = None;
            let part = digest::read_part(&image.file, image.size, number, &mut self.buffer);
            let part = part.map_err(|_| fault("cannot be read"))?;
            if Some(&digest::of_part(part)) != image.parts.get(number as usize) {
                return Err(fault("has another content"));
            }
            self.buffered = Some((index, number));
        }
        Ok(give(&self.buffer[(at % PART) as usize..], into))
    }
}

/// As much as there is and fits.
fn give(from: &[u8], into: &mut [u8]) -> usize {
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

/// Nobody writes to it; the protocol's library wants to be able to.
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

    /// A checkpoint with these files, memory among them.
    fn saved(dir: &Path, files: &[(&str, Vec<u8>)]) -> Manifest {
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
        Manifest { files: digests.collect(), ..Manifest::default() }
    }

    /// The bytes of the disk, as far as they can be read.
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
        // What was opened is used, whatever becomes of the names.
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
    fn there_may_be_more_images_than_files_that_are_open() {
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
    fn memory_is_checked_when_it_is_read_and_all_else_before() {
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
        assert!(fault.contains("pages-1.img") && fault.contains("another content"), "{fault}");
        // Where the parts are not known it is checked like all else.
        let mut older = manifest.clone();
        older.files[1].parts.clear();
        assert!(ImageDisk::open(dir.path(), &older).is_err());
        change("pages-1.img", 2);
        assert_eq!(read(&ImageDisk::open(dir.path(), &older).unwrap()).len() as u64, disk.0.size);
    }
}
