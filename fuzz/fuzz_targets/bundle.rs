//! `config.json`, up to what is sent to the guest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machinen::spec::{bundle, guest};

fuzz_target!(|data: &[u8]| {
    let Ok(spec) = bundle::parse(data, "config.json".into()) else { return };
    let Ok(reduced) = guest::reduce(spec, "c") else { return };
    // Only the hooks that the guest runs are left.
    let mut hooks = reduced.spec.hooks().clone().unwrap_or_default();
    hooks.set_start_container(None);
    assert_eq!(hooks, Default::default());
});
