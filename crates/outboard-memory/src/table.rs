//! A descriptor table to read, entry by entry: the ring's own or an indirect one, at any address (virtio 1.3 §2.7.5).
#![expect(unsafe_code, reason = "reads of the entries")]

use std::marker::PhantomData;

use crate::cells::{Descriptor, Descriptors};
use crate::copy;

/// Bytes of an entry.
const ENTRY: usize = 16;

/// A table of descriptors. Invariant: `host` is readable for `count * 16` bytes while a gathering that holds it lasts.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a> {
    host: *const u8,
    count: usize,
    /// The ring's own table of the loom twin, which is no memory.
    #[cfg(outboard_loom)]
    twin: Option<&'a Descriptors>,
    ring: PhantomData<&'a Descriptors>,
}

impl<'a> Table<'a> {
    /// `host` is readable for `count * 16` bytes as long as the gathering lasts.
    #[inline(always)]
    pub(crate) fn new(host: *const u8, count: u16) -> Self {
        Self {
            host,
            count: usize::from(count),
            #[cfg(outboard_loom)]
            twin: None,
            ring: PhantomData,
        }
    }

    /// Entry `at`, each of its bytes read once; `None` past the end.
    #[inline(always)]
    pub(crate) fn get(&self, at: u16) -> Option<Descriptor> {
        let entry = self.entry(at)?;
        Some(Descriptor {
            addr: entry.addr(),
            len: entry.len(),
            flags: entry.flags(),
            next: entry.next(),
        })
    }

    /// Entry `at`, not read yet; `None` past the end.
    #[inline(always)]
    pub(crate) fn entry(&self, at: u16) -> Option<Entry<'a>> {
        #[cfg(outboard_loom)]
        if let Some(twin) = self.twin {
            let twin = Some(twin.get(at)?);
            return Some(Entry { host: std::ptr::null(), twin, table: PhantomData });
        }
        let at = usize::from(at);
        if at >= self.count {
            return None;
        }
        let host = self.host.wrapping_add(at * ENTRY);
        Some(Entry {
            host,
            #[cfg(outboard_loom)]
            twin: None,
            table: PhantomData,
        })
    }
}

/// Entries one behind the other, by their distance from the first one in bytes. Invariant: `bytes`, whole entries, are
/// those of a table. Each read reads guest memory: do each once, so that what was checked is what is used.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    host: *const u8,
    bytes: usize,
    table: PhantomData<&'a Descriptors>,
}

impl Run<'_> {
    /// `host` is readable for `bytes`, whole entries, as long as the gathering lasts.
    #[inline(always)]
    pub(crate) fn new(host: *const u8, bytes: usize) -> Self {
        Self { host, bytes, table: PhantomData }
    }

    /// Bytes of all entries.
    #[inline(always)]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The guest address of the buffer of the entry at `at`.
    ///
    /// # Safety
    /// `at` is the place of an entry: a multiple of 16, below [`bytes`](Self::bytes).
    #[inline(always)]
    pub(crate) unsafe fn addr(&self, at: usize) -> u64 {
        // SAFETY: inside the table, by the caller's promise.
        unsafe { copy::read(self.host.wrapping_add(at).cast()) }
    }

    /// The bytes of the buffer.
    ///
    /// # Safety
    /// As for [`addr`](Self::addr).
    #[inline(always)]
    pub(crate) unsafe fn len(&self, at: usize) -> u32 {
        // SAFETY: inside the table, by the caller's promise.
        unsafe { copy::read(self.host.wrapping_add(at + 8).cast()) }
    }

    /// What stands where a packed descriptor has its flags.
    ///
    /// # Safety
    /// As for [`addr`](Self::addr).
    #[inline(always)]
    pub(crate) unsafe fn packed_flags(&self, at: usize) -> u16 {
        // SAFETY: inside the table, by the caller's promise.
        unsafe { copy::read(self.host.wrapping_add(at + 14).cast()) }
    }
}

/// One entry of a table. Each call reads guest memory: call each once, so that what was checked is what is used.
#[derive(Clone, Copy)]
pub(crate) struct Entry<'a> {
    host: *const u8,
    #[cfg(outboard_loom)]
    twin: Option<Descriptor>,
    table: PhantomData<&'a Descriptors>,
}

macro_rules! field {
    ($(#[$doc:meta])* $name:ident: $type:ty, $offset:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $name(self) -> $type {
            #[cfg(outboard_loom)]
            if let Some(twin) = self.twin {
                return twin.$name;
            }
            // SAFETY: the entry is inside its table, which is readable.
            unsafe { copy::read(self.host.wrapping_add($offset).cast()) }
        }
    };
}

impl Entry<'_> {
    field!(
        /// Guest address of the buffer.
        addr: u64, 0
    );
    field!(
        /// Bytes.
        len: u32, 8
    );
    field!(
        /// NEXT, WRITE, INDIRECT.
        flags: u16, 12
    );
    field!(
        /// The next descriptor.
        next: u16, 14
    );
}

#[cfg(outboard_loom)]
impl<'a> Table<'a> {
    /// The ring's own table.
    pub(crate) fn twin(table: &'a Descriptors) -> Self {
        Self { host: std::ptr::null(), count: 0, twin: Some(table), ring: PhantomData }
    }
}
