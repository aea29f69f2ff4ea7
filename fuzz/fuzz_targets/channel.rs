//! All bytes that a guest writes to its serial port: the host either fails or gets a control stream.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machinen::{agent::Client, vm::greet};
use tokio::{io::AsyncWriteExt, net::UnixStream};

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, mut guests) = UnixStream::pair().expect("a pair of sockets");
        let host = async {
            if let Ok(control) = greet(ours).await {
                let _ended = Client::new(control).delete_container("c").await;
            }
        };
        let guest = async {
            let _closed = guests.write_all(data).await;
            let _closed = guests.shutdown().await;
            let _read = tokio::io::copy(&mut guests, &mut tokio::io::sink()).await;
        };
        tokio::join!(host, guest);
    });
});
