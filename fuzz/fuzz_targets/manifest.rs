//! A checkpoint's manifest: any text is accepted or refused with a message, and its names stay in their
//! directory.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use machinen::{
    checkpoint::{CheckpointManifest, MANIFEST},
    error::chain,
};

fuzz_target!(|data: &[u8]| {
    match CheckpointManifest::parse(data, Path::new(MANIFEST)) {
        Ok(manifest) => {
            for file in &manifest.files {
                let path = Path::new("dir").join(&file.name);
                assert_eq!(path.parent(), Some(Path::new("dir")));
                assert!(path.file_name().is_some_and(|name| name != MANIFEST));
            }
        }
        Err(error) => assert!(!chain(&error).is_empty()),
    }
});
