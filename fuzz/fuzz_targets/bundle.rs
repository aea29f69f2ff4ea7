//! `config.json`, as far as what the guest is told.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machinen::spec::{bundle, guest};

fuzz_target!(|data: &[u8]| {
    let Ok(spec) = bundle::parse(data, "config.json".into()) else { return };
    let Ok(reduced) = guest::reduce(spec, "c") else { return };
    // Nothing of the host's is left.
    assert!(reduced.spec.hooks().is_none());
});
