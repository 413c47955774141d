//! One owner's view of guest memory: the table, and the region the last look-up hit.
//!
//! `Send`, not `Sync`: each queue has its own. Ring memory is resolved once, into [`Cells`]; buffers are translated as
//! ranges, into [`Segments`] that keep the mapping alive by themselves.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use crate::cells::Cells;
use crate::error::AccessError;
use crate::map::{Entry, GuestMemory};
use crate::num::index;
use crate::segments::Segments;
use crate::table::Table;

/// Translates guest-physical ranges of one generation of guest memory.
pub struct View {
    memory: Arc<GuestMemory>,
    last: Cell<Entry>,
}

impl View {
    /// A view of this generation.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let last = Cell::new(memory.first());
        Self { memory, last }
    }

    /// What it is a view of.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Ring memory: the range must lie in one region.
    ///
    /// # Errors
    /// It does not.
    pub fn cells(&self, guest: u64, len: u64) -> Result<Cells, AccessError> {
        let host = self.find(guest, len).ok_or(AccessError::Outside { guest, len })?;
        Ok(Cells::new(host, guest, len, Arc::clone(&self.memory)))
    }

    /// Appends the range to `to`: as one segment, or as several when it crosses regions that are neighbours in
    /// guest-physical space. No segment for a range of length 0.
    ///
    /// # Errors
    /// Some byte is in no region, or `to` holds segments of another generation; `to` may have grown by a part of the
    /// range then.
    #[inline]
    pub fn push_segments(
        &self,
        guest: u64,
        len: u32,
        to: &mut Segments,
    ) -> Result<(), AccessError> {
        if len == 0 {
            return Ok(());
        }
        to.attach(&self.memory)?;
        match self.find(guest, u64::from(len)) {
            Some(host) => {
                to.push(host, len as usize);
                Ok(())
            }
            None => self.push_split(guest, u64::from(len), to),
        }
    }

    /// An indirect descriptor table of `count` entries, at any address.
    ///
    /// # Errors
    /// Some byte of it is in no region.
    #[inline]
    pub fn table(&self, guest: u64, count: u16) -> Result<Table<'_>, AccessError> {
        let len = u64::from(count) * 16;
        match self.find(guest, len) {
            Some(host) => Ok(Table::whole(host, count, self)),
            None => {
                self.check(guest, len)?;
                Ok(Table::scattered(guest, count, self))
            }
        }
    }

    /// Copies guest memory out.
    ///
    /// # Errors
    /// Some byte is in no region.
    pub fn read(&self, guest: u64, to: &mut [u8]) -> Result<(), AccessError> {
        let mut from = self.segments(guest, to.len())?;
        from.read_exact(to).ok_or(AccessError::Outside { guest, len: to.len() as u64 })
    }

    /// Copies into guest memory.
    ///
    /// # Errors
    /// Some byte is in no region; nothing was written then.
    pub fn write(&self, guest: u64, from: &[u8]) -> Result<(), AccessError> {
        let mut to = self.segments(guest, from.len())?;
        to.write_all(from).ok_or(AccessError::Outside { guest, len: from.len() as u64 })
    }

    fn segments(&self, guest: u64, len: usize) -> Result<Segments, AccessError> {
        let mut list = Segments::new();
        let len = crate::num::wide(len);
        if len != 0 {
            list.attach(&self.memory)?;
            self.push_split(guest, len, &mut list)?;
        }
        Ok(list)
    }

    /// Where a range of one region lies in this process.
    #[inline(always)]
    fn find(&self, guest: u64, len: u64) -> Option<*mut u8> {
        match self.last.get().translate(guest, len) {
            Some(host) => Some(host),
            None => self.search(guest, len),
        }
    }

    /// The same when the last region does not hold it.
    #[inline(never)]
    fn search(&self, guest: u64, len: u64) -> Option<*mut u8> {
        let entry = self.memory.entry(guest)?;
        let host = entry.translate(guest, len)?;
        self.last.set(*entry);
        Some(host)
    }

    #[cold]
    fn push_split(&self, guest: u64, len: u64, to: &mut Segments) -> Result<(), AccessError> {
        let outside = AccessError::Outside { guest, len };
        let (mut at, mut left) = (guest, len);
        while left > 0 {
            let entry = self.memory.entry(at).ok_or(outside)?;
            let part = entry.rest(at).ok_or(outside)?.min(left);
            let host = entry.translate(at, part).ok_or(outside)?;
            to.push_bounded(host, index(part))?;
            left -= part;
            // Only the last part may end at the top of the address space, and then nothing is left.
            at = at.wrapping_add(part);
            if at == 0 && left > 0 {
                return Err(outside);
            }
        }
        Ok(())
    }

    /// Whether every byte of a range is in some region.
    #[cold]
    fn check(&self, guest: u64, len: u64) -> Result<(), AccessError> {
        self.push_split(guest, len, &mut Segments::new())
    }
}

impl Clone for View {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.memory))
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("View").field(&self.memory).finish()
    }
}
