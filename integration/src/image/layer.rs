//! One layer of an image: a tar stream with fixed times, so that the same content has the same digest.

use std::{
    fs::File,
    io::{self, BufReader, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use tar::{Builder, EntryType, Header};

/// Modification time of every entry, since the epoch.
pub(super) const MTIME: Duration = Duration::from_secs(1_700_000_000);

/// The entries of a layer, in order.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    entries: Vec<Entry>,
    /// A tar archive that is the layer, instead of entries.
    archive: Option<PathBuf>,
}

#[derive(Debug, Clone)]
struct Entry {
    path: String,
    mode: u32,
    owner: (u64, u64),
    xattrs: Vec<(String, Vec<u8>)>,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    Directory,
    Bytes(Vec<u8>),
    HostFile(PathBuf),
    Symlink(String),
    HardLink(String),
    /// That many bytes that do not compress and differ by seed.
    Noise {
        seed: u64,
        len: u64,
    },
}

impl Layer {
    pub fn new() -> Self {
        Self::default()
    }

    /// The layer of an existing tar archive.
    pub fn of_archive(archive: &Path) -> Self {
        Self { entries: Vec::new(), archive: Some(archive.to_owned()) }
    }

    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(path, mode, Content::Directory)
    }

    pub fn file(self, path: &str, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        self.entry(path, mode, Content::Bytes(content.into()))
    }

    /// A copy of a file of the host.
    ///
    /// # Errors
    /// The file cannot be examined.
    pub fn host_file(self, path: &str, file: &Path) -> Result<Self> {
        let status = file.metadata().with_context(|| format!("{} is missing", file.display()))?;
        Ok(self.entry(path, status.permissions().mode() & 0o7777, Content::HostFile(file.to_owned())))
    }

    /// A file of incompressible bytes; the same seed gives the same bytes.
    pub fn noise(self, path: &str, seed: u64, len: u64) -> Self {
        self.entry(path, 0o644, Content::Noise { seed, len })
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, 0o777, Content::Symlink(target.to_owned()))
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(path, 0o644, Content::HardLink(target.to_owned()))
    }

    /// Removes what a lower layer has at the path.
    pub fn whiteout(self, path: &str) -> Self {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.file(&format!("{dir}/.wh.{name}"), 0o644, "")
    }

    /// Hides what lower layers have in the directory.
    pub fn opaque(self, dir: &str) -> Self {
        self.file(&format!("{dir}/.wh..wh..opq"), 0o644, "")
    }

    /// Owner of the entry that was added last.
    pub fn owned_by(mut self, uid: u64, gid: u64) -> Self {
        if let Some(last) = self.entries.last_mut() {
            last.owner = (uid, gid);
        }
        self
    }

    /// An extended attribute of the entry that was added last.
    pub fn xattr(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        if let Some(last) = self.entries.last_mut() {
            last.xattrs.push((name.to_owned(), value.into()));
        }
        self
    }

    pub(super) fn directories(&self) -> impl Iterator<Item = &str> {
        let dirs = self.entries.iter().filter(|entry| matches!(entry.content, Content::Directory));
        dirs.map(|entry| entry.path.as_str())
    }

    fn entry(mut self, path: &str, mode: u32, content: Content) -> Self {
        let path = path.trim_start_matches('/').to_owned();
        self.entries.push(Entry { path, mode, owner: (0, 0), xattrs: Vec::new(), content });
        self
    }

    /// Writes the tar stream.
    ///
    /// # Errors
    /// A host file cannot be read, or the output not written.
    pub fn write(&self, mut output: impl Write) -> Result<()> {
        if let Some(archive) = &self.archive {
            let mut file =
                File::open(archive).with_context(|| format!("cannot open {}", archive.display()))?;
            io::copy(&mut file, &mut output).with_context(|| format!("cannot copy {}", archive.display()))?;
            return Ok(());
        }
        let mut tar = Builder::new(output);
        for entry in &self.entries {
            entry.append(&mut tar).with_context(|| format!("cannot put {} into a layer", entry.path))?;
        }
        tar.finish().context("cannot finish a layer")
    }
}

impl Entry {
    fn append(&self, tar: &mut Builder<impl Write>) -> io::Result<()> {
        let names: Vec<_> = self.xattrs.iter().map(|(name, _)| format!("SCHILY.xattr.{name}")).collect();
        if !names.is_empty() {
            let values = self.xattrs.iter().map(|(_, value)| value.as_slice());
            tar.append_pax_extensions(names.iter().map(String::as_str).zip(values))?;
        }
        let mut header = Header::new_gnu();
        header.set_mode(self.mode);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header.set_mtime(MTIME.as_secs());
        header.set_size(0);
        match &self.content {
            Content::Directory => {
                header.set_entry_type(EntryType::Directory);
                tar.append_data(&mut header, format!("{}/", self.path), io::empty())
            }
            Content::Symlink(target) => {
                header.set_entry_type(EntryType::Symlink);
                tar.append_link(&mut header, &self.path, target)
            }
            Content::HardLink(target) => {
                header.set_entry_type(EntryType::Link);
                tar.append_link(&mut header, &self.path, target.trim_start_matches('/'))
            }
            Content::Bytes(bytes) => {
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, &self.path, bytes.as_slice())
            }
            Content::HostFile(path) => {
                let file = File::open(path)?;
                header.set_size(file.metadata()?.len());
                tar.append_data(&mut header, &self.path, BufReader::new(file))
            }
            Content::Noise { seed, len } => {
                header.set_size(*len);
                tar.append_data(&mut header, &self.path, Noise::new(*seed).take(*len))
            }
        }
    }
}

/// xorshift64*: enough to defeat compression, deduplication and sparse files.
struct Noise(u64);

impl Noise {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
}

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let word = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
        Ok(buffer.len())
    }
}
