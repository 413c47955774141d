//! One transfer of device state, on a thread of its own: the control path answers meanwhile
//! (vhost-user messages 42 and 43).
//!
//! The descriptor is the peer's and may be anything: a pipe, a socket, a file. Bounds: the value's
//! size is known from its header before it is read, time is counted from the start of the transfer,
//! and a wait ends when the session does. Flags of a received descriptor are never changed; pipes
//! and sockets are moved without ever blocking on them (RWF_NOWAIT, MSG_DONTWAIT). The descriptor is
//! closed before the outcome is known, so that its end is the end of the state.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use outboard_protocol::StateDirection;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2, read, write};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::notify::Waker;
use crate::snapshot::{DeviceState, STATE_HEADER, Snapshot, StateError};

/// Bytes moved at once.
const PIECE: usize = 64 << 10;

/// What a transfer may cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Bytes of the device's value.
    pub(super) limit: u64,
    /// From the request to the end of the state.
    pub(super) time: Duration,
}

/// What is to be moved.
pub(super) enum Job {
    /// The device's value, and everything else of its state.
    Save(Snapshot, DeviceState),
    /// Whatever comes.
    Load,
}

/// What came of it: the state, when one was loaded.
pub(super) type Outcome = Result<Option<DeviceState>, StateError>;

/// A transfer under way, or finished and not yet asked about.
#[derive(Debug)]
pub(super) struct Transfer {
    direction: StateDirection,
    give_up: Arc<Waker>,
    outcome: oneshot::Receiver<Outcome>,
    thread: JoinHandle<()>,
    reported: bool,
}

impl Transfer {
    /// Starts the thread. It keeps `token` for as long as it lives.
    pub(super) fn start(
        job: Job,
        fd: OwnedFd,
        bounds: Bounds,
        token: Arc<()>,
    ) -> Result<Self, StateError> {
        let failed = |what| move |source| StateError::Io { what, source };
        let give_up = Arc::new(Waker::new().map_err(failed("eventfd"))?);
        let (report, outcome) = oneshot::channel();
        let direction = match &job {
            Job::Save(..) => StateDirection::Save,
            Job::Load => StateDirection::Load,
        };
        let stream = Stream {
            kind: Kind::of(&fd),
            fd,
            give_up: Arc::clone(&give_up),
            until: Instant::now().checked_add(bounds.time),
            seconds: bounds.time.as_secs(),
        };
        let thread = Builder::new().name("state".to_owned()).spawn(move || {
            let done = stream.run(job, bounds.limit);
            drop(stream);
            drop(token);
            // A session that is over does not ask.
            let _ = report.send(done);
        });
        let thread = thread.map_err(failed("thread"))?;
        Ok(Self { direction, give_up, outcome, thread, reported: false })
    }

    /// Save or load.
    pub(super) fn direction(&self) -> StateDirection {
        self.direction
    }

    /// Waits for the end. A dropped wait can be taken up again.
    pub(super) async fn finished(&mut self) -> Outcome {
        let outcome = (&mut self.outcome).await;
        self.reported = true;
        outcome.unwrap_or(Err(StateError::GivenUp))
    }

    /// Has the thread end at once, if it can.
    pub(super) fn give_up(&self) {
        self.give_up.wake();
    }

    /// Joins a thread that has reported, or leaves one to itself that hangs in the kernel.
    pub(super) fn join(self) {
        if self.reported {
            // What it panicked with was logged there.
            let _ = self.thread.join();
        }
    }
}

/// How a descriptor is read and written without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The kernel finishes by itself: files and block devices.
    Storage,
    Socket,
    /// Pipes and whatever else.
    Other,
}

impl Kind {
    fn of(fd: &OwnedFd) -> Self {
        match fstat(fd).map(|found| FileType::from_raw_mode(found.st_mode)) {
            Ok(FileType::RegularFile | FileType::BlockDevice) => Self::Storage,
            Ok(FileType::Socket) => Self::Socket,
            _ => Self::Other,
        }
    }
}

/// Whether a descriptor can carry this direction at all.
pub(super) fn can_carry(fd: BorrowedFd<'_>, direction: StateDirection) -> bool {
    let Ok(flags) = fcntl_getfl(fd) else { return false };
    let mode = flags & OFlags::ACCMODE;
    !flags.contains(OFlags::PATH)
        && match direction {
            StateDirection::Save => mode != OFlags::RDONLY,
            StateDirection::Load => mode != OFlags::WRONLY,
        }
}

