//! CRIU's list of open files (`files.img`, criu's images/fdinfo.proto), and the corrections that a dump makes
//! in it.
//!
//! - A UNIX socket gets another name than that of its bind(2). `sockets.rs` says which and why.
//! - A connection loses the name of the socket that accepted it, if that name was removed. CRIU 4.1 does not
//!   bind connections, but if the other end was closed it waits forever until the connection is bound to the
//!   removed name.
//! - Where all processes are in one mount namespace, a UNIX socket loses the number of its mount. CRIU 4.1 enters
//!   that mount's namespace to bind the socket, also if the process is in it already. The kernel refuses that to
//!   a process that shares its root and working directory with another one, as CRIU's helper for a session whose
//!   first process has ended does.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use protobuf::{Message as _, UnknownFields, UnknownValueRef, well_known_types::empty::Empty};

use super::{CriuError, image};

pub(super) const FILES: &str = "files.img";
/// The field of an entry with a UNIX socket.
const SOCKET: u32 = 16;
/// Fields of a UNIX socket (criu's images/sk-unix.proto).
const INODE: u32 = 2;
const TYPE: u32 = 3;
const STATE: u32 = 4;
const NAME: u32 = 11;
const NAME_DIR: u32 = 14;
const DELETED: u32 = 15;
const MOUNT: u32 = 17;
/// A value of [`TYPE`].
const DATAGRAM: u64 = 2;
/// A value of [`STATE`].
const ESTABLISHED: u64 = 1;

/// A socket that must be bound to another name than before.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MovedSocket {
    /// CRIU identifies a socket by its inode.
    pub(super) inode: u64,
    pub(super) name: PathBuf,
}

/// Corrects the UNIX sockets in the images of a dump. `one_namespace`: all processes are in one mount namespace.
///
/// # Errors
/// The images lack a socket, or those of the file system.
pub(super) fn correct(images: &Path, moved: &[MovedSocket], one_namespace: bool) -> Result<(), CriuError> {
    let path = images.join(FILES);
    let failed = |what| {
        let path = path.clone();
        move |source| CriuError::File { what, path, source }
    };
    let before = fs::read(&path).map_err(failed("read"))?;
    let (after, renamed) = corrected(&before, moved, one_namespace).map_err(failed("read"))?;
    if let Some(missing) = moved.iter().find(|socket| !renamed.contains(&socket.inode)) {
        return Err(CriuError::NoSocket { name: missing.name.clone() });
    }
    if after != before { fs::write(&path, after).map_err(failed("write")) } else { Ok(()) }
}

/// Returns the corrected list of open files, and the sockets that have another name in it.
fn corrected(
    bytes: &[u8],
    moved: &[MovedSocket],
    one_namespace: bool,
) -> io::Result<(Vec<u8>, HashSet<u64>)> {
    let (magic, messages) = image::split(bytes)?;
    let (mut bytes, mut renamed) = (magic.to_vec(), HashSet::new());
    for message in messages {
        // Unknown fields are kept as they are.
        let mut entry = Empty::parse_from_bytes(message)?;
        let entry_fields = entry.special_fields.mut_unknown_fields();
        let socket = match entry_fields.get(SOCKET) {
            Some(UnknownValueRef::LengthDelimited(socket)) => socket,
            _ => {
                image::append(&mut bytes, message)?;
                continue;
            }
        };
        let mut socket = Empty::parse_from_bytes(socket)?;
        let fields = socket.special_fields.mut_unknown_fields();
        let named =
            moved.iter().find(|moved| fields.get(INODE) == Some(UnknownValueRef::Varint(moved.inode)));
        let loses_mount = one_namespace && fields.get(MOUNT).is_some();
        let is_renamed = named.is_some() || is_connection_without_name(fields);
        if !loses_mount && !is_renamed {
            image::append(&mut bytes, message)?;
            continue;
        }
        if loses_mount {
            fields.remove(MOUNT);
        }
        if is_renamed {
            rename(fields, named);
            renamed.extend(named.map(|moved| moved.inode));
        }
        entry_fields.remove(SOCKET);
        entry_fields.add_length_delimited(SOCKET, socket.write_to_bytes()?);
        image::append(&mut bytes, &entry.write_to_bytes()?)?;
    }
    Ok((bytes, renamed))
}

/// Gives a socket the name that it is moved to; without one, no name.
fn rename(socket: &mut UnknownFields, moved: Option<&MovedSocket>) {
    for field in [NAME, NAME_DIR, DELETED] {
        socket.remove(field);
    }
    let mut name = Vec::new();
    if let Some(moved) = moved {
        name.extend(moved.name.as_os_str().as_bytes());
        name.push(0);
    }
    socket.add_length_delimited(NAME, name);
}

