//! The images with the programs: root file systems of Debian packages, made by `scripts/programs-image`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result};
use machinen_integration::{
    containerd::Containerd,
    image::{Image, Layer},
    paths,
    process::Invocation,
};

use crate::program::Program;

/// Longest that making an image may take: hundreds of megabytes are downloaded from a mirror.
const DEADLINE: Duration = Duration::from_secs(1800);

#[derive(Debug)]
pub(crate) struct Images {
    /// Packages of each image.
    packages: BTreeMap<String, BTreeSet<String>>,
    /// Archives of the root file systems that were made.
    archives: BTreeMap<String, PathBuf>,
    imported: BTreeSet<String>,
}

impl Images {
    /// Collects the packages of all programs, so that an image does not depend on the programs that are run.
    pub(crate) fn new(programs: &[Program]) -> Self {
        let mut packages: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for program in programs {
            packages.entry(program.image.clone()).or_default().extend(program.packages.iter().cloned());
        }
        Self { packages, archives: BTreeMap::new(), imported: BTreeSet::new() }
    }

    /// Makes the root file system of an image, unless it is in the cache.
    ///
    /// # Errors
    /// The image cannot be made; the script's output is quoted.
    pub(crate) fn make(&mut self, name: &str) -> Result<()> {
        if self.archives.contains_key(name) {
            return Ok(());
        }
        println!("image {name}: from the cache, or some minutes for Debian's packages");
        let script = paths::workspace().join("scripts/programs-image");
        let packages = self.packages.get(name).into_iter().flatten();
        let mut make = Invocation::new(&script).arg(name).args(packages).deadline(DEADLINE);
        for variable in ["HOME", "XDG_CACHE_HOME", "MACHINEN_CACHE", "http_proxy", "https_proxy", "no_proxy"]
        {
            if let Some(value) = std::env::var_os(variable) {
                make = make.env(variable, value);
            }
        }
        let made = make.run()?.ok().with_context(|| format!("cannot make the image {name}"))?;
        self.archives.insert(name.to_owned(), PathBuf::from(made.text().trim()));
        Ok(())
    }

    /// Imports an image into containerd, and returns its name there.
    ///
    /// # Errors
    /// The image was not made, or cannot be imported.
    pub(crate) fn import(&mut self, containerd: &Containerd, name: &str) -> Result<String> {
        let archive = self.archives.get(name).with_context(|| format!("the image {name} was not made"))?;
        let image = Image::new(&format!("machinen.test/programs-{name}:1"), vec![Layer::of_archive(archive)]);
        if self.imported.insert(name.to_owned()) {
            println!("importing the image {name}");
            containerd.import(&image)?;
        }
        Ok(image.name().to_owned())
    }
}
