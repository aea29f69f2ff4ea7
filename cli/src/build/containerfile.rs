//! The steps of a build, as a Containerfile has them: a small part of what docker and buildah understand. Everything else is
//! refused by its name and line, and nothing is left out silently.
//!
//! | instruction | forms |
//! |---|---|
//! | `FROM IMAGE` | first, and once; IMAGE is a path, as for `machinen boot` |
//! | `RUN COMMAND`, `RUN ["PROGRAM", ...]` | by `/bin/sh -c`, or without a shell |
//! | `COPY SOURCE... DESTINATION`, `COPY ["SOURCE", ...]` | files and directories of the context |
//! | `ENV NAME=VALUE...` | with `$NAME` and `${NAME}`, as COPY, WORKDIR and USER |
//! | `WORKDIR DIR`, `USER USER[:GROUP]` | |
//! | `CMD`, `ENTRYPOINT` | a list in JSON, or a command for the shell |

use super::error::BuildError;

/// The names of the instructions, for errors.
const KNOWN: &str = "FROM, RUN, COPY, ENV, WORKDIR, USER, CMD and ENTRYPOINT";
/// Most instructions of a file.
const MAX_STEPS: usize = 1000;

/// An instruction, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) line: usize,
    /// As it is shown: the instruction in one line.
    pub(super) text: String,
    pub(super) instruction: Instruction,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Instruction {
    From(String),
    /// The program and its arguments.
    Run(Vec<String>),
    /// What is copied is not expanded yet.
    Copy {
        sources: Vec<Word>,
        destination: Word,
    },
    Env(Vec<(String, Word)>),
    Workdir(Word),
    User(Word),
    Cmd(Vec<String>),
    Entrypoint(Vec<String>),
}

/// A word in which variables may be named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Word(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(String),
}

impl Word {
    pub(super) fn literal(text: &str) -> Self {
        Self(vec![Part::Text(text.to_owned())])
    }

    /// The word with the values of variables; those that are not set are empty.
    pub(super) fn expand(&self, env: &[String]) -> String {
        let value = |name: &str| {
            env.iter().filter_map(|variable| variable.split_once('=')).find(|(known, _)| *known == name)
        };
        let part = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Variable(name) => value(name).map(|(_, value)| value.to_owned()).unwrap_or_default(),
        };
        self.0.iter().map(part).collect()
    }
}

/// Reads the steps of a file. The first one is FROM.
///
/// # Errors
/// A line is not understood or not supported; the error names it.
pub(super) fn parse(text: &str) -> Result<Vec<Step>, BuildError> {
    let mut steps = Vec::new();
    for (line, text) in logical_lines(text)? {
        steps.push(step(line, &text)?);
        if steps.len() > MAX_STEPS {
            return Err(BuildError::TooManySteps { most: MAX_STEPS });
        }
    }
    let is_from = |step: &&Step| matches!(step.instruction, Instruction::From(_));
    match steps.first() {
        Some(first) if is_from(&first) => {}
        Some(Step { line, .. }) => return Err(syntax(*line, "the first instruction must be FROM")),
        None => return Err(BuildError::NoSteps),
    }
    match steps.iter().skip(1).find(is_from) {
        Some(second) => {
            Err(syntax(second.line, "a second FROM (a build of several stages) is not supported"))
        }
        None => Ok(steps),
    }
}

/// The instructions, each with the number of its first line. A backslash at the end continues a line, and comments in
/// between are left out.
fn logical_lines(text: &str) -> Result<Vec<(usize, String)>, BuildError> {
    let mut lines: Vec<(usize, String)> = Vec::new();
    let mut continues = false;
    for (at, line) in text.lines().enumerate() {
        let number = at + 1;
        let trimmed = line.trim();
        if let Some(comment) = trimmed.strip_prefix('#') {
            if lines.is_empty() && comment.trim_start().to_ascii_lowercase().starts_with("escape=") {
                return Err(syntax(number, "the directive escape is not supported"));
            }
            continue;
        }
        if trimmed.is_empty() {
            continue;
        }
        let (part, goes_on) = match trimmed.strip_suffix('\\') {
            Some(part) => (part.trim_end(), true),
            None => (trimmed, false),
        };
        match lines.last_mut().filter(|_| continues) {
            Some((_, whole)) => *whole = format!("{whole} {part}"),
            None => lines.push((number, part.to_owned())),
        }
        continues = goes_on;
    }
    match lines.last().filter(|_| continues) {
        Some((line, _)) => Err(syntax(*line, "the file ends in the middle of the instruction")),
        None => Ok(lines),
    }
}

