//! One vhost-user connection: a typed call for each message, blocking, each with a deadline.
//!
//! Carries out the message rules of vhost-user through [`outboard_protocol::Frontend`]. Invariants: one
//! request is under way at a time, its answer is awaited at most for the timeout; anything that leaves
//! the stream out of step (a wrong reply, silence, a closed socket) ends the connection for good, while a
//! refusal does not; acknowledgements are asked for whenever the back-end can give them.

mod device;
mod inflight;
mod log;
mod objects;
mod postcopy;
mod rings;
mod state;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use outboard_memory::RegionSpec;
use outboard_protocol::features::ProtocolFeatures;
use outboard_protocol::header::HEADER_SIZE;
use outboard_protocol::table::{self, Side};
use outboard_protocol::{Answer, Expect, Frontend, MemRegion, Notifier, Request};
use outboard_queue::QueueLayout;

use crate::error::Error;
use crate::socket::{Socket, SocketError};
use crate::transcript::{Direction, Pieces, Recorder};

/// How long a back-end may think about an answer unless the caller says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to a back-end. See the module's text.
pub struct Connection {
    socket: Socket,
    machine: Frontend<OwnedFd>,
    timeout: Duration,
    given_up: bool,
    recorder: Option<Box<dyn Recorder>>,
    /// The reply that is coming in, for the recorder.
    incoming: Pieces,
}

impl Connection {
    /// Connects to the listening socket at `path`.
    ///
    /// # Errors
    /// [`Error::Socket`] with the reason.
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Self, Error> {
        let socket = Socket::connect(path.as_ref(), deadline(timeout))?;
        Ok(Self::over(socket, timeout))
    }

    /// Connects to the listening socket at `path`, trying again until a back-end that is just being
    /// started listens there. The connection that works is the one that is used: nothing is probed and
    /// thrown away, so a back-end that serves one connection only is served well.
    ///
    /// # Errors
    /// [`Error::Socket`] with the last reason when `patience` is over.
    pub fn connect_patiently(
        path: impl AsRef<Path>,
        timeout: Duration,
        patience: Duration,
    ) -> Result<Self, Error> {
        let until = deadline(patience);
        loop {
            match Self::connect(path.as_ref(), timeout) {
                Err(Error::Socket(SocketError::Connect { source, .. }))
                    if retriable(&source) && Instant::now() < until =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                outcome => return outcome,
            }
        }
    }

    /// Takes over a connected Unix stream socket.
    ///
    /// # Errors
    /// [`Error::Socket`] when it is none.
    pub fn from_fd(fd: OwnedFd, timeout: Duration) -> Result<Self, Error> {
        Ok(Self::over(Socket::from_fd(fd)?, timeout))
    }

    fn over(socket: Socket, timeout: Duration) -> Self {
        Self {
            socket,
            machine: Frontend::new(),
            timeout,
            given_up: false,
            recorder: None,
            incoming: Pieces::default(),
        }
    }

    /// Changes how long each answer is waited for.
    pub const fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Lets `recorder` hear of every message from now on.
    pub fn record(&mut self, recorder: impl Recorder + 'static) {
        self.recorder = Some(Box::new(recorder));
    }

    /// The process id of the back-end, where the kernel can tell.
    #[must_use]
    pub fn peer_pid(&self) -> Option<u32> {
        self.socket.peer_pid()
    }

    /// What has been negotiated so far.
    #[must_use]
    pub const fn negotiated(&self) -> &table::Negotiated {
        self.machine.negotiated()
    }

