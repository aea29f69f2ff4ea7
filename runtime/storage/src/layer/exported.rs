//! The names that exports of one container have put into a directory that stays in place.
//!
//! A container that is paused, continues and removes a file of its own leaves no mark of it: no lower layer has the
//! file, so overlayfs just forgets it. The export at the pause has put the file into the directory, though, and the
//! next export has to remove it again. So the names are recorded in a file next to the container's disk:
//!
//! ```text
//!   names that are recorded and that the new archive lacks -> marked as removed in the staging directory
//!   names of the new archive -> appended to the record -> merge -> the record has only these
//! ```
//! Names are separated by zeros. Memory does not grow with their number.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, BufWriter, Write as _},
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use machinen_base::fs::{FileError, if_exists};
use machinen_protocol::layer::MAX_PATH;
use rustix::{
    fs::{AtFlags, Dir, FileType, statat},
    io::Errno,
};

use super::{
    LayerError,
    apply::{directory_flags, open_dir, write_error},
    archive::Components,
    merge::{is_mark, mark},
};

/// What an export is about to put into the directory.
#[derive(Debug)]
pub(super) struct RecordedExport<'a> {
    record: &'a Path,
    next: PathBuf,
}

impl<'a> RecordedExport<'a> {
    /// Adds marks to `staged` for the names of earlier exports that it lacks, and records its own.
    ///
    /// # Errors
    /// The record cannot be read or written, or the marks cannot be made.
    pub(super) fn begin(record: &'a Path, staged: BorrowedFd<'_>) -> Result<Self, LayerError> {
        mark_missing(record, staged)?;
        let next = record.with_extension("next");
        let written = File::create(&next).map(BufWriter::new).map_err(FileError::at("create", &next));
        let mut writer = written?;
        write_names(&mut writer, staged, &mut Components::new(), &next)?;
        writer.flush().map_err(FileError::at("write to", &next))?;
        let append = || -> io::Result<()> {
            let mut record = File::options().append(true).create(true).open(record)?;
            io::copy(&mut File::open(&next)?, &mut record).map(drop)
        };
        append().map_err(FileError::at("write to", record))?;
        Ok(Self { record, next })
    }

    /// To be called when the names are in the directory, and those that were marked are not.
    ///
    /// # Errors
    /// The record cannot be replaced.
    pub(super) fn complete(self) -> Result<(), LayerError> {
        Ok(fs::rename(&self.next, self.record).map_err(FileError::at("replace", self.record))?)
    }
}

fn mark_missing(record: &Path, staged: BorrowedFd<'_>) -> Result<(), LayerError> {
    let failed = |source| FileError::new("read", record, source);
    let Some(file) = if_exists(File::open(record)).map_err(failed)? else { return Ok(()) };
    let mut names = BufReader::new(file);
    loop {
        let mut path = Vec::new();
        // The last name may be incomplete, if the process that wrote it was killed before the merge.
        let read = io::Read::take(&mut names, MAX_PATH as u64 + 1).read_until(0, &mut path);
        if read.map_err(failed)? == 0 || path.pop() != Some(0) {
            return Ok(());
        }
        let path: Components = path.split(|&byte| byte == b'/').map(<[u8]>::to_vec).collect();
        let Some((name, parents)) = path.split_last() else { continue };
        let marked = match open_dir(staged, parents, directory_flags()) {
            // The directory has a mark, or is another kind of file now.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
            Err(errno) => Err(errno),
            Ok(dir) => match statat(&dir, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => mark(dir.as_fd(), name),
                found => found.map(drop),
            },
        };
        marked.map_err(|errno| write_error("mark as removed", &path, errno.into()))?;
    }
}

/// Writes the path of each file below `path`, a directory before its content.
fn write_names(
    writer: &mut impl io::Write,
    staged: BorrowedFd<'_>,
    path: &mut Components,
    to: &Path,
) -> Result<(), LayerError> {
    let failed = |path: &[Vec<u8>]| {
        let path = path.to_vec();
        move |errno: Errno| write_error("list", &path, errno.into())
    };
    let dir = open_dir(staged, path, directory_flags()).map_err(failed(path))?;
    for item in Dir::read_from(&dir).map_err(failed(path))? {
        let item = item.map_err(failed(path))?;
        let name = item.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let status = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed(path))?;
        if is_mark(&status) {
            continue;
        }
        path.push(name.to_bytes().to_vec());
        writer.write_all(&[&path.join(&b'/')[..], &[0]].concat()).map_err(FileError::at("write to", to))?;
        if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
            write_names(writer, staged, path, to)?;
        }
        path.pop();
    }
    Ok(())
}
