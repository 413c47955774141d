//! The state machine of a connection against itself: two ends, whatever the order in which they and what is
//! under way between them get their turn.

use std::collections::VecDeque;

use outboard_devices::vsock::{Address, Connection, Header, Heard, Kind, Op, Phase, shut};
use proptest::prelude::*;

const A: Address = Address { cid: 3, port: 1 };
const B: Address = Address { cid: 2, port: 2 };

/// One end: its machine, what it still has to send, what it holds and what it has taken.
struct End {
    machine: Connection,
    to_send: u32,
    held: u32,
    taken: u32,
    room: u32,
}

impl End {
    fn new(machine: Connection, to_send: u32, room: u32) -> Self {
        Self { machine, to_send, held: 0, taken: 0, room }
    }

    /// Says what is next, with at most `most` bytes.
    fn say(&mut self, most: u32, from: Address, to: Address) -> Option<Header> {
        let op = self.machine.next(self.to_send > 0)?;
        let count =
            if op == Op::Data { self.to_send.min(most).min(self.machine.may_send()) } else { 0 };
        self.to_send -= count;
        let header = Header::new(from, to, Kind::Stream, op).with_length(count);
        Some(self.machine.say(op, header))
    }

    fn hear(&mut self, header: &Header) {
        match self.machine.hear(header.op().expect("an operation"), header) {
            Heard::Data(count) => {
                self.held += count;
                assert!(self.held <= self.room, "{} bytes in a buffer of {}", self.held, self.room);
            }
            heard => assert_ne!(heard, Heard::Broken, "{header:?}"),
        }
    }

    /// Takes up to `most` bytes; says that nothing follows when everything was sent.
    fn take(&mut self, most: u32) {
        let count = self.held.min(most);
        self.held -= count;
        self.taken += count;
        self.machine.took(count);
        if self.to_send == 0 && self.machine.phase() == Phase::Open {
            self.machine.shut(shut::SEND);
        }
        if !self.machine.peer_sends() && self.held == 0 {
            self.machine.shut(shut::RECEIVE);
        }
    }
}

proptest! {
    /// Whatever has its turn when: all bytes arrive, no buffer runs over, both ends come to an end.
    #[test]
    fn two_ends_carry_everything_and_come_to_an_end(
        bytes in (0..5000_u32, 0..5000_u32),
        rooms in (1..300_u32, 1..300_u32),
        turns in prop::collection::vec((0..6_u8, 1..200_u32), 0..600),
    ) {
        let mut a = End::new(Connection::ask(rooms.0), bytes.0, rooms.0);
        let request = a.say(0, A, B).expect("a request");
        let mut b = End::new(Connection::asked(rooms.1, &request), bytes.1, rooms.1);
        b.machine.accept();
        let (mut to_a, mut to_b) = (VecDeque::new(), VecDeque::new());
        // At first in any order, in the end each has its turn until there is nothing to do.
        let fair = (0..200_000_u32).map(|turn| (u8::try_from(turn % 6).unwrap_or(0), 64));
        for (turn, most) in turns.into_iter().chain(fair) {
            match turn {
                0 => to_b.extend(a.say(most, A, B)),
                1 => to_a.extend(b.say(most, B, A)),
                2 => to_a.pop_front().iter().for_each(|header| a.hear(header)),
                3 => to_b.pop_front().iter().for_each(|header| b.hear(header)),
                4 => a.take(most),
                _ => b.take(most),
            }
            if a.machine.is_done() && b.machine.is_done() {
                break;
            }
        }
        prop_assert_eq!((a.taken, b.taken), (bytes.1, bytes.0));
        prop_assert!(a.machine.is_done() && b.machine.is_done());
    }

    /// Whatever a peer says, however it lies: no more is held than there is room for, and it ends or goes on.
    #[test]
    fn b67_a_peer_that_says_anything_is_held_to_its_credit(
        packets in prop::collection::vec((1..9_u16, 0..400_u32, 0..5_u32, any::<u32>(), prop_oneof![0..9_u32, any::<u32>()], 0..300_u32), 0..200),
    ) {
        let request = Header::new(A, B, Kind::Stream, Op::Request);
        let mut end = End::new(Connection::asked(256, &request), 1000, 256);
        end.machine.accept();
        for (op, length, flags, room, taken, most) in packets {
            let Some(op) = Op::of(op) else { continue };
            let told = outboard_devices::vsock::Told { room, taken };
            let header = Header::new(A, B, Kind::Stream, op);
            let header = header.with_length(length).with_flags(flags).with_credit(told);
            if let Heard::Data(count) = end.machine.hear(op, &header) {
                end.held += count;
                prop_assert!(end.held <= 256);
            }
            let before = end.machine.may_send();
            if let Some(said) = end.say(most, B, A) {
                prop_assert!(said.length() <= before);
            }
            if end.machine.phase() == Phase::Open {
                end.take(most);
            }
        }
    }
}
