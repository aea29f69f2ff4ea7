//! Packs an overlay's upper directory into the archive that `machinen_protocol::layer` describes.
//!
//! The directory does not change meanwhile: the container has ended or is frozen, and no other VM uses its
//! disk.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::{self, File, Metadata},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use machinen_protocol::layer::{self, push_record};
use rustix::{
    fs::{lgetxattr, llistxattr, major, minor, seek},
    io::Errno,
};
use tar::{Builder, EntryType, Header};

/// Most bytes of an attribute's value, and of the list of names (xattr(7)).
const XATTR_MAX: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub(crate) enum PackError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} cannot be archived: {what}", path.display())]
    Unfit { path: PathBuf, what: &'static str },
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
}

/// Writes the whole archive.
///
/// # Errors
/// A file cannot be read or archived, or `output` fails.
pub(crate) fn pack(upper: &Path, output: &mut impl Write) -> Result<(), PackError> {
    let mut packer = Packer { upper, archive: Builder::new(output), links: HashMap::new() };
    // The last one is visited next.
    let mut pending = vec![Vec::new()];
    while let Some(name) = pending.pop() {
        let path = packer.path(&name);
        let status = fs::symlink_metadata(&path).map_err(read(&path))?;
        packer.entry(&name, &path, &status)?;
        if status.is_dir() {
            let from = pending.len();
            for item in fs::read_dir(&path).map_err(read(&path))? {
                let item = item.map_err(read(&path))?.file_name();
                let slash: &[u8] = if name.is_empty() { b"" } else { b"/" };
                pending.push([&name, slash, item.as_bytes()].concat());
            }
            pending[from..].sort_by(|a, b| b.cmp(a));
        }
    }
    let output = packer.archive.into_inner().map_err(PackError::Write)?;
    output.flush().map_err(PackError::Write)
}

struct Packer<'a, W: Write> {
    upper: &'a Path,
    archive: Builder<W>,
    /// The first name of each file with several names.
    links: HashMap<u64, Vec<u8>>,
}

impl<W: Write> Packer<'_, W> {
    fn path(&self, name: &[u8]) -> PathBuf {
        // Joining an empty name would end the path with a slash.
        if name.is_empty() {
            self.upper.to_owned()
        } else {
            self.upper.join(std::ffi::OsStr::from_bytes(name))
        }
    }

    fn entry(&mut self, name: &[u8], path: &Path, status: &Metadata) -> Result<(), PackError> {
        let kind = status.file_type();
        if name.len() > layer::MAX_PATH {
            return Err(PackError::Unfit { path: path.to_owned(), what: "its path is too long" });
        }
        let whiteout = kind.is_char_device() && status.rdev() == 0;
        let mut entry = Entry::new(if name.is_empty() { b"." } else { name });
        if !kind.is_dir() && !whiteout && status.nlink() > 1 {
            if let Some(first) = self.links.get(&status.ino()) {
                entry.link(EntryType::Link, first);
                return self.append(&entry, io::empty());
            }
            self.links.insert(status.ino(), name.to_owned());
        }
        if whiteout {
            entry.device(EntryType::Char, 0);
            return self.append(&entry, io::empty());
        }
        entry.status(status);
        for (key, value) in xattrs(path)? {
            entry.record(&[layer::XATTR.as_bytes(), key.to_bytes()].concat(), &value);
        }
        if kind.is_file() {
            return self.file(entry, path, status);
        }
        if kind.is_dir() {
            entry.header.set_entry_type(EntryType::Directory);
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(read(path))?;
            entry.link(EntryType::Symlink, target.as_os_str().as_bytes());
        } else if kind.is_fifo() || kind.is_socket() {
            entry.header.set_entry_type(EntryType::Fifo);
            if kind.is_socket() {
                entry.record(layer::FILE_TYPE.as_bytes(), layer::SOCKET.as_bytes());
            }
        } else {
            let kind = if kind.is_block_device() { EntryType::Block } else { EntryType::Char };
            entry.device(kind, status.rdev());
        }
        self.append(&entry, io::empty())
    }

    fn file(&mut self, mut entry: Entry, path: &Path, status: &Metadata) -> Result<(), PackError> {
        let mut file = File::open(path).map_err(read(path))?;
        if status.blocks() * 512 >= status.size() {
            entry.header.set_size(status.size());
            // A file that has become shorter would shift everything after it.
            let content = file.take(status.size()).chain(io::repeat(0)).take(status.size());
            return self.append(&entry, content);
        }
        let pieces = pieces(&file, status.size()).map_err(read(path))?;
        if pieces.len() > layer::MAX_PIECES {
            return Err(PackError::Unfit { path: path.to_owned(), what: "it has too many holes" });
        }
        let map = layer::map(&pieces);
        let data: u64 = pieces.iter().map(|(_, length)| length).sum();
        entry.header.set_size(map.len() as u64 + data);
        entry.record(layer::SPARSE_MAJOR.as_bytes(), b"1");
        entry.record(layer::SPARSE_MINOR.as_bytes(), b"0");
        entry.record(layer::SPARSE_SIZE.as_bytes(), status.size().to_string().as_bytes());
        file.rewind().map_err(read(path))?;
        let content = map.chain(Pieces { file, left: pieces.into_iter(), current: 0 });
        self.append(&entry, content)
    }

    fn append(&mut self, entry: &Entry, content: impl Read) -> Result<(), PackError> {
        let Entry { records, header } = entry;
        if !records.is_empty() {
            let mut extended = Header::new_gnu();
            extended.set_entry_type(EntryType::XHeader);
            extended.set_size(records.len() as u64);
            extended.set_cksum();
            self.archive.append(&extended, records.as_slice()).map_err(PackError::Write)?;
        }
        let mut header = header.clone();
        header.set_cksum();
        self.archive.append(&header, content).map_err(PackError::Write)
    }
}

