//! One owner's view of guest memory: the regions, and the one the last look-up hit.
//!
//! `Send`, not `Sync`: each queue has its own. Ring memory is resolved once, into [`Cells`]; buffers are translated as
//! ranges, into [`Buffers`] that keep the mapping alive by themselves.
#![expect(unsafe_code, reason = "copies to and from guest memory")]

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use crate::buffers::Buffers;
use crate::cells::{Cells, Descriptors};
use crate::copy;
use crate::error::AccessError;
use crate::gather::Gather;
use crate::iotlb::Permission;
use crate::map::{Entry, GuestMemory};
use crate::num::{index, wide};
use crate::sigbus;
use crate::table::Table;

/// Translates guest-physical ranges of one generation of guest memory.
pub struct View {
    memory: Arc<GuestMemory>,
    /// Which region the last look-up hit.
    last: Cell<usize>,
}

impl View {
    /// A view of this generation.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory, last: Cell::new(0) }
    }

    /// What it is a view of.
    #[inline(always)]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Ring memory, to read and to write: the range must lie in one region.
    ///
    /// # Errors
    /// It does not, or an IOMMU stands before it.
    pub fn cells(&self, guest: u64, len: u64) -> Result<Cells, AccessError> {
        self.cells_to(Permission::BOTH, guest, len)
    }

    /// Ring memory, to read only: the range must lie in one region.
    ///
    /// # Errors
    /// As [`View::cells`].
    pub fn cells_to_read(&self, guest: u64, len: u64) -> Result<Cells, AccessError> {
        self.cells_to(Permission::READ, guest, len)
    }

    fn cells_to(&self, access: Permission, guest: u64, len: u64) -> Result<Cells, AccessError> {
        let host = self.find(guest, len, access)?;
        Ok(Cells::new(host, guest, len, Arc::clone(&self.memory)))
    }

    /// Begins to fill `to` with the buffers of a request whose descriptors start in `table`; what it held is gone.
    pub fn gather<'a>(&'a self, table: &'a Descriptors, to: &'a mut Buffers) -> Gather<'a> {
        Gather::new(self, table.table(), to)
    }

    /// The same for a request whose descriptors are not in a table, or in one that is to be
    /// [entered](Gather::enter).
    pub fn gather_pieces<'a>(&'a self, to: &'a mut Buffers) -> Gather<'a> {
        Gather::new(self, Table::new(std::ptr::null(), 0), to)
    }

    /// Copies guest memory out.
    ///
    /// # Errors
    /// Some byte is in no region; what was copied before it stays copied.
    pub fn read(&self, guest: u64, to: &mut [u8]) -> Result<(), AccessError> {
        let mut to_at = to.as_mut_ptr();
        self.each_part(guest, wide(to.len()), Permission::READ, |from, len| {
            // SAFETY: `each_part` hands out parts of live mappings, `to.len()` bytes in all; `to_at` moves along.
            unsafe { copy::copy_in(from, to_at, len) };
            to_at = to_at.wrapping_add(len);
            Ok(())
        })
    }

    /// Copies into guest memory.
    ///
    /// # Errors
    /// Some byte is in no region; nothing was written then.
    pub fn write(&self, guest: u64, from: &[u8]) -> Result<(), AccessError> {
        self.each_part(guest, wide(from.len()), Permission::WRITE, |_, _| Ok(()))?;
        let mut from_at = from.as_ptr();
        self.each_part(guest, wide(from.len()), Permission::WRITE, |to, len| {
            // SAFETY: `each_part` hands out parts of live mappings, `from.len()` bytes in all; `from_at` moves along.
            unsafe { copy::copy_out(from_at, to, len) };
            from_at = from_at.wrapping_add(len);
            Ok(())
        })
    }

    /// Where a range of one region lies in this process. Behind an IOMMU it may be made of several entries, if they are
    /// neighbours here too.
    pub(crate) fn find(
        &self,
        guest: u64,
        len: u64,
        access: Permission,
    ) -> Result<*mut u8, AccessError> {
        if !self.memory.is_behind_iommu() {
            let host = self.region(guest).and_then(|entry| entry.translate(guest, len));
            return host.ok_or(AccessError::Outside { guest, len });
        }
        let mut first: Option<*mut u8> = None;
        let mut next = std::ptr::null_mut::<u8>();
        self.each_part(guest, len.max(1), access, |host, part| {
            if first.is_some() && host != next {
                return Err(AccessError::Scattered { iova: guest, len });
            }
            first = first.or(Some(host));
            next = host.wrapping_add(part);
            Ok(())
        })?;
        first.ok_or(AccessError::Outside { guest, len })
    }

    /// The guest-physical address of a range in one region that the device may write; behind an IOMMU another one than
    /// the address it has here.
    pub fn physical(&self, guest: u64, len: u64) -> Option<u64> {
        let host = self.find(guest, len, Permission::WRITE).ok()?;
        self.memory.host_to_guest(host)
    }

    /// The region that holds `guest`.
    fn region(&self, guest: u64) -> Option<&Entry> {
        let hit = self.memory.entry_at(self.last.get());
        if let Some(hit) = hit.filter(|hit| hit.rest(guest).is_some()) {
            return Some(hit);
        }
        let (at, entry) = self.memory.entry(guest)?;
        self.last.set(at);
        Some(entry)
    }

    /// Whether some region's file was cut short: see [`GuestMemory::poisoned`].
    #[inline(always)]
    pub fn poisoned(&self) -> bool {
        sigbus::any_poisoned() && self.has_poisoned()
    }

    #[cold]
    fn has_poisoned(&self) -> bool {
        self.memory.poisoned()
    }

    /// Calls `with` for each part of a range in turn, an address of this process and a length.
    pub(crate) fn each_part(
        &self,
        guest: u64,
        len: u64,
        access: Permission,
        mut with: impl FnMut(*mut u8, usize) -> Result<(), AccessError>,
    ) -> Result<(), AccessError> {
        let outside = AccessError::Outside { guest, len };
        guest.checked_add(len).ok_or(outside)?;
        let (mut at, mut left) = (guest, len);
        while left > 0 {
            let Some(entry) = self.region(at).filter(|entry| entry.permission.allows(access))
            else {
                return Err(self.lacking(outside, at, left, access));
            };
            let part = entry.rest(at).ok_or(outside)?.min(left);
            let host = entry.translate(at, part).ok_or(outside)?;
            with(host, index(part))?;
            left -= part;
            at += part;
        }
        Ok(())
    }

    /// Why `iova` cannot be used.
    #[cold]
    fn lacking(
        &self,
        outside: AccessError,
        iova: u64,
        len: u64,
        access: Permission,
    ) -> AccessError {
        match (self.memory.is_behind_iommu(), self.region(iova)) {
            (false, _) => outside,
            (true, None) => AccessError::Miss { iova, len, access },
            (true, Some(_)) => AccessError::Denied { iova, len, access },
        }
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
