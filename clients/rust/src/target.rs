//! What a target is, read from its text: where to connect, and whether that is this host. And how to connect there.

use std::{io, net::IpAddr, path::PathBuf, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpStream, UnixStream},
    time::timeout,
};

use crate::Error;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    Unix(PathBuf),
    /// HOST:PORT each; the first that answers.
    Tcp(Vec<String>),
}

impl Target {
    /// Of `unix:PATH`, `HOST:PORT`, `dns:HOST:PORT`, `ipv4:HOST:PORT,HOST:PORT` or `ipv6:[HOST]:PORT,...`.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() { Err(wrong(text)) } else { Ok(Self::Unix(path.into())) };
        }
        let scheme = ["dns:", "ipv4:", "ipv6:"].into_iter().find(|scheme| text.starts_with(scheme)).unwrap_or("");
        let addresses = &text[scheme.len()..];
        let addresses = addresses.strip_prefix("///").unwrap_or(addresses);
        let addresses: Vec<String> = addresses.split(',').map(str::to_owned).collect();
        for address in &addresses {
            let (host, port) = split(address).ok_or_else(|| wrong(text))?;
            let fits = match scheme {
                "ipv4:" => matches!(host.parse(), Ok(IpAddr::V4(_))),
                "ipv6:" => matches!(host.parse(), Ok(IpAddr::V6(_))),
                _ => addresses.len() == 1 && !host.is_empty(),
            };
            if !fits || port.parse::<u16>().is_err() {
                return Err(wrong(text));
            }
        }
        Ok(Self::Tcp(addresses))
    }

    /// Whether every address is a Unix socket or this host's loopback.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp(addresses) => addresses.iter().all(|address| {
                split(address).is_some_and(|(host, _)| {
                    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
                })
            }),
        }
    }

    /// What HTTP calls the server.
    pub(crate) fn authority(&self) -> &str {
        match self {
            Self::Unix(_) => "localhost",
            Self::Tcp(addresses) => &addresses[0],
        }
    }

    /// A connection, to the first address that answers; each of them may take so long.
    pub(crate) async fn connect(&self, limit: Duration) -> io::Result<TokioIo<Connection>> {
        match self {
            Self::Unix(path) => Ok(TokioIo::new(Box::new(UnixStream::connect(path).await?))),
            Self::Tcp(addresses) => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for address in addresses {
                    match timeout(limit, TcpStream::connect(address.as_str()))
                        .await
                        .unwrap_or_else(|late| Err(late.into()))
                    {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            return Ok(TokioIo::new(Box::new(stream)));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }
}

/// A socket of either kind.
pub(crate) type Connection = Box<dyn ReadWrite>;

pub(crate) trait ReadWrite: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}

impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> ReadWrite for T {}

/// Host without brackets, and port.
fn split(address: &str) -> Option<(&str, &str)> {
    if let Some(rest) = address.strip_prefix('[') {
        return rest.split_once("]:");
    }
    address.split_once(':').filter(|(_, port)| !port.contains(':'))
}

fn wrong(text: &str) -> Error {
    Error::Setup(format!("not unix:PATH, HOST:PORT or ipv4:HOST:PORT,...: {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_what_is_this_host() {
        for (text, is_local) in [
            ("unix:s", true),
            ("unix:///run/s", true),
            ("localhost:1", true),
            ("127.0.0.9:1", true),
            ("[::1]:1", true),
            ("dns:///localhost:1", true),
            ("gpu-host:50051", false),
            ("localhost.example:1", false),
            ("ipv4:127.0.0.1:1,10.0.0.1:1", false),
            ("ipv6:[2001:db8::1]:50051", false),
        ] {
            assert_eq!(Target::parse(text).map(|target| target.is_local()).ok(), Some(is_local), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_target() {
        for text in ["", "unix:", "host", "host:port", "a:1,b:2", "ipv4:host:1", "ipv4:[::1]:1", "::1", "host:99999"] {
            assert!(matches!(Target::parse(text), Err(Error::Setup(_))), "{text}");
        }
    }
}
