//! Writes an OCI image layout (image-spec, image-layout.md): blobs by their digests, and the documents that lead to them.
//!
//! Everything is written to a directory next to the new layout, which gets its name when it is complete.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use flate2::write::GzEncoder;
use machinen::fs::{FileError, hex};
use oci_spec::image::ImageConfiguration;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::error::BuildError;
use crate::image::{ImageError, pack_merged};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// The annotation with the name of an image (image-spec, annotations.md).
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Set when the build is to end; whatever is written then fails.
pub(super) type Cancelled = Arc<AtomicBool>;

/// A writer that computes the digest of what passes through it.
pub(super) struct DigestWriter<W> {
    inner: W,
    digest: Sha256,
    bytes: u64,
    cancelled: Cancelled,
}

impl<W: Write> DigestWriter<W> {
    fn new(inner: W, cancelled: &Cancelled) -> Self {
        Self { inner, digest: Sha256::new(), bytes: 0, cancelled: Arc::clone(cancelled) }
    }
}

impl<W: Write> Write for DigestWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other("the build was interrupted"));
        }
        let count = self.inner.write(bytes)?;
        self.digest.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A layer that was written.
#[derive(Debug, Clone)]
struct WrittenLayer {
    media_type: &'static str,
    digest: String,
    size: u64,
    /// The digest of the tar without its compression.
    diff: String,
}

/// The archive of a layer, while it is written.
pub(super) type LayerArchive = tar::Builder<DigestWriter<GzEncoder<DigestWriter<File>>>>;

/// An image layout that is not complete.
pub(super) struct LayoutWriter {
    dir: TempDir,
    target: PathBuf,
    layers: Vec<WrittenLayer>,
    cancelled: Cancelled,
}

impl LayoutWriter {
    /// Begins the layout that is to be at `target`, in the new directory `unfinished` next to it.
    ///
    /// # Errors
    /// The directory that `target` is in cannot be written.
    pub(super) fn begin(target: &Path, unfinished: &Path, cancelled: &Cancelled) -> Result<Self, BuildError> {
        let parent = unfinished.parent().unwrap_or(Path::new("/"));
        let name = unfinished.file_name().unwrap_or_default();
        // The name is known before, so that the directory is found after SIGKILL.
        let dir = tempfile::Builder::new().prefix(name).rand_bytes(0).tempdir_in(parent);
        let dir = dir.map_err(FileError::at("create a directory in", parent))?;
        let blobs = dir.path().join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(FileError::at("create the directory", &blobs))?;
        let cancelled = Arc::clone(cancelled);
        Ok(Self { dir, target: target.to_owned(), layers: Vec::new(), cancelled })
    }

    /// Copies a layer as it is. `diff` is the digest of its tar.
    ///
    /// # Errors
    /// It cannot be read or written, or has another digest than `expected`.
    pub(super) fn copy_layer(
        &mut self,
        name: &str,
        mut blob: impl Read,
        expected: Option<&str>,
        diff: &str,
    ) -> Result<(), BuildError> {
        let mut start = [0; 4];
        let failed = |source| -> BuildError { ImageError::Pack { path: name.into(), source }.into() };
        let count = fill(&mut blob, &mut start).map_err(failed)?;
        let mut whole = start[..count].chain(blob);
        let path = self.dir.path().join("layer");
        let file = File::create(&path).map_err(FileError::at("create", &path))?;
        let mut writer = DigestWriter::new(file, &self.cancelled);
        io::copy(&mut whole, &mut writer).map_err(failed)?;
        let (digest, size) = (hex(&writer.digest.finalize()), writer.bytes);
        if expected.is_some_and(|expected| expected != digest) {
            let damaged = io::Error::new(io::ErrorKind::InvalidData, "it has changed since it was unpacked");
            return Err(failed(damaged));
        }
        let media_type = match start[..count] {
            [0x1f, 0x8b, ..] => "application/vnd.oci.image.layer.v1.tar+gzip",
            [0x28, 0xb5, 0x2f, 0xfd] => "application/vnd.oci.image.layer.v1.tar+zstd",
            _ => "application/vnd.oci.image.layer.v1.tar",
        };
        self.name_blob(&path, &digest)?;
        self.layers.push(WrittenLayer { media_type, digest, size, diff: diff.to_owned() });
        Ok(())
    }

