//! The host's side: clients that come to PATH and say `CONNECT port`, servers that listen at PATH_port; the
//! convention of Firecracker and cloud-hypervisor.
//!
//! ```text
//!  client ─▶ PATH            "CONNECT 1234\n" ─▶ guest's port 1234; "OK 1073741824\n" when it has accepted
//!  client ─▶ PATH.seqpacket  the same, each line a message
//!  guest  ─▶ PATH_1234       its port 1234 of the host: a stream, or SOCK_SEQPACKET, as the guest's socket is
//! ```
//! Invariants: nothing here waits; a client that says anything else is sent away; what a client sends after its
//! line stays in its socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use outboard::Error;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, recv, socket_with,
};

use super::packet::Kind;
use crate::names::{self, Name};
use crate::watches::{Ask, Watches};

/// The longest line of a client.
const LINE: usize = 32;
/// Bytes of a path in an address, with those of a port behind it.
const PATH: usize = 107;
const SUFFIX: usize = "_4294967295".len();
/// Clients that wait to be let in.
const BACKLOG: i32 = 4096;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

fn socket_type(kind: Kind) -> SocketType {
    match kind {
        Kind::Stream => SocketType::STREAM,
        Kind::Seqpacket => SocketType::SEQPACKET,
    }
}

/// What came of a call to a server.
#[derive(Debug)]
pub(super) enum Dialed {
    Up(OwnedFd),
    /// It has too many callers at the moment.
    Busy,
    /// Nobody is there.
    Refused,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Host {
    path: PathBuf,
    /// For streams and for messages, once it listens.
    listeners: Option<[(UnixListener, Name); 2]>,
}

impl Host {
    /// At this path, not listening yet.
    pub(super) fn at(path: &Path) -> Result<Self, Error> {
        if path.as_os_str().len() + SUFFIX > PATH {
            let most = PATH - SUFFIX;
            return Err(Error::refused(format!(
                "{}: a path of sockets has at most {most} bytes",
                path.display()
            )));
        }
        Ok(Self { path: path.to_owned(), listeners: None })
    }

    /// Listens on what another process has made at the same path, or else on sockets of its own. Another process's
    /// are its own until [`Host::own`].
    pub(super) fn adopt(&mut self, path: &Path, given: [Option<OwnedFd>; 2]) -> Result<(), Error> {
        let beside = with_suffix(path, ".seqpacket");
        let [streams, messages] = given;
        let streams = adopted(path, streams, Kind::Stream)?;
        self.listeners = Some([streams, adopted(&beside, messages, Kind::Seqpacket)?]);
        Ok(())
    }

    /// Whether it has what to listen on.
    pub(super) fn listens(&self) -> bool {
        self.listeners.is_some()
    }

    /// The listening socket, to be given away.
    pub(super) fn listener(&self, kind: Kind) -> Option<BorrowedFd<'_>> {
        let [streams, messages] = self.listeners.as_ref()?;
        Some(if kind == Kind::Stream { streams } else { messages }.0.as_fd())
    }

    /// It is nobody else's: clients are announced under the two tokens, and names removed at the end.
    pub(super) fn own(&mut self, tokens: [u64; 2], watches: &Watches) -> Result<(), Error> {
        let listeners = self.listeners.iter_mut().flatten();
        for ((listener, name), token) in listeners.zip(tokens) {
            watches.add(&*listener, token, Ask::Bytes)?;
            name.own();
        }
        Ok(())
    }

    /// The names are another process's.
    pub(super) fn leave(&mut self) {
        self.listeners.iter_mut().flatten().for_each(|(_, name)| name.leave());
    }

