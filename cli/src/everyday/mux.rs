//! `machinen mux`: several containers on one terminal, one at a time, with a list between them.
//!
//! ```text
//!   list ── number ──> attached to one, as by `machinen attach` ── keys, or its end ──> list
//! ```
//! The keeper of a container has the end of its output, which is shown again each time.

use std::io::{self, IsTerminal as _};

use clap::Args;
use machinen::text::printable;

use super::{
    attach::{AttachEnd, DetachKeys, Typed, connect, converse, print},
    error::EverydayError,
};
use crate::{
    boot::keeper::SOCKET,
    find::{self, FoundContainer, age_of},
    oci::GlobalArgs,
    output::{Align, TextTable},
    text::duration,
};

/// What a program may have changed of a terminal: its colours, its second screen, its cursor (ECMA-48, xterm).
const RESET: &[u8] = b"\x1b[0m\x1b[?1049l\x1b[?25h\r\n";
/// Most bytes of a line that is typed into the list.
const MAX_LINE: usize = 4096;

/// Arguments of `machinen mux`.
#[derive(Debug, Args)]
pub(crate) struct MuxArgs {
    /// Keys that return to the list: characters or ctrl-LETTER, with commas between them
    #[arg(long, value_name = "KEYS", default_value = "ctrl-],ctrl-]")]
    detach_keys: String,
    /// Only these containers
    #[arg(value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// What was typed into the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Quit,
    /// List again.
    Again,
    /// The container at this place.
    Attach(usize),
    Unknown,
}

/// # Errors
/// There is no terminal, or the containers cannot be found.
pub(super) async fn run(global: &GlobalArgs, args: &MuxArgs) -> Result<(), EverydayError> {
    DetachKeys::parse(&args.detach_keys)?;
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(EverydayError::NoTerminal);
    }
    for name in &args.containers {
        find::one(global, name).await?;
    }
    let mut typed = Typed::of_stdin();
    loop {
        let listed = attachable(global, &args.containers).await?;
        print(&mut io::stdout(), menu(&listed).as_bytes())?;
        let Some(line) = next_line(&mut typed).await else { return Ok(()) };
        match choose(&line, &listed) {
            Choice::Quit => return Ok(()),
            Choice::Again => {}
            Choice::Unknown => eprintln!("machinen: there is no {} in the list", printable(line.trim())),
            Choice::Attach(at) => show(&listed[at], args, &mut typed).await?,
        }
    }
}

/// Connects with a container until the user returns or it ends. That it has ended meanwhile is no error.
async fn show(container: &FoundContainer, args: &MuxArgs, typed: &mut Typed) -> Result<(), EverydayError> {
    let keys = DetachKeys::parse(&args.detach_keys)?;
    let name = printable(&container.id);
    print(
        &mut io::stdout(),
        format!("-- {name} ({} returns to the list) --\r\n", args.detach_keys).as_bytes(),
    )?;
    let ended = match connect(container) {
        Ok(stream) => converse(stream, keys, typed).await,
        Err(error) => Err(error),
    };
    print(&mut io::stdout(), RESET)?;
    match ended {
        Ok(AttachEnd::Detached) => {}
        Ok(AttachEnd::Ended(status)) => println!("{name} has ended with status {status}"),
        Err(error @ (EverydayError::Ended { .. } | EverydayError::Attached { .. })) => {
            eprintln!("machinen: {}", machinen::error::chain(&error));
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// The containers whose streams are kept and that have not ended, in the order of their ids.
async fn attachable(global: &GlobalArgs, names: &[String]) -> Result<Vec<FoundContainer>, EverydayError> {
    let is_named = |container: &FoundContainer| {
        names.is_empty() || names.iter().any(|name| container.id.starts_with(name.as_str()))
    };
    let runs = |container: &FoundContainer| {
        container.status != "stopped" && container.bundle.join(SOCKET).exists() && is_named(container)
    };
    Ok(find::all(global).await?.into_iter().filter(runs).collect())
}

fn menu(listed: &[FoundContainer]) -> String {
    if listed.is_empty() {
        return "no container of `machinen boot --detach` runs; Enter looks again, q ends\n> ".to_owned();
    }
    let mut table = TextTable::new([
        ("", Align::Right),
        ("CONTAINER", Align::Left),
        ("STATE", Align::Left),
        ("AGE", Align::Left),
        ("IMAGE", Align::Left),
    ]);
    for (at, container) in listed.iter().enumerate() {
        table.row([
            (at + 1).to_string(),
            printable(&container.id),
            container.status.clone(),
            age_of(container.pid).map(duration).unwrap_or_default(),
            printable(container.image.as_deref().unwrap_or_default()),
        ]);
    }
    format!("{table}number and Enter connect, Enter lists again, q ends\n> ")
}

fn choose(line: &str, listed: &[FoundContainer]) -> Choice {
    let line = line.trim();
    if line.is_empty() {
        return Choice::Again;
    }
    if let Some(at) = listed.iter().position(|container| container.id == line) {
        return Choice::Attach(at);
    }
    match (line, line.parse::<usize>()) {
        ("q" | "quit", _) => Choice::Quit,
        (_, Ok(number @ 1..)) if number <= listed.len() => Choice::Attach(number - 1),
        _ => Choice::Unknown,
    }
}

/// The next line that is typed into the list, where the terminal edits it; None: the terminal has ended. What follows the
/// line stays for the next one, or for a container.
async fn next_line(typed: &mut Typed) -> Option<String> {
    let mut line = Vec::new();
    while typed.is_open() {
        let bytes = typed.next().await;
        line.extend(&bytes);
        // Enter is a carriage return while the modes of the terminal are a container's.
        if let Some(end) = line.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            typed.push_back(line.split_off(end + 1));
            return Some(String::from_utf8_lossy(&line).into_owned());
        }
        if line.len() > MAX_LINE {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::example;

    #[test]
    fn a_container_is_chosen_by_its_number_or_id() {
        let listed = [example("one", None, None), example("2", None, None)];
        assert_eq!(choose("1\n", &listed), Choice::Attach(0));
        assert_eq!(choose(" one \n", &listed), Choice::Attach(0));
        // Its id, which is also a number.
        assert_eq!(choose("2", &listed), Choice::Attach(1));
        assert_eq!((choose("\n", &listed), choose("q\n", &listed)), (Choice::Again, Choice::Quit));
        for odd in ["0", "3", "-1", "two"] {
            assert_eq!(choose(odd, &listed), Choice::Unknown, "{odd}");
        }
        let menu = menu(&listed);
        assert!(menu.contains("1  one") && menu.contains("2  2 "), "{menu}");
    }

    #[tokio::test]
    async fn lines_are_put_together_and_end_with_the_terminal() {
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let mut typed = Typed::of(receiver);
        for part in [&b"a"[..], b"b\nc\rd"] {
            sender.send(part.to_vec()).await.unwrap();
        }
        assert_eq!(next_line(&mut typed).await.as_deref(), Some("ab\n"));
        assert_eq!(next_line(&mut typed).await.as_deref(), Some("c\r"));
        drop(sender);
        assert_eq!(next_line(&mut typed).await, None);
    }
}
