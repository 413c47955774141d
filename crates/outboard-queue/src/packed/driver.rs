//! The driver side of a packed ring. Mirrors `device`: a batch is written whole but for the flags of its first
//! descriptor, which come last, with Release, and a full fence before the look at what the device wants; the flags of a
//! used descriptor are loaded with Acquire before the rest of it.
//!
//! Which ids are free and what an id stands for is private: nothing of what the driver wrote is read back.

use std::sync::atomic::Ordering;

use outboard_memory::{Descriptor, PackedBody, View, fence};

use super::cells::PackedCells;
use super::place::{DESC, DISABLE, ENABLE, Place, event_word, wants};
use super::{AVAIL, STATE, USED};
use crate::error::{QueueFull, RingError};
use crate::layout::{QueueFeatures, QueueLayout};
use crate::order::Offered;

/// What a buffer id is to the driver.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The next free id.
    next: u16,
    /// In flight: descriptors of the ring. 0: free.
    count: u16,
    token: u64,
}

#[derive(Debug)]
pub(crate) struct PackedDriver {
    cells: PackedCells,
    view: View,
    layout: QueueLayout,
    features: QueueFeatures,
    slots: Box<[Slot]>,
    first_free: u16,
    /// Descriptors that are free.
    free: u16,
    in_flight: u16,
    next_avail: Place,
    next_used: Place,
    /// Descriptors added and not published.
    batch: u16,
    /// The first of them, and the flags it gets.
    first: (u16, u16),
    /// Guest address and entries of the indirect tables.
    tables: Option<(u64, u16)>,
    armed: bool,
    /// What is in flight, when the device has to keep to the order.
    offered: Option<Offered>,
}

impl PackedDriver {
    /// `start`: index and wrap counter of both sides.
    pub(crate) fn new(
        layout: QueueLayout,
        features: QueueFeatures,
        view: View,
        start: u16,
    ) -> Result<Self, RingError> {
        let size = layout.size;
        let cells = PackedCells::resolve(&layout, &view)?;
        let wrong = RingError::PackedBase { base: start.into(), size };
        let place = Place::from_bits(start, size).ok_or(wrong)?;
        // As a lap leaves it that ended here: used up to here in this lap, in the one before from here on.
        for at in 0..size {
            let used = (at < place.at) == place.wrap;
            let _ = cells.ring.set_body(at, PackedBody::default());
            let _ = cells.ring.set_flags(at, if used { STATE } else { 0 }, Ordering::Relaxed);
        }
        cells.driver_event.store(event_word(start, wish(features)), Ordering::Relaxed);
        cells.device_event.store(event_word(start, wish(features)), Ordering::Release);
        let slots = (1..=size).map(|next| Slot { next, ..Slot::default() }).collect();
        Ok(Self {
            cells,
            view,
            layout,
            features,
            slots,
            first_free: 0,
            free: size,
            in_flight: 0,
            next_avail: place,
            next_used: place,
            batch: 0,
            first: (0, 0),
            tables: None,
            armed: true,
            offered: features.in_order.then(Offered::default),
        })
    }

    pub(crate) fn set_indirect_area(&mut self, guest: u64, entries: u16) {
        self.tables = Some((guest, entries));
    }

    pub(crate) fn add(
        &mut self,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        token: u64,
    ) -> Result<u16, QueueFull> {
        if readable.is_empty() && writable.is_empty() {
            return self.add(&[(0, 0)], &[], token);
        }
        let needed = readable.len() + writable.len();
        let full = QueueFull { needed, free: usize::from(self.free) };
        let count = u16::try_from(needed).ok().filter(|&count| count <= self.free).ok_or(full)?;
        let id = self.take_id(count, token).ok_or(full)?;
        if let Some(offered) = &mut self.offered {
            offered.push(id, writable);
        }
        let mut left = count;
        self.describe(readable, 0, id, &mut left).ok_or(full)?;
        self.describe(writable, Descriptor::WRITE, id, &mut left).ok_or(full)?;
        Ok(id)
    }

    /// Puts buffers into the next descriptors, as a part of a chain of which `left` are still to come.
    #[inline(always)]
    fn describe(
        &mut self,
        buffers: &[(u64, u32)],
        write: u16,
        id: u16,
        left: &mut u16,
    ) -> Option<()> {
        for &(addr, len) in buffers {
            *left -= 1;
            let flags = if *left > 0 { write | Descriptor::NEXT } else { write };
            self.write(PackedBody { addr, len, id }, flags)?;
        }
        Some(())
    }

    pub(crate) fn add_indirect(
        &mut self,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        token: u64,
    ) -> Result<u16, QueueFull> {
        let needed = (readable.len() + writable.len()).max(1);
        let (area, entries) = self.tables.unwrap_or_default();
        // A chain is never longer than the ring (virtio 1.3 §2.8.19).
        let most = entries.min(self.layout.size);
        let count = u16::try_from(needed).ok().filter(|&count| count <= most);
        let count = count.ok_or(QueueFull { needed, free: usize::from(most) })?;
        let full = QueueFull { needed: 1, free: usize::from(self.free) };
        let offset = u64::from(self.first_free) * u64::from(entries) * 16;
        let table = area.checked_add(offset).filter(|_| self.free > 0).ok_or(full)?;
        for (index, (addr, len, write)) in
            (0..u64::from(count)).zip(crate::split::driver::buffers(readable, writable))
        {
            let entry = bytes(addr, len, write);
            self.view.write(table + index * 16, &entry).map_err(|_| full)?;
        }
        let id = self.take_id(1, token).ok_or(full)?;
        if let Some(offered) = &mut self.offered {
            offered.push(id, writable);
        }
        let body = PackedBody { addr: table, len: u32::from(count) * 16, id };
        self.write(body, Descriptor::INDIRECT).ok_or(full)?;
        Ok(id)
    }

