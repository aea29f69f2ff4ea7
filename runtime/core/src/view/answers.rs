//! Requests that the host answers without the guest.

use std::io;

use machinen_protocol::fuse::{
    MAJOR, MAX_DATA, MINOR, REPLY_HEADER, REQUEST_HEADER, ROOT, RequestHeader, opcode,
};

use super::device::Device;

/// Flags of FUSE_INIT: writes larger than a page, lookups in parallel, `max_pages` is valid.
const BIG_WRITES: u32 = 1 << 5;
const PARALLEL_DIROPS: u32 = 1 << 18;
const MAX_PAGES: u32 = 1 << 22;

const PAGE: usize = 4096;

/// Answers a request that arrives before the container exists. At that time only the process whose root the
/// view becomes uses it, and needs only the attributes of the root.
pub(super) fn without_guest(device: &Device, request: RequestHeader, message: &[u8]) -> io::Result<()> {
    match request.opcode {
        opcode::INIT => device.write(&init(request, message)),
        opcode::GETATTR if request.node == ROOT => device.write(&root(request)),
        _ if by_host(device, request)? || !request.is_answered() => Ok(()),
        _ => device.refuse(request, libc::EAGAIN),
    }
}

/// Answers a request that is not passed to the guest; false if it is for the guest.
pub(super) fn by_host(device: &Device, request: RequestHeader) -> io::Result<bool> {
    match request.opcode {
        // The kernel sends no INTERRUPT after this: an interrupted caller waits for the reply, or until the
        // deadline.
        opcode::INTERRUPT => device.refuse(request, libc::ENOSYS)?,
        opcode::DESTROY => device.refuse(request, 0)?,
        // df(1) asks all mounts of the host, and must not wait for a guest.
        opcode::STATFS => device.write(&no_size(request))?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// The properties of the connection (fuse_init_out). What is not set is not used, including caches of names,
/// data and locks.
fn init(request: RequestHeader, message: &[u8]) -> Vec<u8> {
    let offered = message.get(REQUEST_HEADER + 12..REQUEST_HEADER + 16);
    let offered = offered.map_or(0, |flags| u32::from_le_bytes(flags.try_into().expect("four bytes")));
    let flags = offered & (BIG_WRITES | PARALLEL_DIROPS | MAX_PAGES);
    let (no_readahead, default_background, granularity_ns) = (0_u32, 0_u32, 1_u32);
    let mut body = Vec::with_capacity(64);
    for word in [MAJOR, MINOR, no_readahead, flags, default_background, MAX_DATA as u32, granularity_ns] {
        body.extend_from_slice(&word.to_le_bytes());
    }
    body.extend_from_slice(&((MAX_DATA / PAGE) as u16).to_le_bytes());
    body.resize(64, 0);
    reply(request, &body)
}

/// The attributes of a directory that root owns (fuse_attr_out), valid for no time, so that they are never
/// cached.
fn root(request: RequestHeader) -> Vec<u8> {
    const MODE: u32 = libc::S_IFDIR | 0o755;
    let mut body = vec![0; 104];
    // After the validity times: the inode number, five words of eight bytes, three of four, then mode and
    // link count.
    body[16..24].copy_from_slice(&ROOT.to_le_bytes());
    body[76..80].copy_from_slice(&MODE.to_le_bytes());
    body[80..84].copy_from_slice(&2_u32.to_le_bytes());
    reply(request, &body)
}

/// A file system of no size (fuse_statfs_out), with names of up to 255 bytes.
fn no_size(request: RequestHeader) -> Vec<u8> {
    let mut body = vec![0; 80];
    // After five counts of eight bytes: the size of a block, and the longest name.
    body[40..44].copy_from_slice(&(PAGE as u32).to_le_bytes());
    body[44..48].copy_from_slice(&255_u32.to_le_bytes());
    body[48..52].copy_from_slice(&(PAGE as u32).to_le_bytes());
    reply(request, &body)
}

fn reply(request: RequestHeader, body: &[u8]) -> Vec<u8> {
    let length = (REPLY_HEADER + body.len()) as u32;
    [&length.to_le_bytes()[..], &[0; 4], &request.unique.to_le_bytes(), body].concat()
}
