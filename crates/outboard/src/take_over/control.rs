//! The control socket: where a new process asks to take over.
//!
//! Only the same user and root are listened to (SO_PEERCRED). A connection has one second to say
//! what it wants; it never holds the device up. Invariant: at most one heir waits, the latest.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    sockopt,
};
use rustix::process::geteuid;
use tracing::warn;

use super::letter::{Estate, Letter};
use crate::connection::{Connection, Received};
use crate::error::HostError;
use crate::reactor::{Raced, Reactor, race};
use crate::server::{SocketFile, check_path, clear_stale};
use crate::serving::try_accept;

/// How long a new process may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest letter.
const LONGEST: usize = 64 << 10;

/// A control socket that is listened on.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) listener: OwnedFd,
    pub(crate) file: Option<SocketFile>,
}

impl Control {
    /// Listens on `path`.
    pub(crate) fn listen(path: &Path) -> Result<Self, HostError> {
        let failed = |why: String| HostError::Socket { path: path.to_owned(), why };
        check_path(path).map_err(failed)?;
        clear_stale(path, SocketType::SEQPACKET).map_err(failed)?;
        let made = new_socket().and_then(|socket| {
            bind(&socket, &SocketAddrUnix::new(path)?)?;
            listen(&socket, 8)?;
            Ok(socket)
        });
        let listener = made.map_err(|error| failed(error.to_string()))?;
        let file = SocketFile::of(path).map_err(|error| failed(error.to_string()))?;
        Ok(Self { listener, file: Some(file) })
    }

    /// Listens where only this process can send somebody.
    pub(crate) fn private() -> Result<Self, HostError> {
        let made = new_socket().and_then(|socket| {
            // The kernel finds a name that is in no file system (unix(7), autobind).
            bind(&socket, &SocketAddrUnix::new_unnamed())?;
            listen(&socket, 8)?;
            Ok(socket)
        });
        let listener = made.map_err(|error| HostError::io("control socket")(error.into()))?;
        Ok(Self { listener, file: None })
    }

    /// Connects to the process that listens on `path`.
    pub(crate) fn connect(path: &Path) -> Result<OwnedFd, HostError> {
        let failed = |why: String| HostError::Socket { path: path.to_owned(), why };
        check_path(path).map_err(failed)?;
        let made = new_socket().and_then(|socket| {
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket)
        });
        made.map_err(|error| failed(error.to_string()))
    }
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// A connection of the control socket: the other process.
pub(crate) struct Heir<R: Reactor>(Connection<R>);

impl<R: Reactor> Heir<R> {
    pub(crate) fn new(reactor: R, socket: OwnedFd) -> Result<Self, HostError> {
        Connection::new(reactor, socket).map(Self)
    }

    /// Sends a letter; it is one datagram.
    pub(crate) async fn send(&self, letter: Letter) -> Result<(), HostError> {
        self.0.send(letter.encode()).await
    }

    /// The next letter.
    pub(crate) async fn receive(&self) -> Result<Letter, HostError> {
        let mut buffer = vec![0; LONGEST];
        match self.0.receive(&mut buffer).await? {
            Received::Bytes(count, fds) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                Letter::decode(bytes, fds).map_err(HostError::TakeOver)
            }
            Received::End => Err(HostError::TakeOver("the other process has left".to_owned())),
        }
    }
}

/// Where the device's owner looks whether an heir waits.
pub(crate) struct Door<R: Reactor> {
    reactor: R,
    listener: R::Source,
    belongings: Belongings,
    waiting: Mutex<(Option<Heir<R>>, Option<Waker>)>,
}

/// What a server hands over whatever its front-end does.
#[derive(Debug)]
pub(crate) struct Belongings {
    pub(crate) listener: Option<OwnedFd>,
    pub(crate) socket_file: Option<PathBuf>,
    pub(crate) control_file: Option<PathBuf>,
}

impl<R: Reactor> Door<R> {
    pub(crate) fn new(
        reactor: R,
        control: OwnedFd,
        belongings: Belongings,
    ) -> Result<Self, HostError> {
        let listener = reactor.source(control).map_err(HostError::io("control socket"))?;
        Ok(Self { reactor, listener, belongings, waiting: Mutex::default() })
    }

    /// What is handed over beside the front-end.
    pub(crate) fn estate(&self) -> std::io::Result<Estate> {
        let Belongings { listener, socket_file, control_file } = &self.belongings;
        let estate = Estate {
            listener: listener.as_ref().map(OwnedFd::try_clone).transpose()?,
            socket_file: socket_file.clone(),
            control: Some(self.listener.as_fd().try_clone_to_owned()?),
            control_file: control_file.clone(),
            ..Estate::default()
        };
        if !estate.can_be_told() {
            return Err(std::io::Error::other("a socket path has a line break"));
        }
        Ok(estate)
    }

    /// Lets in who asks; never resolves.
    pub(crate) async fn keep(&self) {
        loop {
            if self.reactor.readable(&self.listener).await.is_err() {
                return std::future::pending().await;
            }
            let Ok(Some(socket)) = try_accept(&self.listener) else {
                // Nobody, or no descriptor left: not in a circle.
                self.reactor.sleep(Duration::from_millis(100)).await;
                continue;
            };
            match race(self.let_in(socket), self.reactor.sleep(PATIENCE)).await {
                Raced::First(Ok(heir)) => self.announce(heir),
                Raced::First(Err(error)) => warn!("control socket: {error}"),
                Raced::Second(()) => warn!("control socket: somebody said nothing"),
            }
        }
    }

    async fn let_in(&self, socket: OwnedFd) -> Result<Heir<R>, HostError> {
        let peer = sockopt::socket_peercred(&socket);
        let peer = peer.map_err(|error| HostError::io("SO_PEERCRED")(error.into()))?;
        if !peer.uid.is_root() && peer.uid != geteuid() {
            let who = peer.uid.as_raw();
            return Err(HostError::TakeOver(format!("user {who} may not take over")));
        }
        let heir = Heir::new(self.reactor.clone(), socket)?;
        match heir.receive().await {
            Ok(Letter::TakeOver) => Ok(heir),
            Ok(_) => Err(HostError::TakeOver("a letter out of turn".to_owned())),
            Err(error) => {
                heir.send(Letter::Refused(error.to_string())).await?;
                Err(error)
            }
        }
    }

    fn announce(&self, heir: Heir<R>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.0 = Some(heir);
        if let Some(waker) = waiting.1.take() {
            waker.wake();
        }
    }

    /// Resolves when an heir waits.
    pub(crate) async fn heir(&self) -> Heir<R> {
        std::future::poll_fn(|context| {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            match waiting.0.take() {
                Some(heir) => Poll::Ready(heir),
                None => {
                    waiting.1 = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}
