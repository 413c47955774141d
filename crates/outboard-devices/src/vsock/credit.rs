//! The credit of one connection, in both directions (virtio 1.3 §5.10.6.3).
//!
//! ```text
//!  to the peer:    room of its buffer − (sent − taken by it)      = what we may send
//!  from the peer:  room of our buffer − (received − taken by us)  = what it may send
//! ```
//! Invariants: never more is under way to the peer than its buffer holds; a peer that sends more than ours
//! holds, or takes what was not sent, lies. Counters run modulo 2^32.

use serde::{Deserialize, Serialize};

use super::packet::Told;

/// The most that is under way, however large a buffer a peer claims: so that counters that are behind can be
/// told from those that are ahead.
const MOST: u32 = 1 << 30;

/// A peer's claim that cannot be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lie;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    peer: Told,
    sent: u32,
    room: u32,
    received: u32,
    taken: u32,
    /// `taken` as the peer knows it.
    told: u32,
}

impl Credit {
    /// Our buffer has this much room; of the peer's nothing is known.
    #[must_use]
    pub fn new(room: u32) -> Self {
        let room = room.min(MOST);
        Self { peer: Told::default(), sent: 0, room, received: 0, taken: 0, told: 0 }
    }

    /// Whether counts that somebody else has kept can be true.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.room <= MOST && self.waiting() <= self.room && self.under_way() <= MOST
    }

    /// The peer tells its credit. What is older than what was told before is passed over: packets of one
    /// connection may be put into the ring by several processors.
    ///
    /// # Errors
    /// It has taken more than was sent.
    pub fn hear(&mut self, told: Told) -> Result<(), Lie> {
        let step = told.taken.wrapping_sub(self.peer.taken);
        if step <= self.under_way() {
            self.peer = told;
            return Ok(());
        }
        if step.wrapping_neg() <= MOST { Ok(()) } else { Err(Lie) }
    }

    fn under_way(&self) -> u32 {
        self.sent.wrapping_sub(self.peer.taken)
    }

    /// Bytes that may be sent to the peer now.
    #[must_use]
    pub fn may_send(&self) -> u32 {
        self.peer.room.min(MOST).saturating_sub(self.under_way())
    }

    /// Room of the peer's whole buffer.
    #[must_use]
    pub fn peer_room(&self) -> u32 {
        self.peer.room.min(MOST)
    }

    /// So many bytes went to the peer, no more than [`Credit::may_send`].
    pub fn sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count.min(self.may_send()));
    }

    /// Bytes of the peer that have not been taken.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.received.wrapping_sub(self.taken)
    }

    /// So many bytes came from the peer.
    ///
    /// # Errors
    /// It had no credit for them; nothing has changed.
    pub fn received(&mut self, count: u32) -> Result<(), Lie> {
        if count > self.room - self.waiting() {
            return Err(Lie);
        }
        self.received = self.received.wrapping_add(count);
        Ok(())
    }

    /// So many of them have left our buffer.
    pub fn took(&mut self, count: u32) {
        self.taken = self.taken.wrapping_add(count.min(self.waiting()));
    }

    /// Whether the peer may soon think that there is no room while there is.
    #[must_use]
    pub fn should_tell(&self) -> bool {
        let untold = self.taken.wrapping_sub(self.told);
        untold != 0 && untold >= self.room / 2
    }

    /// What goes into a header. The peer knows it then.
    pub fn tell(&mut self) -> Told {
        self.told = self.taken;
        Told { room: self.room, taken: self.taken }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(room: u32, taken: u32) -> Told {
        Told { room, taken }
    }

    #[test]
    fn no_more_is_sent_than_the_peer_has_room_for() {
        let mut credit = Credit::new(100);
        assert_eq!(credit.may_send(), 0);
        credit.hear(told(10, 0)).expect("true");
        credit.sent(7);
        assert_eq!(credit.may_send(), 3);
        credit.hear(told(10, 5)).expect("true");
        assert_eq!(credit.may_send(), 8);
        credit.hear(told(1, 5)).expect("a buffer may shrink");
        assert_eq!(credit.may_send(), 0);
    }

    #[test]
    fn b67_a_peer_that_takes_what_was_not_sent_lies() {
        let mut credit = Credit::new(100);
        credit.hear(told(u32::MAX, 0)).expect("a large buffer is nothing wrong");
        assert_eq!(credit.may_send(), MOST);
        credit.sent(50);
        for ahead in [51, 52, 1 << 20, 1 << 30, 1 << 31, (1 << 31) + 1] {
            assert_eq!(credit.clone().hear(told(10, ahead)), Err(Lie), "{ahead}");
        }
        credit.hear(told(10, 50)).expect("true");
        credit.hear(told(99, 40)).expect("an old one");
        assert_eq!(credit.may_send(), 10, "what is old counts for nothing");
    }

    #[test]
    fn b67_a_peer_that_sends_without_credit_lies() {
        let mut credit = Credit::new(100);
        assert_eq!(credit.received(101), Err(Lie));
        assert_eq!(credit.received(u32::MAX), Err(Lie));
        credit.received(60).expect("fits");
        assert_eq!(credit.received(41), Err(Lie));
        credit.received(40).expect("fits");
        assert_eq!(credit.received(1), Err(Lie));
        credit.received(0).expect("nothing always fits");
        credit.took(30);
        credit.received(30).expect("fits again");
    }

    #[test]
    fn credit_is_told_when_half_of_the_room_is_free_and_the_peer_does_not_know() {
        let mut credit = Credit::new(100);
        credit.received(100).expect("fits");
        credit.took(49);
        assert!(!credit.should_tell());
        credit.took(1);
        assert!(credit.should_tell());
        assert_eq!(credit.tell(), told(100, 50));
        assert!(!credit.should_tell());
    }

    #[test]
    fn counters_run_over() {
        let mut credit = Credit::new(MOST);
        credit.hear(told(MOST, 0)).expect("true");
        let mut taken = 0_u32;
        for _ in 0..20 {
            credit.sent(MOST);
            taken = taken.wrapping_add(MOST);
            credit.hear(told(MOST, taken)).expect("true");
            credit.received(MOST).expect("fits");
            credit.took(MOST);
            assert_eq!((credit.may_send(), credit.tell().taken), (MOST, taken));
        }
    }
}
