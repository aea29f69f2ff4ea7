//! One stream of requests, served by one thread: a request, then its reply.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use fuse_backend_rs::{
    api::{filesystem::FileSystem as _, server::Server},
    passthrough::PassthroughFs,
    transport::{FuseBuf, FuseDevWriter, Reader},
};
use machinen_protocol::{
    fuse::{REPLY_HEADER, REQUEST_HEADER, RequestHeader, opcode, refusal},
    shares::MAX_MESSAGE,
    sockets::KIND_OF_SOCKET,
};

use super::{
    dial,
    extended::Extended,
    init::{InitRefusal, InitRequest},
};

/// The files that all queues of a pod serve.
#[derive(Clone)]
pub(super) struct Files {
    files: Arc<PassthroughFs>,
    server: Arc<Server<Arc<PassthroughFs>>>,
    extended: Arc<Extended>,
}

impl Files {
    /// The files below the directory `root`.
    pub(super) fn new(files: PassthroughFs, root: &'static str) -> Self {
        let files = Arc::new(files);
        Self {
            server: Arc::new(Server::new(Arc::clone(&files))),
            files,
            extended: Arc::new(Extended::new(root)),
        }
    }

    /// Connects to sockets of the volumes, until the control socket ends.
    ///
    /// # Errors
    /// The socket has failed.
    pub(super) fn dial(&self, control: OwnedFd) -> io::Result<()> {
        dial::serve(control, &self.files)
    }

    /// Serves until the stream ends.
    ///
    /// # Errors
    /// The stream has failed, or a message is not one of FUSE.
    pub(super) fn serve(&self, mut stream: File) -> io::Result<()> {
        let (mut request, mut reply) = (vec![0; MAX_MESSAGE], vec![0; MAX_MESSAGE]);
        while let Some(header) = receive(&mut stream, &mut request)? {
            self.answer(&mut stream, header, &mut request[..header.length], &mut reply)?;
        }
        Ok(())
    }

    fn answer(
        &self,
        stream: &mut File,
        header: RequestHeader,
        request: &mut [u8],
        reply: &mut [u8],
    ) -> io::Result<()> {
        let body = &request[REQUEST_HEADER..];
        match header.opcode {
            opcode::INIT => return stream.write_all(&self.negotiate(header, body)),
            // The library would resolve these names, which a kernel sends only for NFS.
            opcode::LOOKUP if is_relative(body) => {
                return stream.write_all(&refusal(header.unique, libc::ESTALE));
            }
            KIND_OF_SOCKET => return stream.write_all(&self.kind_of_socket(header)),
            // The agent keeps these to itself.
            opcode::INTERRUPT | opcode::DESTROY => return Ok(()),
            _ => {}
        }
        if let Some(answer) = self.extended.answer(&self.files, header, user(request), body) {
            return if answer.is_empty() { Ok(()) } else { stream.write_all(&answer) };
        }
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request)).map_err(io::Error::other)?;
        // A write to a blocking socket is complete, so a reply needs no buffer of its own.
        let writer = FuseDevWriter::<()>::new(stream.as_raw_fd(), reply).map_err(io::Error::other)?;
        // Everything that an honest kernel sends is answered, with an errno if need be.
        let answered = self.server.handle_message(reader, writer.into(), None, None);
        answered.map(drop).map_err(|error| io::Error::other(format!("a request cannot be answered: {error}")))
    }

    fn kind_of_socket(&self, header: RequestHeader) -> Vec<u8> {
        match dial::kind(&self.files, header.node) {
            Ok(kind) => {
                let body = kind.encode();
                let length = (REPLY_HEADER + body.len()) as u32;
                [&length.to_le_bytes()[..], &[0; 4], &header.unique.to_le_bytes(), &body].concat()
            }
            Err(error) => refusal(header.unique, error.raw_os_error().unwrap_or(libc::EIO)).to_vec(),
        }
    }

    fn negotiate(&self, header: RequestHeader, body: &[u8]) -> Vec<u8> {
        let failed = |errno| refusal(header.unique, errno).to_vec();
        match InitRequest::decode(body) {
            Ok(wish) => match self.files.init(wish.options()) {
                Ok(_) => wish.reply(header.unique),
                Err(error) => failed(error.raw_os_error().unwrap_or(libc::EIO)),
            },
            Err(InitRefusal::Malformed) => failed(libc::EINVAL),
            Err(InitRefusal::Version) => failed(libc::EPROTO),
        }
    }
}

/// Reads one request. None: the stream has ended between two requests.
fn receive(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<Option<RequestHeader>> {
    let (header, rest) = buffer.split_at_mut(REQUEST_HEADER);
    let first = loop {
        match stream.read(header) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read?,
        }
    };
    if first == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut header[first..])?;
    let header = header.as_array().expect("split there");
    let request = RequestHeader::decode_within(header, MAX_MESSAGE).map_err(io::Error::other)?;
    stream.read_exact(&mut rest[..request.length - REQUEST_HEADER])?;
    Ok(Some(request))
}

/// The user and the group of the process that makes a request (fuse_in_header).
fn user(request: &[u8]) -> (u32, u32) {
    let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().expect("within the header"));
    (word(24), word(28))
}

/// Whether a name, which ends with a NUL, is `.` or `..`.
fn is_relative(name: &[u8]) -> bool {
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    name == b"." || name == b".."
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.resize(REQUEST_HEADER, 0);
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn messages_are_read_whole() {
        let mut buffer = vec![0; MAX_MESSAGE];
        let stream = [message(44, b"abcd"), message(40, b"")].concat();
        let mut stream = stream.as_slice();
        assert_eq!(receive(&mut stream, &mut buffer).unwrap().unwrap().length, 44);
        assert_eq!(&buffer[REQUEST_HEADER..44], b"abcd");
        assert_eq!(receive(&mut stream, &mut buffer).unwrap().unwrap().length, 40);
        assert!(receive(&mut stream, &mut buffer).unwrap().is_none());
    }

    #[test]
    fn a_stream_that_breaks_off_and_impossible_lengths_are_errors() {
        let mut buffer = vec![0; MAX_MESSAGE];
        for stream in [
            message(44, b"ab"),
            message(39, b""),
            message(MAX_MESSAGE as u32 + 1, b""),
            message(u32::MAX, b""),
            b"ab".to_vec(),
        ] {
            assert!(receive(&mut stream.as_slice(), &mut buffer).is_err(), "{stream:?}");
        }
    }

    #[test]
    fn names_that_lead_upwards_are_known() {
        assert!(is_relative(b".\0") && is_relative(b"..\0") && is_relative(b"..\0x\0"));
        assert!(!is_relative(b"...\0") && !is_relative(b"a\0") && !is_relative(b""));
    }
}
