//! The chains of a packed ring: idle in a list, or in flight by buffer id.
//!
//! The id of a chain is known when all of it was read (virtio 1.3 §2.8.6), so any idle chain serves any id; the one
//! used last is taken first, and leads to the one to be taken after it. There are as many as ever were in flight at once.

use outboard_memory::{Buffers, View};

use super::place::descriptors;
use crate::budget::{Budget, FEW_PIECES};
use crate::chain::Parts;
use crate::error::RingError;

/// Descriptors of the ring that a chain in flight takes, in bytes.
#[derive(Clone, Copy, Default)]
pub(super) struct Held {
    /// 0: no chain of this id is in flight.
    bytes: u32,
    /// From the first one to the end of the ring.
    left: u32,
}

/// Chains one behind the other. (A list that leads through them costs a request less than a vector of them.)
#[derive(Default)]
struct Idle(Option<Box<Parts>>);

impl Idle {
    #[inline(always)]
    fn pop(&mut self) -> Option<Box<Parts>> {
        let next = self.0.as_mut()?.next.take();
        std::mem::replace(&mut self.0, next)
    }

    #[inline(always)]
    fn push(&mut self, mut parts: Box<Parts>) {
        debug_assert!(parts.next.is_none(), "as `pop` left it");
        // Forgotten, for there is nothing to drop and it need not be asked.
        std::mem::forget(std::mem::replace(&mut parts.next, self.0.take()));
        self.0 = Some(parts);
    }

    fn each(&mut self, mut with: impl FnMut(&mut Parts)) {
        let mut next = &mut self.0;
        while let Some(parts) = next {
            with(parts);
            next = &mut parts.next;
        }
    }
}

impl Drop for Idle {
    /// One by one: a list that is dropped from its front calls itself for each one.
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

pub(super) struct PackedChains {
    idle: Idle,
    /// The idle ones while every request is looked at twice (see `tracked`): what is quick finds none.
    aside: Idle,
    is_aside: bool,
    /// By buffer id.
    held: Box<[Held]>,
    pub(super) budget: Budget,
}

impl PackedChains {
    pub(super) fn new(size: u16) -> Self {
        let held = vec![Held::default(); usize::from(size)].into();
        Self {
            idle: Idle::default(),
            aside: Idle::default(),
            is_aside: false,
            held,
            budget: Budget::default(),
        }
    }

    /// An idle chain that is not set aside.
    #[inline(always)]
    pub(super) fn take(&mut self) -> Option<Box<Parts>> {
        self.idle.pop()
    }

    /// An idle chain, wherever it is, or a new one.
    pub(super) fn take_any(&mut self, view: &View) -> Box<Parts> {
        if let Some(parts) = self.idle.pop().or_else(|| self.aside.pop()) {
            return parts;
        }
        let size = u16::try_from(self.held.len()).unwrap_or(u16::MAX);
        let buffers = Buffers::for_requests(view, size.min(FEW_PIECES));
        let (head, place, turn) = (0, 0, 0);
        Box::new(Parts { buffers, head, place, turn, grown: false, charged: 0, next: None })
    }

    /// A chain is idle again, while none are set aside.
    #[inline(always)]
    pub(super) fn put(&mut self, parts: Box<Parts>) {
        debug_assert!(!self.is_aside, "it would be found");
        self.idle.push(parts);
    }

    /// A chain is idle again, or was not taken after all.
    pub(super) fn put_any(&mut self, parts: Box<Parts>) {
        if self.is_aside { self.aside.push(parts) } else { self.idle.push(parts) }
    }

    /// Sets the chains aside, or puts them where the quick way finds them.
    pub(super) fn set_aside(&mut self, aside: bool) {
        if aside != self.is_aside {
            std::mem::swap(&mut self.idle, &mut self.aside);
            self.is_aside = aside;
        }
    }

    /// A chain that takes `bytes` of the ring, `left` before its end, is in flight under this id.
    #[inline(always)]
    pub(super) fn hold(&mut self, id: u16, bytes: u32, left: u32) -> Result<(), RingError> {
        match self.held.get_mut(usize::from(id)) {
            Some(held) if held.bytes == 0 => {
                *held = Held { bytes, left };
                Ok(())
            }
            held => Err(wrong_id(id, held.is_some(), self.held.len())),
        }
    }

    /// The chain of this [place](Parts::place), its id, is given back: the bytes of the ring that it took. 0: none is in
    /// flight.
    #[inline(always)]
    pub(super) fn release(&mut self, place: u32) -> u32 {
        self.held.get_mut(place as usize).map_or(0, |held| std::mem::take(&mut held.bytes))
    }

    /// Whether a chain of this id is in flight that began so many bytes before the end of the ring.
    #[inline(always)]
    pub(super) fn began_at(&self, id: u16, left: u32) -> bool {
        self.held.get(usize::from(id)).is_some_and(|held| held.bytes > 0 && held.left == left)
    }

    /// The first descriptor of a chain in flight.
    pub(super) fn start(&self, id: u16) -> Option<u16> {
        let held = self.held.get(usize::from(id)).filter(|held| held.bytes > 0)?;
        Some(self.index(held))
    }

    fn index(&self, held: &Held) -> u16 {
        u16::try_from(self.held.len()).unwrap_or(u16::MAX).wrapping_sub(descriptors(held.left))
    }

    /// Chains in flight, counted.
    pub(super) fn in_flight(&self) -> u16 {
        u16::try_from(self.each_in_flight().count()).unwrap_or(u16::MAX)
    }

    /// Id and first descriptor of each chain in flight.
    pub(super) fn each_in_flight(&self) -> impl Iterator<Item = (u16, u16)> {
        let held = (0_u16..).zip(&self.held);
        held.filter(|(_, held)| held.bytes > 0).map(|(id, held)| (id, self.index(held)))
    }

    /// Lets go of guest memory that is not the one of `view`.
    pub(super) fn recycle(&mut self, view: &View) {
        for idle in [&mut self.idle, &mut self.aside] {
            idle.each(|parts| parts.buffers.recycle(view));
        }
    }
}

/// No such id in this ring, or one in flight.
#[cold]
fn wrong_id(id: u16, inside: bool, size: usize) -> RingError {
    let size = u16::try_from(size).unwrap_or(u16::MAX);
    if inside { RingError::HeadInFlight { head: id } } else { RingError::Head { head: id, size } }
}

impl std::fmt::Debug for PackedChains {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedChains")
            .field("in_flight", &self.in_flight())
            .field("budget", &self.budget)
            .finish()
    }
}
