//! `machinen secret`: gives a running container secrets, by the owner of its VM.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::Args;
use machinen::{
    fs::FileError,
    secrets::{check, check_name},
};
use machinen_task::api::{SecretValue, SetSecretsRequest};

use super::error::EverydayError;
use crate::{
    find::{self, PodClient},
    oci::GlobalArgs,
};

/// Most bytes of a file with secrets.
const MAX_FILE: u64 = 1 << 20;

/// Arguments of `machinen secret`.
#[derive(Debug, Args)]
pub(crate) struct SecretArgs {
    /// File with lines NAME=VALUE, or - for stdin; empty lines and lines that begin with # are left out. May be repeated
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Secret that is removed; may be repeated
    #[arg(long, value_name = "NAME")]
    rm: Vec<String>,
    /// Id or name of the container, or the beginning of its id
    #[arg(value_name = "CONTAINER")]
    container: String,
    /// The secrets; NAME alone takes the value of that variable of the environment
    #[arg(value_name = "NAME[=VALUE]")]
    secrets: Vec<String>,
}

/// # Errors
/// A secret is not valid, or the container does not take it.
pub(super) async fn run(global: &GlobalArgs, args: &SecretArgs) -> Result<(), EverydayError> {
    let mut secrets = Vec::new();
    for path in &args.env_file {
        secrets.extend(read(path)?);
    }
    for text in &args.secrets {
        secrets.push(argument(text)?);
    }
    for (name, value) in &secrets {
        check(name, value.as_bytes())?;
    }
    args.rm.iter().try_for_each(|name| check_name(name))?;
    if secrets.is_empty() && args.rm.is_empty() {
        return Err(EverydayError::NoSecret);
    }
    let container = find::one(global, &args.container).await?;
    let value = |(name, value): (String, String)| SecretValue {
        name,
        value: value.into_bytes(),
        ..Default::default()
    };
    let request = SetSecretsRequest {
        container_id: container.id.clone(),
        secrets: last_of_each(secrets).into_iter().map(value).collect(),
        removed: args.rm.clone(),
        ..Default::default()
    };
    Ok(PodClient::connect(&container.socket)?.set_secrets(&request).await?)
}

/// A secret of the command line.
fn argument(text: &str) -> Result<(String, String), EverydayError> {
    match text.split_once('=') {
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => {
            check_name(text)?;
            let unset = |_| EverydayError::NoVariable { name: text.to_owned() };
            std::env::var(text).map(|value| (text.to_owned(), value)).map_err(unset)
        }
    }
}

fn read(path: &Path) -> Result<Vec<(String, String)>, EverydayError> {
    let failed = || FileError::at("read", path);
    let mut text = Vec::new();
    let source: Box<dyn Read> = match path == Path::new("-") {
        true => Box::new(io::stdin().lock()),
        false => Box::new(File::open(path).map_err(FileError::at("open", path))?),
    };
    source.take(MAX_FILE + 1).read_to_end(&mut text).map_err(failed())?;
    if text.len() as u64 > MAX_FILE {
        return Err(EverydayError::EnvFile { path: path.to_owned(), most: MAX_FILE });
    }
    parse(path, &String::from_utf8(text).map_err(io::Error::other).map_err(failed())?)
}

fn parse(path: &Path, text: &str) -> Result<Vec<(String, String)>, EverydayError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let secret = |(at, line): (usize, &str)| {
        let odd = || EverydayError::EnvLine { path: path.to_owned(), line: at + 1 };
        let (name, value) = line.split_once('=').ok_or_else(odd)?;
        // The error does not quote a name that may be the value of another line.
        check_name(name).map_err(|_| odd())?;
        Ok((name.to_owned(), value.to_owned()))
    };
    lines.map(secret).collect()
}

/// A later value replaces an earlier one.
fn last_of_each(secrets: Vec<(String, String)>) -> Vec<(String, String)> {
    let mut last: Vec<(String, String)> = Vec::new();
    for secret in secrets {
        last.retain(|(name, _)| *name != secret.0);
        last.push(secret);
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_read_as_they_are() {
        let read = parse(Path::new("f"), "# comment\n\nA=1 = \"x\"\nB=\nA=2\n").unwrap();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(read, [pair("A", "1 = \"x\""), pair("B", ""), pair("A", "2")]);
        assert_eq!(last_of_each(read), [pair("B", ""), pair("A", "2")]);
        assert_eq!(argument("A=b=c").unwrap(), pair("A", "b=c"));
    }

    #[test]
    fn what_is_no_secret_is_refused_without_its_text() {
        for text in ["A=1\nhush\n", "A=1\nhush hush=1\n", "A=1\n=hush\n"] {
            let error = parse(Path::new("f"), text).unwrap_err().to_string();
            assert!(error.contains("line 2 of f") && !error.contains("hush"), "{error}");
        }
        assert!(matches!(argument("MACHINEN_NO_SUCH"), Err(EverydayError::NoVariable { .. })));
        assert!(matches!(argument("a-b"), Err(EverydayError::Secret(_))));
        assert!(matches!(read(Path::new("/no/such")), Err(EverydayError::File(_))));
    }
}
