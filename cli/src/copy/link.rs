//! The way between two commands: a TCP connection, or a UNIX socket on one host.
//!
//! What goes over it is not encrypted, and who connects is not asked for a name: over a network that others use as well it
//! belongs into a tunnel.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    time::Duration,
};

/// How long a connection may take to come about.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Where a command listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host's name or number, and a port.
    Tcp(String),
    /// A socket in the file system.
    Unix(PathBuf),
}

impl Address {
    /// An address as people write it: what holds a slash is a path.
    ///
    /// # Errors
    /// Why it is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Self::Tcp(text.to_owned())),
            _ => Err("HOST:PORT, or the path of a socket (with a slash in it)".into()),
        }
    }

    /// Connects.
    ///
    /// # Errors
    /// If nobody listens there, or cannot be reached.
    pub fn connect(&self) -> io::Result<Link> {
        match self {
            Self::Unix(path) => UnixStream::connect(path).map(Link::Unix),
            Self::Tcp(address) => {
                let mut last = io::ErrorKind::NotFound.into();
                for address in address.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT_WITHIN) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            return Ok(Link::Tcp(stream));
                        }
                        Err(cause) => last = cause,
                    }
                }
                Err(last)
            }
        }
    }

    /// Listens.
    ///
    /// # Errors
    /// If that is not possible there.
    pub fn listen(&self) -> io::Result<Listener> {
        match self {
            Self::Tcp(address) => TcpListener::bind(address).map(Listener::Tcp),
            Self::Unix(path) => {
                if UnixStream::connect(path).is_err() {
                    // Left by a command that was killed, or not there at all.
                    let _ = std::fs::remove_file(path);
                }
                UnixListener::bind(path).map(|listener| Listener::Unix(listener, path.clone()))
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Somebody who listens. A socket in the file system goes with it.
#[derive(Debug)]
pub enum Listener {
    /// On a port.
    Tcp(TcpListener),
    /// On a socket.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Waits for somebody.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn accept(&self) -> io::Result<Link> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(Link::Tcp(stream))
            }
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| Link::Unix(stream)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // It may be gone, with its directory.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A connection.
#[derive(Debug)]
pub enum Link {
    /// By TCP.
    Tcp(TcpStream),
    /// By a UNIX socket.
    Unix(UnixStream),
}

impl Link {
    /// The same connection, for another direction.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn share(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    /// How long reading and writing wait for the other side.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(patience)).and_then(|()| stream.set_write_timeout(Some(patience)))
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(patience)).and_then(|()| stream.set_write_timeout(Some(patience)))
            }
        }
    }
}

impl Read for Link {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(bytes),
            Self::Unix(stream) => stream.read(bytes),
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.flush(),
            Self::Unix(stream) => stream.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_ports_or_paths() {
        assert_eq!(Address::parse("[::1]:80"), Ok(Address::Tcp("[::1]:80".into())));
        assert_eq!(Address::parse("./a:80"), Ok(Address::Unix("./a:80".into())));
        for bad in ["", "host", ":80", "host:", "host:x", "host:65536"] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_socket_that_nobody_listens_on_is_replaced_and_one_in_use_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let address = Address::Unix(directory.path().join("socket"));
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).expect("bound"));
        let listener = address.listen().expect("replaced");
        assert!(address.listen().is_err(), "in use");
        let mut link = address.connect().expect("somebody listens");
        link.write_all(b"x").expect("sent");
        let mut byte = [0];
        // The first to come is who looked whether somebody listens.
        drop(listener.accept().expect("somebody came"));
        listener.accept().expect("somebody comes").read_exact(&mut byte).expect("read");
        drop(listener);
        assert!(!path.exists() && address.connect().is_err());
    }
}
