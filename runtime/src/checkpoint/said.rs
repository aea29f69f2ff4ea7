//! What a guest says of the images that it has written, checked before anything of it is used.

use std::collections::HashSet;

use machinen_protocol::api::{CheckpointImagesResponse, ImageFile};

use super::{CheckpointError, digest, manifest::is_plain};

/// CRIU makes a few files for each process; a container has thousands of those at most.
const MAX_FILES: usize = 100_000;

/// What the guest has said so far. It may say what it likes.
#[derive(Debug)]
pub(super) struct Said {
    /// Of the disk.
    size: u64,
    names: HashSet<String>,
    /// Bytes of all pieces.
    total: u64,
    /// The image that is not located as a whole: its name and size, and where it goes on.
    unfinished: Option<(String, u64, u64)>,
    last: bool,
}

impl Said {
    pub(super) fn new(size: u64) -> Self {
        Self { size, names: HashSet::new(), total: 0, unfinished: None, last: false }
    }

    /// Takes a whole answer, whose images come next. Each brings it further: there is an end to them.
    pub(super) fn answered(&mut self, answer: &CheckpointImagesResponse) -> Result<(), CheckpointError> {
        if self.last || answer.files.is_empty() && !answer.last {
            return wrong("an answer about no images".to_owned());
        }
        self.last = answer.last;
        Ok(())
    }

    /// Takes what comes next, and returns from where on it is of its image.
    pub(super) fn next(&mut self, image: &ImageFile) -> Result<u64, CheckpointError> {
        let name = image.name.escape_debug();
        let from = match self.unfinished.take() {
            Some((name, size, from)) if name == image.name && size == image.size => from,
            Some((name, ..)) => return wrong(format!("an end of {name} is missing")),
            None if self.names.len() == MAX_FILES => return wrong(format!("more than {MAX_FILES} images")),
            None if !is_plain(&image.name) || !self.names.insert(image.name.clone()) => {
                return wrong(format!("an image is named \"{:.64}\"", name.to_string()));
            }
            None => 0,
        };
        if image.size > self.size {
            return wrong(format!("{name} has {} bytes on a disk of {}", image.size, self.size));
        }
        let goes_on =
            image.located > from && image.located < image.size && image.located.is_multiple_of(digest::PART);
        if goes_on {
            self.unfinished = Some((image.name.clone(), image.size, image.located));
        } else if image.located != image.size {
            return wrong(format!("{} of {} bytes of {name}", image.located, image.size));
        }
        let mut end = from;
        for piece in &image.extents {
            let within = |from: u64, limit: u64| from.checked_add(piece.length).filter(|&end| end <= limit);
            let fits = within(piece.physical, self.size).is_some();
            match within(piece.logical, image.located) {
                Some(next) if fits && piece.logical >= end => end = next,
                _ => return wrong(format!("a piece of {name} is nowhere")),
            }
            self.total = self.total.saturating_add(piece.length);
        }
        // Pieces that overlap on the disk would make the copy larger than the disk.
        if self.total > self.size {
            return wrong(format!("images of {} bytes on a disk of {}", self.total, self.size));
        }
        Ok(from)
    }

    /// Whether that was all of it.
    pub(super) fn finished(&self) -> Result<(), CheckpointError> {
        match &self.unfinished {
            Some((name, ..)) => wrong(format!("an end of {name} is missing")),
            None if self.names.is_empty() || !self.last => wrong("images are missing".to_owned()),
            None => Ok(()),
        }
    }
}

fn wrong<T>(what: String) -> Result<T, CheckpointError> {
    Err(CheckpointError::Guest { what })
}
