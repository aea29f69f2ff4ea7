//! What a guest sends about the ports of its localhost, on connections to them, and to nameservers of the host.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machinen::network::fuzzing::{frames, queries, report};
use machinen_protocol::localhost::MAX_PORTS;
use tokio::io::{AsyncWriteExt, copy, duplex, sink, split};

fuzz_target!(|data: &[u8]| {
    let Some((&kind, data)) = data.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, guests) = duplex(1 << 16);
        let (mut reader, mut writer) = split(guests);
        let guest = async {
            let _closed = writer.write_all(data).await;
            let _closed = writer.shutdown().await;
            let _read = copy(&mut reader, &mut sink()).await;
        };
        let host = async {
            let ours = Box::new(ours);
            match kind % 3 {
                0 => assert!(report(ours).await.is_ok_and(|ports| ports > MAX_PORTS) == false),
                1 => {
                    if let Ok(taken) = frames(ours).await {
                        assert!(taken.len() < data.len());
                    }
                }
                _ => queries(ours).await.expect("this process has a network namespace"),
            }
        };
        tokio::join!(host, guest);
    });
});
