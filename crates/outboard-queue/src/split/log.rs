//! The dirty log of one ring: which writes to guest memory are marked, and when (vhost-user, "Migration").
//!
//! ```text
//!  take chain: mark its writable buffers ─▶ device writes ─▶ complete: mark them again ─▶ mark element, write it
//!  publish:    mark index ─▶ write it ─▶ mark elements and index again          arm, disarm: the same with the wish
//! ```
//! The first mark is for a process that is killed between write and mark; the second for a front-end that took the
//! first one away before the write. Nothing else of this crate writes to guest memory on the device's side. What is
//! marked at the end is what was noted at the beginning, not what the device says it wrote.

use std::fmt;
use std::sync::Arc;

use outboard_memory::{Buffers, DirtyLog, GuestMemory};

/// Where the writes of one ring are noted.
#[derive(Clone)]
pub struct RingLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// The guest-physical address under which writes to the used ring are noted, when they are.
    pub used: Option<u64>,
    /// Called after a batch of writes was noted.
    pub notify: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for RingLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let notify = self.notify.is_some();
        write!(f, "RingLog {{ {:?}, used {:x?}, notify {notify} }}", self.log, self.used)
    }
}

/// A ring that notes its writes.
#[derive(Debug)]
pub(crate) struct Logging {
    to: RingLog,
    size: u16,
    /// By head: the guest-physical ranges, (address, bytes), that a request in flight may write.
    notes: Box<[Vec<(u64, u64)>]>,
}

impl Logging {
    pub(crate) fn new(to: RingLog, size: u16) -> Self {
        Self { to, size, notes: vec![Vec::new(); usize::from(size)].into() }
    }

    /// Goes on in another log, where everything that is in flight is marked too.
    pub(crate) fn go_on(&mut self, to: RingLog) {
        self.to = to;
        for note in &self.notes {
            self.mark(note);
        }
    }

    /// The used ring, when it is noted, is noted there.
    pub(crate) fn move_used(&mut self, place: u64) {
        if let Some(used) = &mut self.to.used {
            *used = place;
        }
    }

    /// A chain is about to be seen by the device.
    pub(crate) fn taken(&mut self, head: u16, buffers: &Buffers) {
        if let Some(note) = self.notes.get_mut(usize::from(head)) {
            note.clear();
            buffers.writable_ranges(note);
        }
        self.mark_head(head);
    }

    /// A request is in flight of which nothing better is known: all of memory may be written.
    pub(crate) fn taken_blindly(&mut self, head: u16, memory: &GuestMemory) {
        if let Some(note) = self.notes.get_mut(usize::from(head)) {
            let regions = memory.regions().iter().map(|region| region.spec());
            *note = regions.map(|spec| (spec.guest_addr, spec.size)).collect();
        }
        self.mark_head(head);
    }

    /// A chain was written, and is about to be given back.
    pub(crate) fn completed(&mut self, head: u16) {
        self.mark_head(head);
        if let Some(note) = self.notes.get_mut(usize::from(head)) {
            note.clear();
        }
    }

    fn mark_head(&self, head: u16) {
        self.mark(self.notes.get(usize::from(head)).map_or(&[], Vec::as_slice));
    }

    fn mark(&self, ranges: &[(u64, u64)]) {
        for &(guest, len) in ranges {
            self.to.log.mark(guest, len);
        }
    }

    /// Whether writes to the ring itself are noted.
    pub(crate) fn notes_used(&self) -> bool {
        self.to.used.is_some()
    }

    /// `len` bytes of guest memory are written.
    pub(crate) fn mark_at(&self, guest: u64, len: u64) {
        self.to.log.mark(guest, len);
    }

    /// `len` bytes of the used ring (packed: of the descriptor ring), `offset` bytes from its start, are written.
    pub(crate) fn mark_used(&self, offset: u64, len: u64) {
        if let Some(used) = self.to.used {
            self.to.log.mark(used.saturating_add(offset), len);
        }
    }

    /// The index of the used ring.
    pub(crate) fn mark_index(&self) {
        self.mark_used(2, 2);
    }

    /// Elements `old..new` of the used ring, indices that count on.
    pub(crate) fn mark_elements(&self, old: u16, new: u16) {
        let (size, count) = (u64::from(self.size), u64::from(new.wrapping_sub(old)));
        let first = u64::from(old) % size;
        let before_the_end = count.min(size - first);
        self.mark_used(4 + 8 * first, 8 * before_the_end);
        self.mark_used(4, 8 * (count - before_the_end).min(size));
    }

    /// The field of the used ring that says whether kicks are wanted.
    pub(crate) fn mark_wish(&self, event_idx: bool) {
        let offset = if event_idx { 4 + 8 * u64::from(self.size) } else { 0 };
        self.mark_used(offset, 2);
    }

    /// A batch of writes is noted.
    pub(crate) fn notify(&self) {
        if let Some(notify) = &self.to.notify {
            notify();
        }
    }
}
