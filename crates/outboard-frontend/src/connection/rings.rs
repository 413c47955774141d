//! Messages to one ring beside those of every start: polling, in-band kicks, byte order, the IOTLB that its
//! addresses go through.

use outboard_protocol::payload::{IOTLB_INVALIDATE, IOTLB_UPDATE, Iotlb};
use outboard_protocol::{Answer, Notifier, Request};

use super::Connection;
use crate::error::Error;

impl Connection {
    /// SET_VRING_KICK without a descriptor: starts the ring, which the back-end polls (or which is kicked
    /// with [`Self::vring_kick`]).
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_kick_polled(&mut self, index: u16) -> Result<(), Error> {
        let (index, kick) = (u32::from(index), Notifier::Poll);
        self.acknowledged(Request::SetVringKick { index, kick })
    }

    /// SET_VRING_CALL without a descriptor: we poll (or are called over the channel).
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_call_polled(&mut self, index: u16) -> Result<(), Error> {
        let (index, call) = (u32::from(index), Notifier::Poll);
        self.acknowledged(Request::SetVringCall { index, call })
    }

    /// SET_VRING_ERR without a descriptor.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_err_polled(&mut self, index: u16) -> Result<(), Error> {
        let (index, err) = (u32::from(index), Notifier::Poll);
        self.acknowledged(Request::SetVringErr { index, err })
    }

    /// VRING_KICK: a kick as a message; it starts a stopped ring.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn vring_kick(&mut self, index: u16) -> Result<(), Error> {
        self.acknowledged(Request::VringKick { index: u32::from(index) })
    }

    /// SET_VRING_ENDIAN: byte order of a legacy ring.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_vring_endian(&mut self, index: u16, big_endian: bool) -> Result<(), Error> {
        self.acknowledged(Request::SetVringEndian { index: u32::from(index), big_endian })
    }

    /// GET_VRING_BASE_SKIP_DRAIN: stops the ring and leaves what is in flight in the in-flight region.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn get_vring_base_skip_drain(&mut self, index: u16) -> Result<u32, Error> {
        match self.answer(Request::GetVringBaseSkipDrain { index: u32::from(index) })? {
            Answer::VringBase { base, .. } => Ok(base),
            _ => Err(Error::WrongAnswer { request: "GET_VRING_BASE_SKIP_DRAIN" }),
        }
    }

    /// IOTLB_MSG, update: `size` bytes at `iova` lie at the user address `user`; `perm` is 1 read, 2 write,
    /// 3 both.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn iotlb_update(&mut self, iova: u64, size: u64, user: u64, perm: u8) -> Result<(), Error> {
        let kind = IOTLB_UPDATE;
        let entry = Iotlb { iova, size, uaddr: user, perm, kind, ..Iotlb::default() };
        self.acknowledged(Request::Iotlb(entry))
    }

    /// IOTLB_MSG, invalidate: `size` bytes at `iova` lie nowhere any more. When this returns, the back-end
    /// uses none of them.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn iotlb_invalidate(&mut self, iova: u64, size: u64) -> Result<(), Error> {
        let entry = Iotlb { iova, size, kind: IOTLB_INVALIDATE, ..Iotlb::default() };
        self.acknowledged(Request::Iotlb(entry))
    }
}
