//! The source of a disk, and how it is recognised without reading it.

use std::path::{Path, PathBuf};

use machinen_base::fs::FileError;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use sha2::{Digest as _, Sha256};

use super::{
    BuildOptions, RootdiskError, init_layer::InitLayer, key::RootdiskKey, manifest::FORMAT,
    source_mount::SourceMount, tree::SourceTree,
};

/// A root file system on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootfsSource {
    /// Layers of an overlay. They must never change, as the committed layers of a snapshotter do not.
    Overlay {
        /// Top first.
        lowers: Vec<PathBuf>,
    },
    /// Any directory, without what is mounted below it.
    Dir(PathBuf),
}

/// A source whose identity is known.
pub(super) struct Recognised {
    /// Equal for equal states of a source on this machine.
    pub(super) identity: RootdiskKey,
    /// Top first; none for a directory.
    layers: Vec<PathBuf>,
    /// The top layer, if Docker has made it.
    init: Option<InitLayer>,
    /// The mount and the walk that were needed to recognise a directory.
    walked: Option<(SourceMount, SourceTree)>,
    /// Whether it can change while it is read.
    pub(super) mutable: bool,
}

impl RootfsSource {
    /// A description for people.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Dir(dir) => dir.display().to_string(),
            Self::Overlay { lowers } => {
                let top = lowers.first().map(|dir| dir.display().to_string());
                format!("{} layers, the top one {}", lowers.len(), top.unwrap_or_default())
            }
        }
    }

    /// The directory to name in messages.
    pub(super) fn name(&self) -> &Path {
        match self {
            Self::Dir(dir) => dir,
            Self::Overlay { lowers } => lowers.first().map_or(Path::new(""), PathBuf::as_path),
        }
    }

    pub(super) fn recognise(&self, options: &BuildOptions) -> Result<Recognised, RootdiskError> {
        let mut digest = Sha256::new();
        digest.update(FORMAT.to_le_bytes());
        digest.update(options.min_size.to_le_bytes());
        match self {
            Self::Dir(dir) => {
                let mount = SourceMount::of_dir(dir)?;
                let tree = SourceTree::walk(&mount)?;
                digest.update(b"dir");
                digest.update(tree.identity().to_string());
                let identity = RootdiskKey::new(digest.finalize().into());
                let walked = Some((mount, tree));
                Ok(Recognised { identity, layers: Vec::new(), init: None, walked, mutable: true })
            }
            Self::Overlay { lowers } => {
                let init = match &lowers[..] {
                    [top, _, ..] => InitLayer::read(top)?,
                    _ => None,
                };
                if let Some(init) = &init {
                    digest.update(b"init");
                    digest.update(init.content.to_string());
                }
                for lower in &lowers[usize::from(init.is_some())..] {
                    digest.update(b"lower");
                    digest.update(layer_identity(lower)?);
                }
                let (identity, layers) = (RootdiskKey::new(digest.finalize().into()), lowers.clone());
                Ok(Recognised { identity, layers, init, walked: None, mutable: false })
            }
        }
    }
}

impl Recognised {
    /// Opens and walks the source.
    pub(super) fn walk(&mut self) -> Result<(SourceMount, SourceTree), RootdiskError> {
        if let Some(walked) = self.walked.take() {
            return Ok(walked);
        }
        let layers: Vec<&Path> = self.layers.iter().map(PathBuf::as_path).collect();
        let mount = SourceMount::of_layers(&layers)?;
        let mut tree = SourceTree::walk(&mount)?;
        if let Some(init) = &self.init {
            init.set_times(&mut tree);
        }
        Ok((mount, tree))
    }
}

/// Identifies a committed layer by its directory: a directory of the same name that is made later has another
/// time of birth, and usually another inode.
fn layer_identity(dir: &Path) -> Result<[u8; 32], RootdiskError> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat =
        statx(CWD, dir, AtFlags::empty(), mask).map_err(|error| FileError::new("examine", dir, error))?;
    let mut digest = Sha256::new();
    let path = dir.as_os_str().as_encoded_bytes();
    digest.update((path.len() as u64).to_le_bytes());
    digest.update(path);
    for number in [u64::from(stat.stx_dev_major), stat.stx_dev_minor.into(), stat.stx_ino] {
        digest.update(number.to_le_bytes());
    }
    for time in [stat.stx_btime, stat.stx_mtime, stat.stx_ctime] {
        digest.update(time.tv_sec.to_le_bytes());
        digest.update(time.tv_nsec.to_le_bytes());
    }
    Ok(digest.finalize().into())
}
