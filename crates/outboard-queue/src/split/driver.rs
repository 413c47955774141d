//! The driver side of a split ring. Mirrors `device`: the available index is published with Release and a full fence
//! before the look at what the device wants; the used index is loaded with Acquire before its elements.
//!
//! Which descriptors are free and what a head stands for is private: nothing is read back from the descriptor table.

use std::sync::atomic::Ordering;

use outboard_memory::{Descriptor, Descriptors, View, fence};

use super::cells::SplitCells;
use super::{NO_INTERRUPT, NO_NOTIFY};
use crate::error::{QueueFull, RingError};
use crate::event::need_event;
use crate::layout::{QueueFeatures, QueueLayout};
use crate::order::Offered;

/// What a descriptor is to the driver.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The next free one, or the next one of its chain.
    next: u16,
    /// As a head in flight: descriptors of the chain. 0: no head in flight.
    count: u16,
    token: u64,
}

#[derive(Debug)]
pub(crate) struct SplitDriver {
    desc: Descriptors,
    cells: SplitCells,
    view: View,
    layout: QueueLayout,
    features: QueueFeatures,
    slots: Box<[Slot]>,
    first_free: u16,
    free: u16,
    next_avail: u16,
    told_avail: u16,
    next_used: u16,
    /// The used index when it was last looked at: what the device writes is not touched for each chain.
    seen_used: u16,
    in_flight: u16,
    /// Guest address and entries of the indirect tables.
    tables: Option<(u64, u16)>,
    armed: bool,
    /// What is in flight, when the device has to keep to the order. Descriptors are used in the order of the table then:
    /// the free ones are a ring.
    offered: Option<Offered>,
}

