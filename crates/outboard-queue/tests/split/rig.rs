//! A guest that writes what it likes: guest memory with gaps and seams, a ring in it, and a device on the ring.

use std::cell::Cell;
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

thread_local! {
    /// Whether new rigs have served every head before. What a head's list has room for is walked
    /// in another way than what it has not, and a fresh ring has room for nothing.
    pub(crate) static WORN: Cell<bool> = const { Cell::new(false) };
}

pub(crate) struct Rig {
    pub(crate) view: View,
    pub(crate) layout: QueueLayout,
    pub(crate) device: DeviceQueue,
    avail: u16,
    /// What the indices began at: a multiple of the size.
    shift: u16,
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
        let mut rig = Self { view, layout, device, avail: 0, shift: 0 };
        if WORN.get() {
            rig.wear(size);
        }
        rig
    }

    /// Has each head serve a chain of a few descriptors, then forgets all about it.
    fn wear(&mut self, size: u16) {
        let table = vec![0; 16 * usize::from(size)];
        for head in 0..size {
            let few = if head < 256 { size.min(16) } else { 1 };
            for step in 0..few {
                let (at, next) = ((head + step) % size, (head + step + 1) % size);
                let flags = if step + 1 < few { NEXT } else { 0 };
                self.desc(at, DATA, 16, flags, next);
            }
            self.offer(head);
            let chain = self.take();
            self.device.complete(chain, 0);
            self.device.publish().unwrap();
        }
        self.view.write(self.layout.desc, &table).unwrap();
        (self.shift, self.avail) = (size, 0);
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
        let index = index.wrapping_add(self.shift);
        self.view.write(self.layout.avail + 2, &index.to_le_bytes()).unwrap();
    }

    pub(crate) fn u16_at(&self, place: u64) -> u16 {
        let mut bytes = [0; 2];
        self.view.read(place, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.u16_at(self.layout.used + 2).wrapping_sub(self.shift)
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

    /// What is said of an available index that cannot be.
    pub(crate) fn avail_error(&self, avail: u16, next: u16) -> RingError {
        let [avail, next] = [avail, next].map(|index| index.wrapping_add(self.shift));
        RingError::AvailIndex { avail, next, size: self.layout.size }
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
