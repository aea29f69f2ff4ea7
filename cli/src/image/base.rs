//! An image that another one is built on: unpacked for the build's container, with its layers for the new image.

use std::{
    fs::File,
    io::{Read, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use machinen::fs::FileError;
use oci_spec::image::{Arch, ImageConfiguration, ImageConfigurationBuilder, Os, RootFsBuilder};

use super::{
    ImageCache, ImageError, ImageRoot, ReadyImage,
    manifest::{self, FoundImage, Layer},
    pack::{Packed, pack},
    reader::DigestReader,
    store::{self, BlobStore, Opened},
};

/// An image that another one is built on.
#[derive(Debug)]
pub(crate) struct BaseImage {
    /// Unpacked into the cache.
    pub(crate) ready: ReadyImage,
    /// The whole configuration, without a layer if the image had none.
    pub(crate) configuration: ImageConfiguration,
    pub(crate) layers: BaseLayers,
}

/// The layers of an image, as they are in its store.
#[derive(Debug)]
pub(crate) struct BaseLayers(Source);

#[derive(Debug)]
enum Source {
    Store(BlobStore, Vec<Layer>),
    /// A root file system, which becomes the only layer, and the digest of its tar.
    Tar {
        tar: File,
        digest: String,
        path: PathBuf,
    },
}

/// A layer of a base image.
pub(crate) struct BaseLayer<'a> {
    /// For errors.
    pub(crate) name: String,
    pub(crate) content: Box<dyn Read>,
    /// The digest that the content has to have, if it is known.
    pub(crate) digest: Option<&'a str>,
    /// The digest of the tar without its compression.
    pub(crate) diff: &'a str,
}

impl BaseLayers {
    /// Calls `each` with each layer, the lowest first.
    ///
    /// # Errors
    /// A layer cannot be read, or `each` fails.
    pub(crate) fn for_each<E: From<ImageError>>(
        &self,
        mut each: impl FnMut(BaseLayer<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        match &self.0 {
            Source::Store(store, layers) => layers.iter().try_for_each(|layer| {
                let (content, _) = store.open(&layer.blob)?;
                let (name, digest) = (layer.blob.clone(), layer.digest.as_deref());
                each(BaseLayer { name, content, digest, diff: &layer.diff })
            }),
            Source::Tar { tar, digest, path } => {
                let content = Box::new(rewound(tar, path)?);
                let name = path.display().to_string();
                each(BaseLayer { name, content, digest: Some(digest), diff: digest })
            }
        }
    }
}

/// Opens an image as [`super::prepare`] does. A directory with a root file system is packed first, so that the build and the
/// new image have the same files whatever happens to the directory.
///
/// # Errors
/// As for [`super::prepare`], or the directory cannot be packed.
pub(crate) fn prepare_base(
    path: &Path,
    reference: Option<&str>,
    cache: &ImageCache,
    report: &mut dyn FnMut(&str),
) -> Result<BaseImage, ImageError> {
    let path = super::found(path)?;
    let name = path.display().to_string();
    let tar = match store::open(&path, cache)? {
        Opened::Image(store) => {
            let FoundImage { config: configuration, layers, name: known } =
                manifest::find(&store, reference)?;
            let root = ImageRoot::Cached(cache.of_layers(&store, &layers, report)?);
            let config = super::runtime_config(configuration.clone());
            let ready = ReadyImage { root, config, name: known.unwrap_or(name) };
            return Ok(BaseImage { ready, configuration, layers: BaseLayers(Source::Store(store, layers)) });
        }
        Opened::RootfsTar(tar) => {
            super::no_choice(&path, reference)?;
            tar
        }
        Opened::Directory => {
            super::no_choice(&path, reference)?;
            super::not_empty(&path)?;
            report("packing the root file system");
            let failed = |source| ImageError::File(FileError::new("pack", &path, source));
            let mut archive = tar::Builder::new(std::io::BufWriter::new(cache.unnamed_file()?));
            pack(&mut archive, &path, Packed::Root)?;
            archive.into_inner().map_err(failed)?.into_inner().map_err(|error| failed(error.into_error()))?
        }
    };
    let root = ImageRoot::Cached(cache.of_tar(&tar, &path, report)?);
    let failed = |source| ImageError::File(FileError::new("read", &path, source));
    let digest = DigestReader::new(rewound(&tar, &path)?, u64::MAX).finish().map_err(failed)?;
    let ready = ReadyImage { root, config: oci_spec::image::Config::default(), name };
    Ok(BaseImage { ready, configuration: bare(), layers: BaseLayers(Source::Tar { tar, digest, path }) })
}

fn rewound(tar: &File, path: &Path) -> Result<File, ImageError> {
    let failed = || FileError::at("read", path);
    let mut tar = tar.try_clone().map_err(failed())?;
    tar.seek(SeekFrom::Start(0)).map_err(failed())?;
    Ok(tar)
}

/// The configuration of an image that has none.
fn bare() -> ImageConfiguration {
    let rootfs = RootFsBuilder::default().typ("layers").diff_ids(Vec::<String>::new()).build();
    let rootfs = rootfs.expect("every field is given");
    let bare =
        ImageConfigurationBuilder::default().architecture(Arch::default()).os(Os::Linux).rootfs(rootfs);
    bare.build().expect("every field is given")
}