    /// An id for a chain of `count` descriptors.
    fn take_id(&mut self, count: u16, token: u64) -> Option<u16> {
        let id = self.first_free;
        let slot = self.slots.get_mut(usize::from(id)).filter(|slot| slot.count == 0)?;
        self.first_free = slot.next;
        slot.count = count;
        slot.token = token;
        self.free = self.free.checked_sub(count)?;
        self.in_flight += 1;
        Some(id)
    }

    /// Writes the next descriptor. The first of a batch gets its flags at last.
    #[inline(always)]
    fn write(&mut self, body: PackedBody, flags: u16) -> Option<()> {
        let at = self.next_avail.at;
        let flags = flags | if self.next_avail.wrap { AVAIL } else { USED };
        self.cells.ring.set_body(at, body)?;
        if self.batch == 0 {
            self.first = (at, flags);
        } else {
            self.cells.ring.set_flags(at, flags, Ordering::Relaxed)?;
        }
        self.batch += 1;
        self.next_avail.advance(1, self.layout.size);
        Some(())
    }

    pub(crate) fn publish(&mut self) -> bool {
        let count = self.batch;
        if count == 0 {
            return false;
        }
        // Release: the rest of the batch is there before the device finds the first one.
        let (at, flags) = self.first;
        let _ = self.cells.ring.set_flags(at, flags, Ordering::Release);
        self.batch = 0;
        // The device arms, then looks at the next descriptor; we write it, then look whether it is armed.
        fence(Ordering::SeqCst);
        let event = self.cells.device_event.load(Ordering::Relaxed);
        wants(event, self.features.event_idx, self.next_avail, count, self.layout.size)
    }

    /// Whether the next descriptor is used, and what it says then.
    fn look(&self, order: Ordering) -> bool {
        if self.offered.as_ref().is_some_and(Offered::is_open) {
            return true;
        }
        let used = if self.next_used.wrap { STATE } else { 0 };
        let flags = self.cells.ring.flags(self.next_used.at, order);
        flags.is_some_and(|flags| flags & STATE == used)
    }

    pub(crate) fn pop_used(&mut self) -> Result<Option<(u64, u32)>, RingError> {
        if !self.look(Ordering::Acquire) {
            return Ok(None);
        }
        let (id, len) = self.next_done()?;
        let slot = self.slots.get_mut(usize::from(id)).filter(|slot| slot.count > 0);
        let slot = slot.ok_or(RingError::UsedHead { id: id.into() })?;
        let (count, token) = (std::mem::take(&mut slot.count), slot.token);
        slot.next = self.first_free;
        self.first_free = id;
        self.free += count;
        self.in_flight -= 1;
        self.next_used.advance(count, self.layout.size);
        Ok(Some((token, len)))
    }

    /// Id and bytes written of the chain that is used now.
    fn next_done(&mut self) -> Result<(u16, u32), RingError> {
        let used = self.cells.ring.body(self.next_used.at).unwrap_or_default();
        let Some(offered) = &mut self.offered else {
            return Ok((used.id, used.len));
        };
        let last = u32::from(used.id);
        if !offered.is_open() {
            offered.open(last, used.len, self.in_flight)?;
        }
        offered.next().ok_or(RingError::UsedHead { id: last })
    }

    pub(crate) fn arm(&mut self) -> bool {
        let word = event_word(self.next_used.bits(), wish(self.features));
        self.cells.driver_event.store(word, Ordering::Relaxed);
        self.armed = true;
        // The device writes a used descriptor, then looks whether we are armed; we arm, then look at it.
        fence(Ordering::SeqCst);
        self.look(Ordering::Relaxed)
    }

    pub(crate) fn disarm(&mut self) {
        if std::mem::replace(&mut self.armed, false) {
            self.cells.driver_event.store(event_word(0, DISABLE), Ordering::Relaxed);
        }
    }

    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    pub(crate) fn free(&self) -> u16 {
        self.free
    }

    /// Index and wrap counter of the next descriptor to be made available.
    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail.bits()
    }

    pub(crate) fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }

    pub(crate) fn layout(&self) -> &QueueLayout {
        &self.layout
    }

    pub(crate) fn features(&self) -> QueueFeatures {
        self.features
    }
}

/// The flags of an event structure that asks to be told.
const fn wish(features: QueueFeatures) -> u8 {
    if features.event_idx { DESC } else { ENABLE }
}

/// An entry of an indirect table as it lies in memory: no id.
fn bytes(addr: u64, len: u32, flags: u16) -> [u8; 16] {
    let rest = u128::from(len) << 64 | u128::from(flags) << 112;
    (u128::from(addr) | rest).to_le_bytes()
}
