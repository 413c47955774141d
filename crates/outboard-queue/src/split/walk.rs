//! The walk of one chain: every descriptor read once, every rule checked, the buffers translated (virtio 1.3 §2.7.5).
//!
//! Zero or more descriptors of the ring, then possibly one indirect table (§2.7.5.3.2). The walk is bounded by the size
//! of the ring whatever the guest writes meanwhile.

use outboard_memory::{Buffers, Descriptor, Descriptors, Rules, View};

use crate::budget::FEW_PIECES;
use crate::error::RingError;
use crate::walk::{MOST_BYTES, unreachable};

/// Where the chains of a ring come from.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) desc: Descriptors,
    pub(crate) view: View,
    pub(crate) rules: Rules,
    /// The rules for the quick walk: no long chains, which are accounted for.
    pub(crate) usual: Rules,
}

impl Source {
    pub(crate) fn new(desc: Descriptors, view: View, most: u16, indirect: bool) -> Self {
        let usual = Rules { most: most.min(FEW_PIECES), indirect };
        Self { desc, view, rules: Rules { most, indirect }, usual }
    }

    /// Puts the buffers of the chain that starts at `head` into `to`, if it is a usual one of few pieces; that is quick.
    /// `None`: something rare or something wrong.
    #[inline(always)]
    pub(crate) fn walk_quickly(&self, head: u16, to: &mut Buffers) -> Option<usize> {
        self.view.gather_usual(&self.desc, head, &self.usual, to)
    }

    /// The walk of any chain. Returns how many pieces it has. It ends: each step uses up one of `size` descriptors, or enters the one table.
    #[cold]
    #[inline(never)]
    pub(crate) fn walk_carefully(&self, head: u16, to: &mut Buffers) -> Result<usize, RingError> {
        let mut gather = self.view.gather(&self.desc, to);
        let mut left = self.rules.most;
        let mut index = head;
        let mut inside = false;
        let mut turned = false;
        loop {
            let descriptor = gather.descriptor(index).ok_or(RingError::Next { index })?;
            let flags = descriptor.flags;
            if flags & Descriptor::INDIRECT != 0 {
                let count = self.table_size(index, &descriptor, inside)?;
                gather.enter(descriptor.addr, count).map_err(|source| unreachable(head, source))?;
                (inside, index) = (true, 0);
                continue;
            }
            // Writable buffers come after all readable ones (§2.7.4.2); empty ones count for the order only.
            if flags & Descriptor::WRITE == 0 && turned {
                return Err(RingError::Order { head, index });
            }
            if flags & Descriptor::WRITE != 0 && !turned {
                gather.turn();
                turned = true;
            }
            left = left
                .checked_sub(1)
                .ok_or(RingError::ChainLength { head, size: self.rules.most })?;
            gather
                .push(descriptor.addr, descriptor.len)
                .map_err(|source| unreachable(head, source))?;
            if flags & Descriptor::NEXT == 0 {
                break;
            }
            index = descriptor.next;
        }
        let (bytes, pieces) = gather.finish(turned);
        if bytes > MOST_BYTES { Err(RingError::ChainBytes { head, bytes }) } else { Ok(pieces) }
    }

    /// The entries of the table an indirect descriptor leads to. Its WRITE flag is ignored (§2.7.5.3.2).
    fn table_size(
        &self,
        index: u16,
        descriptor: &Descriptor,
        inside: bool,
    ) -> Result<u16, RingError> {
        if inside {
            return Err(RingError::IndirectNested { index });
        }
        if !self.rules.indirect {
            return Err(RingError::IndirectNotNegotiated { index });
        }
        if descriptor.flags & Descriptor::NEXT != 0 {
            return Err(RingError::IndirectNext { index });
        }
        let (len, size) = (descriptor.len, self.rules.most);
        let count = u16::try_from(len / 16).ok().filter(|&count| count >= 1 && count <= size);
        count.filter(|_| len.is_multiple_of(16)).ok_or(RingError::IndirectLength { len, size })
    }
}

#[cfg(test)]
mod tests;
