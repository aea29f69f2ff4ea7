//! Container images in files: what `machinen boot` starts from, without any daemon.
//!
//! ```text
//!   OCI image layout, archive of one (docker save, skopeo, buildah), docker's older archive   ── store ──> manifest
//!   tar of a root file system                                                                            │ unpack
//!   directory with a root file system                                                  ROOT of the container <── cache
//! ```
//! Images are not trusted: sizes and digests are checked before anything is made, and unpacking cannot leave its directory
//! ([`unpack`]). An unpacked image is kept by the digests of its layers ([`cache`]).

mod base;
mod cache;
mod error;
mod manifest;
mod pack;
mod reader;
mod store;
mod unpack;

use std::{
    fs,
    path::{Path, PathBuf},
};

use machinen::fs::FileError;
use oci_spec::image::{Config, ImageConfiguration};

pub(crate) use self::{
    base::{BaseImage, BaseLayers, prepare_base},
    cache::{CachedImage, ImageCache},
    error::ImageError,
    pack::{Packed, pack, pack_merged},
    unpack::read_in_root,
};
use self::{manifest::FoundImage, store::Opened};

/// An image that can be started.
#[derive(Debug)]
pub(crate) struct ReadyImage {
    pub(crate) root: ImageRoot,
    /// Command, environment, user and directory; empty for a root file system without a configuration.
    pub(crate) config: Config,
    /// What the user has named, for lists.
    pub(crate) name: String,
}

/// Where an image's root file system is.
#[derive(Debug)]
pub(crate) enum ImageRoot {
    /// A directory of the cache, which does not change.
    Cached(CachedImage),
    /// A directory of the user's, which may change between starts.
    Dir(PathBuf),
}

impl ImageRoot {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Cached(image) => &image.root,
            Self::Dir(path) => path,
        }
    }
}

/// Opens an image and unpacks it into the cache, unless it is there. `reference` chooses one of several images in a
/// layout or an archive. Reports what takes long.
///
/// # Errors
/// The image is missing, damaged or not supported, or cannot be unpacked; nothing is left of it then.
pub(crate) fn prepare(
    path: &Path,
    reference: Option<&str>,
    cache: &ImageCache,
    report: &mut dyn FnMut(&str),
) -> Result<ReadyImage, ImageError> {
    let path = found(path)?;
    let shown = path.display().to_string();
    match store::open(&path, cache)? {
        Opened::Directory => {
            no_choice(&path, reference)?;
            not_empty(&path)?;
            Ok(ReadyImage { root: ImageRoot::Dir(path), config: Config::default(), name: shown })
        }
        Opened::RootfsTar(tar) => {
            no_choice(&path, reference)?;
            let root = cache.of_tar(&tar, &path, report)?;
            Ok(ReadyImage { root: ImageRoot::Cached(root), config: Config::default(), name: shown })
        }
        Opened::Image(store) => {
            let FoundImage { config, layers, name } = manifest::find(&store, reference)?;
            let root = cache.of_layers(&store, &layers, report)?;
            let config = runtime_config(config);
            Ok(ReadyImage { root: ImageRoot::Cached(root), config, name: name.unwrap_or(shown) })
        }
    }
}

/// The absolute path of an image.
fn found(path: &Path) -> Result<PathBuf, ImageError> {
    path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => ImageError::Missing { path: path.to_owned() },
        _ => FileError::new("find", path, error).into(),
    })
}

/// What is a root file system has no images to choose from.
fn no_choice(path: &Path, reference: Option<&str>) -> Result<(), ImageError> {
    match reference {
        Some(reference) => {
            Err(ImageError::NoChoice { path: path.to_owned(), reference: reference.to_owned() })
        }
        None => Ok(()),
    }
}

fn not_empty(path: &Path) -> Result<(), ImageError> {
    match fs::read_dir(path).map_err(FileError::at("list", path))?.next() {
        Some(_) => Ok(()),
        None => Err(ImageError::EmptyDir { path: path.to_owned() }),
    }
}

fn runtime_config(configuration: ImageConfiguration) -> Config {
    configuration.config().clone().unwrap_or_default()
}

#[cfg(test)]
mod tests;
