//! A guest that writes what it likes: guest memory with gaps and seams, a ring in it, and a device on the ring.

use std::sync::Arc;

use outboard_memory::{GuestMemory, Region, View};
use outboard_queue::{Chain, DeviceQueue, QueueLayout, RingError};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;

/// The ring lies at 0; buffers may lie anywhere from here on.
pub(crate) const DATA: u64 = 0x20_0000;
/// Two regions meet here.
pub(crate) const SEAM: u64 = 0x40_0000;
/// Memory ends here.
pub(crate) const END: u64 = 0x60_0000;

pub(crate) struct Rig {
    pub(crate) view: View,
    pub(crate) layout: QueueLayout,
    pub(crate) device: DeviceQueue,
    avail: u16,
}

/// Memory from 0 to `END`, in two regions that meet at `SEAM`.
pub(crate) fn memory() -> Arc<GuestMemory> {
    let regions = [(0, SEAM), (SEAM, END - SEAM)];
    let regions = regions.map(|(start, size)| Arc::new(Region::memfd(start, size).unwrap().0));
    Arc::new(GuestMemory::new(1, regions.into()).unwrap())
}

impl Rig {
    pub(crate) fn new(size: u16, features: u64) -> Self {
        let view = View::new(memory());
        let (layout, end) = QueueLayout::split_at(0, size).unwrap();
        assert!(end < DATA);
        let device = DeviceQueue::new(layout, features, 0, view.clone()).unwrap();
        Self { view, layout, device, avail: 0 }
    }

    /// Writes descriptor `at` of the ring's table.
    pub(crate) fn desc(&self, at: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.desc_at(self.layout.desc + 16 * u64::from(at), addr, len, flags, next);
    }

    /// Writes a descriptor anywhere.
    pub(crate) fn desc_at(&self, place: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.view.write(place, &addr.to_le_bytes()).unwrap();
        self.view.write(place + 8, &len.to_le_bytes()).unwrap();
        self.view.write(place + 12, &flags.to_le_bytes()).unwrap();
        self.view.write(place + 14, &next.to_le_bytes()).unwrap();
    }

    /// Puts a head into the available ring and moves the index.
    pub(crate) fn offer(&mut self, head: u16) {
        let entry = u64::from(self.avail % self.layout.size);
        self.view.write(self.layout.avail + 4 + 2 * entry, &head.to_le_bytes()).unwrap();
        self.set_avail(self.avail.wrapping_add(1));
    }

    pub(crate) fn set_avail(&mut self, index: u16) {
        self.avail = index;
        self.view.write(self.layout.avail + 2, &index.to_le_bytes()).unwrap();
    }

    pub(crate) fn u16_at(&self, place: u64) -> u16 {
        let mut bytes = [0; 2];
        self.view.read(place, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.u16_at(self.layout.used + 2)
    }

    /// Element `at` of the used ring.
    pub(crate) fn used(&self, at: u16) -> (u32, u32) {
        let mut bytes = [0; 8];
        self.view
            .read(self.layout.used + 4 + 8 * u64::from(at % self.layout.size), &mut bytes)
            .unwrap();
        let both = u64::from_le_bytes(bytes);
        (u32::try_from(both & 0xffff_ffff).unwrap(), u32::try_from(both >> 32).unwrap())
    }

    /// What the next chain is: it must be one.
    pub(crate) fn take(&mut self) -> Chain {
        self.device.pop().unwrap().unwrap()
    }

    /// The ring must break with what `is` accepts: told once, then silence, and the device says so.
    pub(crate) fn breaks(&mut self, is: impl Fn(RingError) -> bool) {
        let told = self.device.pop().unwrap_err();
        assert!(is(told), "{told:?}");
        assert!(self.device.is_broken());
        self.stays_silent();
    }

    /// A broken ring: nothing more comes, whatever the guest does; nothing spins.
    pub(crate) fn stays_silent(&mut self) {
        for _ in 0..3 {
            assert!(self.device.pop().unwrap().is_none());
            assert!(!self.device.arm(), "an armed broken ring has no work");
            assert!(!self.device.has_available(), "nor has one that is polled");
        }
        self.set_avail(self.avail.wrapping_add(1));
        assert!(self.device.pop().unwrap().is_none());
        assert!(!self.device.arm());
    }
}

/// A pattern that shows where a byte came from.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_add(u8::try_from(at % 251).unwrap())).collect()
}
