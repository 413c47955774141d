//! Messages of the in-flight region: GET_INFLIGHT_FD, SET_INFLIGHT_FD (vhost-user, "Inflight I/O tracking").

use std::os::fd::{AsFd, OwnedFd};

use outboard_protocol::payload::Inflight;
use outboard_protocol::{Answer, Request};

use super::{Connection, duplicate};
use crate::error::Error;

impl Connection {
    /// GET_INFLIGHT_FD: a fresh region for so many rings of this size; `None` when the back-end has none.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_inflight_fd(
        &mut self,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<Option<(Inflight, OwnedFd)>, Error> {
        match self.answer(Request::GetInflightFd { num_queues, queue_size })? {
            Answer::Inflight(region, file) => Ok(file.map(|file| (region, file))),
            _ => Err(Error::WrongAnswer { request: "GET_INFLIGHT_FD" }),
        }
    }

    /// SET_INFLIGHT_FD; the descriptor stays the caller's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_inflight_fd(&mut self, region: Inflight, file: impl AsFd) -> Result<(), Error> {
        let file = duplicate(file.as_fd())?;
        self.acknowledged(Request::SetInflightFd(region, file))
    }
}
