//! OCI images made on demand, without network: layers, configuration, manifest and index in one archive.

mod busybox;
mod layer;

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    str::FromStr,
    time::UNIX_EPOCH,
};

use anyhow::{Context, Result, bail};
use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, DescriptorBuilder, ImageConfigurationBuilder, ImageIndexBuilder,
    ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, RootFsBuilder, Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest, Sha256};

pub use layer::Layer;

/// An image before it is written.
#[derive(Debug, Clone)]
pub struct Image {
    name: String,
    layers: Vec<Layer>,
    command: Vec<String>,
}

impl Image {
    /// An image of the given layers, lowest first.
    pub fn new(name: &str, layers: Vec<Layer>) -> Self {
        Self { name: name.to_owned(), layers, command: vec!["/bin/sh".to_owned()] }
    }

    /// busybox with all of its applets and a few files with properties worth testing.
    ///
    /// # Errors
    /// The host has no statically linked busybox.
    pub fn busybox() -> Result<Self> {
        Ok(Self::new("machinen.test/busybox:1", vec![busybox::layer()?]))
    }

    /// The same files under another name and with another command.
    pub fn running(mut self, name: &str, command: &[&str]) -> Self {
        name.clone_into(&mut self.name);
        self.command = command.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// The same image with one more layer, under another name.
    pub fn with(mut self, name: &str, layer: Layer) -> Self {
        name.clone_into(&mut self.name);
        self.layers.push(layer);
        self
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Unpacks a single-layer image into a directory, for bundles that bring their own rootfs.
    ///
    /// # Errors
    /// There is not exactly one layer, or it cannot be unpacked.
    pub fn unpack(&self, dir: &Path) -> Result<()> {
        let [layer] = self.layers.as_slice() else { bail!("{} has not exactly one layer", self.name) };
        let mut bytes = Vec::new();
        layer.write(&mut bytes)?;
        let mut archive = tar::Archive::new(bytes.as_slice());
        archive.set_preserve_permissions(true);
        archive.set_preserve_ownerships(true);
        let failed = || format!("cannot unpack {} into {}", self.name, dir.display());
        archive.unpack(dir).with_context(failed)?;
        // Directories get the time of their last new entry; the same image must give the same tree.
        for path in layer.directories() {
            File::open(dir.join(path))?.set_modified(UNIX_EPOCH + layer::MTIME).with_context(failed)?;
        }
        Ok(())
    }

    /// Writes the image as an OCI archive, for `ctr images import`.
    ///
    /// # Errors
    /// A host file cannot be read, or the archive not written.
    pub fn write(&self, archive: &Path) -> Result<()> {
        let file = File::create(archive).with_context(|| format!("cannot make {}", archive.display()))?;
        let mut tar = tar::Builder::new(BufWriter::new(file));
        let mut layers = Vec::new();
        for layer in &self.layers {
            layers.push(append_layer(&mut tar, layer)?);
        }
        let rootfs = RootFsBuilder::default()
            .typ("layers")
            .diff_ids(layers.iter().map(|layer| layer.digest().to_string()).collect::<Vec<_>>())
            .build()?;
        let environment = vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
        let config = ConfigBuilder::default().cmd(self.command.clone()).env(environment).build()?;
        let config = ImageConfigurationBuilder::default()
            .architecture(Arch::Amd64)
            .os(Os::Linux)
            .config(config)
            .rootfs(rootfs)
            .history(Vec::new())
            .build()?;
        let config = append_json(&mut tar, MediaType::ImageConfig, &config)?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(layers)
            .build()?;
        let mut manifest = append_json(&mut tar, MediaType::ImageManifest, &manifest)?;
        manifest.set_annotations(Some(HashMap::from([
            ("io.containerd.image.name".to_owned(), self.name.clone()),
            ("org.opencontainers.image.ref.name".to_owned(), "1".to_owned()),
        ])));
        let index = ImageIndexBuilder::default().schema_version(2u32).manifests(vec![manifest]).build()?;
        append(&mut tar, "index.json", &serde_json::to_vec(&index)?)?;
        let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
        append(&mut tar, "oci-layout", &serde_json::to_vec(&layout)?)?;
        let mut file = tar.into_inner().context("cannot finish the archive")?;
        file.flush().with_context(|| format!("cannot write {}", archive.display()))
    }
}

type Archive = tar::Builder<BufWriter<File>>;

/// The name must contain the digest, so a layer is first made in a file of its own.
fn append_layer(tar: &mut Archive, layer: &Layer) -> Result<Descriptor> {
    let file = tempfile::tempfile().context("cannot make a temporary file")?;
    let mut hashed = Hashed { inner: BufWriter::new(file), hash: Sha256::new() };
    layer.write(&mut hashed)?;
    let digest = hex(&hashed.hash.finalize());
    let mut file = hashed.inner.into_inner().context("cannot write a layer")?;
    io::Seek::rewind(&mut file)?;
    let size = file.metadata()?.len();
    let mut header = header(size);
    tar.append_data(&mut header, format!("blobs/sha256/{digest}"), file)?;
    descriptor(MediaType::ImageLayer, &digest, size)
}

fn append_json(tar: &mut Archive, kind: MediaType, value: &impl Serialize) -> Result<Descriptor> {
    let json = serde_json::to_vec(value)?;
    let digest = hex(&Sha256::digest(&json));
    append(tar, &format!("blobs/sha256/{digest}"), &json)?;
    descriptor(kind, &digest, json.len() as u64)
}

fn append(tar: &mut Archive, path: &str, bytes: &[u8]) -> Result<()> {
    let mut header = header(bytes.len() as u64);
    tar.append_data(&mut header, path, bytes).with_context(|| format!("cannot write {path} to the archive"))
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header
}

fn descriptor(kind: MediaType, digest: &str, size: u64) -> Result<Descriptor> {
    let digest = Sha256Digest::from_str(digest)?;
    Ok(DescriptorBuilder::default().media_type(kind).digest(digest).size(size).build()?)
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Hashed<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
