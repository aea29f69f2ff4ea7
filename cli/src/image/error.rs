//! Why an image cannot be used.

use std::{io, path::PathBuf};

use machinen::{
    error::{ErrorKind, HasKind},
    fs::FileError,
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error(
        "there is no image {}: it is a path of an OCI image layout, an archive (docker save, skopeo copy), a tar of a root \
         file system, or a directory with one", path.display()
    )]
    Missing { path: PathBuf },
    #[error("{} is an empty directory, and no root file system", path.display())]
    EmptyDir { path: PathBuf },
    #[error("{} has no images to choose from, so {reference:?} (--ref) names none", path.display())]
    NoChoice { path: PathBuf, reference: String },
    #[error("{} is neither a tar archive nor a compressed one (gzip, zstd)", path.display())]
    NotAnArchive { path: PathBuf },
    #[error("the image has no file {name:?}")]
    NoFile { name: String },
    #[error("{name:?} of the image is {size} bytes long; {most} are allowed")]
    TooLarge { name: String, size: u64, most: u64 },
    #[error("{name:?} of the image is not understood")]
    Json { name: String, source: serde_json::Error },
    #[error("{name:?} of the image is not understood")]
    Model { name: String, source: Box<oci_spec::OciSpecError> },
    #[error("{name:?} of the image is damaged: its digest is {found}, and should be {expected}")]
    Digest { name: String, expected: String, found: String },
    #[error("{digest:?} is no digest that is supported; sha256 is")]
    DigestKind { digest: String },
    #[error("there is no image for {architecture} in it; it has {found}")]
    Platform { architecture: &'static str, found: String },
    #[error("there are several images in it; choose one with --ref: {references}")]
    Several { references: String },
    #[error("there is no image {reference:?} in it; it has {references}")]
    NoReference { reference: String, references: String },
    #[error("the image has {layers} layers, and the digests of {diffs}")]
    Layers { layers: usize, diffs: usize },
    #[error("the image refers to itself")]
    Nested,
    #[error("cannot unpack {path:?} of the image: {reason}")]
    Entry { path: PathBuf, reason: &'static str },
    #[error("cannot unpack {path:?} of the image")]
    Unpack { path: PathBuf, source: io::Error },
    #[error("cannot read {name:?} of the image")]
    Read { name: String, source: io::Error },
    #[error("cannot pack {path:?} into an image")]
    Pack { path: PathBuf, source: io::Error },
    #[error("the image has more than {most} {what}")]
    Bounds { what: &'static str, most: u64 },
    #[error(transparent)]
    File(#[from] FileError),
}

impl HasKind for ImageError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } | Self::NoReference { .. } => ErrorKind::NotFound,
            Self::Bounds { .. } => ErrorKind::ResourceExhausted,
            Self::Unpack { source, .. } | Self::Read { source, .. } | Self::Pack { source, .. } => {
                ErrorKind::of_io(source)
            }
            Self::File(error) => error.kind(),
            _ => ErrorKind::InvalidArgument,
        }
    }
}
