//! What a back-end told or asked over its channel, after it was carried out and answered.
//!
//! Invariant: an event names a ring that exists and a range that was checked; what was refused is an
//! event too, with the reason.

use outboard_memory::Window;
use outboard_protocol::payload::Uuid;

/// One thing that the back-end did. All but [`ChannelEvent::Refused`] succeeded.
#[derive(Debug)]
#[non_exhaustive]
pub enum ChannelEvent {
    /// The configuration space has changed: read it again.
    ConfigChanged,
    /// A part of a shared-memory region shows something now.
    Map {
        /// Region id.
        region: u8,
        /// First byte in the region.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether it may be written.
        writable: bool,
    },
    /// A part of a shared-memory region shows nothing any more.
    Unmap {
        /// Region id.
        region: u8,
        /// First byte in the region.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A page whose writes notify the device, or (`None`) its end.
    HostNotifier {
        /// Ring.
        queue: u16,
        /// The page.
        page: Option<Window>,
    },
    /// A ring has completions (in-band notifications).
    VringCall {
        /// Ring.
        queue: u16,
    },
    /// A ring is broken (in-band notifications).
    VringErr {
        /// Ring.
        queue: u16,
    },
    /// The device waits for an IOTLB entry: answer with
    /// [`Connection::iotlb_update`](crate::Connection::iotlb_update).
    IotlbMiss {
        /// I/O virtual address.
        iova: u64,
        /// 1 read, 2 write, 3 both.
        perm: u8,
    },
    /// The device was not allowed an access.
    IotlbAccessFailure {
        /// I/O virtual address.
        iova: u64,
        /// Bytes, if it said.
        size: u64,
        /// 1 read, 2 write, 3 both.
        perm: u8,
    },
    /// The device exports an object: it answers
    /// [`Connection::get_shared_object`](crate::Connection::get_shared_object) with it.
    SharedObjectAdded(Uuid),
    /// The device exports an object no more.
    SharedObjectRemoved(Uuid),
    /// The device asked for an object.
    SharedObjectLookup {
        /// Its name.
        uuid: Uuid,
        /// Whether it got it.
        found: bool,
    },
    /// Something was refused, or broke a rule without getting out of step.
    Refused {
        /// Why.
        reason: String,
    },
}
