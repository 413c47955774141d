//! Where front-ends come from: a path to listen on, a path to connect to, an inherited descriptor
//! (contract §5; vhost-user, "Backend program conventions").
//!
//! One front-end is served at a time; another one that knocks meanwhile is closed at once with one
//! line in the log, so that a readiness probe never uses up the connection. When the front-end
//! leaves, the next one is served. A stale socket file is replaced only if nobody answers on it,
//! and ours is removed at the end.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, sockopt};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use tracing::{info, warn};

use crate::device::VhostUserDevice;
use crate::error::HostError;
use crate::handler::{Attention, DeviceRequestHandler, Ended, HandlerOptions};
use crate::reactor::{Parker, Raced, Reactor, block_on, race};

/// sockaddr_un holds 108 bytes, one of them for the final NUL.
const MAX_PATH: usize = 107;
/// How long to wait before accepting again when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The first descriptor of systemd's socket activation.
const LISTEN_FDS_START: RawFd = 3;

#[derive(Debug)]
enum Source {
    Listening(OwnedFd),
    Connected(OwnedFd),
}

/// See the module.
#[derive(Debug)]
pub struct Server {
    source: Source,
    /// A socket file of ours, to be removed.
    file: Option<SocketFile>,
    options: HandlerOptions,
    stop: (Arc<UnixStream>, UnixStream),
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
        clear_stale(path).map_err(failed)?;
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
        let own = duplicate_own(fd).map_err(|error| failed(error.to_string()))?;
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
        let stream = sockopt::socket_domain(&socket) == Ok(rustix::net::AddressFamily::UNIX)
            && sockopt::socket_type(&socket) == Ok(rustix::net::SocketType::STREAM);
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
        Ok(Self { source, file, options: HandlerOptions::default(), stop })
    }

    /// Sets the handler's options.
    #[must_use]
    pub fn with_options(mut self, options: HandlerOptions) -> Self {
        self.options = options;
        self
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
        let served = block_on(self.serve_on(Parker, device));
        Ok(served.map_err(HostError::io("poll"))??)
    }

    /// As [`Server::serve`], on any executor.
    ///
    /// # Errors
    /// As [`Server::serve`].
    #[cfg(feature = "async-io")]
    pub async fn run<D: VhostUserDevice>(self, device: D) -> Result<(), crate::Error> {
        Ok(self.serve_on(crate::reactor::AsyncIo, device).await?)
    }

    async fn serve_on<R: Reactor, D: VhostUserDevice>(
        self,
        reactor: R,
        device: D,
    ) -> Result<(), HostError> {
        let Self { source, file: _file, options, stop: (_writer, stop) } = self;
        let mut handler = DeviceRequestHandler::new(device, options)?;
        let stop = reactor.source(stop.into()).map_err(HostError::io("stop"))?;
        match source {
            Source::Connected(socket) => {
                let end = socket.try_clone().map_err(HostError::io("socket"))?;
                let attention = Attention { stop: Some(&stop), knock: None };
                let ended = handler.run_on(reactor, socket, attention).await;
                // The number that we inherited may still be open: the peer is to see the end.
                let _ = rustix::net::shutdown(&end, rustix::net::Shutdown::Both);
                ended.map(|_| ())
            }
            Source::Listening(listener) => {
                let listener = reactor.source(listener).map_err(HostError::io("listener"))?;
                accept_loop(&reactor, &listener, &stop, &mut handler).await
            }
        }
    }
}

async fn accept_loop<R: Reactor, D: VhostUserDevice>(
    reactor: &R,
    listener: &R::Source,
    stop: &R::Source,
    handler: &mut DeviceRequestHandler<D>,
) -> Result<(), HostError> {
    loop {
        let next = accept(reactor, listener);
        let socket = match race(next, reactor.readable(stop)).await {
            Raced::First(socket) => socket?,
            Raced::Second(_) => return Ok(()),
        };
        info!("front-end connected");
        let turn_away = || turn_away(listener);
        let attention = Attention { stop: Some(stop), knock: Some((listener, &turn_away)) };
        match handler.run_on(reactor.clone(), socket, attention).await {
            Ok(Ended::Left) => {}
            Ok(Ended::Stopped) => return Ok(()),
            Err(error) => warn!("session ended: {error}"),
        }
    }
}

/// Waits for the next front-end. Running out of descriptors is waited out, not fatal (case A96).
async fn accept<R: Reactor>(reactor: &R, listener: &R::Source) -> Result<OwnedFd, HostError> {
    loop {
        let readable = reactor.readable(listener).await;
        readable.map_err(HostError::io("wait for a front-end"))?;
        match try_accept(listener) {
            Ok(Some(socket)) => return Ok(socket),
            Ok(None) => {}
            Err(error) => {
                warn!("accept: {error}");
                reactor.sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Accepts without blocking, whatever the listener's flags are: they may be shared.
fn try_accept(listener: &impl AsFd) -> io::Result<Option<OwnedFd>> {
    let mut ready = [rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    if matches!(rustix::event::poll(&mut ready, Some(&now)), Ok(0) | Err(_)) {
        return Ok(None);
    }
    match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(socket) => Ok(Some(socket)),
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A second front-end is closed at once.
fn turn_away(listener: &impl AsFd) {
    match try_accept(listener) {
        Ok(Some(socket)) => {
            drop(socket);
            warn!("a second front-end was turned away: this device serves one at a time");
        }
        Ok(None) => {}
        Err(error) => warn!("accept: {error}"),
    }
}

/// An owned duplicate of a descriptor that we know by number only. `pidfd_getfd` on ourselves
/// checks that it is open, which taking it over by number cannot.
fn duplicate_own(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(Errno::BADF.into());
    }
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(this, fd, PidfdGetfdFlags::empty())?)
}

fn check_path(path: &Path) -> Result<(), String> {
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(format!("the path has {length} bytes, a socket's may have {MAX_PATH}"));
    }
    Ok(())
}

/// Removes a socket file on which nobody answers.
fn clear_stale(path: &Path) -> Result<(), String> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    if !found.file_type().is_socket() {
        return Err("the path exists and is no socket".to_owned());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("another program serves this socket".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// A socket file that we made; removed with the server unless another one stands in its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let made = std::fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), inode: (made.dev(), made.ino()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let there = std::fs::symlink_metadata(&self.path);
        if there.is_ok_and(|there| (there.dev(), there.ino()) == self.inode) {
            // A file that cannot be removed is found stale by the next server.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
