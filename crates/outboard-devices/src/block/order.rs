//! The order of writes to the same bytes, while requests may be repeated by a process that follows this one.
//!
//! ```text
//!  write 1  sectors 0..8   under way
//!  write 2  sectors 4..6   waits for 1          an older one is repeated only together with every newer one
//!  write 3  sectors 8..16  under way            that overlaps it, and in front of it
//!  write 4  sectors 0..16  waits for 1, 2, 3
//! ```
//! Without this a write that was finished and told could be undone: killed with an older one to the same sectors still
//! under way, the next process would repeat that one. It holds for the queues of one worker; between queues of different
//! workers virtio knows no order, nor does the in-flight region.
//!
//! Invariant: a write begins when no older one that overlaps it is in the list; the list holds no more entries than there
//! are requests under way.

use std::ops::Range;

/// A place in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn(u64);

#[derive(Debug)]
struct Entry {
    turn: Turn,
    /// What it is called when it may begin.
    name: usize,
    bytes: Range<u64>,
    /// Older entries that overlap it.
    waits_for: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct WriteOrder {
    /// The oldest first.
    entries: Vec<Entry>,
    next: u64,
    /// How many wait.
    waiting: usize,
    /// Those that wait no more, and were not told yet.
    ready: Vec<usize>,
}

impl WriteOrder {
    /// Takes a place for a write of `bytes`. True: it may begin; else [`Self::ready`] says its `name` when it may.
    pub(crate) fn enter(&mut self, bytes: Range<u64>, name: usize) -> (Turn, bool) {
        let turn = Turn(self.next);
        self.next = self.next.wrapping_add(1);
        let waits_for = self.entries.iter().filter(|older| overlap(&older.bytes, &bytes)).count();
        self.waiting += usize::from(waits_for != 0);
        self.entries.push(Entry { turn, name, bytes, waits_for });
        (turn, waits_for == 0)
    }

    /// A write has ended, or never began.
    pub(crate) fn leave(&mut self, turn: Turn) {
        let Some(at) = self.entries.iter().position(|entry| entry.turn == turn) else { return };
        let gone = self.entries.remove(at);
        self.waiting -= usize::from(gone.waits_for != 0);
        if self.waiting == 0 {
            return;
        }
        for entry in self.entries.iter_mut().skip(at) {
            if entry.waits_for != 0 && overlap(&entry.bytes, &gone.bytes) {
                entry.waits_for -= 1;
                if entry.waits_for == 0 {
                    self.waiting -= 1;
                    self.ready.push(entry.name);
                }
            }
        }
    }

    /// A write that has waited and may begin now.
    pub(crate) fn ready(&mut self) -> Option<usize> {
        self.ready.pop()
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_waits_for_every_older_one_that_it_overlaps_and_for_no_other() {
        let mut order = WriteOrder::default();
        let (first, now) = order.enter(0..8, 1);
        assert!(now);
        let (second, now) = order.enter(4..6, 2);
        assert!(!now);
        let (third, now) = order.enter(8..16, 3);
        assert!(now, "they touch and do not overlap");
        let (fourth, now) = order.enter(0..16, 4);
        assert!(!now);
        order.leave(third);
        assert_eq!(order.ready(), None);
        order.leave(first);
        assert_eq!((order.ready(), order.ready()), (Some(2), None));
        order.leave(second);
        assert_eq!((order.ready(), order.ready()), (Some(4), None));
        order.leave(fourth);
        assert!(order.enter(0..16, 5).1, "nothing is left behind");
    }

    #[test]
    fn one_that_never_began_holds_nobody_up() {
        let mut order = WriteOrder::default();
        let (first, _) = order.enter(0..8, 1);
        let (second, _) = order.enter(0..8, 2);
        let (third, _) = order.enter(0..8, 3);
        order.leave(second);
        assert_eq!(order.ready(), None);
        order.leave(first);
        assert_eq!((order.ready(), order.ready()), (Some(3), None));
        order.leave(first);
        order.leave(third);
        assert_eq!(order.waiting, 0);
    }
}
