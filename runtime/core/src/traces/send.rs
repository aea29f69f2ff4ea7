//! Sends requests to a receiver of OTLP/HTTP on the node or in the cluster.

use std::{env, io, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// How long a receiver may take for one request.
const DEADLINE: Duration = Duration::from_secs(5);
/// The status line, which is all that is read of a reply, is not longer.
const MOST_REPLY: u64 = 1024;

/// Where traces are sent: plain HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `HOST:PORT`
    authority: String,
    path: String,
}

/// Why traces cannot be sent to an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It is not a URL that is supported.
    #[error(
        "the endpoint of traces is {endpoint:?}; it takes http://HOST:PORT/PATH, such as \
         http://127.0.0.1:4318/v1/traces of a collector on the node"
    )]
    Url {
        /// The endpoint.
        endpoint: String,
    },
    /// Another protocol is asked for.
    #[error("OTEL_EXPORTER_OTLP_PROTOCOL is {protocol:?}; traces are sent by http/json only")]
    Protocol {
        /// The protocol.
        protocol: String,
    },
}

/// Why a request has failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    #[error("cannot send to {endpoint}")]
    Io { endpoint: String, source: io::Error },
    #[error("{endpoint} has not answered within {DEADLINE:?}")]
    Late { endpoint: String },
    #[error("{endpoint} has answered {status:?}")]
    Refused { endpoint: String, status: String },
}

impl Endpoint {
    /// # Errors
    /// The text is no URL of plain HTTP.
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        let odd = || EndpointError::Url { endpoint: text.to_owned() };
        let rest = text.strip_prefix("http://").ok_or_else(odd)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let is_plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if authority.is_empty() || authority.contains('@') || !is_plain(authority) || !is_plain(path) {
            return Err(odd());
        }
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let authority = if has_port { authority.to_owned() } else { format!("{authority}:80") };
        Ok(Self { authority, path: format!("/{path}") })
    }

    /// The endpoint of the configuration, or that of OpenTelemetry's environment variables, which containerd passes on.
    ///
    /// # Errors
    /// The endpoint or the protocol is not supported.
    pub fn find(configured: &str) -> Result<Option<Self>, EndpointError> {
        Self::find_in(configured, |name| env::var(name).ok())
    }

    fn find_in(
        configured: &str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, EndpointError> {
        if !configured.is_empty() {
            return Self::parse(configured).map(Some);
        }
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let is_off = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
            || variable("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
        let endpoint = variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or_else(|| {
            let base = variable("OTEL_EXPORTER_OTLP_ENDPOINT")?;
            Some(format!("{}/v1/traces", base.trim_end_matches('/')))
        });
        let Some(endpoint) = endpoint.filter(|_| !is_off) else { return Ok(None) };
        let protocol = variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL");
        match protocol.or_else(|| variable("OTEL_EXPORTER_OTLP_PROTOCOL")) {
            Some(protocol) if !protocol.starts_with("http/") => Err(EndpointError::Protocol { protocol }),
            _ => Self::parse(&endpoint).map(Some),
        }
    }
}

/// Sends one request, and waits for the status of the reply.
///
/// # Errors
/// The receiver cannot be reached, is too slow, or refuses the request.
pub(super) async fn post(to: &Endpoint, body: &[u8]) -> Result<(), SendError> {
    let endpoint = || to.authority.clone();
    let status = match timeout(DEADLINE, exchange(to, body)).await {
        Ok(status) => status.map_err(|source| SendError::Io { endpoint: endpoint(), source })?,
        Err(_) => return Err(SendError::Late { endpoint: endpoint() }),
    };
    match status.split(' ').nth(1) {
        Some(code) if code.starts_with('2') => Ok(()),
        _ => Err(SendError::Refused { endpoint: endpoint(), status }),
    }
}

/// Returns the status line.
async fn exchange(to: &Endpoint, body: &[u8]) -> io::Result<String> {
    let mut stream = TcpStream::connect(&to.authority).await?;
    let head = format!(
        "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        to.path,
        to.authority,
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await?;
    let mut reply = Vec::new();
    stream.take(MOST_REPLY).read_to_end(&mut reply).await?;
    let text = String::from_utf8_lossy(&reply);
    Ok(text.lines().next().unwrap_or_default().chars().filter(|char| !char.is_control()).take(80).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_plain_http() {
        let parse = |text| Endpoint::parse(text).map(|endpoint| (endpoint.authority, endpoint.path));
        assert_eq!(parse("http://a:4318/v1/traces"), Ok(("a:4318".into(), "/v1/traces".into())));
        assert_eq!(parse("http://[::1]:4318"), Ok(("[::1]:4318".into(), "/".into())));
        assert_eq!(parse("http://collector"), Ok(("collector:80".into(), "/".into())));
        for odd in ["", "a:4318", "https://a:4318", "http://", "http://u:p@a/", "http://a/\r\nX: y"] {
            let error = parse(odd).unwrap_err();
            assert!(error.to_string().contains("it takes http://HOST:PORT/PATH"), "{odd}: {error}");
        }
    }

    #[test]
    fn the_configuration_comes_before_the_environment() {
        let find = |configured: &str, set: &[(&str, &str)]| {
            let variable = |name: &str| {
                set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            };
            Endpoint::find_in(configured, variable)
                .map(|found| found.map(|found| found.authority + &found.path))
        };
        const BASE: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://base:1/");
        assert_eq!(find("", &[]), Ok(None));
        assert_eq!(find("http://own:2/x", &[BASE]), Ok(Some("own:2/x".to_owned())));
        assert_eq!(find("", &[BASE]), Ok(Some("base:1/v1/traces".to_owned())));
        let exact = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://exact:3/y");
        assert_eq!(find("", &[BASE, exact]), Ok(Some("exact:3/y".to_owned())));
        assert_eq!(find("", &[BASE, ("OTEL_SDK_DISABLED", "TRUE")]), Ok(None));
        assert_eq!(find("", &[BASE, ("OTEL_TRACES_EXPORTER", "none")]), Ok(None));
        assert!(find("", &[BASE, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]).is_err());
        assert!(find("", &[BASE, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")]).unwrap().is_some());
    }
}
