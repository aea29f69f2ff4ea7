//! Which image is in a layout or an archive: its configuration and its layers, each with the digests that must hold.

use machinen::text::printable;
use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{ImageError, store::BlobStore};

/// How deep indexes may name further ones.
const MAX_DEPTH: u32 = 4;
/// Most layers of an image: overlayfs and container tools have smaller limits.
const MAX_LAYERS: usize = 512;

/// The annotations with the name of an image: of the OCI image-spec, and of containerd and Docker.
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// An image of which nothing has been unpacked.
#[derive(Debug)]
pub(super) struct FoundImage {
    pub(super) config: ImageConfiguration,
    /// The lowest first.
    pub(super) layers: Vec<Layer>,
    pub(super) name: Option<String>,
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    /// The file in the store.
    pub(super) blob: String,
    /// SHA-256 of that file in hexadecimal digits; None if only that of its content is known.
    pub(super) digest: Option<String>,
    /// SHA-256 of the tar without compression (`diff_id`).
    pub(super) diff: String,
}

/// An entry of docker's own list of images.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Finds the image that `reference` names, or the only one.
///
/// # Errors
/// There is no such image, there are several, or its documents are damaged.
pub(super) fn find(store: &BlobStore, reference: Option<&str>) -> Result<FoundImage, ImageError> {
    if store.has("index.json") { find_oci(store, reference) } else { find_docker(store, reference) }
}

fn find_oci(store: &BlobStore, reference: Option<&str>) -> Result<FoundImage, ImageError> {
    let index = index(store, "index.json", None)?;
    let named: Vec<(Option<String>, &Descriptor)> = index
        .manifests()
        .iter()
        .filter(|entry| is_image(entry))
        .map(|entry| (name_of(entry), entry))
        .collect();
    let names = || named.iter().filter_map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let wanted: Vec<_> = match reference {
        None => named.clone(),
        Some(wanted) => {
            named.iter().filter(|(name, entry)| is_meant(name.as_deref(), entry, wanted)).cloned().collect()
        }
    };
    let fitting: Vec<_> = wanted.iter().filter(|(_, entry)| fits(entry)).collect();
    let (name, entry) = match (fitting.as_slice(), reference) {
        ([one], _) => one,
        ([first, rest @ ..], _) if rest.iter().all(|(_, entry)| entry.digest() == first.1.digest()) => first,
        ([], Some(reference)) if wanted.is_empty() => {
            return Err(ImageError::NoReference {
                reference: reference.to_owned(),
                references: list(&names()),
            });
        }
        ([], _) => return Err(no_platform(wanted.iter().map(|(_, entry)| *entry))),
        _ => return Err(ImageError::Several { references: list(&names()) }),
    };
    let manifest = manifest(store, entry, MAX_DEPTH)?;
    let config_blob = blob(manifest.config())?;
    let config = store.read(&config_blob)?;
    check(&config_blob, &config, manifest.config())?;
    let config = configuration(&config_blob, &config)?;
    let blobs = manifest.layers().iter().map(|layer| Ok((blob(layer)?, Some(sha256(layer)?))));
    let blobs = blobs.collect::<Result<Vec<_>, ImageError>>()?;
    Ok(FoundImage { layers: layers(blobs, &config)?, config, name: name.clone() })
}

/// Follows indexes to the manifest for this machine.
fn manifest(store: &BlobStore, entry: &Descriptor, depth: u32) -> Result<ImageManifest, ImageError> {
    let name = blob(entry)?;
    if !matches!(entry.media_type(), MediaType::ImageIndex)
        && !entry.media_type().to_string().ends_with("manifest.list.v2+json")
    {
        let text = store.read(&name)?;
        check(&name, &text, entry)?;
        return ImageManifest::from_reader(text.as_slice()).map_err(model(&name));
    }
    if depth == 0 {
        return Err(ImageError::Nested);
    }
    let index = index(store, &name, Some(entry))?;
    let images = || index.manifests().iter().filter(|entry| is_image(entry));
    let fitting = images().find(|entry| fits(entry)).ok_or_else(|| no_platform(images()))?;
    manifest(store, fitting, depth - 1)
}

fn index(store: &BlobStore, name: &str, entry: Option<&Descriptor>) -> Result<ImageIndex, ImageError> {
    let text = store.read(name)?;
    if let Some(entry) = entry {
        check(name, &text, entry)?;
    }
    ImageIndex::from_reader(text.as_slice()).map_err(model(name))
}

fn find_docker(store: &BlobStore, reference: Option<&str>) -> Result<FoundImage, ImageError> {
    const LIST: &str = "manifest.json";
    let all: Vec<DockerImage> = serde_json::from_slice(&store.read(LIST)?)
        .map_err(|source| ImageError::Json { name: LIST.to_owned(), source })?;
    let tags = |image: &DockerImage| image.repo_tags.clone().unwrap_or_default();
    let references = || list(&all.iter().flat_map(tags).collect::<Vec<_>>());
    let wanted = |image: &&DockerImage| {
        reference.is_none_or(|wanted| tags(image).iter().any(|tag| names_image(tag, wanted)))
    };
    let image = match (all.iter().filter(wanted).collect::<Vec<_>>().as_slice(), reference) {
        ([one], _) => *one,
        ([], Some(reference)) => {
            return Err(ImageError::NoReference {
                reference: reference.to_owned(),
                references: references(),
            });
        }
        ([], None) => return Err(ImageError::NoFile { name: "an image".to_owned() }),
        _ => return Err(ImageError::Several { references: references() }),
    };
    let config = store.read(&image.config)?;
    // The name is the digest: docker's own form, and that of an image layout.
    let digest = image.config.strip_suffix(".json").or_else(|| image.config.strip_prefix("blobs/sha256/"));
    if let Some(expected) = digest.filter(|digest| is_sha256(digest)) {
        check_digest(&image.config, &config, expected)?;
    }
    let config = configuration(&image.config, &config)?;
    let blobs = image.layers.iter().map(|layer| (layer.clone(), None)).collect();
    Ok(FoundImage { layers: layers(blobs, &config)?, config, name: tags(image).into_iter().next() })
}

