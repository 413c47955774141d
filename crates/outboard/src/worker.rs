//! `Worker` and `Model`: what most device authors write (contract §1b).
//!
//! A [`Model`] says what the device is: its queues, features, configuration. A [`Worker`] serves
//! requests on a thread that the library runs; it is built on that thread and need not be `Send`.
//! [`crate::WorkerDevice`] makes a whole [`crate::VhostUserDevice`] of the two.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use outboard_protocol::ProtocolFeatures;
use outboard_protocol::payload::CryptoSession;

use crate::channel::BackendChannel;
use crate::device::ConfigWrite;
use crate::error::Error;
use crate::events::{EventLoop, FileId};
use crate::queue::QueueSpec;
use crate::request::{Outcome, Request, Served};
use crate::shared_memory::SharedMemoryRegion;

/// Serves the requests of one or many queues.
pub trait Worker {
    /// Serves one request: answer it ([`Request::done`]), keep it ([`Request::defer`]) or hand it
    /// to the kernel ([`Request::submit`]).
    ///
    /// # Errors
    /// An error is logged; the request, dropped, went back with length 0 and the ring goes on.
    fn serve(&mut self, request: Request<'_>) -> Result<Served, Error>;

    /// A file operation started by [`Request::submit`] has finished.
    ///
    /// # Errors
    /// As [`Worker::serve`].
    fn completed(
        &mut self,
        request: Request<'_>,
        token: u64,
        outcome: Outcome,
    ) -> Result<Served, Error> {
        let _ = token;
        Ok(request.done(outcome.unwrap_or(0)))
    }

    /// A descriptor given to [`WorkerContext::watch`] became readable.
    ///
    /// # Errors
    /// Logged; the worker goes on.
    fn event(&mut self, token: u32) -> Result<(), Error> {
        let _ = token;
        Ok(())
    }

    /// Time between calls of [`Worker::tick`]; None: never.
    fn tick_every(&self) -> Option<Duration> {
        None
    }

    /// Called when [`Worker::tick_every`] has passed.
    ///
    /// # Errors
    /// Logged; the worker goes on.
    fn tick(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

/// What a worker can ask of its thread while it is built.
#[derive(Debug)]
pub struct WorkerContext<'a> {
    pub(crate) events: &'a mut dyn EventLoop,
    pub(crate) thread: usize,
}

impl WorkerContext<'_> {
    /// Number of this thread among the device's worker threads.
    #[must_use]
    pub fn thread(&self) -> usize {
        self.thread
    }

    /// Has [`Worker::event`] called with `token` when `fd` becomes readable (edges).
    ///
    /// # Errors
    /// The descriptor cannot be waited for.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        self.events.watch(fd, crate::thread::device_token(token))
    }

    /// Makes a file known to the event loop, for [`Request::submit`].
    pub fn add_file(&mut self, file: Arc<File>) -> FileId {
        self.events.add_file(file)
    }

    /// Whether [`Request::submit`] can be had on this thread.
    #[must_use]
    pub fn can_submit(&self) -> bool {
        self.events.can_submit()
    }
}

