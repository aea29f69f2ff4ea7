//! The digest of a file's content, which does not depend on where the file has holes.

use sha2::{Digest as _, Sha256};

use super::ext4::BLOCK;

/// Digest of the blocks that are not all zeros.
///
/// A block of zeros and a hole are the same on the disk, so they are the same here. Every run of other blocks
/// is followed by its offset and length, so that different files never give the same input.
pub(super) struct FileDigest {
    digest: Sha256,
    start: u64,
    length: u64,
}

impl FileDigest {
    pub(super) fn new() -> Self {
        Self { digest: Sha256::new(), start: 0, length: 0 }
    }

    /// Adds data at a byte offset that is a multiple of the block size; offsets only grow. Only the last
    /// piece may end in the middle of a block.
    pub(super) fn update(&mut self, offset: u64, data: &[u8]) {
        let zero = |block: &[u8]| block[0] == 0 && block == &[0; BLOCK][..block.len()];
        let mut from = 0;
        while from < data.len() {
            let blocks = data[from..].chunks(BLOCK);
            let span: usize = blocks.take_while(|block| !zero(block)).map(<[u8]>::len).sum();
            if span == 0 {
                from += BLOCK;
                continue;
            }
            let at = offset + from as u64;
            if self.length == 0 || self.start + self.length != at {
                self.end_run();
                self.start = at;
            }
            self.digest.update(&data[from..from + span]);
            self.length += span as u64;
            from += span;
        }
    }

    pub(super) fn finish(mut self) -> [u8; 32] {
        self.end_run();
        self.digest.finalize().into()
    }

    fn end_run(&mut self) {
        if self.length > 0 {
            self.digest.update(self.start.to_le_bytes());
            self.digest.update(self.length.to_le_bytes());
            self.length = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(data: &[u8]) -> [u8; 32] {
        let mut content = FileDigest::new();
        content.update(0, data);
        content.finish()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn pieces_and_holes_do_not_matter(
            blocks in prop::collection::vec(0_u8..3, 0..12), tail in 0..BLOCK, cut in 0_usize..12,
        ) {
            let mut data: Vec<u8> = blocks.iter().flat_map(|&byte| [byte; BLOCK]).collect();
            data.extend(std::iter::repeat_n(1, tail));
            let cut = (cut * BLOCK).min(blocks.len() * BLOCK);
            let mut pieces = FileDigest::new();
            for (index, block) in data.chunks(BLOCK).enumerate() {
                if block.iter().any(|&byte| byte != 0) {
                    pieces.update((index * BLOCK) as u64, block);
                }
            }
            let mut halves = FileDigest::new();
            halves.update(0, &data[..cut]);
            halves.update(cut as u64, &data[cut..]);
            prop_assert_eq!(whole(&data), pieces.finish());
            prop_assert_eq!(whole(&data), halves.finish());
        }
    }

    #[test]
    fn the_offset_counts() {
        let block = [1; BLOCK];
        let at = |offset: usize| {
            let mut content = FileDigest::new();
            content.update((offset * BLOCK) as u64, &block);
            content.finish()
        };
        assert_ne!(at(0), at(1));
        assert_eq!(whole(&[]), whole(&[0; 3 * BLOCK + 5]));
    }
}
