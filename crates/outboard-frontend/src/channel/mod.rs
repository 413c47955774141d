//! The front-end's end of the back-end channel: what the device asks of its VMM (vhost-user, "Back-end
//! message types").
//!
//! ```text
//!  Vmm::open_channel ─ SET_BACKEND_REQ_FD ─▶ back-end
//!  Channel ◀─ requests ── socket ◀────────────┘
//!     ├─▶ SharedRegions (SHMEM_MAP, UNMAP, GPU_MAP)    ├─▶ SharedObjects (LOOKUP)    └─▶ ChannelEvent
//! ```
//! Invariants: the back-end is not trusted: its requests are checked and carried out or refused, each
//! exactly once, and only bytes out of step or a back-end that does not take its answers end the channel.
//! Mappings belong to the device, not to the channel that brought them: a channel may be replaced.

mod event;
mod objects;
mod regions;
mod thread;

pub use event::ChannelEvent;
pub use objects::SharedObjects;
pub use regions::{GPU_HANDLE_SHM, Mapped, RegionError, SharedRegions};
pub use thread::ChannelThread;

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use outboard_memory::{Window, page_size};
use outboard_protocol::payload::{
    ExternalMap, IOTLB_MISS, Iotlb, SHMEM_MAP_RW, ShmemMap, Uuid, VringArea, VringFd,
};
use outboard_protocol::{
    ChannelEffect, ChannelFrontend, ChannelRequest, ChannelStep, ProtocolFeatures, Refusal, Reply,
    Ticket,
};
use rustix::event::PollFlags;

use crate::Iommu;
use crate::connection::deadline;
use crate::error::Error;
use crate::socket::{Socket, SocketError, wait_fd};
use crate::transcript::{Direction, Pieces, Recorder};

/// Most objects that one back-end may export at a time.
const MAX_OBJECTS: usize = 1024;

/// What a channel has to know about its device.
#[derive(Clone, Debug)]
pub struct ChannelSetup {
    /// Protocol features that were negotiated.
    pub protocol: ProtocolFeatures,
    /// Feature bits that were or will be acknowledged.
    pub features: u64,
    /// Number of rings: requests that name others are refused.
    pub queues: u16,
    /// The device's shared-memory regions.
    pub regions: SharedRegions,
    /// What it can look up.
    pub objects: SharedObjects,
    /// The device lives in this process: its host addresses (EXTERNAL_MAP) mean something.
    pub same_process: bool,
    /// How long a back-end may take to read an answer.
    pub patience: Duration,
}

/// The channel. See the module's text.
pub struct Channel {
    socket: Socket,
    machine: ChannelFrontend<OwnedFd>,
    setup: ChannelSetup,
    /// What the device sees guest memory through: misses that it does not map are refused.
    iommu: Option<Iommu>,
    /// Objects that this back-end exports.
    exported: BTreeSet<[u8; 16]>,
    given_up: bool,
    recorder: Option<Box<dyn Recorder>>,
    incoming: Pieces,
}

/// How a request went.
type Outcome = Result<ChannelEvent, String>;

impl Channel {
    /// A channel over a socket whose other end the back-end has.
    ///
    /// # Errors
    /// [`Error::Socket`] when it is no connected Unix stream socket.
    pub fn new(socket: OwnedFd, setup: ChannelSetup) -> Result<Self, Error> {
        Ok(Self {
            socket: Socket::from_fd(socket)?,
            machine: ChannelFrontend::new(setup.protocol, setup.features),
            setup,
            iommu: None,
            exported: BTreeSet::new(),
            given_up: false,
            recorder: None,
            incoming: Pieces::default(),
        })
    }

    /// Lets `recorder` hear of every message from now on.
    pub fn record(&mut self, recorder: impl Recorder + 'static) {
        self.recorder = Some(Box::new(recorder));
    }

    /// Refuses misses of the IOTLB that `iommu` does not map, from now on; the others are events.
    pub fn translate(&mut self, iommu: Iommu) {
        self.iommu = Some(iommu);
    }

    /// The shared-memory regions that the back-end maps into.
    #[must_use]
    pub const fn regions(&self) -> &SharedRegions {
        &self.setup.regions
    }

    /// The shared objects that the back-end can look up.
    #[must_use]
    pub const fn objects(&self) -> &SharedObjects {
        &self.setup.objects
    }

