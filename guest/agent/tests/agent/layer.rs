//! The archive of a container's changes, as the host receives it.

use std::{collections::BTreeMap, io::Read};

use machinen_protocol::{
    api,
    layer::{FILE_TYPE, Records, SOCKET, SPARSE_SIZE},
};
use tar::EntryType;
use tokio::io::AsyncReadExt;
use ttrpc::Code;

use crate::support::{Guest, Spec, context, status, within};

/// An entry of the archive: its header, its records as text, its data.
struct Entry {
    header: tar::Header,
    records: BTreeMap<String, String>,
    data: Vec<u8>,
}

async fn export(guest: &mut Guest, id: &str) -> BTreeMap<String, Entry> {
    let (token, mut stream) = guest.stream().await;
    let request = api::ExportLayerRequest { container_id: id.into(), stream: token, ..Default::default() };
    let agent = guest.agent.clone();
    let mut answer = tokio::spawn(async move { agent.export_layer(context(), &request).await });
    // The stream stays open, so do not read to its end.
    let (mut bytes, mut total) = (Vec::new(), None);
    while total.is_none_or(|total| bytes.len() < total) {
        tokio::select! {
            answered = &mut answer, if total.is_none() => {
                total = Some(usize::try_from(answered.unwrap().unwrap().total_bytes).unwrap());
            }
            read = within(stream.read_buf(&mut bytes)) => assert_ne!(read.unwrap(), 0),
        }
    }
    assert_eq!(Some(bytes.len()), total);
    entries(&bytes)
}

fn entries(bytes: &[u8]) -> BTreeMap<String, Entry> {
    let (mut found, mut records) = (BTreeMap::new(), BTreeMap::new());
    for entry in tar::Archive::new(bytes).entries().unwrap().raw(true) {
        let mut entry = entry.unwrap();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).unwrap();
        if entry.header().entry_type() == EntryType::XHeader {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            records = Records(&data).map(|record| record.unwrap()).map(|(k, v)| (text(k), text(v))).collect();
            continue;
        }
        let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        let records = std::mem::take(&mut records);
        let path = records.get("path").cloned().unwrap_or(path);
        let entry = Entry { header: entry.header().clone(), records, data };
        assert!(found.insert(path, entry).is_none(), "a name comes twice");
    }
    found
}

#[tokio::test]
async fn a_container_without_writes_has_an_unchanged_layer() {
    let guest = Guest::start().await;
    guest.create("a", &Spec::new(&["true"])).await.unwrap();
    guest.start_container("a").await.unwrap();
    assert!(guest.wait("a").await.layer_unchanged);
    guest.delete("a").await.unwrap();
    guest.create("b", &Spec::sh("touch /new")).await.unwrap();
    guest.start_container("b").await.unwrap();
    assert!(!guest.wait("b").await.layer_unchanged);
    guest.delete("b").await.unwrap();
}

#[tokio::test]
async fn everything_written_is_in_the_archive() {
    let mut guest = Guest::start().await;
    let long = "n".repeat(255);
    let script = format!(
        "echo data > /file; chmod 4711 /file; mkdir -p /d/e; echo x > /d/e/{long}; cat /d/e/{long} > /dev/null; \
         dd if=/dev/zero of=/sparse bs=4096 count=1 seek=1000 2> /dev/null"
    );
    guest.create("a", &Spec::sh(&script)).await.unwrap();
    guest.start_container("a").await.unwrap();
    let ended = guest.wait("a").await;
    assert_eq!((ended.exit_status, ended.layer_unchanged), (0, false));
    let found = export(&mut guest, "a").await;
    assert_eq!(found["."].header.entry_type(), EntryType::Directory);
    let file = &found["file"];
    assert_eq!((file.header.mode().unwrap(), file.data.as_slice()), (0o4711, &b"data\n"[..]));
    assert!(file.records.contains_key("mtime"), "{:?}", file.records);
    assert_eq!(found[&format!("d/e/{long}")].data, b"x\n");
    let sparse = &found["sparse"];
    assert_eq!(sparse.records[SPARSE_SIZE], (1001 * 4096).to_string());
    assert_eq!(sparse.data.len(), 512 + 4096);
    for entry in found.values() {
        let overlay =
            entry.records.keys().find(|key| key.contains("trusted.overlay") && !key.ends_with("opaque"));
        assert_eq!(overlay, None);
    }
    // The archive can be sent again, and sending it changes nothing.
    assert_eq!(export(&mut guest, "a").await.len(), found.len());
    guest.delete("a").await.unwrap();
}

#[tokio::test]
async fn links_and_sockets_are_in_the_archive() {
    let mut guest = Guest::start().await;
    // syslogd follows the link to the place where it binds.
    let script = "ln -s /socket /dev/log; syslogd -n & until test -S /socket; do usleep 10000; done; kill -9 $!; \
                  chmod 640 /socket; chown 5:6 /socket; ln /socket /socket2; ln -s nowhere /link; ln /link /link2; mkfifo /fifo";
    guest.create("a", &Spec::sh(script)).await.unwrap();
    guest.start_container("a").await.unwrap();
    assert_eq!(guest.wait("a").await.exit_status, 0);
    let found = export(&mut guest, "a").await;
    let socket = &found["socket"];
    assert_eq!((socket.header.entry_type(), socket.records[FILE_TYPE].as_str()), (EntryType::Fifo, SOCKET));
    let owner = (socket.header.uid().unwrap(), socket.header.gid().unwrap());
    assert_eq!((socket.header.mode().unwrap(), owner), (0o640, (5, 6)));
    assert!(!found["fifo"].records.contains_key(FILE_TYPE));
    for (name, first) in [("socket2", "socket"), ("link2", "link")] {
        let header = &found[name].header;
        assert_eq!(header.entry_type(), EntryType::Link);
        assert_eq!(header.link_name_bytes().unwrap().as_ref(), first.as_bytes());
    }
    guest.delete("a").await.unwrap();
}

#[tokio::test]
async fn an_export_needs_a_container_and_a_stream() {
    let mut guest = Guest::start().await;
    let (token, _stream) = guest.stream().await;
    let ask =
        |id: &str, stream| api::ExportLayerRequest { container_id: id.into(), stream, ..Default::default() };
    let refused = guest.agent.export_layer(context(), &ask("missing", token)).await;
    assert_eq!(status(refused).0, Code::NOT_FOUND);
    guest.create("a", &Spec::new(&["true"])).await.unwrap();
    let refused = guest.agent.export_layer(context(), &ask("a", 999)).await;
    assert_eq!(status(refused).0, Code::NOT_FOUND);
    guest.delete("a").await.unwrap();
}

#[tokio::test]
async fn a_host_that_hangs_up_stops_the_export() {
    let mut guest = Guest::start().await;
    guest.create("a", &Spec::sh("dd if=/dev/zero of=/big bs=1024 count=4096 2> /dev/null")).await.unwrap();
    guest.start_container("a").await.unwrap();
    guest.wait("a").await;
    let (token, stream) = guest.stream().await;
    drop(stream);
    let request = api::ExportLayerRequest { container_id: "a".into(), stream: token, ..Default::default() };
    let refused = guest.agent.export_layer(context(), &request).await;
    assert_eq!(status(refused).0, Code::INTERNAL);
    // The agent still works.
    assert!(!export(&mut guest, "a").await.is_empty());
    guest.delete("a").await.unwrap();
}