/// The descriptor, and when to stop waiting for it.
struct Stream {
    fd: OwnedFd,
    kind: Kind,
    give_up: Arc<Waker>,
    /// None: longer than the clock reaches.
    until: Option<Instant>,
    seconds: u64,
}

impl Stream {
    fn run(&self, job: Job, limit: u64) -> Outcome {
        match job {
            Job::Save(snapshot, state) => self.save(snapshot, state, limit).map(|()| None),
            Job::Load => self.load(limit).map(Some),
        }
    }

    fn save(&self, snapshot: Snapshot, state: DeviceState, limit: u64) -> Result<(), StateError> {
        let (version, value) = snapshot.into_bytes()?;
        let length = value.len() as u64;
        if length > limit {
            return Err(StateError::TooLarge { length, limit });
        }
        let bytes = DeviceState { version, value, ..state }.to_bytes();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let piece = rest.get(..PIECE).unwrap_or(rest);
            let written = self.retry(PollFlags::OUT, "write", || self.write(piece))?;
            rest = rest.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    fn load(&self, limit: u64) -> Result<DeviceState, StateError> {
        let mut bytes = Vec::with_capacity(STATE_HEADER);
        self.read_up_to(&mut bytes, STATE_HEADER)?;
        let length = DeviceState::value_length(&bytes, limit)?;
        let whole = STATE_HEADER.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
        // One more: nothing may follow.
        self.read_up_to(&mut bytes, whole.saturating_add(1))?;
        DeviceState::parse(&bytes, limit)
    }

    /// Reads until there are `whole` bytes, or no more come. Room is made for what has come.
    fn read_up_to(&self, bytes: &mut Vec<u8>, whole: usize) -> Result<(), StateError> {
        let mut piece = [0; PIECE];
        while bytes.len() < whole {
            let most = (whole - bytes.len()).min(PIECE);
            let room = piece.get_mut(..most).unwrap_or_default();
            let count = self.retry(PollFlags::IN, "read", || self.read(room))?;
            if count == 0 {
                break;
            }
            bytes.extend_from_slice(room.get(..count).unwrap_or_default());
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self.kind {
            Kind::Storage => write(&self.fd, bytes),
            Kind::Socket => send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Kind::Other => {
                let slice = [IoSlice::new(bytes)];
                match pwritev2(&self.fd, &slice, u64::MAX, ReadWriteFlags::NOWAIT) {
                    Err(Errno::OPNOTSUPP) => write(&self.fd, bytes),
                    done => done,
                }
            }
        }
    }

    fn read(&self, bytes: &mut [u8]) -> Result<usize, Errno> {
        match self.kind {
            Kind::Storage => read(&self.fd, bytes),
            Kind::Socket => recv(&self.fd, bytes, RecvFlags::DONTWAIT).map(|(count, _)| count),
            Kind::Other => {
                let slice = &mut [IoSliceMut::new(bytes)];
                match preadv2(&self.fd, slice, u64::MAX, ReadWriteFlags::NOWAIT) {
                    Err(Errno::OPNOTSUPP) => read(&self.fd, bytes),
                    done => done,
                }
            }
        }
    }

    fn retry(
        &self,
        flags: PollFlags,
        what: &'static str,
        mut attempt: impl FnMut() -> Result<usize, Errno>,
    ) -> Result<usize, StateError> {
        loop {
            self.wait(flags)?;
            match attempt() {
                Ok(count) => return Ok(count),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(StateError::Io { what, source: errno.into() }),
            }
        }
    }

    /// Waits until something can be moved, the time is over, or the session is.
    fn wait(&self, flags: PollFlags) -> Result<(), StateError> {
        loop {
            let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds =
                [PollFd::new(&*self.give_up, PollFlags::IN), PollFd::new(&self.fd, flags)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) if !fds[0].revents().is_empty() => return Err(StateError::GivenUp),
                _ if left == Some(Duration::ZERO) => {
                    return Err(StateError::Deadline(self.seconds));
                }
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => {
                    return Err(StateError::Io { what: "poll", source: io::Error::from(errno) });
                }
            }
        }
    }
}
