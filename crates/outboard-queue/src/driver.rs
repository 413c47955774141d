//! The driver side of a queue: what the front-end, the tests and the benches use.

use outboard_memory::View;

use crate::error::{QueueFull, RingError};
use crate::layout::{QueueFeatures, QueueLayout};
use crate::packed::driver::PackedDriver;
use crate::split::driver::SplitDriver;

/// A queue that a driver fills. The device is not trusted: what it writes is checked.
#[derive(Debug)]
pub struct DriverQueue {
    ring: Ring,
}

/// The layouts.
#[derive(Debug)]
enum Ring {
    Split(SplitDriver),
    Packed(PackedDriver),
}

/// The same of either layout.
macro_rules! each {
    ($ring:expr, $this:ident => $what:expr) => {
        match $ring {
            Ring::Split($this) => $what,
            Ring::Packed($this) => $what,
        }
    };
}

impl DriverQueue {
    /// A fresh queue: both indices 0 (packed: both wrap counters 1), flags and events cleared in guest memory.
    ///
    /// # Errors
    /// The ring is not in guest memory as described.
    pub fn new(layout: QueueLayout, features: u64, view: View) -> Result<Self, RingError> {
        let packed = QueueFeatures::from_bits(features).packed;
        Self::starting_at(layout, features, view, if packed { 0x8000 } else { 0 })
    }

    /// The same with both indices at `index`, a packed ring's with the wrap counter in bit 15. The base to tell the
    /// device is [`base`](Self::base).
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn starting_at(
        layout: QueueLayout,
        features: u64,
        view: View,
        index: u16,
    ) -> Result<Self, RingError> {
        let features = QueueFeatures::from_bits(features);
        let ring = if features.packed {
            Ring::Packed(PackedDriver::new(layout, features, view, index)?)
        } else {
            Ring::Split(SplitDriver::new(layout, features, view, index)?)
        };
        Ok(Self { ring })
    }

    /// Sets memory aside for indirect tables: one of `entries` descriptors for each head, at `guest`, 16 × `entries` ×
    /// ring size bytes in all. Used by [`add_indirect`](Self::add_indirect).
    pub fn set_indirect_area(&mut self, guest: u64, entries: u16) {
        each!(&mut self.ring, ring => ring.set_indirect_area(guest, entries));
    }

    /// Offers a chain of these buffers, (guest address, bytes) each; `token` comes back with it. Nothing shows before
    /// [`publish`](Self::publish). A chain without buffers has one empty readable descriptor. Returns the head.
    ///
    /// # Errors
    /// Too few descriptors are free.
    #[inline]
    pub fn add(
        &mut self,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        token: u64,
    ) -> Result<u16, QueueFull> {
        each!(&mut self.ring, ring => ring.add(readable, writable, token))
    }

    /// The same with all buffers in one indirect table.
    ///
    /// # Errors
    /// No descriptor is free, the table is too short or not in guest memory, or there is no area for tables.
    pub fn add_indirect(
        &mut self,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        token: u64,
    ) -> Result<u16, QueueFull> {
        each!(&mut self.ring, ring => ring.add_indirect(readable, writable, token))
    }

    /// Shows the device what was added since the last time. True: it wants a kick.
    #[inline]
    pub fn publish(&mut self) -> bool {
        each!(&mut self.ring, ring => ring.publish())
    }

    /// The next chain that the device is done with: its token, and the bytes it says it wrote.
    ///
    /// # Errors
    /// The device broke a rule. Said each time.
    #[inline]
    pub fn pop_used(&mut self) -> Result<Option<(u64, u32)>, RingError> {
        each!(&mut self.ring, ring => ring.pop_used())
    }

    /// Asks for a call, then takes a last look. True: something is used already, so do not sleep.
    pub fn arm(&mut self) -> bool {
        each!(&mut self.ring, ring => ring.arm())
    }

    /// Wants no calls.
    pub fn disarm(&mut self) {
        each!(&mut self.ring, ring => ring.disarm());
    }

    /// Chains that the device holds, the unpublished ones included.
    pub fn in_flight(&self) -> u16 {
        each!(&self.ring, ring => ring.in_flight())
    }

    /// Descriptors that are free.
    pub fn free(&self) -> u16 {
        each!(&self.ring, ring => ring.free())
    }

    /// What SET_VRING_BASE carries when a device takes over. Split: the available index, right with nothing in flight.
    pub fn base(&self) -> u32 {
        each!(&self.ring, ring => ring.base())
    }

    /// The available index (packed: with its wrap counter in bit 15).
    pub fn next_avail(&self) -> u16 {
        each!(&self.ring, ring => ring.next_avail())
    }

    /// Where the ring lies.
    pub fn layout(&self) -> &QueueLayout {
        each!(&self.ring, ring => ring.layout())
    }

    /// The features the ring was made with.
    pub fn features(&self) -> QueueFeatures {
        each!(&self.ring, ring => ring.features())
    }
}
