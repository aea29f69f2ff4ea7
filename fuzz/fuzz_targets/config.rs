//! The configuration file and annotations: any text is accepted or refused with a message.
#![no_main]

use std::{collections::HashMap, path::Path};

use libfuzzer_sys::fuzz_target;
use machinen::{annotations, config::Config, error::chain};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    let config = match Config::parse(text, Path::new("machinen.toml")) {
        Ok(config) => config,
        Err(error) => {
            assert!(!chain(&error).is_empty());
            Config::default()
        }
    };
    // The same text as annotations, one a line.
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let all: HashMap<String, String> = pairs
        .map(|(name, value)| (format!("{}{}", annotations::PREFIX, name.trim()), value.trim().to_owned()))
        .collect();
    if let Ok(applied) = annotations::apply(&config, &all) {
        assert!(applied.vm.kernel_args.len() <= config.vm.kernel_args.len() + 1025);
    }
});
