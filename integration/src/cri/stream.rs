//! Streams of containers and ports of pods through containerd's streaming server, by websocket.
//!
//! A call of CRI returns an address, and a client that dials it gets the streams: each message begins with the number of
//! its stream (Kubernetes, `v4.channel.k8s.io`).

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::AsFd as _,
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use machinen_base::netns;
use serde_json::Value;
use tungstenite::{Error, Message, WebSocket, client::IntoClientRequest, http::HeaderValue};

use super::{Node, PATIENCE};

/// The streams of a process.
pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
/// How the process has ended, as JSON.
pub const STATUS: u8 = 3;
/// The size of the process's terminal, as JSON.
pub const SIZE: u8 = 4;

const PROTOCOL: &str = "v4.channel.k8s.io";

/// An open connection, with what has arrived on each stream.
#[derive(Debug)]
pub struct Streams {
    socket: WebSocket<TcpStream>,
    received: [Vec<u8>; 4],
}

impl Streams {
    /// Dials the address that a call has returned.
    ///
    /// # Errors
    /// The server does not accept.
    pub fn open(node: &Node, url: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").with_context(|| format!("odd address {url:?}"))?;
        let address: SocketAddr =
            rest.split('/').next().unwrap_or_default().parse().context("odd address")?;
        let path = format!("/proc/{}/ns/net", node.containerd().keeper_pid());
        let namespace = netns::open(Path::new(&path))?;
        let stream = netns::inside(namespace.as_fd(), || TcpStream::connect(address))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut request = format!("ws://{rest}").into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
        let (socket, _) = tungstenite::client(request, stream).context("no websocket")?;
        Ok(Self { socket, received: Default::default() })
    }

    /// Sends bytes on a stream.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn send(&mut self, stream: u8, bytes: &[u8]) -> Result<()> {
        let message = [&[stream], bytes].concat();
        Ok(self.socket.send(Message::binary(message))?)
    }

    /// Waits until a text has arrived on a stream.
    ///
    /// # Errors
    /// The connection ends before.
    pub fn wait_for(&mut self, stream: u8, text: &str) -> Result<()> {
        while !self.text(stream).contains(text) {
            ensure!(self.receive()?, "no {text:?}, but {:?}", [0, 1, 2, 3].map(|stream| self.text(stream)));
        }
        Ok(())
    }

    /// Receives until the server ends the connection.
    ///
    /// # Errors
    /// The connection breaks.
    pub fn to_end(&mut self) -> Result<()> {
        while self.receive()? {}
        Ok(())
    }

    /// What has arrived on a stream.
    pub fn text(&self, stream: u8) -> String {
        String::from_utf8_lossy(&self.received[usize::from(stream)]).into_owned()
    }

    /// The exit code of the process, after the end of the connection.
    ///
    /// # Errors
    /// The server has not reported it.
    pub fn exit_code(&self) -> Result<i32> {
        let text = self.text(STATUS);
        let status: Value = serde_json::from_str(&text).with_context(|| format!("odd status {text:?}"))?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        let causes = status["details"]["causes"].as_array().cloned().unwrap_or_default();
        let code = causes.iter().find(|cause| cause["reason"] == "ExitCode");
        let code = code.and_then(|cause| cause["message"].as_str());
        Ok(code.with_context(|| format!("no exit code in {text}"))?.parse()?)
    }

    /// False at the end of the connection.
    fn receive(&mut self) -> Result<bool> {
        let bytes = match self.socket.read() {
            Ok(Message::Binary(bytes)) => bytes,
            Ok(Message::Close(_)) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => return Ok(false),
            // containerd does not always say goodbye.
            Err(Error::Protocol(_)) => return Ok(false),
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            Ok(Message::Ping(_) | Message::Pong(_)) => return Ok(true),
            Ok(other) => bail!("odd message {other:?}"),
            Err(error) => return Err(error.into()),
        };
        let (stream, bytes) = bytes.split_first().context("a message without a stream")?;
        let received =
            self.received.get_mut(usize::from(*stream)).with_context(|| format!("stream {stream}"))?;
        received.extend_from_slice(bytes);
        Ok(true)
    }
}
