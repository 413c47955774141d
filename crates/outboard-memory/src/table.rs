//! A descriptor table to read, entry by entry: the ring's own or an indirect one, at any address (virtio 1.3 §2.7.5).
#![expect(unsafe_code, reason = "reads of the entries")]

use std::marker::PhantomData;

use crate::cells::{Descriptor, Descriptors};
use crate::copy;

/// A table of descriptors. Invariant: `host` is readable for `count * 16` bytes while a gathering that holds it lasts.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a> {
    host: *const u8,
    count: u16,
    /// The ring's own table of the loom twin, which is no memory.
    #[cfg(outboard_loom)]
    twin: Option<&'a Descriptors>,
    ring: PhantomData<&'a Descriptors>,
}

impl Table<'_> {
    /// `host` is readable for `count * 16` bytes as long as the gathering lasts.
    #[inline(always)]
    pub(crate) fn new(host: *const u8, count: u16) -> Self {
        Self {
            host,
            count,
            #[cfg(outboard_loom)]
            twin: None,
            ring: PhantomData,
        }
    }

    /// Entry `at`, each of its bytes read once; `None` past the end.
    #[inline(always)]
    pub(crate) fn get(&self, at: u16) -> Option<Descriptor> {
        #[cfg(outboard_loom)]
        if let Some(twin) = self.twin {
            return twin.get(at);
        }
        if at >= self.count {
            return None;
        }
        let from = self.host.wrapping_add(usize::from(at) * 16);
        // SAFETY: `at < count`, so that the entry is inside the table.
        let (addr, rest) = unsafe { copy::read_pair(from) };
        Some(Descriptor::from_words(addr, rest))
    }
}

#[cfg(outboard_loom)]
impl<'a> Table<'a> {
    /// The ring's own table.
    pub(crate) fn twin(table: &'a Descriptors) -> Self {
        Self { host: std::ptr::null(), count: 0, twin: Some(table), ring: PhantomData }
    }
}