    /// Writes a layer, which `fill` puts into an archive.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub(super) fn write_layer(
        &mut self,
        fill: impl FnOnce(&mut LayerArchive) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        let path = self.dir.path().join("layer");
        let file = File::create(&path).map_err(FileError::at("create", &path))?;
        let compressed = DigestWriter::new(file, &self.cancelled);
        let encoder = GzEncoder::new(compressed, flate2::Compression::fast());
        let mut archive = tar::Builder::new(DigestWriter::new(encoder, &self.cancelled));
        fill(&mut archive)?;
        let failed = |source| BuildError::from(ImageError::Pack { path: path.clone(), source });
        let plain = archive.into_inner().map_err(failed)?;
        let diff = hex(&plain.digest.finalize());
        let compressed = plain.inner.finish().map_err(failed)?;
        let (digest, size) = (hex(&compressed.digest.finalize()), compressed.bytes);
        self.name_blob(&path, &digest)?;
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        self.layers.push(WrittenLayer { media_type, digest, size, diff });
        Ok(())
    }

    fn name_blob(&self, path: &Path, digest: &str) -> Result<(), BuildError> {
        let name = self.blob(digest);
        Ok(fs::rename(path, &name).map_err(FileError::at("rename to", &name))?)
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.dir.path().join("blobs/sha256").join(digest)
    }

    fn write_document(&self, value: &Value, media_type: &str) -> Result<Value, BuildError> {
        let text = serde_json::to_vec_pretty(value).map_err(BuildError::Document)?;
        let digest = hex(&Sha256::digest(&text));
        let path = self.blob(&digest);
        fs::write(&path, &text).map_err(FileError::at("write", &path))?;
        Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": text.len() }))
    }

    /// Writes the documents, and gives the layout its name. If that ends with `.tar`, the layout becomes an archive.
    ///
    /// # Errors
    /// The file system refuses, or the name is taken.
    pub(super) fn finish(
        self,
        mut configuration: ImageConfiguration,
        name: Option<&str>,
    ) -> Result<(), BuildError> {
        let diffs = self.layers.iter().map(|layer| format!("sha256:{}", layer.diff)).collect();
        configuration.rootfs_mut().set_diff_ids(diffs);
        let configuration = serde_json::to_value(&configuration).map_err(BuildError::Document)?;
        let config = self.write_document(&configuration, CONFIG)?;
        let layers: Vec<_> = self.layers.iter().map(WrittenLayer::descriptor).collect();
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        let mut entry = self.write_document(&manifest, MANIFEST)?;
        if let Some(name) = name {
            entry["annotations"] = json!({ REF_NAME: name });
        }
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [entry] });
        let documents = [("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })), ("index.json", index)];
        for (name, document) in documents {
            let path = self.dir.path().join(name);
            let text = serde_json::to_vec_pretty(&document).map_err(BuildError::Document)?;
            fs::write(&path, text).map_err(FileError::at("write", &path))?;
        }
        self.name_layout()
    }

    fn name_layout(self) -> Result<(), BuildError> {
        let failed = |action| FileError::at(action, &self.target);
        let open = |path: &Path| File::open(path).map_err(FileError::at("open", path));
        rustix::fs::syncfs(open(self.dir.path())?)
            .map_err(|errno| FileError::new("write", self.dir.path(), errno))?;
        if self.target.extension().is_some_and(|extension| extension == "tar") {
            return self.name_archive(|archive| {
                for name in ["oci-layout", "index.json", "blobs"] {
                    let path = self.dir.path().join(name);
                    let added = match path.is_dir() {
                        true => archive.append_dir_all(name, &path),
                        false => archive.append_path_with_name(&path, name),
                    };
                    added.map_err(FileError::at("pack", &path))?;
                }
                Ok(())
            });
        }
        let from = self.dir.path();
        // As of any other directory that the user makes.
        fs::set_permissions(from, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .map_err(failed("set the mode of"))?;
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, &self.target, flags)
            .map_err(|errno| FileError::new("create", &self.target, errno))?;
        // The name is gone.
        let _ = self.dir.keep();
        Ok(())
    }
}

impl LayoutWriter {
    /// Writes the tar of a root file system instead of a layout: what an overlay of `upper` over `lower` shows.
    ///
    /// # Errors
    /// A file cannot be read or written, or the name is taken.
    pub(super) fn finish_rootfs(self, upper: &Path, lower: &Path) -> Result<(), BuildError> {
        self.name_archive(|archive| Ok(pack_merged(archive, upper, lower)?))
    }

    /// Writes an archive, to which `fill` adds the files, and gives it the name of the target.
    fn name_archive(
        &self,
        fill: impl FnOnce(&mut tar::Builder<DigestWriter<BufWriter<File>>>) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        let packed = self.dir.path().join("archive");
        let file = File::create(&packed).map_err(FileError::at("create", &packed))?;
        let mut archive = tar::Builder::new(DigestWriter::new(BufWriter::new(file), &self.cancelled));
        fill(&mut archive)?;
        let failed = || FileError::at("write", &packed);
        let buffer = archive.into_inner().map_err(failed())?.inner;
        let file = buffer.into_inner().map_err(io::IntoInnerError::into_error).map_err(failed())?;
        file.sync_all().map_err(failed())?;
        // Unlike rename(2), link(2) replaces nothing.
        Ok(fs::hard_link(&packed, &self.target).map_err(FileError::at("create", &self.target))?)
    }
}

impl WrittenLayer {
    fn descriptor(&self) -> Value {
        json!({
            "mediaType": self.media_type, "digest": format!("sha256:{}", self.digest), "size": self.size,
        })
    }
}

/// Reads until the buffer is full or the source ends.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while count < buffer.len() {
        match from.read(&mut buffer[count..])? {
            0 => break,
            more => count += more,
        }
    }
    Ok(count)
}
