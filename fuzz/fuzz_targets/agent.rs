//! The control stream after its handshake: for any input from the guest, every call ends, at the latest with
//! the stream.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machinen::agent::Client;
use machinen_protocol::process::ProcessRef;
use tokio::io::AsyncWriteExt;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, mut guests) = tokio::io::duplex(64 << 10);
        let client = Client::new(Box::new(ours));
        let calls = async {
            let (deleted, exit, files) = tokio::join!(
                client.delete_container("c"),
                client.wait_process("c", &ProcessRef::Init),
                client.read_cgroup("c", &["cpu.stat"]),
            );
            drop((deleted, exit, files));
        };
        let guest = async {
            // The host may close the stream early.
            let _closed = guests.write_all(data).await;
            let _closed = guests.shutdown().await;
            // The guest has to read what the host sends, or calls are never sent.
            let _read = tokio::io::copy(&mut guests, &mut tokio::io::sink()).await;
        };
        tokio::select! { () = calls => {}, () = async { guest.await; std::future::pending().await } => {} }
    });
});
