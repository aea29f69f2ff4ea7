//! Finds a user's home directory in the container's own /etc/passwd.
//!
//! The C library would load the container's name service modules into this process.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
};

use pathrs::{Root, flags::OpenFlags};

/// The file belongs to the tenant: at most this much of it is read.
const MAX_PASSWD: u64 = 1 << 20;

/// The home directory of a user; "/" when the file does not name it.
pub(super) fn home_of(root: &Root, uid: u32) -> String {
    read(root, uid).unwrap_or_else(|| "/".to_owned())
}

fn read(root: &Root, uid: u32) -> Option<String> {
    let handle = root.resolve(Path::new("/etc/passwd")).ok()?;
    // Opening a fifo in its place would block forever.
    let flags = OpenFlags::O_RDONLY | OpenFlags::O_NONBLOCK | OpenFlags::O_CLOEXEC;
    let file = handle.reopen(flags).ok()?;
    file.metadata().ok()?.is_file().then_some(())?;
    find(BufReader::new(file.take(MAX_PASSWD)), uid)
}

/// Fields of passwd(5): name:password:uid:gid:comment:home:shell
fn find(passwd: impl BufRead, uid: u32) -> Option<String> {
    let uid = uid.to_string();
    passwd.split(b'\n').map_while(Result::ok).find_map(|line| {
        let line = String::from_utf8(line).ok()?;
        let mut fields = line.split(':').skip(2);
        (fields.next()? == uid).then(|| fields.nth(2).map(str::to_owned))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_of_the_uid_counts() {
        let passwd =
            b"root:x:0:0:root:/root:/bin/sh\nbroken\n\xff:x:5:5::/no:\nme:x:5:5::/home/me:\n5:x:6:5::/x:\n";
        assert_eq!(find(&passwd[..], 0), Some("/root".into()));
        assert_eq!(find(&passwd[..], 5), Some("/home/me".into()));
        assert_eq!(find(&passwd[..], 7), None);
    }
}
