//! A guest that writes what it likes: guest memory with seams, a packed ring in it, and a device on the ring.

use std::cell::Cell;
use std::sync::Arc;

use outboard_memory::{GuestMemory, Region, View};
use outboard_queue::{Chain, DeviceQueue, QueueLayout, RingError};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
pub(crate) const AVAIL: u16 = 1 << 7;
pub(crate) const USED: u16 = 1 << 15;

pub(crate) const PACKED: u64 = 1 << 34;
pub(crate) const IN_ORDER: u64 = 1 << 35;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;

/// Index 0 and wrap counter 1, for both sides.
pub(crate) const FRESH: u32 = 0x8000_8000;

/// The ring lies at 0; buffers may lie anywhere from here on.
pub(crate) const DATA: u64 = 0x20_0000;
/// Two regions meet here.
pub(crate) const SEAM: u64 = 0x40_0000;
/// Memory ends here.
pub(crate) const END: u64 = 0x60_0000;

thread_local! {
    /// Whether new rigs have served chains before. What a chain's list has room for is walked in another way than what
    /// it has not, and a fresh ring has room for nothing.
    pub(crate) static WORN: Cell<bool> = const { Cell::new(false) };
}

pub(crate) struct Rig {
    pub(crate) view: View,
    pub(crate) layout: QueueLayout,
    pub(crate) device: DeviceQueue,
    /// Where the driver goes on.
    pub(crate) at: u16,
    pub(crate) wrap: bool,
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
        let (layout, end) = QueueLayout::packed_at(0, size).unwrap();
        assert!(end < DATA);
        let device = DeviceQueue::new(layout, features | PACKED, FRESH, view.clone()).unwrap();
        let mut rig = Self { view, layout, device, at: 0, wrap: true };
        if WORN.get() {
            rig.wear();
        }
        rig
    }

    /// Has the device serve a few long chains, and comes back to index 0 two laps later.
    fn wear(&mut self) {
        let size = self.layout.size;
        let few = size.min(16);
        let mut left = 2 * size;
        while left > 0 {
            let chains: Vec<_> = (0..4)
                .filter_map(|id| {
                    let count = few.min(left).min(size / 4).max(u16::from(id == 0));
                    if count == 0 {
                        return None;
                    }
                    left -= count;
                    self.offer(id, &vec![(DATA, 16, 0); usize::from(count)]);
                    Some(self.take())
                })
                .collect();
            for chain in chains {
                self.device.complete(chain, 0);
            }
            self.device.publish().unwrap();
        }
        assert_eq!((self.at, self.wrap), (0, true));
    }

    /// The flags of an available descriptor where the driver is.
    pub(crate) fn available(&self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// Writes descriptor `at` as it is said.
    pub(crate) fn desc(&self, at: u16, addr: u64, len: u32, id: u16, flags: u16) {
        let place = self.layout.desc + 16 * u64::from(at);
        self.view.write(place, &addr.to_le_bytes()).unwrap();
        self.view.write(place + 8, &len.to_le_bytes()).unwrap();
        self.view.write(place + 12, &id.to_le_bytes()).unwrap();
        self.view.write(place + 14, &flags.to_le_bytes()).unwrap();
    }

    /// Makes one descriptor with these flags (and those of the wrap counter) available and goes on behind it.
    pub(crate) fn push(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        self.desc(self.at, addr, len, id, flags | self.available());
        self.at += 1;
        if self.at == self.layout.size {
            (self.at, self.wrap) = (0, !self.wrap);
        }
    }

    /// Makes a chain of these buffers (address, bytes, WRITE) available.
    pub(crate) fn offer(&mut self, id: u16, buffers: &[(u64, u32, u16)]) {
        for (at, &(addr, len, flags)) in buffers.iter().enumerate() {
            let next = if at + 1 < buffers.len() { NEXT } else { 0 };
            self.push(addr, len, id, flags | next);
        }
    }

    /// Writes an entry of an indirect table.
    pub(crate) fn entry(&self, place: u64, addr: u64, len: u32, flags: u16) {
        self.view.write(place, &addr.to_le_bytes()).unwrap();
        self.view.write(place + 8, &len.to_le_bytes()).unwrap();
        self.view.write(place + 12, &[0xaa, 0xaa]).unwrap();
        self.view.write(place + 14, &flags.to_le_bytes()).unwrap();
    }

    pub(crate) fn u16_at(&self, place: u64) -> u16 {
        let mut bytes = [0; 2];
        self.view.read(place, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Descriptor `at` as the device leaves it: id, bytes, flags.
    pub(crate) fn used(&self, at: u16) -> (u16, u32, u16) {
        let place = self.layout.desc + 16 * u64::from(at);
        let len = u32::from(self.u16_at(place + 8)) | u32::from(self.u16_at(place + 10)) << 16;
        (self.u16_at(place + 12), len, self.u16_at(place + 14))
    }

    /// What the device wrote into its event structure: place, flags.
    pub(crate) fn wish(&self) -> (u16, u16) {
        (self.u16_at(self.layout.used), self.u16_at(self.layout.used + 2))
    }

    /// What the next chain is: it must be one.
    pub(crate) fn take(&mut self) -> Chain {
        self.device.pop().unwrap().unwrap()
    }

    /// Takes the next chain, gives it back and publishes.
    pub(crate) fn serve(&mut self) -> bool {
        let chain = self.take();
        self.device.complete(chain, 0);
        self.device.publish().unwrap()
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
            self.offer(0, &[(DATA, 16, 0)]);
        }
    }
}

/// A pattern that shows where a byte came from.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_add(u8::try_from(at % 251).unwrap())).collect()
}
