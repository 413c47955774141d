//! One message to send: its bytes and the descriptors that ride with the first of them.
//!
//! Invariant: `bytes` is one whole message, header first, and the descriptors go out with byte 0
//! (`SCM_RIGHTS` on the `sendmsg` that sends it), whatever way the rest is split.

use zerocopy::IntoBytes;

use crate::header::Header;

/// One whole message, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame<Fd> {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// Descriptors that go with the first byte.
    pub fds: Vec<Fd>,
}

impl<Fd> Frame<Fd> {
    /// A request with this id. The payload is not looked at: tests and judges build wrong ones.
    #[must_use]
    pub fn request(id: u32, need_reply: bool, payload: &[u8], fds: Vec<Fd>) -> Self {
        Self::raw(Header::request(id, need_reply, length(payload)), payload, fds)
    }

    /// A reply to the request `id`.
    #[must_use]
    pub fn reply(id: u32, payload: &[u8], fds: Vec<Fd>) -> Self {
        Self::raw(Header::reply(id, length(payload)), payload, fds)
    }

    /// Any header before any payload, whether they agree or not.
    #[must_use]
    pub fn raw(header: Header, payload: &[u8], fds: Vec<Fd>) -> Self {
        let mut bytes = Vec::with_capacity(crate::header::HEADER_SIZE + payload.len());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(payload);
        Self { bytes, fds }
    }
}

fn length(payload: &[u8]) -> u32 {
    u32::try_from(payload.len()).unwrap_or(u32::MAX)
}