/// Whether a socket was accepted by another one whose name was removed.
fn is_connection_without_name(socket: &UnknownFields) -> bool {
    let is = |field, value| socket.get(field) == Some(UnknownValueRef::Varint(value));
    is(STATE, ESTABLISHED) && !is(TYPE, DATAGRAM) && is(DELETED, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: u64 = 1;
    const LISTEN: u64 = 10;

    /// An entry of the list with a socket, whose other fields must not change.
    fn socket(inode: u64, kind: u64, state: u64, name: &[u8], is_deleted: bool) -> Vec<u8> {
        let (mut entry, mut socket) = (Empty::new(), Empty::new());
        let fields = socket.special_fields.mut_unknown_fields();
        for (field, value) in [(1, 9), (INODE, inode), (TYPE, kind), (STATE, state), (17, 5)] {
            fields.add_varint(field, value);
        }
        fields.add_length_delimited(9, b"\x08\x01".to_vec());
        fields.add_length_delimited(NAME, name.to_vec());
        if is_deleted {
            fields.add_length_delimited(NAME_DIR, b"/run".to_vec());
            fields.add_varint(DELETED, 1);
        }
        let fields = entry.special_fields.mut_unknown_fields();
        fields.add_varint(1, 5);
        fields.add_varint(2, 9);
        fields.add_length_delimited(SOCKET, socket.write_to_bytes().unwrap());
        entry.write_to_bytes().unwrap()
    }

    fn list(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut list = b"magic888".to_vec();
        entries.iter().for_each(|entry| image::append(&mut list, entry).unwrap());
        list
    }

    /// The fields of an entry, in an order that does not depend on its encoding.
    fn fields(entry: &[u8]) -> Vec<String> {
        let message = Empty::parse_from_bytes(entry).unwrap();
        let mut fields = Vec::new();
        for (number, value) in message.special_fields.unknown_fields().iter() {
            match value {
                UnknownValueRef::LengthDelimited(socket) if number == SOCKET => {
                    fields.extend(self::fields(socket));
                }
                value => fields.push(format!("{number} {value:?}")),
            }
        }
        fields.sort();
        fields
    }

    #[test]
    fn names_are_corrected_and_all_else_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let before = [
            b"\x08\x01\x10\x07".to_vec(),
            socket(7, STREAM, LISTEN, b"a\0", true),
            socket(8, STREAM, LISTEN, b"b\0", true),
            socket(9, STREAM, ESTABLISHED, b"b\0", true),
            socket(10, STREAM, ESTABLISHED, b"/run/d\0", false),
            socket(11, DATAGRAM, ESTABLISHED, b"e\0", true),
        ];
        fs::write(dir.path().join(FILES), list(&before)).unwrap();
        correct(dir.path(), &[MovedSocket { inode: 8, name: "/run/c".into() }], false).unwrap();
        let after = fs::read(dir.path().join(FILES)).unwrap();
        let (magic, entries) = image::split(&after).unwrap();
        assert_eq!((magic, entries.len()), (*b"magic888", before.len()));
        for same in [0, 1, 4, 5] {
            assert_eq!(entries[same], before[same], "{same}");
        }
        assert_eq!(fields(entries[2]), fields(&socket(8, STREAM, LISTEN, b"/run/c\0", false)));
        assert_eq!(fields(entries[3]), fields(&socket(9, STREAM, ESTABLISHED, b"", false)));
    }

    #[test]
    fn in_one_namespace_sockets_have_no_mounts() {
        let dir = tempfile::tempdir().unwrap();
        let before = [b"\x08\x01\x10\x07".to_vec(), socket(7, STREAM, LISTEN, b"/run/a\0", false)];
        fs::write(dir.path().join(FILES), list(&before)).unwrap();
        correct(dir.path(), &[], true).unwrap();
        let after = fs::read(dir.path().join(FILES)).unwrap();
        let (_, entries) = image::split(&after).unwrap();
        assert_eq!(entries[0], before[0]);
        let mut all = fields(&before[1]);
        all.retain(|field| !field.starts_with("17 "));
        assert_eq!(fields(entries[1]), all);
    }

    #[test]
    fn a_socket_that_is_not_there_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let moved = [MovedSocket { inode: 1, name: "/a".into() }];
        assert!(matches!(correct(dir.path(), &moved, false), Err(CriuError::File { .. })));
        fs::write(dir.path().join(FILES), list(&[socket(7, STREAM, LISTEN, b"a\0", true)])).unwrap();
        assert!(
            matches!(correct(dir.path(), &moved, false), Err(CriuError::NoSocket { name }) if name == *"/a")
        );
    }
}
