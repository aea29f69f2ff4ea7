//! The help of the whole command line, its manual pages and the completions of shells. All of them are made of the same
//! description, so that none can lack a verb.

use std::{
    fs,
    io::{self, Write as _},
    path::PathBuf,
};

use clap::{Args, Command, CommandFactory as _, Subcommand};
use clap_complete::Shell;
use machinen::fs::FileError;

use crate::{Cli, everyday::EverydayVerb, maintenance::MaintenanceVerb, oci::OciVerb};

/// Adds the verbs of an enumeration to a command.
type AddVerbs = fn(Command) -> Command;

/// The verbs in groups, in the order in which the help lists them.
const GROUPS: [(&str, AddVerbs); 3] = [
    ("Everyday commands", EverydayVerb::augment_subcommands),
    ("Verbs of an OCI runtime", OciVerb::augment_subcommands),
    ("Maintenance", MaintenanceVerb::augment_subcommands),
];

const TEMPLATE: &str = "{about-with-newline}\n{usage-heading} {usage}\n{after-help}\n\nOptions:\n{options}\n";

/// The exit statuses and kinds of errors, which the manual page lists.
const STATUS: &str = "Exit status: 0 if the command has done its work; 1 if it has failed; 2 if the command line is wrong. \
    run, exec, restore and boot end with the status of the process instead (128+N if signal N ended it); exec ends with \
    255, and boot with 125, if the process could not be started.\n\n\
    Errors are one line on stderr, with all causes. With --log-format json the line is an object with level, msg, code, \
    retryable and time. The codes are invalid-argument, not-found, already-exists, \
    permission-denied, failed-precondition, unimplemented, resource-exhausted, deadline-exceeded, unavailable and \
    internal; the same command may succeed later where retryable is true.";

/// Arguments of `machinen man`.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Directory that gets the pages
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

/// Arguments of `machinen completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// The whole command line, with its verbs in groups.
pub(crate) fn command() -> Command {
    let command = Cli::command();
    let listed = groups(&command);
    command.help_template(TEMPLATE).after_help(listed).after_long_help(None)
}

/// The names and the first lines of all verbs that are shown.
fn groups(command: &Command) -> String {
    let width = command.get_subcommands().map(|verb| verb.get_name().len()).max().unwrap_or(0);
    let mut text = String::new();
    for (heading, augment) in GROUPS {
        text += &format!("\n{heading}:\n");
        for verb in augment(Command::new("verbs")).get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
            text += &format!("  {:width$}  {about}\n", verb.get_name());
        }
    }
    text.trim().to_owned()
}

/// Writes a manual page for each verb.
///
/// # Errors
/// A page cannot be written.
pub(crate) fn write_pages(args: &ManArgs) -> Result<(), FileError> {
    fs::create_dir_all(&args.dir).map_err(FileError::at("create the directory", &args.dir))?;
    let command = Cli::command().after_long_help(STATUS);
    clap_mangen::generate_to(command, &args.dir).map_err(FileError::at("write the pages to", &args.dir))
}

/// Prints the completions of a shell.
///
/// # Errors
/// They cannot be written.
pub(crate) fn print_completions(args: &CompletionsArgs) -> Result<(), FileError> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "machinen", &mut text);
    io::stdout().lock().write_all(&text).map_err(FileError::at("write to", "stdout"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The paths of all verbs, such as `machinen-rootdisk-ls`, with what is described by each.
    fn verbs(command: &Command, name: &str) -> Vec<(String, Command)> {
        let mut all = vec![(name.to_owned(), command.clone())];
        for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help")
        {
            all.extend(verbs(verb, &format!("{name}-{}", verb.get_name())));
        }
        all
    }

    #[test]
    fn the_description_has_no_contradiction() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_and_option_has_help_and_every_verb_a_page() {
        let dir = tempfile::tempdir().unwrap();
        write_pages(&ManArgs { dir: dir.path().to_owned() }).unwrap();
        for (name, verb) in verbs(&Cli::command(), "machinen") {
            assert!(verb.get_about().is_some(), "{name} has no help");
            for option in verb.get_arguments().filter(|option| !option.is_hide_set()) {
                assert!(option.get_help().is_some(), "{name}: {} has no help", option.get_id());
            }
            let page = fs::read_to_string(dir.path().join(format!("{name}.1"))).expect(&name);
            assert!(page.contains(".SH NAME") && page.contains(".SH SYNOPSIS"), "{name}: {page}");
        }
        let page = fs::read_to_string(dir.path().join("machinen.1")).unwrap();
        assert!(page.contains("retryable"), "{page}");
    }

    #[test]
    fn the_help_has_every_verb_once_and_in_a_group() {
        let help = command().render_help().to_string();
        for (heading, _) in GROUPS {
            assert!(help.contains(&format!("\n{heading}:\n")), "{help}");
        }
        for verb in Cli::command().get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let start = format!("  {} ", verb.get_name());
            assert_eq!(help.lines().filter(|line| line.starts_with(&start)).count(), 1, "{start}: {help}");
        }
        for verb in ["man", "completions"] {
            assert!(!help.lines().any(|line| line.starts_with(&format!("  {verb} "))), "{help}");
        }
    }

    #[test]
    fn each_shell_has_completions_with_the_verbs() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "machinen", &mut text);
            let text = String::from_utf8(text).unwrap();
            assert!(text.contains("rootdisk") && text.contains("checkpoint"), "{shell}");
        }
    }
}
