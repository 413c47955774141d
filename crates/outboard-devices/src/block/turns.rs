//! Workers that write to one mapped image take turns where their writes may overlap: a copy writes byte by byte, where a
//! system call has the whole file for itself (virtio 1.3 §5.2: a sector is written whole or not; case B60).
//!
//! The image is cut into stripes, dealt out to a few locks. Invariant: locks are taken in the order of their numbers, so
//! that two writes never wait for each other. A worker that always was alone takes none.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use outboard::Counter;

/// Locks; a power of two.
const LOCKS: usize = 16;
/// Bytes of a stripe, as a shift.
const STRIPE: u32 = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Turns {
    locks: [Mutex<()>; LOCKS],
    workers: AtomicUsize,
    /// There were two at once. It stays so: the one that is left when another one goes (after a panic, say) may be in the
    /// middle of a write without a turn when the next one comes.
    shared: AtomicBool,
    /// How often one waited for another.
    waits: Counter,
}

/// Nobody else writes to its bytes while it is there.
pub(super) type Turn<'a> = [Option<MutexGuard<'a, ()>>; LOCKS];

impl Turns {
    /// One more worker writes. To be said before it does, and by all that there are at first before one of them does.
    pub(super) fn join(&self) {
        if self.workers.fetch_add(1, Ordering::Relaxed) > 0 {
            self.shared.store(true, Ordering::Relaxed);
        }
    }

    /// One fewer does.
    pub(super) fn leave(&self) {
        self.workers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Waits until nobody writes to these bytes. None: there never was anybody else.
    pub(super) fn take(&self, at: u64, length: u64) -> Option<Turn<'_>> {
        self.shared.load(Ordering::Relaxed).then(|| self.lock(at, length))
    }

    /// How often a writer has waited for another one.
    pub(super) const fn waits(&self) -> &Counter {
        &self.waits
    }

    fn lock(&self, at: u64, length: u64) -> Turn<'_> {
        let first = at >> STRIPE;
        let stripes = (at.saturating_add(length.max(1) - 1) >> STRIPE) - first;
        let mut number = 0;
        self.locks.each_ref().map(|lock| {
            // How far behind the first stripe the first one of this lock is.
            let behind = u64::wrapping_sub(number, first) % LOCKS as u64;
            number += 1;
            // Nothing is behind a lock that a panic could leave half done.
            (behind <= stripes).then(|| match lock.try_lock() {
                Ok(held) => held,
                Err(TryLockError::Poisoned(held)) => held.into_inner(),
                Err(TryLockError::WouldBlock) => self.wait(lock),
            })
        })
    }

    #[cold]
    fn wait<'a>(&self, lock: &'a Mutex<()>) -> MutexGuard<'a, ()> {
        self.waits.add_shared(1);
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(turns: &Turns, at: u64, length: u64) -> Vec<usize> {
        let turn = turns.lock(at, length);
        turn.iter().enumerate().filter_map(|(at, lock)| lock.as_ref().map(|_| at)).collect()
    }

    #[test]
    fn a_write_holds_the_locks_of_its_stripes_and_no_others() {
        let turns = Turns::default();
        assert_eq!(held(&turns, 0, 1), [0]);
        assert_eq!(held(&turns, (1 << 16) - 1, 1), [0]);
        assert_eq!(held(&turns, (1 << 16) - 1, 2), [0, 1]);
        assert_eq!(held(&turns, 15 << 16, 2 << 16), [0, 15], "round the end");
        assert_eq!(held(&turns, 33 << 16, 1 << 16), [1]);
        assert_eq!(held(&turns, 5, u64::MAX).len(), 16);
        assert_eq!(held(&turns, 7 << 16, 0), [7]);
    }

    #[test]
    fn a_worker_takes_no_lock_until_it_has_company_and_always_from_then_on() {
        let turns = Turns::default();
        turns.join();
        turns.leave();
        turns.join();
        assert!(turns.take(0, 512).is_none(), "one after the other");
        turns.join();
        assert!(turns.take(0, 512).is_some());
        turns.leave();
        assert!(turns.take(0, 512).is_some(), "another one comes while this one writes");
    }
}
