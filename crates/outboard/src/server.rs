//! Where front-ends come from: a path to listen on, a path to connect to, an inherited descriptor
//! (contract §5; vhost-user, "Backend program conventions").
//!
//! One front-end is served at a time; another one that knocks meanwhile is closed at once with one
//! line in the log, so that a readiness probe never uses up the connection. When the front-end
//! leaves, the next one is served. A stale socket file is replaced only if nobody answers on it,
//! and ours is removed at the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, getsockname, socket_with, sockopt,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::device::VhostUserDevice;
use crate::error::HostError;
use crate::handler::HandlerOptions;
use crate::reactor::{Parker, block_on};
use crate::serving::serve_on;
use crate::take_over::Control;

/// sockaddr_un holds 108 bytes, one of them for the final NUL.
const MAX_PATH: usize = 107;
/// The first descriptor of systemd's socket activation.
const LISTEN_FDS_START: RawFd = 3;

#[derive(Debug)]
pub(crate) enum Source {
    Listening(OwnedFd),
    Connected(OwnedFd),
    /// The control socket of a process whose place is to be taken.
    Predecessor(OwnedFd),
}

/// See the module.
#[derive(Debug)]
pub struct Server {
    pub(crate) source: Source,
    /// A socket file of ours, to be removed.
    pub(crate) file: Option<SocketFile>,
    pub(crate) options: HandlerOptions,
    pub(crate) stop: (Arc<UnixStream>, UnixStream),
    pub(crate) control: Option<Control>,
}

/// Tells a server to finish: from another thread, or from a signal handler through the descriptor.
#[derive(Clone, Debug)]
pub struct StopHandle(Arc<UnixStream>);

impl StopHandle {
    /// The server drains its queues and returns.
    pub fn stop(&self) {
        // Full or closed: stopped already.
        let _ = rustix::io::write(&*self.0, &[0]);
    }

    /// A descriptor that stops the server when a byte is written to it.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }
}

/// Where another process can be let in, to take the device over.
#[derive(Clone, Debug)]
pub struct Gate(SocketAddrUnix);

impl Gate {
    /// A connection for one process that may take over: to be sent to it, for
    /// [`Server::take_over_from`].
    ///
    /// # Errors
    /// The device is gone, or no descriptor is left.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let made =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&made, &self.0)?;
        Ok(made)
    }
}

impl Server {
    /// Listens on `path`.
    ///
    /// # Errors
    /// Somebody answers on the path, it is no socket, too long, or its directory is missing; the
    /// file system is unchanged then.
    pub fn listen(path: impl AsRef<Path>) -> Result<Self, HostError> {
        let path = path.as_ref();
        let failed = |why: String| HostError::Socket { path: path.to_owned(), why };
        check_path(path).map_err(failed)?;
        clear_stale(path, SocketType::STREAM).map_err(failed)?;
        let listener = UnixListener::bind(path).map_err(|error| failed(error.to_string()))?;
        let file = SocketFile::of(path).map_err(|error| failed(error.to_string()))?;
        Self::new(Source::Listening(listener.into()), Some(file))
    }

