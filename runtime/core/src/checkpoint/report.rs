//! Validates the guest's report on the images that it has written, before the host uses any of it.

use std::collections::HashSet;

use machinen_protocol::api::{CheckpointImagesResponse, ImageFile};

use super::{CheckpointError, digest, manifest::is_image};

/// An upper bound: CRIU makes a few files for each process, and a container has at most thousands of
/// processes.
const MAX_FILES: usize = 100_000;

/// The guest's report so far. Its content is not trusted.
#[derive(Debug)]
pub(super) struct ImageReport {
    /// Size of the disk, bytes.
    size: u64,
    names: HashSet<String>,
    /// Sum of the lengths of all pieces, bytes.
    total: u64,
    /// The image that is not completely located yet: its name, its size, and the offset of the next piece.
    unfinished: Option<(String, u64, u64)>,
    last: bool,
}

impl ImageReport {
    pub(super) fn new(size: u64) -> Self {
        Self { size, names: HashSet::new(), total: 0, unfinished: None, last: false }
    }

    /// Accepts an answer, whose images are passed to [`ImageReport::accept_image`] afterwards. Every answer
    /// makes progress, so the report is finite.
    pub(super) fn accept(&mut self, answer: &CheckpointImagesResponse) -> Result<(), CheckpointError> {
        if self.last || answer.files.is_empty() && !answer.last {
            return invalid("an answer without images".to_owned());
        }
        self.last = answer.last;
        Ok(())
    }

    /// Accepts the next image, or the next piece of the last one. Returns the offset in the image at which it
    /// starts.
    pub(super) fn accept_image(&mut self, image: &ImageFile) -> Result<u64, CheckpointError> {
        let name = image.name.escape_debug();
        let from = match self.unfinished.take() {
            Some((name, size, from)) if name == image.name && size == image.size => from,
            Some((name, ..)) => return invalid(format!("the rest of {name} is missing")),
            None if self.names.len() == MAX_FILES => return invalid(format!("more than {MAX_FILES} images")),
            None if !is_image(&image.name) || !self.names.insert(image.name.clone()) => {
                return invalid(format!("an image is named \"{:.64}\"", name.to_string()));
            }
            None => 0,
        };
        if image.size > self.size {
            return invalid(format!("{name} has {} bytes on a disk of {}", image.size, self.size));
        }
        let continues =
            image.located > from && image.located < image.size && image.located.is_multiple_of(digest::PART);
        if continues {
            self.unfinished = Some((image.name.clone(), image.size, image.located));
        } else if image.located != image.size {
            return invalid(format!("{name} ends after {} of {} bytes", image.located, image.size));
        }
        let mut end = from;
        for piece in &image.extents {
            let within = |from: u64, limit: u64| from.checked_add(piece.length).filter(|&end| end <= limit);
            let fits = within(piece.physical, self.size).is_some();
            match within(piece.logical, image.located) {
                Some(next) if fits && piece.logical >= end => end = next,
                _ => return invalid(format!("a piece of {name} is outside of the image or the disk")),
            }
            self.total = self.total.saturating_add(piece.length);
        }
        // Pieces that overlap on the disk could make the copy larger than the disk.
        if self.total > self.size {
            return invalid(format!("images of {} bytes on a disk of {}", self.total, self.size));
        }
        Ok(from)
    }

    /// Checks that the report is complete.
    pub(super) fn finish(&self) -> Result<(), CheckpointError> {
        match &self.unfinished {
            Some((name, ..)) => invalid(format!("the rest of {name} is missing")),
            None if self.names.is_empty() || !self.last => invalid("images are missing".to_owned()),
            None => Ok(()),
        }
    }
}

fn invalid<T>(what: String) -> Result<T, CheckpointError> {
    Err(CheckpointError::Guest { what })
}
