//! `machinen console`: what the guest of a container has printed on its console.
//!
//! The text is the guest's, so it is printed without what a terminal acts upon. A VM that has failed leaves its console in
//! a file of the pod's directory, which is printed when the VM is gone.

use std::io::{self, Write as _};

use clap::Args;
use machinen::fs::{FileError, Links, if_exists, open_regular};

use crate::{
    find::{self, FindError, FoundContainer, PodClient},
    oci::GlobalArgs,
};

/// The console of a VM that has failed, below the pod's directory (`Vm::launch`).
const LEFT: &str = "vm/console.log";
/// Most bytes that are printed of it: more than the owner of a VM keeps.
const MAX_LEFT: u64 = 1 << 20;

/// How many bytes are the end of it.
const LAST: usize = 4096;

/// Arguments of `machinen console`.
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// Print what follows, until the VM ends
    #[arg(long, short)]
    follow: bool,
    /// Id or name of the container, or the beginning of its id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// # Errors
/// The container does not exist, or its VM cannot be asked and has left nothing.
pub(super) async fn run(global: &GlobalArgs, args: &ConsoleArgs) -> Result<(), FindError> {
    let container = find::one(global, &args.container).await?;
    match print_running(&container, args.follow).await {
        Err(error @ (FindError::NoOwner { .. } | FindError::Refused { .. })) => {
            if print_left(&container)? {
                Ok(())
            } else {
                Err(error)
            }
        }
        printed => printed,
    }
}

/// Prints the end of what there is. Text that a VM has left when it ended is printed as well.
///
/// # Errors
/// The VM cannot be asked, and has left nothing.
pub(super) async fn print_last(container: &FoundContainer) -> Result<(), FindError> {
    let asked = match PodClient::connect(&container.socket) {
        Ok(pod) => pod.console(&container.id, 0, false).await,
        Err(error) => Err(error),
    };
    match asked {
        Ok(piece) => Ok(print(&piece.text[piece.text.len().saturating_sub(LAST)..])?),
        Err(error) => match print_left(container)? {
            true => Ok(()),
            false => Err(error),
        },
    }
}

async fn print_running(container: &FoundContainer, follow: bool) -> Result<(), FindError> {
    let pod = PodClient::connect(&container.socket)?;
    let mut from = 0;
    loop {
        let piece = pod.console(&container.id, from, follow).await?;
        if piece.left_out > 0 {
            eprintln!("machinen: {} bytes are not kept any more", piece.left_out);
        }
        if piece.text.is_empty() {
            return Ok(());
        }
        print(&piece.text)?;
        // A server that repeats itself must not be asked for ever.
        if piece.end <= from {
            return Ok(());
        }
        from = piece.end;
    }
}

/// Prints the console log of a VM that has ended. Returns false if there is no such log.
fn print_left(container: &FoundContainer) -> Result<bool, FindError> {
    let path = match &container.root {
        // The pod's directory is that of the socket.
        Some(_) => container.socket.0.with_file_name(LEFT),
        None => container.bundle.join(LEFT),
    };
    let opened = if_exists(open_regular(&path, Links::Refuse)).map_err(FileError::at("open", &path))?;
    let Some(file) = opened else { return Ok(false) };
    let mut text = Vec::new();
    let read = io::Read::read_to_end(&mut io::Read::take(file, MAX_LEFT), &mut text);
    read.map_err(FileError::at("read", &path))?;
    print(&text)?;
    Ok(true)
}

fn print(text: &[u8]) -> Result<(), FileError> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(shown(text).as_bytes()).and_then(|()| stdout.flush());
    written.map_err(FileError::at("write to", "stdout"))
}

/// Lines and tabs stay; other characters that a terminal acts upon are left out.
fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.chars().filter(|char| matches!(char, '\n' | '\t') || !char.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_act_on_the_terminal() {
        assert_eq!(shown(b"[ 0.1] a\tb\r\n\x1b[2Jx\x07\xff\n"), "[ 0.1] a\tb\n[2Jx\u{fffd}\n");
    }

    #[test]
    fn a_vm_that_has_failed_leaves_its_console() {
        let bundle = tempfile::tempdir().unwrap();
        let mut container = find::example("c", None, Some("default"));
        container.bundle = bundle.path().to_owned();
        assert!(!print_left(&container).unwrap());
        std::fs::create_dir(bundle.path().join("vm")).unwrap();
        std::fs::write(bundle.path().join(LEFT), "Kernel panic\n").unwrap();
        assert!(print_left(&container).unwrap());
        std::fs::remove_file(bundle.path().join(LEFT)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", bundle.path().join(LEFT)).unwrap();
        assert!(print_left(&container).is_err());
    }
}
