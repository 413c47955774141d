//! `Hooks`: what only some devices do — a network card's RARP and MTU, crypto sessions, a display,
//! shared objects, shared memory (vhost-user, messages 19, 20, 26, 27, 33, 41 and 44).
//!
//! A device without any says nothing: [`VhostUserDevice::hooks`](crate::VhostUserDevice::hooks) and
//! [`Model::hooks`](crate::Model::hooks) answer `None` by themselves. Invariant: a hook is called
//! only when its feature was offered and negotiated.

use std::os::fd::OwnedFd;

use outboard_protocol::ProtocolFeatures;
use outboard_protocol::payload::CryptoSession;

use crate::channel::BackendChannel;
use crate::error::Error;
use crate::shared_memory::SharedMemoryRegion;

/// A descriptor of the host's that goes to the next process of a device with a live upgrade: a socket that the
/// device listens on, a terminal, a connection.
#[derive(Debug)]
pub struct Heirloom {
    /// What the device knows it by: letters, digits and the like, no blank, at most 64 bytes.
    pub name: String,
    /// The descriptor; the giver keeps one of its own until all is over.
    pub fd: OwnedFd,
}

/// What only some devices do; every hook may be left out.
pub trait Hooks {
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

    /// A live upgrade has begun, in the old process: what of the host's goes along. From now on until
    /// [`Hooks::handed_over`] these are to rest: nothing is read from them, accepted or written. No queue runs; the
    /// device's state is saved after this.
    ///
    /// # Errors
    /// The device goes on here.
    fn hand_over(&mut self) -> Result<Vec<Heirloom>, Error> {
        Ok(Vec::new())
    }

    /// The live upgrade is over, in the old process: `gone` says whether everything is the new one's, names in the
    /// file system too. If not, the device goes on.
    fn handed_over(&mut self, gone: bool) {
        let _ = gone;
    }

    /// A live upgrade has begun, in the new process: what has come, before anything else is said. They are to rest until
    /// [`Hooks::inherited`]; queues may be started before that, when there is no other way back.
    ///
    /// # Errors
    /// The old process goes on.
    fn inherit(&mut self, heirlooms: Vec<Heirloom>) -> Result<(), Error> {
        drop(heirlooms);
        Ok(())
    }

    /// Everything is this process's now.
    fn inherited(&mut self) {}
}
