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

impl<'a> Table<'a> {
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

    /// All entries in their order, of a table that is memory; `None` when there are none.
    #[inline(always)]
    pub(crate) fn run(&self) -> Option<Run<'a>> {
        Some(Run { entry: self.entry(0)?, left: self.count })
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
        if at >= usize::from(self.count) {
            return None;
        }
        let host = self.host.wrapping_add(at * 16);
        Some(Entry {
            host,
            #[cfg(outboard_loom)]
            twin: None,
            table: PhantomData,
        })
    }
}

/// Entries one behind the other, a pointer and a bound, which stay in registers. Invariant: `left` entries of the table begin
/// with this one, at least one.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    entry: Entry<'a>,
    left: u16,
}

impl<'a> Run<'a> {
    /// Entries from the present one on.
    #[inline(always)]
    pub(crate) fn left(&self) -> u16 {
        self.left
    }

    /// The present one, not read yet.
    #[inline(always)]
    pub(crate) fn entry(&self) -> Entry<'a> {
        self.entry
    }

    /// From the next one on; `None` when there is none.
    #[inline(always)]
    pub(crate) fn after(self) -> Option<Self> {
        match self.left - 1 {
            0 => None,
            left => {
                let host = self.entry.host.wrapping_add(16);
                Some(Self { entry: Entry { host, ..self.entry }, left })
            }
        }
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