/// Reads one instruction.
///
/// # Errors
/// It is not understood or not supported.
pub(super) fn step(line: usize, text: &str) -> Result<Step, BuildError> {
    let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let (name, rest) = (name.to_ascii_uppercase(), rest.trim());
    if rest.is_empty() {
        return Err(syntax(line, format!("{name} has no argument")));
    }
    if let Some(option) = rest.split_whitespace().next().filter(|word| word.starts_with("--")) {
        return Err(syntax(line, format!("the option {option} of {name} is not supported")));
    }
    let words = || words(line, rest);
    let one = |words: Vec<Word>| match <[Word; 1]>::try_from(words) {
        Ok([word]) => Ok(word),
        Err(_) => Err(syntax(line, format!("{name} takes one argument"))),
    };
    let instruction = match name.as_str() {
        "FROM" => Instruction::From(plain(line, rest)?),
        "RUN" => Instruction::Run(command(line, rest)?),
        "CMD" => Instruction::Cmd(command(line, rest)?),
        "ENTRYPOINT" => Instruction::Entrypoint(command(line, rest)?),
        "COPY" => copy(line, rest)?,
        "ENV" => Instruction::Env(variables(line, rest)?),
        // The whole line, with its spaces.
        "WORKDIR" => Instruction::Workdir(one(words()?)?),
        "USER" => Instruction::User(one(words()?)?),
        _ => {
            let name: String = name.chars().take(40).collect();
            return Err(syntax(line, format!("{name} is not supported; supported are {KNOWN}")));
        }
    };
    let shown = text.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(Step { line, text: shown, instruction })
}

/// The image of FROM: one word without variables.
fn plain(line: usize, text: &str) -> Result<String, BuildError> {
    match (text.split_whitespace().count(), text.contains('$')) {
        (1, false) => Ok(text.to_owned()),
        (1, true) => Err(syntax(line, "variables in FROM are not supported")),
        _ => Err(syntax(line, "FROM takes one image; names of stages (AS) are not supported")),
    }
}

/// A list in JSON, or a command of the shell.
fn command(line: usize, text: &str) -> Result<Vec<String>, BuildError> {
    if let Some(list) = list(line, text)? {
        return Ok(list);
    }
    let is_document = |rest: &str| {
        let rest = rest.strip_prefix('-').unwrap_or(rest).trim_start_matches(['"', '\'']);
        rest.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
    };
    if text.match_indices("<<").any(|(at, _)| is_document(&text[at + 2..])) {
        return Err(syntax(line, "here-documents are not supported"));
    }
    Ok(["/bin/sh", "-c", text].map(str::to_owned).to_vec())
}

/// Reads a JSON list of strings that has at least one. Returns None for any other text.
fn list(line: usize, text: &str) -> Result<Option<Vec<String>>, BuildError> {
    if !text.starts_with('[') {
        return Ok(None);
    }
    // docker takes a list that is not valid for a command of the shell, which hides a mistake.
    match serde_json::from_str::<Vec<String>>(text) {
        Ok(list) if !list.is_empty() => Ok(Some(list)),
        _ => Err(syntax(line, "the argument begins with [, and is no list of texts in JSON")),
    }
}

fn copy(line: usize, text: &str) -> Result<Instruction, BuildError> {
    let mut all = match list(line, text)? {
        Some(list) => list.iter().map(|text| Word::literal(text)).collect(),
        None => words(line, text)?,
    };
    match all.pop() {
        Some(destination) if !all.is_empty() => Ok(Instruction::Copy { sources: all, destination }),
        _ => Err(syntax(line, "COPY takes at least one source and a destination")),
    }
}

