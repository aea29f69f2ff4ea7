//! How long each phase of a container's start took, as the shim logs it.
//!
//! The shim writes one line per start, `... phases="rootdisk=12.3ms vm=850.0ms ..."`, into containerd's log.
//! The parser accepts any logger's format of the rest of the line, including its quoting.

/// A phase and its milliseconds.
pub type Phase = (String, f64);

/// The phases on a log line, in order; empty for other lines.
pub fn parse(line: &str) -> Option<Vec<Phase>> {
    let (_, tail) = line.split_once("phases=")?;
    let tail = tail.trim_start_matches(['\\', '"']);
    let end = tail.find(['\\', '"']).unwrap_or(tail.len());
    let phases: Vec<Phase> = tail[..end].split([' ', ',']).filter_map(phase).collect();
    (!phases.is_empty()).then_some(phases)
}

fn phase(word: &str) -> Option<Phase> {
    let (name, time) = word.split_once('=')?;
    let millis = time.strip_suffix("ms")?.parse().ok()?;
    Some((name.to_owned(), millis))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn finds_phases_however_they_are_quoted() {
        let wanted = Some(vec![("rootdisk".to_owned(), 12.25), ("vm".to_owned(), 850.0)]);
        assert_eq!(parse(r#"INFO started id="a" phases="rootdisk=12.25ms vm=850ms" x=1"#), wanted);
        assert_eq!(parse(r#"msg="started phases=\"rootdisk=12.25ms vm=850ms\"""#), wanted);
        assert_eq!(parse("phases=rootdisk=12.25ms,vm=850ms"), wanted);
    }

    #[test]
    fn other_lines_have_none() {
        assert_eq!(parse("msg=\"container started\""), None);
        assert_eq!(parse("phases=\"\""), None);
        assert_eq!(parse("phases=\"rootdisk=soon\""), None);
    }
}
