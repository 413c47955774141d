//! Messages that pass descriptors and shared memory: the back-end channel, the display, shared objects.

use std::os::fd::{AsFd, OwnedFd};

use outboard_protocol::payload::{ShmemConfig, Uuid};
use outboard_protocol::{Answer, Request};

use super::{Connection, duplicate};
use crate::error::Error;

impl Connection {
    /// SET_BACKEND_REQ_FD: the socket for the back-end's requests; the descriptor stays the caller's.
    /// [`Vmm::open_channel`](crate::Vmm::open_channel) makes one and listens at its other end.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_backend_req_fd(&mut self, socket: impl AsFd) -> Result<(), Error> {
        let socket = duplicate(socket.as_fd())?;
        self.acknowledged(Request::SetBackendReqFd(socket))
    }

    /// GPU_SET_SOCKET: the display channel; the descriptor stays the caller's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn gpu_set_socket(&mut self, socket: impl AsFd) -> Result<(), Error> {
        let socket = duplicate(socket.as_fd())?;
        self.acknowledged(Request::GpuSetSocket(socket))
    }

    /// GET_SHARED_OBJECT: the object of this name, if the device exports one.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_shared_object(&mut self, uuid: Uuid) -> Result<Option<OwnedFd>, Error> {
        match self.answer(Request::GetSharedObject(uuid))? {
            Answer::SharedObject(object) => Ok(object),
            _ => Err(Error::WrongAnswer { request: "GET_SHARED_OBJECT" }),
        }
    }

    /// GET_SHMEM_CONFIG: the device's shared-memory regions, as it lists them.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_shmem_config(&mut self) -> Result<Box<ShmemConfig>, Error> {
        match self.answer(Request::GetShmemConfig)? {
            Answer::ShmemConfig(config) => Ok(config),
            _ => Err(Error::WrongAnswer { request: "GET_SHMEM_CONFIG" }),
        }
    }
}
