//! `config.json`, up to what is sent to the guest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machinen::spec::{bundle, guest};

fuzz_target!(|data: &[u8]| {
    let Ok(spec) = bundle::parse(data, "config.json".into()) else { return };
    let Ok(reduced) = guest::reduce(spec, "c") else { return };
    // Hooks, which would run on the host, are removed.
    assert!(reduced.spec.hooks().is_none());
});