    /// Serves the channel in a thread of its own.
    ///
    /// # Errors
    /// [`Error::Host`] when there is no descriptor or no thread to be had.
    pub fn spawn(self) -> Result<ChannelThread, Error> {
        let socket = self
            .socket
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| Error::Host { call: "dup", source })?;
        ChannelThread::spawn(self, socket)
    }

    /// The next request, carried out and answered; `None` when none comes before `timeout`.
    ///
    /// # Errors
    /// [`Error::Violation`], [`Error::ChannelClosed`], [`Error::Silent`] (it does not read its answers),
    /// after which every call is [`Error::GivenUp`].
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<ChannelEvent>, Error> {
        let Some(step) = self.next_step(timeout)? else { return Ok(None) };
        let outcome = match step {
            ChannelStep::Violation(violation) => Err(violation.to_string()),
            ChannelStep::Effect(ChannelEffect::Lookup { uuid, ticket }) => {
                let object = self.setup.objects.find(&uuid);
                let found = object.is_some();
                self.answer(ticket, Ok(object))?;
                Ok(ChannelEvent::SharedObjectLookup { uuid, found })
            }
            ChannelStep::Effect(ChannelEffect::Request { request, ticket }) => {
                let outcome = self.carry_out(request);
                let answer = outcome.as_ref().map(|_| ()).map_err(Refusal::because);
                self.answer(ticket, answer)?;
                outcome
            }
        };
        Ok(Some(outcome.unwrap_or_else(|reason| ChannelEvent::Refused { reason })))
    }

    /// The next request, for a caller that carries it out and [answers](Self::answer) it by itself, in any
    /// order; `None` when none comes before `timeout`.
    ///
    /// # Errors
    /// As [`Self::next_event`].
    pub fn next_step(&mut self, timeout: Duration) -> Result<Option<ChannelStep<OwnedFd>>, Error> {
        self.guarded(|channel| channel.receive_step(deadline(timeout)))
    }

    /// Answers a request that came from [`Self::next_step`].
    ///
    /// # Errors
    /// As [`Self::next_event`].
    pub fn answer<R: Reply<OwnedFd>>(
        &mut self,
        ticket: Ticket<R>,
        value: R::Value,
    ) -> Result<(), Error> {
        self.machine.answer(ticket, value);
        self.guarded(Self::flush)
    }

    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        if self.given_up {
            return Err(Error::GivenUp);
        }
        let outcome = work(self);
        self.given_up = outcome.is_err();
        outcome
    }

    fn receive_step(&mut self, deadline: Instant) -> Result<Option<ChannelStep<OwnedFd>>, Error> {
        loop {
            let step = self.machine.poll();
            self.flush()?;
            if let Some(step) = step? {
                return Ok(Some(step));
            }
            let wanted = self.machine.wanted();
            if wanted == 0 {
                // Too many tickets are with the caller.
                return Ok(None);
            }
            let mut buffer = [0; 4096];
            let part = buffer.get_mut(..wanted.min(4096)).unwrap_or_default();
            let received = match self.socket.receive(part, deadline) {
                Ok(received) => received,
                Err(SocketError::TimedOut) => return Ok(None),
                Err(SocketError::Closed) if self.machine.at_message_boundary() => {
                    return Err(Error::ChannelClosed { inside: false });
                }
                Err(SocketError::Closed) => return Err(Error::ChannelClosed { inside: true }),
                Err(other) => return Err(other.into()),
            };
            let bytes = part.get(..received.bytes).unwrap_or_default();
            if let Some(recorder) = &mut self.recorder {
                self.incoming.take(bytes, received.fds.len(), |message, fds| {
                    recorder.channel_message(Direction::In, message, fds);
                });
            }
            self.machine.receive(bytes, received.fds);
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        while let Some(frame) = self.machine.transmit() {
            if let Some(recorder) = &mut self.recorder {
                recorder.channel_message(Direction::Out, &frame.bytes, frame.fds.len());
            }
            let fds: Vec<_> = frame.fds.iter().map(AsFd::as_fd).collect();
            let patience = self.setup.patience;
            self.socket.send(&frame.bytes, &fds, deadline(patience)).map_err(
                |error| match error {
                    SocketError::Closed => Error::ChannelClosed { inside: false },
                    SocketError::TimedOut => {
                        Error::Silent { request: "the channel's answers", after: patience }
                    }
                    other => Error::Socket(other),
                },
            )?;
        }
        Ok(())
    }

    fn carry_out(&mut self, request: ChannelRequest<OwnedFd>) -> Outcome {
        match request {
            ChannelRequest::ConfigChange => Ok(ChannelEvent::ConfigChanged),
            ChannelRequest::Iotlb(entry) => self.iotlb(&entry),
            ChannelRequest::HostNotifier(area, file) => self.host_notifier(&area, file),
            ChannelRequest::VringCall(state) => {
                Ok(ChannelEvent::VringCall { queue: self.ring("VRING_CALL", state.index.into())? })
            }
            ChannelRequest::VringErr(state) => {
                Ok(ChannelEvent::VringErr { queue: self.ring("VRING_ERR", state.index.into())? })
            }
            ChannelRequest::SharedObjectAdd(uuid) => self.add_object(uuid),
            ChannelRequest::SharedObjectRemove(uuid) => {
                if !self.exported.remove(&uuid.bytes) {
                    return Err("SHARED_OBJECT_REMOVE names an object that it did not add".into());
                }
                Ok(ChannelEvent::SharedObjectRemoved(uuid))
            }
            ChannelRequest::ShmemMap(map, file) => {
                let writable = map.flags & SHMEM_MAP_RW != 0;
                let done = self.setup.regions.map(&map, file);
                mapped(done, map.shmid, map.shm_offset, map.len, writable)
            }
            ChannelRequest::ShmemUnmap(map) => self.unmap(&map),
            ChannelRequest::GpuMap(map, file) => {
                let done = self.setup.regions.map_gpu(&map, file);
                mapped(done, map.shmid, map.shm_offset, map.len, true)
            }
            ChannelRequest::ExternalMap(map) => {
                let done = self.external(&map);
                mapped(done, map.shmid, map.shm_offset, map.len, false)
            }
            other => Err(format!("message {} is not carried out here", other.code().id())),
        }
    }

    fn iotlb(&self, entry: &Iotlb) -> Outcome {
        let &Iotlb { iova, size, perm, kind, .. } = entry;
        if kind != IOTLB_MISS {
            return Ok(ChannelEvent::IotlbAccessFailure { iova, size, perm });
        }
        match &self.iommu {
            Some(iommu) if !iommu.permits(iova, perm) => {
                Err(format!("I/O address {iova:#x} is not mapped for access {perm}"))
            }
            _ => Ok(ChannelEvent::IotlbMiss { iova, perm }),
        }
    }

    fn external(&self, map: &ExternalMap) -> Result<(), RegionError> {
        if !self.setup.same_process {
            return Err(RegionError::Foreign { ptr: map.ptr });
        }
        self.setup.regions.map_own(map)
    }

    fn unmap(&self, map: &ShmemMap) -> Outcome {
        let &ShmemMap { shmid: region, shm_offset: offset, len, .. } = map;
        match self.setup.regions.unmap(map) {
            Ok(()) => Ok(ChannelEvent::Unmap { region, offset, len }),
            Err(error) => Err(format!("SHMEM_UNMAP: {error}")),
        }
    }

    fn host_notifier(&self, area: &VringArea, file: Option<OwnedFd>) -> Outcome {
        const NAME: &str = "VRING_HOST_NOTIFIER_MSG";
        let queue = self.ring(NAME, VringFd(area.vring).index())?;
        let Some(file) = file else {
            return Ok(ChannelEvent::HostNotifier { queue, page: None });
        };
        let page = page_size();
        if area.size != page || !area.offset.is_multiple_of(page) {
            return Err(format!(
                "{NAME}: {:#x} bytes at {:#x} are not one page of {page:#x}",
                area.size, area.offset
            ));
        }
        let page = Window::map(file, area.offset, area.size, true)
            .map_err(|error| format!("{NAME}: {error}"))?;
        Ok(ChannelEvent::HostNotifier { queue, page: Some(page) })
    }

    fn add_object(&mut self, uuid: Uuid) -> Outcome {
        if self.exported.len() >= MAX_OBJECTS {
            return Err(format!("SHARED_OBJECT_ADD: {MAX_OBJECTS} objects are exported already"));
        }
        if !self.exported.insert(uuid.bytes) {
            return Err("SHARED_OBJECT_ADD names an object that is there already".into());
        }
        Ok(ChannelEvent::SharedObjectAdded(uuid))
    }

    fn ring(&self, message: &str, index: u64) -> Result<u16, String> {
        let queues = self.setup.queues;
        match u16::try_from(index) {
            Ok(index) if index < queues => Ok(index),
            _ => Err(format!("{message} names ring {index:#x} of {queues}")),
        }
    }

    /// Waits until there is something to read, or until `timeout`; true when there is. For callers with
    /// other descriptors: [`AsFd`] is the one to poll, for reading.
    ///
    /// # Errors
    /// [`Error::Host`] when the system call fails.
    pub fn wait(&self, timeout: Duration) -> Result<bool, Error> {
        wait_fd(self.socket.as_fd(), PollFlags::IN, timeout)
            .map_err(|errno| Error::host("poll", errno))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Channel")
            .field("socket", &self.socket)
            .field("setup", &self.setup)
            .field("given_up", &self.given_up)
            .finish_non_exhaustive()
    }
}

fn mapped(
    done: Result<(), RegionError>,
    region: u8,
    offset: u64,
    len: u64,
    writable: bool,
) -> Outcome {
    match done {
        Ok(()) => Ok(ChannelEvent::Map { region, offset, len, writable }),
        Err(error) => Err(format!("mapping into region {region}: {error}")),
    }
}
