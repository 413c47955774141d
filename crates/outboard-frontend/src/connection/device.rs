//! Messages to the device as a whole: status, resets, and what only net and crypto devices have.

use outboard_protocol::payload::CryptoSession;
use outboard_protocol::{Answer, Request};

use super::Connection;
use crate::error::Error;

impl Connection {
    /// RESET_OWNER (deprecated): disables all rings.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn reset_owner(&mut self) -> Result<(), Error> {
        self.acknowledged(Request::ResetOwner)
    }

    /// RESET_DEVICE.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn reset_device(&mut self) -> Result<(), Error> {
        self.acknowledged(Request::ResetDevice)
    }

    /// SET_STATUS: the virtio status byte; 0 resets.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn set_status(&mut self, status: u8) -> Result<(), Error> {
        self.acknowledged(Request::SetStatus(status))
    }

    /// GET_STATUS: the virtio status byte.
    ///
    /// # Errors
    /// [`Error::WrongAnswer`] when it is no byte, else as [`Self::call`].
    pub fn get_status(&mut self) -> Result<u8, Error> {
        const WRONG: Error = Error::WrongAnswer { request: "GET_STATUS" };
        match self.answer(Request::GetStatus)? {
            Answer::Status(status) => u8::try_from(status).map_err(|_| WRONG),
            _ => Err(WRONG),
        }
    }

    /// SEND_RARP: a fake RARP with this address is to be broadcast.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        self.acknowledged(Request::SendRarp(mac))
    }

    /// NET_SET_MTU: the guest's MTU in bytes.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn net_set_mtu(&mut self, mtu: u16) -> Result<(), Error> {
        self.acknowledged(Request::NetSetMtu(mtu))
    }

    /// CREATE_CRYPTO_SESSION: the id of the session.
    ///
    /// # Errors
    /// [`Error::Refused`] with the negative id, else as [`Self::call`].
    pub fn create_crypto_session(&mut self, session: CryptoSession) -> Result<u64, Error> {
        const REQUEST: &str = "CREATE_CRYPTO_SESSION";
        match self.answer(Request::CreateCryptoSession(Box::new(session)))? {
            Answer::CryptoSession(id) => u64::try_from(id)
                .map_err(|_| Error::Refused { request: REQUEST, code: id.cast_unsigned() }),
            _ => Err(Error::WrongAnswer { request: REQUEST }),
        }
    }

    /// CLOSE_CRYPTO_SESSION.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn close_crypto_session(&mut self, id: u64) -> Result<(), Error> {
        self.acknowledged(Request::CloseCryptoSession(id))
    }
}
