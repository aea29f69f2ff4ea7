//! The options of the runtime on standard input, as containerd passes them to `start` and `-info`.

use std::io::{self, IsTerminal as _, Read as _};

use machinen::fs::FileError;
use machinen_task::options::RuntimeOptions;

use crate::{args::ShimArgs, error::ShimError};

/// The limit of containerd's own shims, bytes.
const MOST: u64 = 10 << 20;

/// # Errors
/// Standard input cannot be read, or has no options that this runtime takes.
pub(crate) fn of_start(args: &ShimArgs) -> Result<RuntimeOptions, ShimError> {
    Ok(RuntimeOptions::of_start(&input()?, &args.id, &args.namespace)?)
}

/// # Errors
/// As for [`of_start`].
pub(crate) fn of_info() -> Result<RuntimeOptions, ShimError> {
    Ok(RuntimeOptions::of_any(&input()?)?)
}

/// A user at a terminal has no options.
fn input() -> Result<Vec<u8>, FileError> {
    let (stdin, mut input) = (io::stdin().lock(), Vec::new());
    if !stdin.is_terminal() {
        stdin.take(MOST).read_to_end(&mut input).map_err(FileError::at("read", "/dev/stdin"))?;
    }
    Ok(input)
}
