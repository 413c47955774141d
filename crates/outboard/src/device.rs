//! `VhostUserDevice`: the full contract between a device and its handler (contract §1).
//!
//! Most authors write a [`crate::Model`] and a [`crate::Worker`] instead and get this from
//! [`crate::WorkerDevice`]. Calls that may have to wait are `async`: they never block the
//! executor, other connections or running rings.

use std::future::Future;
use std::os::fd::OwnedFd;

use outboard_protocol::ProtocolFeatures;
use outboard_protocol::payload::CryptoSession;

use crate::channel::BackendChannel;
use crate::error::{Error, HostError};
use crate::queue::{Queue, QueueSpec};
use crate::shared_memory::SharedMemoryRegion;

/// Who writes the configuration space (vhost-user, VhostUserConfig flags).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigWrite {
    /// The guest's driver: only writable fields may change.
    Guest,
    /// The front-end, at the destination of a migration: read-only fields may change too.
    Migration,
}

/// A virtio device, driven by a [`crate::DeviceRequestHandler`].
pub trait VhostUserDevice: Send {
    /// Its queues; the same for as long as the device lives.
    fn queues(&self) -> &[QueueSpec];

    /// The device's own feature bits. Ring and transport bits are the handler's.
    fn features(&self) -> u64;

    /// The driver acknowledged these of [`VhostUserDevice::features`]; replaces an earlier set.
    ///
    /// # Errors
    /// The front-end gets a NAK and the old set stays.
    fn ack_features(&mut self, features: u64) -> Result<(), Error>;

    /// Protocol features that the device adds to those which the handler carries by itself.
    fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures::empty()
    }

    /// Number of bytes of the configuration space.
    fn config_size(&self) -> u32;

    /// Copies configuration from byte `offset`; the range is inside the space.
    ///
    /// # Errors
    /// The front-end gets an answer of length 0.
    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error>;

    /// Writes configuration; the range is inside the space.
    ///
    /// # Errors
    /// The front-end gets a NAK.
    fn write_config(&mut self, offset: u32, bytes: &[u8], origin: ConfigWrite)
    -> Result<(), Error>;

    /// Starts serving `queue`; returns at once and leaves the suspended state. The ring may hold
    /// requests already: they are served without waiting for a kick.
    ///
    /// # Errors
    /// The front-end gets a NAK; the ring stays stopped and can be set up again.
    fn start_queue(&mut self, index: u16, queue: Queue) -> Result<(), Error>;

    /// Stops serving and gives the queue back. Afterwards nothing of it is in flight, and there is
    /// no access to guest memory and no call.
    ///
    /// # Errors
    /// [`HostError::NotStarted`] for a queue that was never started; anything else ends the
    /// connection.
    fn stop_queue(&mut self, index: u16) -> impl Future<Output = Result<Queue, HostError>> + Send;

    /// To the power-on state. No queue is started.
    ///
    /// # Errors
    /// The connection ends.
    fn reset(&mut self) -> impl Future<Output = Result<(), Error>> + Send;

    /// No queue is started any more, or the device has just been made: no guest memory is written
    /// and nothing is signalled until the next [`VhostUserDevice::start_queue`].
    ///
    /// # Errors
    /// At construction the handler's `new` returns it; later the request that caused it is refused.
    fn enter_suspended_state(&mut self) -> impl Future<Output = Result<(), Error>> + Send;

    /// Whether children of this process must not see guest memory (MADV_DONTFORK).
    fn unmap_guest_memory_on_fork(&self) -> bool {
        false
    }

    /// The channel over which the device asks its front-end. The handler plugs the front-end's
    /// socket in. None: the handler uses one of its own.
    fn back_end_channel(&self) -> Option<BackendChannel> {
        None
    }

    /// Shared-memory regions, the same for as long as the device lives; with any, SHMEM is offered.
    fn shared_memory(&self) -> &[SharedMemoryRegion] {
        &[]
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