    /// Connects to a front-end that listens on `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, HostError> {
        let path = path.as_ref();
        let failed = |why: String| HostError::Socket { path: path.to_owned(), why };
        check_path(path).map_err(failed)?;
        let stream = UnixStream::connect(path).map_err(|error| failed(error.to_string()))?;
        Self::new(Source::Connected(stream.into()), None)
    }

    /// Takes a descriptor that this process inherited: connected or listening, told apart.
    ///
    /// # Errors
    /// It is closed, or no Unix stream socket.
    pub fn inherited(fd: RawFd) -> Result<Self, HostError> {
        let failed = |why: String| HostError::Inherited { fd, why };
        let own = inherited_descriptor(fd).map_err(|error| failed(error.to_string()))?;
        Self::from_socket(own).map_err(failed)
    }

    /// Takes the socket that systemd's socket activation passed, if it did.
    ///
    /// # Errors
    /// Not exactly one socket was passed, or it is no Unix stream socket.
    pub fn activated() -> Result<Option<Self>, HostError> {
        let ours = std::env::var("LISTEN_PID")
            .is_ok_and(|pid| pid.parse() == Ok(getpid().as_raw_nonzero().get()));
        let Some(count) = std::env::var("LISTEN_FDS").ok().filter(|_| ours) else {
            return Ok(None);
        };
        if count != "1" {
            return Err(HostError::Inherited {
                fd: LISTEN_FDS_START,
                why: format!("socket activation passed {count} sockets instead of 1"),
            });
        }
        Self::inherited(LISTEN_FDS_START).map(Some)
    }

    /// Takes a Unix stream socket, connected or listening.
    ///
    /// # Errors
    /// It is something else: the reason, in words.
    pub fn from_socket(socket: OwnedFd) -> Result<Self, String> {
        let stream = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&socket) == Ok(SocketType::STREAM);
        if !stream {
            return Err("not a Unix stream socket".to_owned());
        }
        let listening = sockopt::socket_acceptconn(&socket).map_err(|error| error.to_string())?;
        let source = if listening { Source::Listening(socket) } else { Source::Connected(socket) };
        Self::new(source, None).map_err(|error| error.to_string())
    }

    fn new(source: Source, file: Option<SocketFile>) -> Result<Self, HostError> {
        let (writer, reader) = UnixStream::pair().map_err(HostError::io("socketpair"))?;
        let nonblocking = writer.set_nonblocking(true);
        nonblocking.map_err(HostError::io("socketpair"))?;
        let stop = (Arc::new(writer), reader);
        Ok(Self { source, file, options: HandlerOptions::default(), stop, control: None })
    }

    /// Takes the place of the process whose control socket is at `path`, once the device is there:
    /// its sockets and its front-end with everything that was set up. If that fails, it goes on
    /// there and [`Server::serve`] returns the reason.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn take_over(path: impl AsRef<Path>) -> Result<Self, HostError> {
        Self::new(Source::Predecessor(Control::connect(path.as_ref())?), None)
    }

    /// Listens on a control socket at `path`: there another process can take over
    /// ([`Server::take_over`]). Only the same user and root are listened to.
    ///
    /// # Errors
    /// As for [`Server::listen`].
    pub fn with_control(mut self, path: impl AsRef<Path>) -> Result<Self, HostError> {
        self.control = Some(Control::listen(path.as_ref())?);
        Ok(self)
    }

    /// As [`Server::take_over`], over a connection to the other process' gate ([`Gate::open`]).
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn take_over_from(gate: OwnedFd) -> Result<Self, HostError> {
        Self::new(Source::Predecessor(gate), None)
    }

    /// As [`Server::with_control`] without a path: whoever is let in comes through the gate.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn with_gate(mut self) -> Result<(Self, Gate), HostError> {
        let control = Control::private()?;
        let address = getsockname(&control.listener).and_then(SocketAddrUnix::try_from);
        let gate = Gate(address.map_err(|error| HostError::io("control socket")(error.into()))?);
        self.control = Some(control);
        Ok((self, gate))
    }

    /// Sets the handler's options.
    #[must_use]
    pub fn with_options(mut self, options: HandlerOptions) -> Self {
        self.options = options;
        self
    }

    /// The socket that it listens on, if it does.
    #[must_use]
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        match &self.source {
            Source::Listening(listener) => Some(listener.as_fd()),
            Source::Connected(_) | Source::Predecessor(_) => None,
        }
    }

    /// The socket file at `path` belongs to the inherited socket: it is removed at the end.
    ///
    /// # Errors
    /// There is none.
    pub fn with_socket_file(mut self, path: impl AsRef<Path>) -> Result<Self, HostError> {
        let path = path.as_ref();
        let failed =
            |why: io::Error| HostError::Socket { path: path.to_owned(), why: why.to_string() };
        self.file = Some(SocketFile::of(path).map_err(failed)?);
        Ok(self)
    }

    /// A way to stop the server.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.stop.0))
    }

    /// Serves front-ends on this thread, one after the other, until the server is told to stop;
    /// a connection that was made or inherited, until it ends.
    ///
    /// # Errors
    /// The device cannot be suspended, or the socket fails. How sessions end is logged.
    pub fn serve<D: VhostUserDevice>(self, device: D) -> Result<(), crate::Error> {
        let served = block_on(serve_on(self, Parker, device));
        Ok(served.map_err(HostError::io("poll"))??)
    }

    /// As [`Server::serve`], on any executor.
    ///
    /// # Errors
    /// As [`Server::serve`].
    #[cfg(feature = "async-io")]
    pub async fn run<D: VhostUserDevice>(self, device: D) -> Result<(), crate::Error> {
        Ok(serve_on(self, crate::reactor::AsyncIo, device).await?)
    }
}

/// An owned duplicate of a descriptor that we know by number only. `pidfd_getfd` on ourselves
/// checks that it is open, which taking it over by number cannot.
///
/// # Errors
/// It is not open.
pub fn inherited_descriptor(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(Errno::BADF.into());
    }
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(this, fd, PidfdGetfdFlags::empty())?)
}

pub(crate) fn check_path(path: &Path) -> Result<(), String> {
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(format!("the path has {length} bytes, a socket's may have {MAX_PATH}"));
    }
    Ok(())
}

/// Removes a socket file on which nobody answers.
pub(crate) fn clear_stale(path: &Path, kind: SocketType) -> Result<(), String> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    if !found.file_type().is_socket() {
        return Err("the path exists and is no socket".to_owned());
    }
    let there = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .and_then(|socket| rustix::net::connect(&socket, &SocketAddrUnix::new(path)?));
    match there {
        Ok(()) => Err("another program serves this socket".to_owned()),
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(|error| error.to_string()),
        Err(error) => Err(io::Error::from(error).to_string()),
    }
}

/// A socket file that we made; removed with the server unless another one stands in its place, also when the
/// process has another root directory by then.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    folder: OwnedFd,
    inode: (u64, u64),
}

impl SocketFile {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let made = std::fs::symlink_metadata(path)?;
        let path = std::path::absolute(path)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(folder, flags, Mode::empty())?;
        Ok(Self { path, folder, inode: (made.dev(), made.ino()) })
    }
}

impl SocketFile {
    /// Another process has it now.
    pub(crate) fn give_away(&mut self) {
        self.inode = (0, 0);
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let Some(name) = self.path.file_name() else { return };
        let there = statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW);
        if there.is_ok_and(|there| (there.st_dev, there.st_ino) == self.inode) {
            // A file that cannot be removed is found stale by the next server.
            let _ = unlinkat(&self.folder, name, AtFlags::empty());
        }
    }
}
