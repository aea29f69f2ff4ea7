//! Every option of the host's runc is an option of machinen, and those that a VM cannot have are refused by name.

use anyhow::{Context, ensure};
use machinen_integration::runtime::{RUNC, Runtime};

const VERBS: [&str; 17] = [
    "create",
    "start",
    "run",
    "state",
    "kill",
    "delete",
    "exec",
    "list",
    "ps",
    "pause",
    "resume",
    "update",
    "events",
    "checkpoint",
    "restore",
    "spec",
    "features",
];

/// The options that are refused, with a value where they take one (docs/design/oci.md).
const REFUSED: [(&str, &[&str]); 5] = [
    ("create", &["--preserve-fds=1"]),
    ("exec", &["--preserve-fds=1", "--cgroup=x"]),
    ("update", &["--cpu-rt-period=1", "--cpu-rt-runtime=1", "--l3-cache-schema=x", "--mem-bw-schema=x"]),
    (
        "checkpoint",
        &[
            "--lazy-pages",
            "--pre-dump",
            "--page-server=x",
            "--status-fd=3",
            "--parent-path=x",
            "--auto-dedup",
            "--tcp-skip-in-flight",
        ],
    ),
    ("restore", &["--lazy-pages", "--auto-dedup", "--lsm-profile=x", "--lsm-mount-context=x"]),
];

#[test]
fn of_runc_are_known() {
    super::run(Runtime::Machinen, |oci| {
        let mut known = 0;
        for verb in VERBS {
            let help = oci.host().program(RUNC)?.args([verb, "--help"]).run()?.ok()?.text();
            for option in options(&help) {
                for name in &option.names {
                    let output = oci.output(&[&[verb][..], &option.given(name), &["--help"]].concat())?;
                    ensure!(output.status == 0, "{verb} {option:?}: {output}");
                    known += 1;
                }
            }
        }
        ensure!(known > 80, "only {known} options were found");
        Ok(())
    });
}

#[test]
fn some_are_refused_by_name() {
    super::run(Runtime::Machinen, |oci| {
        for (verb, options) in REFUSED {
            for option in options {
                let name = option.split('=').next().context("it has a name")?;
                let output = oci.output(&[verb, option, "none"])?;
                let text = output.error_text();
                ensure!(output.status != 0 && text.contains(&format!("{name} is not supported")), "{output}");
            }
        }
        Ok(())
    });
}

/// An option with all of its names.
#[derive(Debug)]
struct HelpedOption {
    names: Vec<String>,
    takes_value: bool,
}

impl HelpedOption {
    /// The option as it is written in a command line, by one of its names.
    fn given<'a>(&self, name: &'a str) -> Vec<&'a str> {
        let long = self.names.iter().find(|name| name.starts_with("--")).map_or("", String::as_str);
        match (self.takes_value, long) {
            (false, _) => vec![name],
            (true, "--format") => vec![name, "json"],
            (true, "--interval") => vec![name, "1s"],
            (true, _) => vec![name, "1"],
        }
    }
}

/// Reads runc's help: `   --name value, -n value  what it does`.
fn options(help: &str) -> Vec<HelpedOption> {
    let lines = help.lines().skip_while(|line| !line.starts_with("OPTIONS")).map(str::trim_start);
    let columns = lines.filter(|line| line.starts_with('-')).filter_map(|line| line.split("  ").next());
    let option = |column: &str| {
        let words = column.split([',', ' ']);
        let names = words.filter(|word| word.starts_with('-')).map(str::to_owned).collect();
        HelpedOption { names, takes_value: column.split([',', ' ']).any(|word| word == "value") }
    };
    let all = columns.map(option);
    all.filter(|option| !option.names.iter().any(|name| name == "--help")).collect()
}
