//! The driver side of a queue: what the front-end, the tests and the benches use.

use outboard_memory::View;

use crate::error::{QueueFull, RingError};
use crate::layout::{QueueFeatures, QueueLayout};
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
}

impl DriverQueue {
    /// A fresh queue: both indices 0, flags and events cleared in guest memory.
    ///
    /// # Errors
    /// The ring is not in guest memory as described.
    pub fn new(layout: QueueLayout, features: u64, view: View) -> Result<Self, RingError> {
        Self::starting_at(layout, features, view, 0)
    }

    /// The same with both indices at `index`, which is the base to tell the device.
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
        if features.packed {
            return Err(RingError::Packed);
        }
        Ok(Self { ring: Ring::Split(SplitDriver::new(layout, features, view, index)?) })
    }

    /// Sets memory aside for indirect tables: one of `entries` descriptors for each head, at `guest`, 16 × `entries` ×
    /// ring size bytes in all. Used by [`add_indirect`](Self::add_indirect).
    pub fn set_indirect_area(&mut self, guest: u64, entries: u16) {
        let Ring::Split(ring) = &mut self.ring;
        ring.set_indirect_area(guest, entries);
    }

    /// Offers a chain of these buffers, (guest address, bytes) each; `token` comes back with it. Nothing shows before
    /// [`publish`](Self::publish). A chain without buffers has one empty readable descriptor. Returns the head.
    ///
    /// # Errors
    /// Too few descriptors are free.
    pub fn add(
        &mut self,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        token: u64,
    ) -> Result<u16, QueueFull> {
        let Ring::Split(ring) = &mut self.ring;
        ring.add(readable, writable, token)
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
        let Ring::Split(ring) = &mut self.ring;
        ring.add_indirect(readable, writable, token)
    }

    /// Shows the device what was added since the last time. True: it wants a kick.
    pub fn publish(&mut self) -> bool {
        let Ring::Split(ring) = &mut self.ring;
        ring.publish()
    }

    /// The next chain that the device is done with: its token, and the bytes it says it wrote.
    ///
    /// # Errors
    /// The device broke a rule. Said each time.
    pub fn pop_used(&mut self) -> Result<Option<(u64, u32)>, RingError> {
        let Ring::Split(ring) = &mut self.ring;
        ring.pop_used()
    }

    /// Asks for a call, then takes a last look. True: something is used already, so do not sleep.
    pub fn arm(&mut self) -> bool {
        let Ring::Split(ring) = &mut self.ring;
        ring.arm()
    }

    /// Wants no calls.
    pub fn disarm(&mut self) {
        let Ring::Split(ring) = &mut self.ring;
        ring.disarm();
    }

    /// Chains that the device holds, the unpublished ones included.
    pub fn in_flight(&self) -> u16 {
        let Ring::Split(ring) = &self.ring;
        ring.in_flight()
    }

    /// Descriptors that are free.
    pub fn free(&self) -> u16 {
        let Ring::Split(ring) = &self.ring;
        ring.free()
    }

    /// The available index: what SET_VRING_BASE carries when a device takes over with nothing in flight.
    pub fn next_avail(&self) -> u16 {
        let Ring::Split(ring) = &self.ring;
        ring.next_avail()
    }

    /// Where the ring lies.
    pub fn layout(&self) -> &QueueLayout {
        let Ring::Split(ring) = &self.ring;
        ring.layout()
    }

    /// The features the ring was made with.
    pub fn features(&self) -> QueueFeatures {
        let Ring::Split(ring) = &self.ring;
        ring.features()
    }
}
