//! The options before the verb, as runc has them, and the log that they name.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::SystemTime,
};

use clap::{Args, ValueEnum};
use machinen::{config::Config, fs::FileError, owner};
use serde::{Deserialize, Serialize};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

use super::error::OciError;
use crate::failure::Failure;

/// Where containers of the OCI command line have their directories, unless `--root` says otherwise.
pub(crate) fn default_root() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| owner::run_dir().join("containers"));
    &ROOT
}

/// Options of all verbs of the OCI runtime.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of the OCI runtime")]
pub(crate) struct GlobalArgs {
    /// Directory for the state of containers
    #[arg(long, value_name = "DIR", default_value = default_root().as_os_str())]
    pub(crate) root: PathBuf,
    #[command(flatten)]
    pub(super) log: LogArgs,
    /// cgroupsPath has the form SLICE:PREFIX:NAME, whose scope systemd is asked for
    #[arg(long)]
    systemd_cgroup: bool,
    /// Accepted because callers of runc pass it; machinen finds out for whom it works
    #[arg(long, value_name = "true|false|auto", hide = true)]
    rootless: Option<String>,
    /// Accepted because callers of runc pass it; the guest has a CRIU of its own
    #[arg(long, value_name = "PATH", hide = true)]
    criu: Option<PathBuf>,
}

/// Where messages go.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
pub(super) struct LogArgs {
    /// Write errors and the log to this file, too
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Format of the log
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Log more
    #[arg(long)]
    debug: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
enum LogFormat {
    #[default]
    Text,
    Json,
}

impl GlobalArgs {
    /// Begins the log that the caller has named.
    ///
    /// # Errors
    /// Its file cannot be opened.
    pub(super) fn begin_log(&self) -> Result<(), OciError> {
        self.log.begin()
    }

    /// Reports the failure of a verb on stderr, and in the log that the caller has named. A caller that reads only its log
    /// still learns the reason.
    pub(crate) fn report(&self, failure: &Failure) {
        match (&self.log.log, self.log.log_format) {
            // As runc, whose log is its stderr then.
            (None, LogFormat::Json) => eprintln!("{}", failure.value(&now())),
            _ => eprintln!("machinen: {}", failure.message()),
        }
        if let Err(error) = self.log.report(failure) {
            eprintln!("machinen: cannot write the log: {error}");
        }
    }
}

impl LogArgs {
    /// The same log for a process that works in another directory.
    ///
    /// # Errors
    /// There is no working directory.
    pub(super) fn absolute(&self) -> Result<Self, OciError> {
        let log = self.log.as_deref().map(std::path::absolute).transpose();
        Ok(Self { log: log.map_err(OciError::io("find the log"))?, ..*self })
    }

    fn report(&self, failure: &Failure) -> io::Result<()> {
        let Some(path) = &self.log else { return Ok(()) };
        let time = now();
        let line = match self.log_format {
            LogFormat::Json => failure.value(&time).to_string(),
            LogFormat::Text => format!("time={time:?} level=error msg={:?}", failure.message()),
        };
        writeln!(append(path)?, "{line}")
    }

    /// Sends this process's log to the file, if there is one.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(super) fn follow(&self, config: &Config) -> Result<(), OciError> {
        let Some(path) = &self.log else { return Ok(()) };
        let level = config.log.level.parse().unwrap_or(LevelFilter::INFO);
        self.send(append(path).map_err(FileError::at("open the log", path))?, level);
        Ok(())
    }

    /// Begins the log of a verb: in the file, which is there from then on, or with --debug on stderr.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(super) fn begin(&self) -> Result<(), OciError> {
        match &self.log {
            Some(path) => {
                let file = append(path).map_err(FileError::at("open the log", path))?;
                self.send(file, LevelFilter::INFO);
            }
            None if self.debug => {
                let stderr = io::stderr().as_fd().try_clone_to_owned();
                self.send(stderr.map_err(OciError::io("duplicate stderr"))?.into(), LevelFilter::INFO);
            }
            None => {}
        }
        Ok(())
    }

    /// Sends this process's log to a file; more of it with --debug.
    fn send(&self, file: File, level: LevelFilter) {
        let file = Arc::new(file);
        let level = if self.debug { level.max(LevelFilter::DEBUG) } else { level };
        // libcgroups warns at each use of each cgroup controller that the host does not have. What fails is an error.
        let levels =
            Targets::new().with_default(level).with_target("libcgroups", level.min(LevelFilter::ERROR));
        let registry = tracing_subscriber::registry().with(levels);
        match self.log_format {
            LogFormat::Text => {
                let lines = tracing_logfmt::builder().with_target(false).layer().with_writer(file);
                registry.with(lines).init();
            }
            LogFormat::Json => {
                let lines = tracing_subscriber::fmt::layer().json().with_target(false).with_writer(file);
                registry.with(lines).init();
            }
        }
    }
}

fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_in_the_format_that_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = |log_format| LogArgs { log: Some(path.clone()), log_format, debug: false };
        let failure = Failure::from(OciError::NoContainer { id: "x".to_owned() });
        log(LogFormat::Json).report(&failure).unwrap();
        log(LogFormat::Text).report(&failure).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let json: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
        let message = "container does not exist: \"x\"";
        assert_eq!((json["level"].as_str(), json["msg"].as_str()), (Some("error"), Some(message)));
        assert_eq!(json["code"], "not-found");
        assert!(lines[1].contains("level=error msg=\"container does not exist: \\\"x\\\"\""), "{text}");
        LogArgs::default().report(&failure).unwrap();
    }
}
