//! Tests of the view with a simulated kernel and guest: the device is a socket that carries messages.

use std::os::fd::OwnedFd;

use machinen_protocol::fuse::{
    MAX_REPLY, MAX_REQUEST, REPLY_HEADER, REQUEST_HEADER, ROOT, ReplyHeader, RequestHeader, opcode, refusal,
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair},
};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::{
    REPLY_DEADLINE, answers,
    device::{Device, DeviceRead},
    requests,
    session::{self, SessionEnd},
};

const LOOKUP: u32 = 1;
const CALLER_PID: u32 = 4321;

/// The host's kernel.
struct Kernel(OwnedFd);

impl Kernel {
    fn new() -> (Self, Device) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, devices) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (Self(ours), Device::over(devices).unwrap())
    }

    fn ask(&self, message: &[u8]) {
        assert_eq!(nix::unistd::write(&self.0, message).unwrap(), message.len());
    }

    /// The replies that the kernel has received so far.
    fn replies(&self) -> Vec<Vec<u8>> {
        use std::os::fd::AsRawFd as _;
        let mut buffer = vec![0; MAX_REPLY];
        let mut replies = Vec::new();
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(0) | Err(Errno::EAGAIN) => return replies,
                Ok(length) => replies.push(buffer[..length].to_vec()),
                // The device was closed before all requests were read.
                Err(Errno::ECONNRESET) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn message_of(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let length = (REQUEST_HEADER + body.len()) as u32;
    let mut message = [length.to_le_bytes(), opcode.to_le_bytes()].concat();
    message.extend_from_slice(&unique.to_le_bytes());
    message.extend_from_slice(&ROOT.to_le_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&CALLER_PID.to_le_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(body);
    message
}

fn reply(unique: u64, body: &[u8]) -> Vec<u8> {
    let length = (REPLY_HEADER + body.len()) as u32;
    [&length.to_le_bytes()[..], &[0; 4], &unique.to_le_bytes(), body].concat()
}

/// A session whose first request is a lookup with the number 2, until it ends.
async fn run(device: Device, kernel: &Kernel, guest: DuplexStream) -> SessionEnd {
    let mut buffer = vec![0; MAX_REQUEST];
    kernel.ask(&message_of(LOOKUP, 2, b"name\0"));
    let DeviceRead::Request(first) = device.read(&mut buffer).await.unwrap() else { panic!("no request") };
    session::run(&device, Box::new(guest), first, &mut buffer).await
}

async fn received(guest: &mut DuplexStream) -> (RequestHeader, Vec<u8>) {
    let mut header = [0; REQUEST_HEADER];
    guest.read_exact(&mut header).await.unwrap();
    let request = RequestHeader::decode(&header).unwrap();
    let mut body = vec![0; request.length - REQUEST_HEADER];
    guest.read_exact(&mut body).await.unwrap();
    (request, [&header[..], &body].concat())
}

#[tokio::test]
async fn requests_and_replies_pass() {
    let (kernel, device) = Kernel::new();
    let (ours, mut guest) = duplex(1 << 20);
    let (end, ()) = tokio::join!(run(device, &kernel, ours), async {
        let (request, message) = received(&mut guest).await;
        assert_eq!((request.opcode, request.unique, request.node), (LOOKUP, 2, ROOT));
        assert_eq!(&message[REQUEST_HEADER..], b"name\0");
        assert_eq!(&message[32..36], &[0; 4], "the guest does not get the caller's pid");
        kernel.ask(&message_of(opcode::INTERRUPT, 3, &2_u64.to_le_bytes()));
        kernel.ask(&message_of(opcode::FORGET, 4, &1_u64.to_le_bytes()));
        kernel.ask(&message_of(LOOKUP, 6, b"other\0"));
        let (forget, _) = received(&mut guest).await;
        let (other, _) = received(&mut guest).await;
        assert_eq!((forget.unique, other.unique), (4, 6), "what the host answers does not reach the guest");
        // In any order.
        guest.write_all(&reply(6, &[7; 128])).await.unwrap();
        guest.write_all(&refusal(2, libc::ENOENT)).await.unwrap();
        drop(guest);
    });
    assert!(matches!(end, SessionEnd::Stream(_)), "{end:?}");
    // The host has decided about the validity and the mode.
    let mut entry = [7; 128];
    entry[16..36].fill(0);
    entry[36..40].copy_from_slice(&10_000_000_u32.to_le_bytes());
    entry[101] &= !0o6000_u16.to_le_bytes()[1];
    assert_eq!(
        kernel.replies(),
        [refusal(3, libc::ENOSYS).to_vec(), reply(6, &entry), refusal(2, libc::ENOENT).to_vec()]
    );
}

#[tokio::test]
async fn a_malformed_reply_fails_the_request_and_ends_the_session() {
    let mut long = reply(2, b"");
    long[..4].copy_from_slice(&(MAX_REPLY as u32 + 1).to_le_bytes());
    let mut positive = reply(2, b"");
    positive[4..8].copy_from_slice(&1_i32.to_le_bytes());
    let mut error_and_more = reply(2, b"12345678");
    error_and_more[4..8].copy_from_slice(&(-2_i32).to_le_bytes());
    for (lie, message) in [
        ("no length", vec![0; REPLY_HEADER]),
        ("too long", long),
        ("a notification", reply(0, &[0; 16])),
        ("an answer to nothing", reply(8, b"")),
        ("no errno", positive),
        ("an error and more", error_and_more),
    ] {
        let (kernel, device) = Kernel::new();
        let (ours, mut guest) = duplex(1 << 20);
        guest.write_all(&message).await.unwrap();
        let end = run(device, &kernel, ours).await;
        assert!(matches!(end, SessionEnd::Malformed(_) | SessionEnd::Unexpected), "{lie}: {end:?}");
        assert_eq!(kernel.replies(), [refusal(2, libc::EIO)], "{lie}");
    }
}

#[tokio::test]
async fn a_listing_with_control_characters_fails_and_ends_the_session() {
    let (kernel, device) = Kernel::new();
    let (ours, mut guest) = duplex(1 << 20);
    let (end, ()) = tokio::join!(run(device, &kernel, ours), async {
        kernel.ask(&message_of(opcode::READDIR, 4, &[0; 40]));
        let mut dirent = vec![0; 24];
        dirent[16] = 4;
        dirent.extend_from_slice(b"\x1b[2J\0\0\0\0");
        received(&mut guest).await;
        received(&mut guest).await;
        guest.write_all(&reply(4, &dirent)).await.unwrap();
    });
    assert!(matches!(end, SessionEnd::Hostile(_)), "{end:?}");
    assert_eq!(kernel.replies(), [refusal(2, libc::EIO), refusal(4, libc::EIO)]);
}

#[tokio::test]
async fn a_second_reply_to_a_request_ends_the_session() {
    let (kernel, device) = Kernel::new();
    let (ours, mut guest) = duplex(1 << 20);
    guest.write_all(&[reply(2, b"first"), reply(2, b"second")].concat()).await.unwrap();
    let end = run(device, &kernel, ours).await;
    assert!(matches!(end, SessionEnd::Unexpected), "{end:?}");
    assert_eq!(kernel.replies(), [reply(2, b"first")]);
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_misses_the_deadline() {
    // The first two guests take the request and send nothing or a part of a reply; the third does not even
    // take it.
    for (room, part) in [(1 << 20, &b""[..]), (1 << 20, &reply(2, b"part")[..18]), (16, b"")] {
        let (kernel, device) = Kernel::new();
        let (ours, mut guest) = duplex(room);
        guest.write_all(part).await.unwrap();
        let end = run(device, &kernel, ours).await;
        assert!(matches!(end, SessionEnd::Deadline), "{end:?}");
        assert_eq!(kernel.replies(), [refusal(2, libc::EIO)]);
    }
}

#[tokio::test(start_paused = true)]
async fn requests_fail_at_once_while_a_guest_is_silent() {
    let (kernel, device) = Kernel::new();
    let mut buffer = vec![0; MAX_REQUEST];
    let (reopening, answers) = (tokio::sync::Notify::new(), tokio::sync::Notify::new());
    let (silent, _kept) = duplex(1 << 20);
    let (served, mut guest) = duplex(1 << 20);
    let streams = std::cell::RefCell::new(vec![served, silent]);
    // The first stream is there at once, the second when the guest answers again.
    let open = || async {
        if streams.borrow().len() == 1 {
            reopening.notify_one();
            answers.notified().await;
        }
        let stream: machinen_vm::BoxedStream = Box::new(streams.borrow_mut().pop().expect("asked twice"));
        Ok(stream)
    };
    let begun = tokio::time::Instant::now();
    let asking = async {
        kernel.ask(&message_of(LOOKUP, 2, b"name\0"));
        reopening.notified().await;
        assert_eq!(kernel.replies(), [refusal(2, libc::EIO)]);
        let waited = begun.elapsed();
        assert!(waited >= REPLY_DEADLINE, "it was not waited for: {waited:?}");
        kernel.ask(&message_of(LOOKUP, 4, b"name\0"));
        while kernel.replies() != [refusal(4, libc::EIO)] {
            tokio::task::yield_now().await;
        }
        assert_eq!(begun.elapsed(), waited, "it was waited for again");
        answers.notify_one();
        tokio::task::yield_now().await;
        kernel.ask(&message_of(LOOKUP, 6, b"name\0"));
        let (request, _) = received(&mut guest).await;
        assert_eq!(request.unique, 6);
    };
    tokio::select! {
        end = requests("id", &device, &mut buffer, open) => panic!("{end:?}"),
        () = asking => {}
    }
}

#[tokio::test]
async fn more_requests_wait_in_the_kernel() {
    let (kernel, device) = Kernel::new();
    let (ours, mut guest) = duplex(1 << 20);
    let (end, ()) = tokio::join!(run(device, &kernel, ours), async {
        for unique in 3..=66 {
            kernel.ask(&message_of(LOOKUP, unique * 2, b"x\0"));
        }
        for _ in 0..64 {
            received(&mut guest).await;
        }
        let early = tokio::time::timeout(std::time::Duration::from_millis(50), received(&mut guest)).await;
        assert!(early.is_err(), "the guest has got a request beyond its share");
        guest.write_all(&reply(2, b"")).await.unwrap();
        received(&mut guest).await;
        drop(guest);
    });
    assert!(matches!(end, SessionEnd::Stream(_)), "{end:?}");
    assert_eq!(kernel.replies().len(), 65, "every request has a reply");
}

#[tokio::test]
async fn before_the_guest_is_attached_only_the_root_is_served() {
    let (kernel, device) = Kernel::new();
    let mut buffer = vec![0; MAX_REQUEST];
    let init: Vec<u8> = [7, 45, 131_072, u32::MAX].iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
    for message in [
        message_of(opcode::INIT, 2, &init),
        message_of(opcode::GETATTR, 4, &[0; 16]),
        message_of(LOOKUP, 6, b"etc\0"),
        message_of(opcode::FORGET, 8, &[1; 8]),
    ] {
        kernel.ask(&message);
        let DeviceRead::Request(request) = device.read(&mut buffer).await.unwrap() else {
            panic!("no request")
        };
        answers::without_guest(&device, request, &buffer).unwrap();
    }
    let mut fuse_init_out = vec![0; 64];
    // 7.31, no readahead; FUSE_BIG_WRITES, FUSE_PARALLEL_DIROPS, FUSE_MAX_PAGES; 128 KiB in 32 pages.
    for (at, word) in [(0, 7_u32), (4, 31), (12, 0x44_0020), (20, 128 << 10), (24, 1), (28, 32)] {
        fuse_init_out[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    let mut fuse_attr_out = vec![0; 104];
    for (at, word) in [(16, 1_u32), (76, 0o40_755), (80, 2)] {
        fuse_attr_out[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    let replies = [reply(2, &fuse_init_out), reply(4, &fuse_attr_out), refusal(6, libc::EAGAIN).to_vec()];
    assert_eq!(kernel.replies(), replies);
}

proptest! {
    #[test]
    fn the_kernel_gets_valid_replies_whatever_a_guest_sends(
        chunks in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..64),
            (1_u64..6, prop::collection::vec(any::<u8>(), 0..64)).prop_map(|(n, body)| reply(n * 2, &body)),
            (1_u64..6, 0..600_i32).prop_map(|(n, errno)| refusal(n * 2, errno).to_vec()),
        ], 0..12)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let replies = runtime.block_on(async {
            let (kernel, device) = Kernel::new();
            let (ours, mut guest) = duplex(1 << 20);
            let requests = async {
                for unique in [4, 6, 8] {
                    kernel.ask(&message_of(LOOKUP, unique, b"x\0"));
                }
                for chunk in &chunks {
                    guest.write_all(chunk).await.unwrap();
                }
                tokio::task::yield_now().await;
                drop(guest);
            };
            tokio::join!(run(device, &kernel, ours), requests);
            kernel.replies()
        });
        let mut answered = Vec::new();
        for message in &replies {
            let reply = ReplyHeader::decode(message.first_chunk().unwrap()).unwrap();
            prop_assert_eq!(reply.length, message.len());
            prop_assert!([2, 4, 6, 8].contains(&reply.unique));
            answered.push(reply.unique);
        }
        let total = answered.len();
        answered.sort_unstable();
        answered.dedup();
        prop_assert_eq!(answered.len(), total, "answered twice");
        prop_assert!(answered.contains(&2));
    }
}