    /// SET_OWNER.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_owner(&mut self) -> Result<(), Error> {
        self.acknowledged(Request::SetOwner)
    }

    /// GET_FEATURES: the virtio and vhost bits offered.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_features(&mut self) -> Result<u64, Error> {
        match self.answer(Request::GetFeatures)? {
            Answer::Features(features) => Ok(features),
            _ => Err(Error::WrongAnswer { request: "GET_FEATURES" }),
        }
    }

    /// SET_FEATURES.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_features(&mut self, features: u64) -> Result<(), Error> {
        self.acknowledged(Request::SetFeatures(features))
    }

    /// GET_PROTOCOL_FEATURES: those offered, as far as they are known here.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_protocol_features(&mut self) -> Result<ProtocolFeatures, Error> {
        match self.answer(Request::GetProtocolFeatures)? {
            Answer::ProtocolFeatures(features) => Ok(features),
            _ => Err(Error::WrongAnswer { request: "GET_PROTOCOL_FEATURES" }),
        }
    }

    /// SET_PROTOCOL_FEATURES.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_protocol_features(&mut self, features: ProtocolFeatures) -> Result<(), Error> {
        self.acknowledged(Request::SetProtocolFeatures(features))
    }

    /// GET_QUEUE_NUM: how many rings (DPDK: pairs) there are at most.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_queue_num(&mut self) -> Result<u64, Error> {
        match self.answer(Request::GetQueueNum)? {
            Answer::QueueNum(count) => Ok(count),
            _ => Err(Error::WrongAnswer { request: "GET_QUEUE_NUM" }),
        }
    }

    /// GET_MAX_MEM_SLOTS.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_max_mem_slots(&mut self) -> Result<u64, Error> {
        match self.answer(Request::GetMaxMemSlots)? {
            Answer::MaxMemSlots(count) => Ok(count),
            _ => Err(Error::WrongAnswer { request: "GET_MAX_MEM_SLOTS" }),
        }
    }

    /// SET_MEM_TABLE with these regions; the descriptors stay the caller's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_mem_table<'a>(
        &mut self,
        regions: impl Iterator<Item = (RegionSpec, BorrowedFd<'a>)>,
    ) -> Result<(), Error> {
        let regions: Result<Vec<_>, Error> =
            regions.map(|(spec, file)| Ok((wire_region(&spec), duplicate(file)?))).collect();
        self.acknowledged(Request::SetMemTable(regions?))
    }

    /// ADD_MEM_REG; the descriptor stays the caller's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn add_mem_region(&mut self, spec: RegionSpec, file: BorrowedFd<'_>) -> Result<(), Error> {
        self.acknowledged(Request::AddMemReg(wire_region(&spec), duplicate(file)?))
    }

    /// REM_MEM_REG.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn remove_mem_region(&mut self, spec: RegionSpec) -> Result<(), Error> {
        self.acknowledged(Request::RemMemReg(wire_region(&spec)))
    }

    /// SET_VRING_NUM.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_num(&mut self, index: u16, size: u16) -> Result<(), Error> {
        let (index, size) = (u32::from(index), u32::from(size));
        self.acknowledged(Request::SetVringNum { index, size })
    }

    /// SET_VRING_ADDR for a ring at these guest addresses of [`crate::SharedMemory`].
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_addr(&mut self, index: u16, layout: &QueueLayout) -> Result<(), Error> {
        self.set_vring_addr_logged(index, layout, None)
    }

    /// SET_VRING_BASE.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_base(&mut self, index: u16, base: u32) -> Result<(), Error> {
        self.acknowledged(Request::SetVringBase { index: u32::from(index), base })
    }

    /// GET_VRING_BASE: stops the ring; its base.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_vring_base(&mut self, index: u16) -> Result<u32, Error> {
        match self.answer(Request::GetVringBase { index: u32::from(index) })? {
            Answer::VringBase { base, .. } => Ok(base),
            _ => Err(Error::WrongAnswer { request: "GET_VRING_BASE" }),
        }
    }

    /// SET_VRING_KICK with a descriptor, which stays the caller's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_kick(&mut self, index: u16, kick: impl AsFd) -> Result<(), Error> {
        let kick = Notifier::Fd(duplicate(kick.as_fd())?);
        self.acknowledged(Request::SetVringKick { index: u32::from(index), kick })
    }

    /// SET_VRING_CALL with a descriptor, which stays the caller's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_call(&mut self, index: u16, call: impl AsFd) -> Result<(), Error> {
        let call = Notifier::Fd(duplicate(call.as_fd())?);
        self.acknowledged(Request::SetVringCall { index: u32::from(index), call })
    }

    /// SET_VRING_ERR with a descriptor, which stays the caller's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_err(&mut self, index: u16, err: impl AsFd) -> Result<(), Error> {
        let err = Notifier::Fd(duplicate(err.as_fd())?);
        self.acknowledged(Request::SetVringErr { index: u32::from(index), err })
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_enable(&mut self, index: u16, enabled: bool) -> Result<(), Error> {
        self.acknowledged(Request::SetVringEnable { index: u32::from(index), enabled })
    }

    /// GET_CONFIG: exactly `size` bytes of the configuration space.
    ///
    /// # Errors
    /// [`Error::NoConfig`] when the back-end refuses, else as [`Self::call`].
    pub fn get_config(&mut self, offset: u32, size: u32) -> Result<Vec<u8>, Error> {
        match self.answer(Request::GetConfig { offset, size })? {
            Answer::Config { bytes, .. } => bytes.ok_or(Error::NoConfig { offset, size }),
            _ => Err(Error::WrongAnswer { request: "GET_CONFIG" }),
        }
    }

    /// SET_CONFIG, as the guest does it or as a migration does.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_config(&mut self, offset: u32, bytes: &[u8], migration: bool) -> Result<(), Error> {
        self.acknowledged(Request::SetConfig { offset, bytes: bytes.to_vec(), migration })
    }

    /// Sends any request and waits for its answer; `None` when it has none.
    ///
    /// # Errors
    /// [`Error::Unsendable`] when it may not be sent; [`Error::Violation`], [`Error::Silent`] and
    /// [`Error::Closed`], after which every call is [`Error::GivenUp`].
    pub fn call(&mut self, request: Request<OwnedFd>) -> Result<Option<Answer<OwnedFd>>, Error> {
        if self.given_up {
            return Err(Error::GivenUp);
        }
        let name = name_of(&request);
        let outcome = self.exchange(request, name);
        if matches!(
            outcome,
            Err(Error::Violation(_)
                | Error::Silent { .. }
                | Error::Closed { .. }
                | Error::Socket(_))
        ) {
            self.given_up = true;
        }
        outcome
    }

    fn exchange(
        &mut self,
        request: Request<OwnedFd>,
        name: &'static str,
    ) -> Result<Option<Answer<OwnedFd>>, Error> {
        let deadline = deadline(self.timeout);
        let timeout = self.timeout;
        let named = |error| match error {
            SocketError::Closed => Error::Closed { request: name },
            SocketError::TimedOut => Error::Silent { request: name, after: timeout },
            other => Error::Socket(other),
        };
        self.refuse_unasked().map_err(|error| match error {
            Error::Socket(error) => named(error),
            other => other,
        })?;
        let expect = self.machine.send(request).map_err(Error::Unsendable)?;
        while let Some(frame) = self.machine.transmit() {
            if let Some(recorder) = &mut self.recorder {
                recorder.message(Direction::Out, &frame.bytes, frame.fds.len());
            }
            let fds: Vec<_> = frame.fds.iter().map(AsFd::as_fd).collect();
            self.socket.send(&frame.bytes, &fds, deadline).map_err(named)?;
        }
        if expect == Expect::Nothing {
            return Ok(None);
        }
        loop {
            if let Some(answer) = self.machine.poll()? {
                return Ok(Some(answer));
            }
            let mut buffer = [0; 4096];
            // No more than this reply: the next one's descriptors belong to its own first byte.
            let part = buffer.get_mut(..self.machine.wanted().clamp(1, 4096)).unwrap_or_default();
            let received = self.socket.receive(part, deadline).map_err(named)?;
            self.take(part.get(..received.bytes).unwrap_or_default(), received.fds);
        }
    }

    /// A reply before the question is a violation, not the answer to what is asked next.
    fn refuse_unasked(&mut self) -> Result<(), Error> {
        let mut buffer = [0; HEADER_SIZE];
        while let Some(received) = self.socket.try_receive(&mut buffer)? {
            self.take(buffer.get(..received.bytes).unwrap_or_default(), received.fds);
            self.machine.poll()?;
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        if let Some(recorder) = &mut self.recorder {
            self.incoming.take(bytes, fds.len(), |message, fds| {
                recorder.message(Direction::In, message, fds);
            });
        }
        self.machine.receive(bytes, fds);
    }

    fn answer(&mut self, request: Request<OwnedFd>) -> Result<Answer<OwnedFd>, Error> {
        let name = name_of(&request);
        self.call(request)?.ok_or(Error::WrongAnswer { request: name })
    }

    fn acknowledged(&mut self, request: Request<OwnedFd>) -> Result<(), Error> {
        let name = name_of(&request);
        match self.call(request)? {
            None | Some(Answer::Ack { value: 0, .. }) => Ok(()),
            Some(Answer::Ack { value, .. }) => Err(Error::Refused { request: name, code: value }),
            Some(_) => Err(Error::WrongAnswer { request: name }),
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Connection")
            .field("socket", &self.socket)
            .field("negotiated", self.negotiated())
            .field("given_up", &self.given_up)
            .finish_non_exhaustive()
    }
}

/// Whether a back-end that is being started may be the reason.
fn retriable(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), ConnectionRefused | NotFound)
}

fn name_of(request: &Request<OwnedFd>) -> &'static str {
    table::info(Side::FrontEnd, request.code().id()).map_or("an unknown message", |row| row.name)
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    fd.try_clone_to_owned().map_err(|source| Error::Host { call: "dup", source })
}

const fn wire_region(spec: &RegionSpec) -> MemRegion {
    MemRegion {
        guest_addr: spec.guest_addr,
        size: spec.size,
        user_addr: spec.user_addr,
        offset: spec.offset,
    }
}

/// A point in time; a duration too long to add is a year.
pub(crate) fn deadline(after: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    let now = Instant::now();
    now.checked_add(after.min(YEAR)).unwrap_or(now)
}
