//! `-info`: describes this runtime and its features (containerd 2.2 and newer, once per runtime).

use std::{collections::HashMap, io};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use machinen::{accel, config::Config, confined, error::chain, features, owner};
use protobuf::{Message, MessageField, well_known_types::any::Any};

use crate::{error::ShimError, options};

/// The name of the runtime-spec's features document in containerd's registry of types.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// What runs the instructions of guests on this host: `kvm`, `tcg`, which is no isolation boundary, or the reason
/// why no VM can start.
const ACCELERATOR: &str = "io.machinen.accelerator";

/// Whether Landlock restricts the threads that unpack what guests send: `true` or `false`.
const LANDLOCK: &str = "io.machinen.landlock";

/// # Errors
/// The answer cannot be written.
pub(crate) fn run() -> Result<(), ShimError> {
    let features = Any {
        type_url: FEATURES_TYPE.to_owned(),
        value: serde_json::to_vec(&features::document()).map_err(ShimError::Json)?,
        ..Default::default()
    };
    let info = RuntimeInfo {
        name: "io.machinen.v1".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        features: MessageField::some(features),
        annotations: HashMap::from([
            (ACCELERATOR.to_owned(), accelerator()),
            (LANDLOCK.to_owned(), confined::holds().unwrap_or_default().to_string()),
        ]),
        ..Default::default()
    };
    info.write_to_writer(&mut io::stdout().lock()).map_err(ShimError::Encode)
}

/// That of the configuration file which the handler of the request has.
fn accelerator() -> String {
    let loaded = options::of_info().and_then(|options| Ok(Config::load_named(options.config.as_deref())?));
    let mode = match loaded {
        Ok(config) => config.vm.accel,
        Err(error) => return chain(&error),
    };
    match accel::verdict(owner::run_dir()).and_then(|verdict| verdict.choose(mode)) {
        Ok(accelerator) => accelerator.name().to_owned(),
        Err(error) => chain(&error),
    }
}
