//! The walk of one chain of a packed ring: every descriptor read once, every rule checked, the buffers translated
//! (virtio 1.3 §2.8.5 to §2.8.7).
//!
//! A chain is a run of available descriptors, or one that stands for an indirect table. The walk is bounded by the
//! descriptors that the driver can have made available, whatever it writes meanwhile.

use std::sync::atomic::Ordering;

use outboard_memory::{Buffers, Descriptor, PackedBody, PackedRing, PackedTaken, View};

use super::STATE;
use crate::error::RingError;
use crate::walk::{MOST_BYTES, unreachable};

/// Where the chains of a ring come from.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) ring: PackedRing,
    pub(super) view: View,
    pub(super) size: u16,
    pub(super) indirect: bool,
}

/// One descriptor of a chain, as it was read, once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// Where it was read, for errors.
    pub(super) index: u16,
    pub(super) flags: u16,
    pub(super) body: PackedBody,
}

/// A walk along the ring, from a chain's first descriptor on.
struct Along<'a> {
    source: &'a Source,
    head: u16,
    /// The descriptor that comes next, and its flags when they were read already.
    index: u16,
    flags: Option<u16>,
    available: u16,
}

impl Along<'_> {
    fn step(&mut self) -> Result<Piece, RingError> {
        let (index, ring) = (self.index, &self.source.ring);
        let missing = RingError::Next { index };
        let flags = match self.flags.take() {
            Some(flags) => flags,
            None => ring.flags(index, Ordering::Relaxed).ok_or(missing)?,
        };
        if flags & STATE != self.available {
            return Err(RingError::NotAvailable { head: self.head, index });
        }
        let body = ring.body(index).ok_or(missing)?;
        self.index += 1;
        if self.index >= self.source.size {
            self.index = 0;
            self.available ^= STATE;
        }
        Ok(Piece { index, flags, body })
    }
}

/// A chain as the careful walk found it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walked {
    pub(super) taken: PackedTaken,
    pub(super) pieces: usize,
}

impl Source {
    /// The walk of any chain that starts at `head` with these flags, of at most `left` descriptors. Errors name
    /// descriptors by their index in the ring, and the chain by its first one. What was read of the ring goes to `seen`.
    #[cold]
    #[inline(never)]
    pub(super) fn walk_carefully(
        &self,
        (head, flags): (u16, u16),
        left: u16,
        to: &mut Buffers,
        mut seen: Option<&mut Vec<Piece>>,
    ) -> Result<Walked, RingError> {
        let (available, index) = (flags & STATE, head);
        let mut along = Along { source: self, head, index, flags: Some(flags), available };
        self.walk_pieces(head, left, to, &mut || {
            let piece = along.step()?;
            if let Some(seen) = &mut seen {
                seen.push(piece);
            }
            Ok(piece)
        })
    }

    /// The walk of a chain whose descriptors were read before.
    pub(super) fn walk_again(
        &self,
        pieces: &[Piece],
        to: &mut Buffers,
    ) -> Result<Walked, RingError> {
        let head = pieces.first().map_or(0, |piece| piece.index);
        let left = u16::try_from(pieces.len()).unwrap_or(u16::MAX);
        let mut pieces = pieces.iter();
        self.walk_pieces(head, left, to, &mut || {
            let piece = pieces.next().copied();
            piece.ok_or(RingError::ChainLength { head, size: left })
        })
    }

    /// The walk of a chain whose descriptors `next` gives, one after the other.
    #[cold]
    #[inline(never)]
    fn walk_pieces(
        &self,
        head: u16,
        left: u16,
        to: &mut Buffers,
        next: &mut dyn FnMut() -> Result<Piece, RingError>,
    ) -> Result<Walked, RingError> {
        let mut gather = self.view.gather_pieces(to);
        let (mut turned, mut count) = (false, 0);
        let too_long = RingError::ChainLength { head, size: left };
        let id = loop {
            let Piece { index, flags, body } = next()?;
            count += 1;
            if count > left {
                return Err(too_long);
            }
            if flags & Descriptor::INDIRECT != 0 {
                // Not in a list, and no list behind it (§2.8.7).
                let linked = count > 1 || flags & Descriptor::NEXT != 0;
                let entries = self.table_size(index, body.len, linked)?;
                gather.enter(body.addr, entries).map_err(|source| unreachable(head, source))?;
                for at in 0..entries {
                    let entry = gather.descriptor(at).ok_or(RingError::Next { index: at })?;
                    // The flags stand where a split descriptor has `next`; only WRITE counts (§2.8.7).
                    if entry.next & Descriptor::INDIRECT != 0 {
                        return Err(RingError::IndirectNested { index: at });
                    }
                    turn(&mut gather, entry.next, &mut turned, (head, at))?;
                    let pushed = gather.push(entry.addr, entry.len);
                    pushed.map_err(|source| unreachable(head, source))?;
                }
                break body.id;
            }
            turn(&mut gather, flags, &mut turned, (head, index))?;
            gather.push(body.addr, body.len).map_err(|source| unreachable(head, source))?;
            if flags & Descriptor::NEXT == 0 {
                break body.id;
            }
        };
        let (bytes, pieces) = gather.finish(turned);
        if bytes > MOST_BYTES {
            return Err(RingError::ChainBytes { head, bytes });
        }
        Ok(Walked { taken: PackedTaken { id, bytes: 16 * u32::from(count) }, pieces })
    }

    /// The entries of the table an indirect descriptor leads to. Its WRITE flag is reserved and ignored.
    fn table_size(&self, index: u16, len: u32, linked: bool) -> Result<u16, RingError> {
        if !self.indirect {
            return Err(RingError::IndirectNotNegotiated { index });
        }
        if linked {
            return Err(RingError::IndirectNext { index });
        }
        let size = self.size;
        let count = u16::try_from(len / 16).ok().filter(|&count| count >= 1 && count <= size);
        count.filter(|_| len.is_multiple_of(16)).ok_or(RingError::IndirectLength { len, size })
    }
}

/// Writable buffers come after all readable ones (§2.8.17 by §2.6.4); empty ones count for the order only.
fn turn(
    gather: &mut outboard_memory::Gather<'_>,
    flags: u16,
    turned: &mut bool,
    (head, index): (u16, u16),
) -> Result<(), RingError> {
    match (flags & Descriptor::WRITE != 0, *turned) {
        (false, true) => return Err(RingError::Order { head, index }),
        (true, false) => {
            gather.turn();
            *turned = true;
        }
        _ => {}
    }
    Ok(())
}