/// Builds a worker on the thread that it will run on.
pub type MakeWorker<W> = Arc<dyn Fn(&mut WorkerContext<'_>) -> Result<W, Error> + Send + Sync>;

/// What a device is, apart from serving requests.
pub trait Model: Send + 'static {
    /// What serves its requests.
    type Worker: Worker + 'static;

    /// Its queues, in virtio's order.
    fn queues(&self) -> Vec<QueueSpec>;

    /// How a worker is built; called on each worker thread, again after a worker panicked.
    fn make_worker(&self) -> MakeWorker<Self::Worker>;

    /// How many threads serve the queues; queue `i` goes to thread `i % threads`.
    fn threads(&self) -> usize {
        1
    }

    /// The device's own feature bits (virtio 1.3 §5, bits 0–23 and 50 up).
    fn features(&self) -> u64 {
        0
    }

    /// The driver took these of them.
    ///
    /// # Errors
    /// The set is refused, the old one stays.
    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        let _ = features;
        Ok(())
    }

    /// Number of bytes of the configuration space.
    fn config_size(&self) -> u32 {
        0
    }

    /// Copies configuration from byte `offset` into `bytes`; the range is inside the space.
    ///
    /// # Errors
    /// The front-end hears of a refusal.
    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        let _ = offset;
        bytes.fill(0);
        Ok(())
    }

    /// Writes configuration; the range is inside the space.
    ///
    /// # Errors
    /// Nothing there can be written.
    fn write_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        origin: ConfigWrite,
    ) -> Result<(), Error> {
        let _ = (bytes, origin);
        Err(Error::refused(format!("configuration byte {offset} is read-only")))
    }

    /// The first ring is about to start: take locks, open doors.
    ///
    /// # Errors
    /// The ring does not start and the front-end hears of it.
    fn resume(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The last ring has stopped: let go of what another process may need.
    ///
    /// # Errors
    /// The request that caused it is refused.
    fn suspend(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The device goes to its power-on state; no ring runs.
    ///
    /// # Errors
    /// The connection ends.
    fn reset(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Whether children of this process must not see guest memory (MADV_DONTFORK).
    fn unmap_guest_memory_on_fork(&self) -> bool {
        false
    }

    /// Protocol features that the device adds: RARP, MTU, CRYPTO_SESSION, SHARED_OBJECT,
    /// HOST_NOTIFIER.
    fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures::empty()
    }

    /// The channel over which the device asks its front-end. The handler plugs the front-end's
    /// socket in. None: the handler uses one of its own.
    fn back_end_channel(&self) -> Option<BackendChannel> {
        None
    }

    /// Shared-memory regions, the same for as long as the device lives; with any, SHMEM is offered.
    fn shared_memory(&self) -> Vec<SharedMemoryRegion> {
        Vec::new()
    }

    /// SEND_RARP: broadcast the guest's address. With [`ProtocolFeatures::RARP`].
    ///
    /// # Errors
    /// The front-end gets a NAK.
    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        let _ = mac;
        Err(Error::refused("this device sends no RARP"))
    }

    /// NET_SET_MTU, in bytes. With [`ProtocolFeatures::MTU`].
    ///
    /// # Errors
    /// The MTU is not one that the device can carry.
    fn set_mtu(&mut self, mtu: u16) -> Result<(), Error> {
        Err(Error::refused(format!("this device has no MTU to set to {mtu}")))
    }

    /// CREATE_CRYPTO_SESSION: the session's id, not negative. With
    /// [`ProtocolFeatures::CRYPTO_SESSION`].
    ///
    /// # Errors
    /// The front-end gets a session id below 0.
    fn create_crypto_session(&mut self, session: &CryptoSession) -> Result<i64, Error> {
        let _ = session;
        Err(Error::refused("this device has no crypto sessions"))
    }

    /// CLOSE_CRYPTO_SESSION.
    ///
    /// # Errors
    /// There is no such session.
    fn close_crypto_session(&mut self, id: u64) -> Result<(), Error> {
        Err(Error::refused(format!("there is no crypto session {id}")))
    }

    /// Whether the device takes a display socket (GPU_SET_SOCKET).
    fn takes_gpu_socket(&self) -> bool {
        false
    }

    /// GPU_SET_SOCKET: the display's own channel.
    ///
    /// # Errors
    /// The front-end gets a NAK.
    fn set_gpu_socket(&mut self, socket: OwnedFd) -> Result<(), Error> {
        drop(socket);
        Err(Error::refused("this device has no display"))
    }

    /// GET_SHARED_OBJECT: the descriptor of an object that this device exported, if there is such
    /// a one. With [`ProtocolFeatures::SHARED_OBJECT`].
    ///
    /// # Errors
    /// The front-end gets no descriptor.
    fn shared_object(&mut self, uuid: [u8; 16]) -> Result<Option<OwnedFd>, Error> {
        let _ = uuid;
        Ok(None)
    }
}

/// The model of a device that has queues and nothing else.
pub struct Plain<W> {
    pub(crate) queues: Vec<QueueSpec>,
    pub(crate) make: MakeWorker<W>,
}

impl<W: Worker + 'static> Model for Plain<W> {
    type Worker = W;

    fn queues(&self) -> Vec<QueueSpec> {
        self.queues.clone()
    }

    fn make_worker(&self) -> MakeWorker<W> {
        Arc::clone(&self.make)
    }
}
