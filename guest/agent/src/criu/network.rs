//! Removes the lock that CRIU sets on a container's connections for a dump: a table of packet filters, which
//! remains if CRIU is killed.
//!
//! A single netlink request (nf_tables) needs no additional program in the guest.

use std::os::fd::AsRawFd as _;

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

use super::CriuError;

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFT_MSG_DELTABLE: u16 = NFNL_SUBSYS_NFTABLES << 8 | 2;
const NFTA_TABLE_NAME: u16 = 1;
const NFPROTO_INET: u8 = 1;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;

/// Removes the lock of one run of CRIU, if it exists. The VM's network is that of all its containers.
///
/// # Errors
/// The kernel refuses.
pub(super) fn unlock(run: &str) -> Result<(), CriuError> {
    match delete_table(&format!("CRIU-{run}")) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(source) => Err(CriuError::Unlock(source)),
    }
}

fn delete_table(name: &str) -> Result<(), Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let kernel = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
    let bracket = |kind| message(kind, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES, &[]);
    let name = attribute(NFTA_TABLE_NAME, &[name.as_bytes(), b"\0"].concat());
    let delete = message(NFT_MSG_DELTABLE, NLM_F_REQUEST | NLM_F_ACK, NFPROTO_INET, 0, &name);
    let batch = [bracket(NFNL_MSG_BATCH_BEGIN), delete, bracket(NFNL_MSG_BATCH_END)].concat();
    send(kernel.as_raw_fd(), &batch, MsgFlags::empty())?;
    // The kernel has carried out the request, and its answer is there: an nlmsghdr, and 0 or the negative
    // error.
    let mut answer = [0; 512];
    let length = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let error = answer[..length].get(16..20).and_then(|bytes| bytes.try_into().ok()).ok_or(Errno::EBADMSG)?;
    match i32::from_ne_bytes(error) {
        0 => Ok(()),
        error => Err(Errno::from_raw(-error)),
    }
}

/// An nlmsghdr and an nfgenmsg, followed by a body.
fn message(kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 16 + 4;
    let mut message = Vec::new();
    message.extend(length(HEADERS + body.len()).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and port are 0: there is one request, and the kernel knows the port.
    message.extend([0; 8]);
    message.extend([family, 0]);
    message.extend(resource.to_be_bytes());
    message.extend(body);
    message
}

/// An nlattr, with its value padded to whole words.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut attribute = Vec::new();
    attribute.extend(u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_the_kernel_wants_them() {
        let name = attribute(NFTA_TABLE_NAME, b"CRIU-1\0");
        assert_eq!(name, b"\x0b\0\x01\0CRIU-1\0\0");
        let message = message(NFT_MSG_DELTABLE, NLM_F_REQUEST | NLM_F_ACK, NFPROTO_INET, 0, &name);
        assert_eq!(message[..20], [32, 0, 0, 0, 2, 10, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(message[20..], name);
    }
}