fn configuration(name: &str, text: &[u8]) -> Result<ImageConfiguration, ImageError> {
    let config = ImageConfiguration::from_reader(text).map_err(model(name))?;
    match (config.architecture(), config.os()) {
        (architecture, Os::Linux) if *architecture == Arch::default() => Ok(config),
        (architecture, os) => {
            let found = printable(&format!("{os}/{architecture}"));
            Err(ImageError::Platform { architecture: std::env::consts::ARCH, found })
        }
    }
}

fn layers(
    blobs: Vec<(String, Option<String>)>,
    config: &ImageConfiguration,
) -> Result<Vec<Layer>, ImageError> {
    let diffs = config.rootfs().diff_ids();
    if blobs.len() != diffs.len() {
        return Err(ImageError::Layers { layers: blobs.len(), diffs: diffs.len() });
    }
    if blobs.len() > MAX_LAYERS {
        return Err(ImageError::Bounds { what: "layers", most: MAX_LAYERS as u64 });
    }
    blobs
        .into_iter()
        .zip(diffs)
        .map(|((blob, digest), diff)| {
            let unknown = || ImageError::DigestKind { digest: printable(diff) };
            let diff = diff.strip_prefix("sha256:").filter(|digest| is_sha256(digest)).ok_or_else(unknown)?;
            Ok(Layer { blob, digest, diff: diff.to_owned() })
        })
        .collect()
}

/// Attestations of builders are listed as images for an unknown platform.
fn is_image(entry: &Descriptor) -> bool {
    let platform = entry.platform().as_ref();
    platform.is_none_or(|platform| platform.os().to_string() != "unknown")
}

/// Without a platform the configuration decides.
fn fits(entry: &Descriptor) -> bool {
    entry
        .platform()
        .as_ref()
        .is_none_or(|platform| *platform.os() == Os::Linux && *platform.architecture() == Arch::default())
}

fn name_of(entry: &Descriptor) -> Option<String> {
    let annotations = entry.annotations().as_ref()?;
    NAMES.iter().find_map(|name| annotations.get(*name)).cloned()
}

fn is_meant(name: Option<&str>, entry: &Descriptor, wanted: &str) -> bool {
    let digest = entry.digest().to_string();
    let tag = entry.annotations().as_ref().and_then(|all| all.get(NAMES[1]));
    digest == wanted
        || tag.is_some_and(|tag| tag == wanted)
        || name.is_some_and(|name| names_image(name, wanted))
}

/// `alpine` names `docker.io/library/alpine:latest`, as with docker.
fn names_image(name: &str, wanted: &str) -> bool {
    let short = |name: &str| {
        let name = name.strip_prefix("docker.io/").unwrap_or(name);
        let name = name.strip_prefix("library/").unwrap_or(name);
        name.strip_suffix(":latest").unwrap_or(name).to_owned()
    };
    short(name) == short(wanted)
}

fn no_platform<'a>(entries: impl Iterator<Item = &'a Descriptor>) -> ImageError {
    let platforms = entries.filter_map(|entry| entry.platform().clone());
    let found: Vec<_> =
        platforms.map(|platform| format!("{}/{}", platform.os(), platform.architecture())).collect();
    ImageError::Platform { architecture: std::env::consts::ARCH, found: list(&found) }
}

fn list(names: &[String]) -> String {
    const MOST: usize = 20;
    if names.is_empty() {
        "none with a name".to_owned()
    } else {
        printable(&names[..names.len().min(MOST)].join(", "))
    }
}

fn blob(entry: &Descriptor) -> Result<String, ImageError> {
    Ok(format!("blobs/sha256/{}", sha256(entry)?))
}

fn sha256(entry: &Descriptor) -> Result<String, ImageError> {
    let digest = entry.digest().to_string();
    let hex = digest.strip_prefix("sha256:").filter(|digest| is_sha256(digest)).map(str::to_owned);
    hex.ok_or_else(|| ImageError::DigestKind { digest: printable(&digest) })
}

fn is_sha256(digest: &str) -> bool {
    digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

fn check(name: &str, text: &[u8], entry: &Descriptor) -> Result<(), ImageError> {
    check_digest(name, text, &sha256(entry)?)
}

fn check_digest(name: &str, text: &[u8], expected: &str) -> Result<(), ImageError> {
    let found = machinen::fs::hex(&Sha256::digest(text));
    match found == expected {
        true => Ok(()),
        false => Err(ImageError::Digest { name: name.to_owned(), expected: expected.to_owned(), found }),
    }
}

fn model(name: &str) -> impl FnOnce(oci_spec::OciSpecError) -> ImageError {
    let name = name.to_owned();
    move |source| ImageError::Model { name, source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_mean_what_docker_means_by_them() {
        for (name, wanted) in [
            ("docker.io/library/alpine:latest", "alpine"),
            ("alpine:latest", "alpine"),
            ("example.org/x:1", "example.org/x:1"),
        ] {
            assert!(names_image(name, wanted), "{name} {wanted}");
        }
        assert!(!names_image("example.org/alpine:latest", "alpine"));
        assert!(is_sha256(&"0a".repeat(32)) && !is_sha256("../x") && !is_sha256(&"0A".repeat(32)));
    }
}
