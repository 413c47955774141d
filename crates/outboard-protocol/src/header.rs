//! The twelve bytes before each payload (vhost-user, "Message Specification: Header").
//!
//! ```text
//!  0         4         8         12            12 + size
//!  | request |  flags  |  size   | payload ... |
//! ```
//! Invariant: integers are in host order and stay at wire width; nothing here trusts `size`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Length of a header in bytes.
pub const HEADER_SIZE: usize = 12;
/// The only protocol version there is, in bits 0–1 of the flags.
pub const VERSION: u32 = 1;
/// Mask of the version bits.
pub const VERSION_MASK: u32 = 0x3;
/// Flag bit 2: this message answers a request.
pub const FLAG_REPLY: u32 = 0x4;
/// Flag bit 3: the sender asks for a reply (REPLY_ACK).
pub const FLAG_NEED_REPLY: u32 = 0x8;
/// The exact flags of every reply: QEMU compares for equality.
pub const REPLY_FLAGS: u32 = VERSION | FLAG_REPLY;
/// No payload of any message is longer than this many bytes; more is out of step.
pub const MAX_PAYLOAD: u32 = 4096;

/// A message header as it stands on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Message id; front-end and back-end messages have separate number spaces.
    pub request: u32,
    /// Version, reply and need_reply bits. The reserved bits 4–31 are ignored on receipt (hostile
    /// case A8) and never sent.
    pub flags: u32,
    /// Bytes of payload that follow.
    pub size: u32,
}

const _: () = assert!(size_of::<Header>() == HEADER_SIZE);

impl Header {
    /// The header of a request with `size` bytes of payload.
    #[must_use]
    pub const fn request(request: u32, need_reply: bool, size: u32) -> Self {
        let flags = if need_reply { VERSION | FLAG_NEED_REPLY } else { VERSION };
        Self { request, flags, size }
    }

    /// The header of a reply to `request` with `size` bytes of payload.
    #[must_use]
    pub const fn reply(request: u32, size: u32) -> Self {
        Self { request, flags: REPLY_FLAGS, size }
    }

    /// The version bits.
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.flags & VERSION_MASK
    }

    /// Whether the reply bit is set.
    #[must_use]
    pub const fn is_reply(&self) -> bool {
        self.flags & FLAG_REPLY != 0
    }

    /// Whether the sender asked for an answer.
    #[must_use]
    pub const fn need_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}
