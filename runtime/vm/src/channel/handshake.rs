//! The first bytes of each stream, on the host's side (see the protocol crate's `preamble`).

use machinen_protocol::preamble::{ANSWER_LEN, Answer, PREAMBLE_LEN, Preamble, PreambleError, StreamKind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{BoxedStream, ByteStream, VmChannelError};

/// Accepts streams until one of them is a control stream.
///
/// The guest gives up a call whose answer is late, and calls again. So a stream without a greeting may be one that the
/// guest has given up, and a newer stream replaces it.
pub(super) async fn control<F>(accept: impl Fn() -> F) -> Result<BoxedStream, VmChannelError>
where
    F: Future<Output = Result<BoxedStream, VmChannelError>>,
{
    let mut stream = accept().await?;
    loop {
        let newer = tokio::select! {
            biased;
            accepted = accept_control(&mut stream) => match accepted {
                Ok(()) => return Ok(stream),
                Err(VmChannelError::Closed(error)) => {
                    tracing::debug!("the guest has given up a control stream: {error}");
                    accept().await?
                }
                Err(error) => return Err(error),
            },
            newer = accept() => newer?,
        };
        stream = newer;
    }
}

/// Reads the guest's first bytes and answers them.
pub(super) async fn accept_control(stream: &mut (impl ByteStream + ?Sized)) -> Result<(), VmChannelError> {
    let mut bytes = [0; PREAMBLE_LEN];
    stream.read_exact(&mut bytes).await.map_err(VmChannelError::Closed)?;
    let verdict = match Preamble::decode(&bytes) {
        Ok(Preamble { kind: StreamKind::Control, token: 0 }) => Ok(()),
        Ok(Preamble { kind, token }) => {
            let (field, value) = match kind {
                StreamKind::Control => ("control token", token),
                StreamKind::Raw | StreamKind::Waiting => ("stream kind", kind.number().into()),
            };
            Err(VmChannelError::Protocol(PreambleError::Unknown { field, value }))
        }
        Err(error) => Err(VmChannelError::from(error)),
    };
    let answer = match verdict {
        Ok(()) => Answer::Accepted,
        Err(VmChannelError::Version(_)) => Answer::WrongVersion,
        Err(_) => Answer::Refused,
    };
    let written = async {
        stream.write_all(&answer.encode()).await?;
        stream.flush().await
    };
    // If the guest has closed the stream already, the verdict is still the error to report.
    let written = written.await.map_err(VmChannelError::Closed);
    verdict.and(written)
}

/// Announces the purpose of a stream that the host has dialled, and waits until the agent accepts it.
pub(super) async fn offer(
    stream: &mut (impl ByteStream + ?Sized),
    preamble: Preamble,
) -> Result<(), VmChannelError> {
    let mut bytes = [0; ANSWER_LEN];
    let exchange = async {
        stream.write_all(&preamble.encode()).await?;
        stream.flush().await?;
        stream.read_exact(&mut bytes).await
    };
    exchange.await.map_err(VmChannelError::Closed)?;
    match Answer::decode(&bytes)? {
        Answer::Accepted => Ok(()),
        Answer::Refused => Err(VmChannelError::Refused),
        // Decoding the answer has checked the agent's version, so this answer contradicts itself.
        Answer::WrongVersion => {
            Err(VmChannelError::Protocol(PreambleError::Unknown { field: "answer", value: 1 }))
        }
    }
}

impl From<PreambleError> for VmChannelError {
    fn from(error: PreambleError) -> Self {
        match error {
            PreambleError::Version { .. } => Self::Version(error),
            _ => Self::Protocol(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    fn chain(error: &VmChannelError) -> String {
        machinen_base::error::chain(error)
    }

    #[tokio::test]
    async fn a_control_stream_is_accepted() {
        let (mut host, mut guest) = duplex(64);
        guest.write_all(&Preamble { kind: StreamKind::Control, token: 0 }.encode()).await.unwrap();
        accept_control(&mut host).await.unwrap();
        let mut answer = [0; ANSWER_LEN];
        guest.read_exact(&mut answer).await.unwrap();
        assert_eq!(Answer::decode(&answer), Ok(Answer::Accepted));
    }

    #[tokio::test]
    async fn another_version_names_both_and_the_remedy() {
        let (mut host, mut guest) = duplex(64);
        let mut first = Preamble { kind: StreamKind::Control, token: 0 }.encode();
        first[8] = 77;
        guest.write_all(&first).await.unwrap();
        let error = accept_control(&mut host).await.unwrap_err();
        let text = chain(&error);
        assert!(
            text.contains("make guest-image") && text.contains("77") && text.contains("speaks"),
            "{text}"
        );
        let mut answer = [0; ANSWER_LEN];
        guest.read_exact(&mut answer).await.unwrap();
        assert_eq!(Answer::decode(&answer), Ok(Answer::WrongVersion));
    }

    #[tokio::test]
    async fn other_first_bytes_are_refused() {
        for first in [[0; PREAMBLE_LEN], Preamble { kind: StreamKind::Raw, token: 1 }.encode()] {
            let (mut host, mut guest) = duplex(64);
            guest.write_all(&first).await.unwrap();
            assert!(matches!(accept_control(&mut host).await, Err(VmChannelError::Protocol(_))));
        }
        let (mut host, guest) = duplex(64);
        drop(guest);
        assert!(matches!(accept_control(&mut host).await, Err(VmChannelError::Closed(_))));
    }

    #[tokio::test]
    async fn streams_that_the_guest_has_given_up_are_replaced() {
        let (calls, accepted) = tokio::sync::mpsc::unbounded_channel();
        let accepted = tokio::sync::Mutex::new(accepted);
        let accept = || async { Ok(accepted.lock().await.recv().await.unwrap()) };
        let call = || {
            let (host, guest) = duplex(64);
            calls.send(Box::new(host) as BoxedStream).unwrap();
            guest
        };
        // One ends half-way, and one stays silent.
        let mut closed = call();
        closed.write_all(b"mach").await.unwrap();
        drop(closed);
        let silent = call();
        let mut last = call();
        last.write_all(&Preamble { kind: StreamKind::Control, token: 0 }.encode()).await.unwrap();
        let mut control = control(accept).await.unwrap();
        control.write_all(b"hello").await.unwrap();
        let mut read = [0; ANSWER_LEN + 5];
        last.read_exact(&mut read).await.unwrap();
        assert_eq!(&read[ANSWER_LEN..], b"hello");
        drop(silent);
    }

    #[tokio::test]
    async fn an_offer_is_answered_three_ways() {
        let preamble = Preamble { kind: StreamKind::Raw, token: 5 };
        let mut older = Answer::WrongVersion.encode();
        older[8] -= 1;
        for (answer, expected) in [
            (Answer::Accepted.encode(), "accepted"),
            (Answer::Refused.encode(), "the guest agent refused a stream"),
            (older, "rebuild the guest image"),
        ] {
            let (mut host, mut guest) = duplex(64);
            guest.write_all(&answer).await.unwrap();
            let text = match offer(&mut host, preamble).await {
                Ok(()) => "accepted".to_owned(),
                Err(error) => chain(&error),
            };
            assert!(text.contains(expected), "{text}");
            let mut sent = [0; PREAMBLE_LEN];
            guest.read_exact(&mut sent).await.unwrap();
            assert_eq!(Preamble::decode(&sent), Ok(preamble));
        }
    }
}