impl SplitDriver {
    pub(crate) fn new(
        layout: QueueLayout,
        features: QueueFeatures,
        view: View,
        index: u16,
    ) -> Result<Self, RingError> {
        let (desc, cells) = SplitCells::resolve(&layout, features, &view)?;
        cells.avail_flags.store(0, Ordering::Relaxed);
        cells.used_flags.store(0, Ordering::Relaxed);
        if let Some(events) = &cells.events {
            events.used_event.store(index, Ordering::Relaxed);
            events.avail_event.store(index, Ordering::Relaxed);
        }
        cells.used_idx.store(index, Ordering::Relaxed);
        cells.avail_idx.store(index, Ordering::Release);
        let after = |next| if features.in_order && next == layout.size { 0 } else { next };
        let slots = (1..=layout.size).map(|next| Slot { next: after(next), ..Slot::default() });
        let slots = slots.collect();
        Ok(Self {
            desc,
            cells,
            view,
            layout,
            features,
            slots,
            first_free: 0,
            free: layout.size,
            next_avail: index,
            told_avail: index,
            next_used: index,
            seen_used: index,
            in_flight: 0,
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
        let free = usize::from(self.free);
        let full = QueueFull { needed, free };
        let count = u16::try_from(needed).ok().filter(|&count| count <= self.free).ok_or(full)?;
        let head = self.first_free;
        let (mut at, mut left) = (head, count);
        self.describe(readable, 0, &mut at, &mut left).ok_or(full)?;
        self.describe(writable, Descriptor::WRITE, &mut at, &mut left).ok_or(full)?;
        self.offer((head, count), at, writable, token).ok_or(full)
    }

    /// Puts buffers into the free descriptors from `at` on, as a part of a chain of which `left` are still to come. (Not a
    /// loop over all buffers of a chain: that takes twice the instructions.)
    #[inline(always)]
    fn describe(
        &self,
        buffers: &[(u64, u32)],
        write: u16,
        at: &mut u16,
        left: &mut u16,
    ) -> Option<()> {
        for &(addr, len) in buffers {
            let next = self.slots.get(usize::from(*at))?.next;
            *left -= 1;
            let flags = if *left > 0 { write | Descriptor::NEXT } else { write };
            self.desc.set(*at, Descriptor { addr, len, flags, next })?;
            *at = next;
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
        // A chain is never longer than the ring (virtio 1.3 §2.7.5.3.1).
        let most = entries.min(self.layout.size);
        let count = u16::try_from(needed).ok().filter(|&count| count <= most);
        let count = count.ok_or(QueueFull { needed, free: usize::from(most) })?;
        let head = self.first_free;
        let full = QueueFull { needed: 1, free: usize::from(self.free) };
        let next = self.slots.get(usize::from(head)).filter(|_| self.free > 0).ok_or(full)?.next;
        let offset = u64::from(head) * u64::from(entries) * 16;
        let table = area.checked_add(offset).ok_or(full)?;
        for (index, (addr, len, write)) in (0..count).zip(buffers(readable, writable)) {
            let more = if index + 1 < count { Descriptor::NEXT } else { 0 };
            let entry = Descriptor { addr, len, flags: write | more, next: index + 1 };
            self.view.write(table + u64::from(index) * 16, &bytes(entry)).map_err(|_| full)?;
        }
        let outer = Descriptor {
            addr: table,
            len: u32::from(count) * 16,
            flags: Descriptor::INDIRECT,
            next: 0,
        };
        self.desc.set(head, outer).ok_or(full)?;
        self.offer((head, 1), next, writable, token).ok_or(full)
    }

    /// Takes `count` descriptors from `head` on off the free list, which goes on at `rest`, and offers the head.
    fn offer(
        &mut self,
        (head, count): (u16, u16),
        rest: u16,
        writable: &[(u64, u32)],
        token: u64,
    ) -> Option<u16> {
        if let Some(offered) = &mut self.offered {
            offered.push(head, writable);
        }
        let slot = self.slots.get_mut(usize::from(head))?;
        slot.count = count;
        slot.token = token;
        self.first_free = rest;
        self.free -= count;
        self.cells.avail.store(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
        Some(head)
    }

    pub(crate) fn publish(&mut self) -> bool {
        let (old, new) = (self.told_avail, self.next_avail);
        if old == new {
            return false;
        }
        // Release: descriptors and entries are there before the index covers them.
        self.cells.avail_idx.store(new, Ordering::Release);
        self.told_avail = new;
        // The device arms, then looks at the available index; we move the index, then look whether it is armed.
        fence(Ordering::SeqCst);
        match &self.cells.events {
            Some(events) => need_event(events.avail_event.load(Ordering::Relaxed), new, old),
            None => self.cells.used_flags.load(Ordering::Relaxed) & NO_NOTIFY == 0,
        }
    }

    pub(crate) fn pop_used(&mut self) -> Result<Option<(u64, u32)>, RingError> {
        let (next, in_flight) = (self.next_used, self.in_flight);
        if self.seen_used == next {
            let used = self.cells.used_idx.load(Ordering::Acquire);
            if used == next {
                return Ok(None);
            }
            if used.wrapping_sub(next) > in_flight {
                return Err(RingError::UsedIndex { used, next, in_flight });
            }
            self.seen_used = used;
        }
        let ahead = self.seen_used.wrapping_sub(next);
        let (id, written) = self.next_done(ahead)?;
        let unknown = RingError::UsedHead { id };
        let head = u16::try_from(id).map_err(|_| unknown)?;
        let slot =
            self.slots.get_mut(usize::from(head)).filter(|slot| slot.count > 0).ok_or(unknown)?;
        let (count, token) = (std::mem::take(&mut slot.count), slot.token);
        self.release(head, count);
        self.next_used = next.wrapping_add(1);
        self.in_flight -= 1;
        Ok(Some((token, written)))
    }

    /// Head and bytes written of the chain that is used now; the used index covers it and `ahead - 1` more.
    fn next_done(&mut self, ahead: u16) -> Result<(u32, u32), RingError> {
        let (last, written) = self.cells.used.load(self.next_used);
        let Some(offered) = &mut self.offered else {
            return Ok((last, written));
        };
        if !offered.is_open() {
            offered.open(last, written, ahead)?;
        }
        let next = offered.next().map(|(head, written)| (head.into(), written));
        next.ok_or(RingError::UsedHead { id: last })
    }

    /// Puts the descriptors of a chain back on the free list.
    fn release(&mut self, head: u16, count: u16) {
        if self.offered.is_some() {
            self.free += count;
            return;
        }
        let mut last = head;
        for _ in 1..count {
            last = self.slots.get(usize::from(last)).map_or(last, |slot| slot.next);
        }
        if let Some(slot) = self.slots.get_mut(usize::from(last)) {
            slot.next = self.first_free;
        }
        self.first_free = head;
        self.free += count;
    }

    pub(crate) fn arm(&mut self) -> bool {
        match &self.cells.events {
            Some(events) => {
                events.used_event.store(self.next_used, Ordering::Relaxed);
            }
            None => {
                self.cells.avail_flags.store(0, Ordering::Relaxed);
            }
        }
        self.armed = true;
        // The device moves the used index, then looks whether we are armed; we arm, then look at the index.
        fence(Ordering::SeqCst);
        self.cells.used_idx.load(Ordering::Relaxed) != self.next_used
    }

    pub(crate) fn disarm(&mut self) {
        if !std::mem::replace(&mut self.armed, false) {
            return;
        }
        match &self.cells.events {
            Some(events) => {
                events.used_event.store(self.next_used.wrapping_sub(1), Ordering::Relaxed);
            }
            None => {
                self.cells.avail_flags.store(NO_INTERRUPT, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    pub(crate) fn free(&self) -> u16 {
        self.free
    }

    pub(crate) fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    pub(crate) fn layout(&self) -> &QueueLayout {
        &self.layout
    }

    pub(crate) fn features(&self) -> QueueFeatures {
        self.features
    }
}

/// The buffers of a chain in order, each with its Descriptor::WRITE flag; one empty readable one when there are none.
pub(crate) fn buffers(
    readable: &[(u64, u32)],
    writable: &[(u64, u32)],
) -> impl Iterator<Item = (u64, u32, u16)> {
    let none = readable.is_empty() && writable.is_empty();
    let empty = none.then_some((0, 0, 0));
    let readable = readable.iter().map(|&(addr, len)| (addr, len, 0));
    readable.chain(writable.iter().map(|&(addr, len)| (addr, len, Descriptor::WRITE))).chain(empty)
}

/// A descriptor as it lies in memory.
fn bytes(descriptor: Descriptor) -> [u8; 16] {
    let rest = u128::from(descriptor.len) << 64
        | u128::from(descriptor.flags) << 96
        | u128::from(descriptor.next) << 112;
    (u128::from(descriptor.addr) | rest).to_le_bytes()
}
