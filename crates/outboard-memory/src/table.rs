//! An indirect descriptor table, read entry by entry: at any address, across regions if need be (virtio 1.3 §2.7.5.3).
#![expect(unsafe_code, reason = "reads of the entries")]

use crate::cells::Descriptor;
use crate::copy;
use crate::num::wide;
use crate::view::View;

/// An indirect table in guest memory.
pub struct Table<'a> {
    /// The first entry, when the table lies in one region: `count * 16` bytes in a mapping that `view` keeps alive.
    host: Option<*const u8>,
    guest: u64,
    count: u16,
    view: &'a View,
}

impl<'a> Table<'a> {
    pub(crate) fn whole(host: *const u8, count: u16, view: &'a View) -> Self {
        Self { host: Some(host), guest: 0, count, view }
    }

    pub(crate) fn scattered(guest: u64, count: u16, view: &'a View) -> Self {
        Self { host: None, guest, count, view }
    }

    /// Entry `at`, each of its bytes read once; `None` past the end.
    #[inline]
    pub fn get(&self, at: u16) -> Option<Descriptor> {
        if at >= self.count {
            return None;
        }
        let Some(host) = self.host else { return self.get_scattered(at) };
        let from = host.wrapping_add(usize::from(at) * 16);
        // SAFETY: `at < count`, so that the entry is inside the table, which is inside a live mapping.
        let (addr, rest) = unsafe { copy::read_pair(from) };
        Some(Descriptor::from_words(addr, rest))
    }

    #[cold]
    fn get_scattered(&self, at: u16) -> Option<Descriptor> {
        let mut bytes = [0; 16];
        let guest = self.guest.checked_add(wide(usize::from(at) * 16))?;
        self.view.read(guest, &mut bytes).ok()?;
        let both = u128::from_le_bytes(bytes);
        let (low, high) = (both & u128::from(u64::MAX), both >> 64);
        Some(Descriptor::from_words(u64::try_from(low).ok()?, u64::try_from(high).ok()?))
    }
}
