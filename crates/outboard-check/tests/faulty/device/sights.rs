//! Rings at whose sight a fault ends the process: each has the name of the one check that puts such a ring
//! before the device.
//!
//! Invariant: a ring is told by what lies in it, as it was read once.

use outboard_memory::GuestMemory;
use outboard_queue::QueueLayout;

use super::raw::{INDIRECT, NEXT, Raw, WRITE};

/// What lies in the ring when a request is to be taken.
pub(super) struct Sight<'a> {
    pub(super) layout: QueueLayout,
    /// Where the device is.
    pub(super) at: u16,
    /// Where the driver says that it is.
    pub(super) avail: u16,
    pub(super) head: u16,
    /// The chain, as far as it can be followed.
    pub(super) parts: &'a [Raw],
    /// The table that the chain is, where it is one.
    pub(super) table: &'a [Raw],
    pub(super) memory: &'a GuestMemory,
}

type When = fn(&Sight<'_>) -> bool;

/// Check, and what only it does.
const SIGHTS: &[(&str, When)] = &[
    ("loop-of-one", |s| s.first(NEXT) && s.parts[0].next == s.head),
    ("loop-of-all", |s| {
        s.last(NEXT)
            && s.parts.len() == 16
            && s.parts[15].next == s.head
            && s.parts[0].next != s.head
    }),
    ("loop-writable", |s| s.parts.len() > 1 && s.parts[1].flags & WRITE != 0 && s.turns(1)),
    ("next-outside", |s| s.last(NEXT) && s.parts[s.parts.len() - 1].next >= s.layout.size),
    ("head-outside", |s| matches!(s.head, 16 | 17 | 0x8000)),
    ("index-ahead", |s| s.distance() > s.layout.size && s.distance() < 0x8000),
    ("index-back", |s| s.distance() >= 0x8000),
    ("header-outside", |s| s.outside(0, 16)),
    ("data-outside", |s| s.outside(1, 512)),
    ("status-outside", |s| s.outside(2, 1)),
    ("data-endless", |s| s.parts.len() == 3 && s.parts[1].len >= 0x7fff_fe00),
    ("data-is-the-ring", |s| s.parts.len() == 3 && s.is_ring(s.parts[1].addr)),
    ("writable-first", |s| s.parts.len() == 3 && s.first(WRITE)),
    ("indirect-nested", |s| s.entry(0, INDIRECT) && s.table[0].addr != s.parts[0].addr),
    ("indirect-in-itself", |s| s.entry(0, INDIRECT) && s.table[0].addr == s.parts[0].addr),
    ("indirect-next", |s| s.first(INDIRECT) && s.first(NEXT)),
    ("indirect-odd-length", |s| s.is_table() && (s.len() % 16 != 0 || s.len() == 0)),
    ("indirect-endless", |s| s.is_table() && s.len() >= 0x0100_0000),
    ("indirect-loop", |s| s.len() == 32 && s.entry(1, NEXT) && s.table[1].next == 1),
    ("indirect-next-outside", |s| s.len() == 32 && s.entry(0, NEXT) && s.table[0].next == 3),
    ("indirect-outside", |s| s.is_table() && s.outside(0, 48)),
    ("indirect-long", |s| s.is_table() && s.len() == 101 * 16),
];

impl Sight<'_> {
    /// Whether the named fault shows.
    pub(super) fn trips(&self, fault: &str) -> bool {
        SIGHTS.iter().any(|(name, when)| *name == fault && when(self))
    }

    fn first(&self, flag: u16) -> bool {
        self.parts.first().is_some_and(|part| part.flags & flag != 0)
    }

    fn last(&self, flag: u16) -> bool {
        self.parts.last().is_some_and(|part| part.flags & flag != 0)
    }

    /// Whether a descriptor goes on at itself.
    fn turns(&self, at: usize) -> bool {
        self.parts[at].flags & NEXT != 0 && self.parts[at].next == self.parts[at - 1].next
    }

    const fn distance(&self) -> u16 {
        self.avail.wrapping_sub(self.at)
    }

    /// Whether the chain is one table.
    fn is_table(&self) -> bool {
        self.parts.len() == 1 && self.first(INDIRECT)
    }

    /// Length of the table.
    fn len(&self) -> u32 {
        self.parts.first().filter(|_| self.is_table()).map_or(0, |part| part.len)
    }

    fn entry(&self, at: usize, flag: u16) -> bool {
        self.is_table() && self.table.get(at).is_some_and(|part| part.flags & flag != 0)
    }

    /// Whether the descriptor has this length and does not lie in memory.
    fn outside(&self, at: usize, len: u32) -> bool {
        let Some(part) = self.parts.get(at).filter(|part| part.len == len) else { return false };
        let mapped = |place: u64| {
            self.memory.regions().iter().any(|one| {
                let spec = one.spec();
                place.checked_sub(spec.guest_addr).is_some_and(|offset| offset < spec.size)
            })
        };
        !mapped(part.addr) || !mapped(part.addr.wrapping_add(u64::from(len) - 1))
    }

    fn is_ring(&self, addr: u64) -> bool {
        [self.layout.desc, self.layout.avail, self.layout.used].contains(&addr)
    }
}