    /// The next client of this kind; None when no other one waits.
    pub(super) fn accept(&self, kind: Kind) -> io::Result<Option<OwnedFd>> {
        let Some(listener) = self.listener(kind) else { return Ok(None) };
        loop {
            match accept_with(listener, FLAGS) {
                Ok(client) => return Ok(Some(client)),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Calls who listens for `port`.
    pub(super) fn dial(&self, port: u32, kind: Kind) -> Dialed {
        let path = with_suffix(&self.path, &format!("_{port}"));
        let dialed = SocketAddrUnix::new(&path).and_then(|address| {
            let socket = socket_with(AddressFamily::UNIX, socket_type(kind), FLAGS, None)?;
            connect(&socket, &address).map(|()| socket)
        });
        match dialed {
            Ok(socket) => Dialed::Up(socket),
            Err(Errno::AGAIN) => Dialed::Busy,
            Err(_) => Dialed::Refused,
        }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// A listener that was given, if its name is this one; or a new one.
fn adopted(path: &Path, given: Option<OwnedFd>, kind: Kind) -> Result<(UnixListener, Name), Error> {
    if let Some(given) = given {
        let listener = UnixListener::from(given);
        if listener.local_addr()?.as_pathname() == Some(path) {
            return Ok((listener, Name::of_another(path)));
        }
    }
    names::listen_by(path, |path| Ok(bound(path, kind)?))
        .map_err(|error| Error::refused(format!("{}: {error}", path.display())))
}

fn bound(path: &Path, kind: Kind) -> Result<UnixListener, Errno> {
    let socket = socket_with(AddressFamily::UNIX, socket_type(kind), FLAGS, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// What a client has said so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The guest's port that it wants.
    Port(u32),
    /// Not a whole line yet.
    Nothing,
    /// Something else, or it has left.
    Nonsense,
}

/// Reads a client's line, and nothing behind it.
pub(super) fn read_line(client: impl AsFd) -> Said {
    let mut bytes = [0; LINE];
    let peeked = loop {
        match recv(&client, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((count, _)) => break count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Said::Nothing,
            Err(_) => return Said::Nonsense,
        }
    };
    let said = bytes.get(..peeked).unwrap_or_default();
    let Some(end) = said.iter().position(|byte| *byte == b'\n') else {
        return if (1..LINE).contains(&peeked) { Said::Nothing } else { Said::Nonsense };
    };
    let Some(port) = port(said.get(..end).unwrap_or_default()) else { return Said::Nonsense };
    let line = bytes.get_mut(..=end).unwrap_or_default();
    match recv(&client, line, RecvFlags::DONTWAIT) {
        Ok(_) => Said::Port(port),
        Err(_) => Said::Nonsense,
    }
}

fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let (word, port) = line.trim_end_matches('\r').split_once(' ')?;
    let port = port.trim();
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    (word.eq_ignore_ascii_case("connect") && digits).then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_client_names_a_port_and_what_follows_stays_in_its_socket() {
        let (mut client, mut ours) = UnixStream::pair().expect("sockets");
        assert_eq!(read_line(&ours), Said::Nothing);
        client.write_all(b"CONN").expect("sent");
        assert_eq!(read_line(&ours), Said::Nothing);
        client.write_all(b"ECT 4294967295\nbytes").expect("sent");
        assert_eq!(read_line(&ours), Said::Port(u32::MAX));
        let mut rest = [0; 5];
        ours.read_exact(&mut rest).expect("there");
        assert_eq!(&rest, b"bytes");
        drop(client);
        assert_eq!(read_line(&ours), Said::Nonsense);
    }

    #[test]
    fn anything_else_is_nonsense() {
        assert_eq!(port(b"connect 7\r"), Some(7));
        for line in ["", "CONNECT", "CONNECT ", "CONNECT -1", "CONNECT 4294967296", "CONNECT +1"] {
            assert_eq!(port(line.as_bytes()), None, "{line}");
        }
        for line in ["GET / HTTP/1.1", "CONNECT 1 2", "CONNECT1", "\u{fe}"] {
            assert_eq!(port(line.as_bytes()), None, "{line}");
        }
        let (mut client, ours) = UnixStream::pair().expect("sockets");
        client.write_all(&[b'C'; LINE]).expect("sent");
        assert_eq!(read_line(&ours), Said::Nonsense, "a line that never ends");
    }
}
