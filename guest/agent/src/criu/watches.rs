//! Watches (inotify, fanotify) on files of volumes, in CRIU's list of open files (criu's images/fsnotify.proto).
//!
//! CRIU records the path of a watched file if it finds one, and restores the watch by the path. Otherwise it restores the
//! watch by the file's handle, which in a volume is a number of this VM: in another VM it is that of no file, or of
//! another one. So a dump with such a watch is refused.

use std::{fs, io, path::Path};

use protobuf::{Message as _, UnknownFields, UnknownValueRef, well_known_types::empty::Empty};

use super::{CriuError, files, image, volumes::VolumeDevice};

/// The fields of an open file with what it watches: of the file, of each watch in it, and of the watch's device. The
/// message with the handle is in the last field, for fanotify(7) in a message of its own.
const KINDS: [WatchFields; 2] = [
    WatchFields { file: 13, watch: 5, device: 5, handle: &[7] },
    WatchFields { file: 14, watch: 6, device: 6, handle: &[7, 2] },
];
/// The field of a handle with the path.
const PATH: u32 = 4;

struct WatchFields {
    file: u32,
    watch: u32,
    device: u32,
    handle: &'static [u32],
}

/// Checks the images of a dump.
///
/// # Errors
/// A process watches a file of a volume for which CRIU has found no path.
pub(super) fn check(images: &Path, volumes: VolumeDevice) -> Result<(), CriuError> {
    let path = images.join(files::FILES);
    let read = || io::Result::Ok(has_nameless(&fs::read(&path)?, volumes)?);
    match read() {
        Ok(false) => Ok(()),
        Ok(true) => Err(CriuError::NamelessWatch),
        Err(source) => Err(CriuError::File { what: "read", path, source }),
    }
}

fn has_nameless(bytes: &[u8], volumes: VolumeDevice) -> Result<bool, protobuf::Error> {
    let (_, messages) = image::split(bytes)?;
    for message in messages {
        let entry = parse(message)?;
        for kind in &KINDS {
            for file in inner(&entry, kind.file)? {
                for watch in inner(&file, kind.watch)? {
                    if is_on(&watch, kind.device, volumes) && is_nameless(&watch, kind.handle)? {
                        return Ok(true);
                    }
                }
            }
        }
    }
    Ok(false)
}

fn is_on(watch: &Empty, device: u32, volumes: VolumeDevice) -> bool {
    match fields(watch).get(device) {
        Some(UnknownValueRef::Varint(device)) => volumes.is_device(device),
        _ => false,
    }
}

/// Whether a watch has a handle, and the handle no path. The watch of a mount has no handle.
fn is_nameless(watch: &Empty, handle: &[u32]) -> Result<bool, protobuf::Error> {
    let Some((field, rest)) = handle.split_first() else {
        return Ok(fields(watch).get(PATH).is_none());
    };
    for message in inner(watch, *field)? {
        if is_nameless(&message, rest)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The messages in a field that may be repeated.
fn inner(message: &Empty, field: u32) -> Result<Vec<Empty>, protobuf::Error> {
    let values = fields(message).iter().filter(|(number, _)| *number == field);
    values
        .filter_map(|(_, value)| match value {
            UnknownValueRef::LengthDelimited(bytes) => Some(parse(bytes)),
            _ => None,
        })
        .collect()
}

fn fields(message: &Empty) -> &UnknownFields {
    message.special_fields.unknown_fields()
}

fn parse(bytes: &[u8]) -> Result<Empty, protobuf::Error> {
    Empty::parse_from_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(numbers: &[(u32, u64)], messages: &[(u32, &[u8])]) -> Vec<u8> {
        let mut message = Empty::new();
        let fields = message.special_fields.mut_unknown_fields();
        numbers.iter().for_each(|(field, value)| fields.add_varint(*field, *value));
        messages.iter().for_each(|(field, value)| fields.add_length_delimited(*field, value.to_vec()));
        message.write_to_bytes().unwrap()
    }

    fn list(entry: &[u8]) -> Vec<u8> {
        let mut list = b"magic888".to_vec();
        for entry in [b"\x08\x01\x10\x07", entry] {
            image::append(&mut list, entry).unwrap();
        }
        list
    }

    #[test]
    fn a_watch_in_a_volume_needs_a_path() {
        let device = VolumeDevice::new(0, 300);
        let handles = [message(&[(1, 8), (3, 2)], &[]), message(&[(1, 8)], &[(PATH, b"/data/f")])];
        for (handle, is_nameless) in handles.iter().zip([true, false]) {
            // The kernel's number of the device, and that of stat(2).
            for number in [300, 0x10_002c] {
                let watch = message(&[(1, 1), (5, number)], &[(7, handle)]);
                let other = message(&[(5, 299)], &[(7, &handles[0])]);
                let inotify = message(&[(2, 0)], &[(5, &other), (5, &watch)]);
                let list = list(&message(&[(1, 8)], &[(13, &inotify)]));
                assert_eq!(has_nameless(&list, device).unwrap(), is_nameless, "{number}");
            }
            let of_file = message(&[(6, 300)], &[(7, &message(&[(1, 5)], &[(2, handle)]))]);
            let of_mount = message(&[(6, 300)], &[(8, &message(&[(1, 5)], &[]))]);
            let fanotify = message(&[(2, 0)], &[(6, &of_mount), (6, &of_file)]);
            let list = list(&message(&[(1, 12)], &[(14, &fanotify)]));
            assert_eq!(has_nameless(&list, device).unwrap(), is_nameless);
        }
    }
}