/// `NAME=VALUE ...`, or the older form `NAME VALUE` with one variable.
fn variables(line: usize, text: &str) -> Result<Vec<(String, Word)>, BuildError> {
    let is_name = |name: &str| {
        !name.is_empty()
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && !name.as_bytes()[0].is_ascii_digit()
    };
    let first = text.split_whitespace().next().unwrap_or_default();
    if !first.contains('=') {
        return Err(syntax(line, "ENV takes NAME=VALUE; the form without = is not supported"));
    }
    words(line, text)?
        .into_iter()
        .map(|Word(mut parts)| {
            let odd = || syntax(line, "ENV takes NAME=VALUE, with a name of letters, digits and _");
            let Some(Part::Text(start)) = parts.first_mut() else { return Err(odd()) };
            let (name, value) = start.split_once('=').ok_or_else(odd)?;
            let (name, value) = (name.to_owned(), value.to_owned());
            *start = value;
            if is_name(&name) { Ok((name, Word(parts))) } else { Err(odd()) }
        })
        .collect()
}

/// Splits a text at spaces, with the quotes and the backslash of the shell.
fn words(line: usize, text: &str) -> Result<Vec<Word>, BuildError> {
    let mut words = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(first) = chars.peek() {
        if first.is_whitespace() {
            chars.next();
            continue;
        }
        words.push(word(line, &mut chars)?);
    }
    Ok(words)
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// Reads a word to the next space outside of quotes.
fn word(line: usize, chars: &mut Chars<'_>) -> Result<Word, BuildError> {
    let (mut parts, mut text, mut quote) = (Vec::new(), String::new(), None);
    while let Some(char) = chars.peek().copied() {
        if quote.is_none() && char.is_whitespace() {
            break;
        }
        chars.next();
        match (char, quote) {
            ('\'' | '"', None) => quote = Some(char),
            (char, Some(open)) if char == open => quote = None,
            ('\\', None) => text.extend(chars.next()),
            ('\\', Some('"')) => match chars.peek() {
                Some('"' | '\\' | '$') => text.extend(chars.next()),
                _ => text.push('\\'),
            },
            ('$', None | Some('"')) => {
                parts.push(Part::Text(std::mem::take(&mut text)));
                parts.push(Part::Variable(variable(line, chars)?));
            }
            (char, _) => text.push(char),
        }
    }
    if quote.is_some() {
        return Err(syntax(line, "a quote is not closed"));
    }
    parts.push(Part::Text(text));
    Ok(Word(parts))
}

/// The name of a variable, after `$`.
fn variable(line: usize, chars: &mut Chars<'_>) -> Result<String, BuildError> {
    let braced = chars.next_if_eq(&'{').is_some();
    let mut name = String::new();
    while let Some(char) = chars.next_if(|char| char.is_ascii_alphanumeric() || *char == '_') {
        name.push(char);
    }
    if name.is_empty() || braced && chars.next_if_eq(&'}').is_none() {
        return Err(syntax(line, "after $ only NAME and {NAME} are supported; \\$ is the character itself"));
    }
    Ok(name)
}

fn syntax(line: usize, what: impl Into<String>) -> BuildError {
    BuildError::Syntax { line, what: what.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn instructions(text: &str) -> Vec<Instruction> {
        parse(text).unwrap().into_iter().map(|step| step.instruction).collect()
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn instructions_are_read() {
        let text = "# comment\n\nfrom ./base.tar\nRUN echo a && \\\n  # between\n  echo b\nRUN [\"/x\", \"a b\"]\n\
            ENV A=1 B=\"x $A\" C='$A' PATH=/o:${PATH}\nWORKDIR /w\nUSER web:log\nCMD [\"sh\"]\nENTRYPOINT run me\n\
            COPY a \"b c\" /d/\nCOPY [\"e\", \"/f\"]\n";
        let all = instructions(text);
        assert_eq!(all[0], Instruction::From("./base.tar".to_owned()));
        assert_eq!(all[1], Instruction::Run(strings(&["/bin/sh", "-c", "echo a && echo b"])));
        assert_eq!(all[2], Instruction::Run(strings(&["/x", "a b"])));
        let Instruction::Env(variables) = &all[3] else { panic!("{all:?}") };
        let env = strings(&["A=7", "PATH=/bin"]);
        let values: Vec<_> =
            variables.iter().map(|(name, value)| format!("{name}={}", value.expand(&env))).collect();
        assert_eq!(values, ["A=1", "B=x 7", "C=$A", "PATH=/o:/bin"]);
        assert_eq!(all[4], Instruction::Workdir(Word(vec![Part::Text("/w".into())])));
        assert_eq!(all[6], Instruction::Cmd(strings(&["sh"])));
        assert_eq!(all[7], Instruction::Entrypoint(strings(&["/bin/sh", "-c", "run me"])));
        let Instruction::Copy { sources, destination } = &all[8] else { panic!("{all:?}") };
        let sources: Vec<_> = sources.iter().map(|word| word.expand(&[])).collect();
        assert_eq!((sources, destination.expand(&[])), (strings(&["a", "b c"]), "/d/".to_owned()));
        let steps = parse(text).unwrap();
        assert_eq!((steps[1].line, steps[1].text.as_str()), (4, "RUN echo a && echo b"));
    }

    #[test]
    fn what_is_not_supported_is_named_with_its_line() {
        for (text, line, what) in [
            ("FROM x\n\nARG A=1\n", 3, "ARG is not supported; supported are FROM"),
            ("FROM x\nADD a /b\n", 2, "ADD is not supported"),
            (
                "FROM x\nRUN --mount=type=cache,target=/x ls\n",
                2,
                "the option --mount=type=cache,target=/x of RUN",
            ),
            ("FROM x\nCOPY --chown=1 a /b\n", 2, "the option --chown=1 of COPY"),
            ("FROM x AS y\n", 1, "names of stages"),
            ("FROM x\nFROM y\n", 2, "a second FROM"),
            ("FROM $X\n", 1, "variables in FROM"),
            ("RUN x\n", 1, "the first instruction must be FROM"),
            ("FROM x\nRUN cat <<EOF\nRUN y\n", 2, "here-documents"),
            ("FROM x\nRUN a \\\n", 2, "ends in the middle"),
            ("FROM x\nRUN\n", 2, "RUN has no argument"),
            ("FROM x\nCMD [sh]\n", 2, "no list of texts"),
            ("FROM x\nENV A 1\n", 2, "without ="),
            ("FROM x\nENV 9=1\n", 2, "with a name of letters"),
            ("FROM x\nENV A=${B:-c}\n", 2, "only NAME and {NAME}"),
            ("FROM x\nENV A='x\n", 2, "a quote is not closed"),
            ("FROM x\nCOPY a\n", 2, "at least one source"),
            ("FROM x\nWORKDIR /a /b\n", 2, "takes one argument"),
            ("# escape=`\nFROM x\n", 1, "the directive escape"),
        ] {
            let error = parse(text).unwrap_err();
            let BuildError::Syntax { line: found, what: said } = &error else { panic!("{error}") };
            assert!(*found == line && said.contains(what), "{text:?}: {error}");
        }
        assert!(matches!(parse("# nothing\n"), Err(BuildError::NoSteps)));
        assert!(parse("FROM x\nRUN echo $((1 << 2))\n").is_ok());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(FROM x\n)?([A-Z]{2,6} [a-z$'\"\\\\{}\\[\\]<= -]{0,20}\n){0,4}") {
            let _ = parse(&text);
        }

        #[test]
        fn a_quoted_text_is_one_word(text in "[a-z $'{}<=]{0,20}") {
            let quoted = format!("\"{}\"", text.replace('$', "\\$"));
            let words = words(1, &quoted).unwrap();
            prop_assert_eq!(words.len(), 1);
            prop_assert_eq!(words[0].expand(&[]), text);
        }
    }
}
