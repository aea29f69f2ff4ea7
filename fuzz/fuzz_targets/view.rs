//! All bytes with which a guest answers requests for a container's files: the host's kernel gets one reply to
//! each of its requests, or an error.
#![no_main]

use std::os::unix::net::UnixDatagram;

use libfuzzer_sys::fuzz_target;
use machinen::view::session;
use machinen_protocol::fuse::{MAX_REPLY, REQUEST_HEADER, ReplyHeader};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, sink};

/// The numbers of the requests; low ones are found soon.
const ASKED: std::ops::RangeInclusive<u64> = 1..=4;
const LOOKUP: u32 = 1;

fuzz_target!(|data: &[u8]| {
    let (kernel, device) = UnixDatagram::pair().expect("a pair of sockets");
    for socket in [&kernel, &device] {
        socket.set_nonblocking(true).expect("a socket");
    }
    for unique in ASKED {
        let mut request = [0; REQUEST_HEADER + 2];
        request[..4].copy_from_slice(&(REQUEST_HEADER as u32 + 2).to_le_bytes());
        request[4..8].copy_from_slice(&LOOKUP.to_le_bytes());
        request[8..16].copy_from_slice(&unique.to_le_bytes());
        request[REQUEST_HEADER] = b'x';
        kernel.send(&request).expect("room");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, guests) = duplex(1 << 20);
        let (mut requests, mut replies) = tokio::io::split(guests);
        let guest = async {
            let _closed = replies.write_all(data).await;
            let _closed = replies.shutdown().await;
            let mut some = [0; REQUEST_HEADER];
            let _read = requests.read(&mut some).await;
            let _read = tokio::io::copy(&mut requests, &mut sink()).await;
        };
        tokio::join!(session(device.into(), Box::new(ours)), guest);
    });
    let (mut buffer, mut answered) = (vec![0; MAX_REPLY + 1], Vec::new());
    while let Ok(length) = kernel.recv(&mut buffer) {
        let reply = ReplyHeader::decode(buffer.first_chunk().expect("it is larger")).expect("a reply");
        assert_eq!(reply.length, length);
        assert!(ASKED.contains(&reply.unique) && !answered.contains(&reply.unique), "{reply:?}");
        answered.push(reply.unique);
    }
    assert!(answered.contains(ASKED.start()), "the first request has no answer");
});
