//! The walk of one chain: every descriptor read once, every rule checked, the buffers translated (virtio 1.3 §2.7.5).
//!
//! Zero or more descriptors of the ring, then possibly one indirect table (§2.7.5.3.2). The walk is bounded by the size
//! of the ring whatever the guest writes meanwhile.

use outboard_memory::{Descriptor, View};

use super::cells::SplitCells;
use super::{INDIRECT, NEXT, WRITE};
use crate::chain::Buffers;
use crate::error::RingError;

/// The most bytes of a chain (virtio 1.3 §2.6.4: "the total length … MUST NOT exceed 2³²").
const MOST_BYTES: u64 = 1 << 32;

/// What a walk needs to know of its queue.
pub(crate) struct Walk<'a> {
    pub(crate) cells: &'a SplitCells,
    pub(crate) view: &'a View,
    pub(crate) size: u16,
    pub(crate) indirect: bool,
}

impl Walk<'_> {
    /// Puts the buffers of the chain that starts at `head` into `to`, which is empty.
    #[inline]
    pub(crate) fn run(&self, head: u16, to: &mut Buffers) -> Result<(), RingError> {
        let size = self.size;
        let mut left = size;
        let mut index = head;
        let mut writable = false;
        loop {
            let descriptor = self.cells.desc.get(index).ok_or(RingError::Next { index, size })?;
            if descriptor.flags & INDIRECT != 0 {
                self.run_indirect(head, index, descriptor, left, writable, to)?;
                break;
            }
            if left == 0 {
                return Err(RingError::ChainLength { head, size });
            }
            left -= 1;
            self.take(head, index, &descriptor, &mut writable, to)?;
            if descriptor.flags & NEXT == 0 {
                break;
            }
            index = descriptor.next;
        }
        let bytes = to.readable.len() + to.writable.len();
        if bytes > MOST_BYTES {
            return Err(RingError::ChainBytes { head, bytes });
        }
        Ok(())
    }

    /// The same for the rest of a chain that lies in an indirect table.
    #[inline(never)]
    fn run_indirect(
        &self,
        head: u16,
        index: u16,
        descriptor: Descriptor,
        left: u16,
        mut writable: bool,
        to: &mut Buffers,
    ) -> Result<(), RingError> {
        let count = self.check_indirect(index, &descriptor)?;
        let table = self.view.table(descriptor.addr, count);
        let table = table.map_err(|source| RingError::Buffer { head, source })?;
        let mut left = left;
        let mut index = 0;
        loop {
            let descriptor = table.get(index).ok_or(RingError::Next { index, size: count })?;
            if descriptor.flags & INDIRECT != 0 {
                return Err(RingError::IndirectNested { index });
            }
            if left == 0 {
                return Err(RingError::ChainLength { head, size: self.size });
            }
            left -= 1;
            self.take(head, index, &descriptor, &mut writable, to)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    /// The entries of the table an indirect descriptor leads to. Its WRITE flag is ignored (§2.7.5.3.2).
    fn check_indirect(&self, index: u16, descriptor: &Descriptor) -> Result<u16, RingError> {
        if !self.indirect {
            return Err(RingError::IndirectNotNegotiated { index });
        }
        if descriptor.flags & NEXT != 0 {
            return Err(RingError::IndirectNext { index });
        }
        let (len, size) = (descriptor.len, self.size);
        let count = u16::try_from(len / 16).ok().filter(|&count| count >= 1 && count <= size);
        count.filter(|_| len.is_multiple_of(16)).ok_or(RingError::IndirectLength { len, size })
    }

    /// One buffer. Writable ones come after all readable ones (§2.7.4.2); empty ones count for the order only.
    #[inline(always)]
    fn take(
        &self,
        head: u16,
        index: u16,
        descriptor: &Descriptor,
        writable: &mut bool,
        to: &mut Buffers,
    ) -> Result<(), RingError> {
        let list = if descriptor.flags & WRITE != 0 {
            *writable = true;
            &mut to.writable
        } else if *writable {
            return Err(RingError::Order { head, index });
        } else {
            &mut to.readable
        };
        let pushed = self.view.push_segments(descriptor.addr, descriptor.len, list);
        pushed.map_err(|source| RingError::Buffer { head, source })
    }
}