/// A header, and the records with what does not fit into it.
struct Entry {
    header: Header,
    records: Vec<u8>,
}

impl Entry {
    fn new(name: &[u8]) -> Self {
        let mut entry = Self { header: Header::new_gnu(), records: Vec::new() };
        entry.header.set_size(0);
        entry.header.set_mode(0);
        entry.header.set_uid(0);
        entry.header.set_gid(0);
        entry.header.set_mtime(0);
        let room = &mut entry.header.as_gnu_mut().expect("it was made as one").name;
        let fits = name.len().min(room.len());
        room[..fits].copy_from_slice(&name[..fits]);
        if fits < name.len() {
            entry.record(layer::PATH.as_bytes(), name);
        }
        entry
    }

    fn record(&mut self, key: &[u8], value: &[u8]) {
        push_record(&mut self.records, key, value);
    }

    fn status(&mut self, status: &Metadata) {
        self.header.set_mode(status.mode() & 0o7777);
        self.header.set_uid(status.uid().into());
        self.header.set_gid(status.gid().into());
        let nanoseconds = u32::try_from(status.mtime_nsec()).unwrap_or(0);
        match u64::try_from(status.mtime()) {
            Ok(seconds) if nanoseconds == 0 => self.header.set_mtime(seconds),
            _ => self
                .record(layer::MTIME.as_bytes(), layer::format_time(status.mtime(), nanoseconds).as_bytes()),
        }
    }

    fn link(&mut self, kind: EntryType, target: &[u8]) {
        self.header.set_entry_type(kind);
        let room = &mut self.header.as_gnu_mut().expect("it was made as one").linkname;
        let fits = target.len().min(room.len());
        room[..fits].copy_from_slice(&target[..fits]);
        if fits < target.len() {
            self.record(layer::LINK.as_bytes(), target);
        }
    }

    fn device(&mut self, kind: EntryType, device: u64) {
        self.header.set_entry_type(kind);
        let header = self.header.as_gnu_mut().expect("it was made as one");
        header.set_device_major(major(device));
        header.set_device_minor(minor(device));
    }
}

/// The attributes that belong to the container, with their values.
fn xattrs(path: &Path) -> Result<Vec<(CString, Vec<u8>)>, PackError> {
    let failed = |errno: Errno| PackError::Read { path: path.to_owned(), source: errno.into() };
    let mut names = Vec::with_capacity(XATTR_MAX);
    match llistxattr(path, rustix::buffer::spare_capacity(&mut names)) {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(errno) => return Err(failed(errno)),
    }
    let mut found = Vec::new();
    for name in names.split(|&byte| byte == 0).filter(|name| layer::travels(name)) {
        let name = CString::new(name).expect("split at zeros");
        let mut value = Vec::with_capacity(XATTR_MAX);
        lgetxattr(path, &name, rustix::buffer::spare_capacity(&mut value)).map_err(failed)?;
        // An overlay inside the container has marks of its own; a mark with another value hides nothing.
        if name.to_bytes() != layer::OPAQUE.0.as_bytes() || value == layer::OPAQUE.1 {
            found.push((name, value));
        }
    }
    Ok(found)
}

/// The parts of a file without its holes (lseek(2), SEEK_DATA).
fn pieces(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let (mut pieces, mut offset) = (Vec::new(), 0);
    while offset < size && pieces.len() <= layer::MAX_PIECES {
        let start = match seek(file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(file, rustix::fs::SeekFrom::Hole(start))?.min(size);
        if start < end {
            pieces.push((start, end - start));
        }
        offset = end.max(start + 1);
    }
    Ok(pieces)
}

/// Reads the parts of a file in order.
struct Pieces {
    file: File,
    left: std::vec::IntoIter<(u64, u64)>,
    /// Bytes left in the part at the file's position.
    current: u64,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current == 0 {
            let Some((offset, length)) = self.left.next() else { return Ok(0) };
            self.file.seek(SeekFrom::Start(offset))?;
            self.current = length;
        }
        let most = usize::try_from(self.current).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read(&mut buffer[..most])?;
        if read == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.current -= read as u64;
        Ok(read)
    }
}

fn read(path: &Path) -> impl FnOnce(io::Error) -> PackError {
    let path = path.to_owned();
    move |source| PackError::Read { path, source }
}
