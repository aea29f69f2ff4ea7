//! Copy mounts in a checkpoint: what was written to a copy is an image, and the mount of the copy has a source that no other
//! mount has.

/// The beginning of the source of a mount that is a copy.
const SOURCE: &str = "machinen-copy:";

/// The name of the image with what was written to the copy of this number.
pub fn image(number: usize) -> String {
    format!("machinen-copy-{number}.img")
}

/// The source, in the facts of a checkpoint, of the mount of the copy of this number.
pub fn source(number: usize) -> String {
    format!("{SOURCE}{number}")
}

/// The number of the copy that is mounted from this source, if it is a copy.
pub fn number(source: &str) -> Option<usize> {
    source.strip_prefix(SOURCE)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_known_by_its_source() {
        assert_eq!((source(3).as_str(), image(3).as_str()), ("machinen-copy:3", "machinen-copy-3.img"));
        assert_eq!(number("machinen-copy:3"), Some(3));
        for other in ["", "machinen-copy:", "machinen-copy:x", "machinen-copy-3", "/machinen-copy:3"] {
            assert_eq!(number(other), None, "{other}");
        }
    }
}
