//! Guests behind one switch (`outboard_devices::net::Switch`).

use std::time::{Duration, Instant};

use outboard::{Fact, LoopKind};
use outboard_devices::net::{Net, NetOptions, Port, Switch, Wire};

use crate::guest::{ALL, BOTH, Guest, HEADER, OTHER, TX, packet};
use crate::rig::PATIENCE;

const ADDRESSES: [[u8; 6]; 3] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 3]];

fn guest(port: &Port, number: usize, events: LoopKind) -> Guest {
    let mut options = NetOptions::new(Wire::Port(port.clone()));
    options.mac = Some(ADDRESSES[number]);
    let mut guest = Guest::start(&options, events);
    // A round trip on the thread of its rings: by now they have heard that they are enabled.
    assert_eq!(guest.command(&[9, 9], 1), Some(1));
    guest
}

/// Ports of a switch, named by their numbers.
fn ports(switch: &Switch, count: usize) -> Vec<Port> {
    (0..count).map(|number| switch.plug(&number.to_string()).expect("a place")).collect()
}

fn guests(count: usize, events: LoopKind) -> Vec<Guest> {
    // Nobody is passed over because this machine has other things to do.
    let switch = Switch::with_patience(count, 1500, 10 * PATIENCE).expect("a switch");
    let ports = ports(&switch, count);
    ports.iter().enumerate().map(|(number, port)| guest(port, number, events)).collect()
}

/// A packet from one guest to an address.
fn from(sender: usize, to: [u8; 6], fill: u8) -> Vec<u8> {
    let mut bytes = packet(to, fill, 60);
    bytes[6..12].copy_from_slice(&ADDRESSES[sender]);
    bytes
}

#[test]
fn a_switch_floods_what_it_does_not_know_and_learns_where_addresses_are() {
    for events in BOTH {
        let mut guests = guests(3, events);
        // Nobody knows the address yet: all others get the packet.
        let unknown = from(0, ADDRESSES[1], 1);
        guests[0].send(&unknown);
        assert_eq!(guests[1].receive(), unknown);
        assert_eq!(guests[2].receive(), unknown);
        let answer = from(1, ADDRESSES[0], 2);
        guests[1].send(&answer);
        assert_eq!(guests[0].receive(), answer);
        // Now it does, and the third one hears nothing of it: what it gets next is the group's.
        let (known, group) = (from(0, ADDRESSES[1], 3), from(0, ALL, 4));
        guests[0].send(&known);
        guests[0].send(&group);
        assert_eq!(guests[1].receive(), known);
        assert_eq!(guests[1].receive(), group);
        assert_eq!(guests[2].receive(), group);
        // A guest that moves to another port is found there.
        let moved = from(1, ALL, 5);
        guests[2].send(&moved);
        assert_eq!(guests[0].receive(), moved);
        assert_eq!(guests[1].receive(), moved);
        let followed = from(0, ADDRESSES[1], 6);
        guests[0].send(&followed);
        assert_eq!(guests[2].receive(), followed);
        guests.into_iter().for_each(|guest| guest.rig.end());
    }
}

/// One guest takes nothing: those who send to it are held up for a moment, and then go on to others.
#[test]
fn a_guest_that_takes_nothing_does_not_hold_up_what_is_for_others() {
    for events in BOTH {
        let switch = Switch::new(3, 1500).expect("a switch");
        let ports = ports(&switch, 3);
        let mut sender = guest(&ports[0], 0, events);
        let mut taker = guest(&ports[1], 1, events);
        // It has buffers for a few packets, and never gives more.
        let mut deaf = guest(&ports[2], 2, events);
        for (number, guest) in [(1, &mut taker), (2, &mut deaf)] {
            guest.send(&from(number, OTHER, 1));
            sender.receive();
        }
        deaf.receive();
        for round in 0..2000 {
            sender.send(&from(0, ADDRESSES[2], 2));
            if round % 500 == 0 {
                sender.send(&from(0, ADDRESSES[1], 3));
                while taker.receive()[14] != 3 {}
            }
        }
        [sender, taker, deaf].into_iter().for_each(|guest| guest.rig.end());
    }
}

#[test]
fn a_card_moves_to_another_switch_and_both_switches_find_out_where_its_address_is() {
    for events in BOTH {
        let (hello, answer) = (from(0, ADDRESSES[1], 1), from(1, ADDRESSES[0], 2));
        let patient = || Switch::with_patience(2, 1500, 10 * PATIENCE).expect("a switch");
        let (here, there) = (patient(), patient());
        let plugged = ports(&here, 2);
        let (mut source, mut left) = (guest(&plugged[0], 0, events), guest(&plugged[1], 1, events));
        source.send(&hello);
        assert_eq!(left.receive(), hello);
        left.send(&answer);
        assert_eq!(source.receive(), answer);
        source.rig.vmm.sleep().expect("stops");
        let state = source.rig.vmm.connection().save_state().expect("saved");

        let plugged = ports(&there, 2);
        let mut met = guest(&plugged[1], 1, events);
        let options = NetOptions::new(Wire::Port(plugged[0].clone()));
        let mut moved = Guest::of(Net::new(&options).expect("a card"), events, u64::MAX);
        let features = moved.rig.vmm.features();
        moved.rig.vmm.connection().set_features(features).expect("taken");
        moved.rig.vmm.connection().load_state(&state).expect("loaded");
        moved.activate();
        assert_eq!(moved.command(&[3, 0], 1), Some(0), "it was asked to announce itself");
        moved.send(&hello);
        assert_eq!(met.receive(), hello);
        met.send(&answer);
        assert_eq!(moved.receive(), answer);
        assert_eq!(counted(&there, "flooded"), 1, "the answer knew its way");
        // Where it was nobody takes what is for it; that is for everybody then, and there is nobody.
        left.send(&answer);
        assert_eq!(counted(&here, "dropped-nobody"), 1);
        assert_eq!(counted(&here, "dropped-stopped"), 0);
    }
}

/// What all ports of a switch count under a name.
fn counted(switch: &Switch, name: &str) -> u64 {
    let facts = switch.inspect().facts().into_iter();
    let of_name = facts.filter(|(path, _)| path.ends_with(&format!("/{name}")));
    let numbers = of_name.map(|(_, fact)| match fact {
        Fact::Number(number) => number,
        _ => 0,
    });
    numbers.sum()
}

/// What waited at a guest that takes nothing, and what was on its way as a guest went, is dropped under a name: with
/// what was received it is all that was sent.
#[test]
fn every_packet_for_a_guest_that_takes_nothing_and_then_goes_is_received_or_counted() {
    for events in BOTH {
        let switch = Switch::with_patience(2, 1500, Duration::from_millis(1)).expect("a switch");
        let mut cards = (0..2).map(|number: usize| {
            let port = switch.plug(&number.to_string()).expect("a place");
            let mut options = NetOptions::new(Wire::Port(port));
            options.mac = Some(ADDRESSES[number]);
            let card = Net::new(&options).expect("a card");
            let counters = card.counters().remove(0);
            let mut guest = Guest::of(card, events, u64::MAX);
            guest.activate();
            assert_eq!(guest.command(&[9, 9], 1), Some(1));
            (guest, counters)
        });
        let ((mut sender, sent), (mut deaf, got)) =
            (cards.next().expect("two"), cards.next().expect("two"));
        deaf.send(&from(1, OTHER, 1));
        sender.receive();
        // The inbox is crowded, is passed over, and crowded again with what it does not get either.
        while counted(&switch, "dropped-passed-over") == 0 {
            sender.send(&from(0, ADDRESSES[1], 2));
        }
        (0..8).for_each(|_| sender.send(&from(0, ADDRESSES[1], 3)));
        deaf.rig.end();
        sender.rig.end();
        let counted = |name| counted(&switch, name);
        assert_eq!((counted("flooded"), counted("flooded-copies")), (1, 1));
        let dropped = counted("dropped-passed-over") + counted("dropped-stopped");
        assert_eq!(sent.sent.get(), got.received.get() + got.stopped.get() + dropped);
        assert!(counted("dropped-stopped") + got.stopped.get() > 0, "something waited to the end");
    }
}

/// How many packets go each way: `OUTBOARD_ROUNDS`, or enough to go round every ring and inbox many times.
fn rounds() -> u64 {
    let told = std::env::var("OUTBOARD_ROUNDS").ok();
    told.and_then(|text| text.parse().ok()).unwrap_or(20_000)
}

/// A guest that sends numbered packets as fast as its ring takes them, and checks what it gets.
struct Flow {
    guest: Guest,
    offered: u64,
    sent: u64,
    got: u64,
}

/// Slots for packets to be sent, behind the receive buffers.
const SLOTS: u64 = 32;

impl Flow {
    fn new(guest: Guest, me: usize, other: usize) -> Self {
        for slot in 0..SLOTS {
            let bytes = [&[0; HEADER][..], &from(me, ADDRESSES[other], 0)].concat();
            guest.rig.store(guest.rig.at((1 << 20) + slot * 128), &bytes);
        }
        Self { guest, offered: 0, sent: 0, got: 0 }
    }

    /// Does what can be done now; true: something was.
    fn go_on(&mut self, rounds: u64) -> bool {
        let before = (self.sent, self.got, self.offered);
        while self.guest.rig.is_back(TX) {
            self.sent += 1;
        }
        while self.offered < rounds && self.offered < self.sent + SLOTS {
            let at = self.guest.rig.at((1 << 20) + self.offered % SLOTS * 128);
            self.guest.rig.store(at + 40, &self.offered.to_le_bytes());
            let queue = &mut self.guest.rig.queues[TX];
            assert!(queue.add(&[(at, 72)], &[], 77).expect("fits"), "the ring is full");
            self.offered += 1;
        }
        self.guest.rig.queues[TX].kick().expect("kicked");
        while let Some(bytes) = self.guest.take() {
            assert_eq!(bytes[28..36], self.got.to_le_bytes(), "one was lost, or out of order");
            self.got += 1;
        }
        before != (self.sent, self.got, self.offered)
    }
}

#[test]
fn packets_between_two_guests_all_arrive_in_order_however_fast_they_are_sent() {
    for events in BOTH {
        let mut guests = guests(2, events);
        let (mut second, mut first) = (guests.pop().expect("two"), guests.pop().expect("two"));
        // Both are known to the switch.
        first.send(&from(0, ALL, 0));
        second.receive();
        second.send(&from(1, ALL, 0));
        first.receive();
        let mut flows = [Flow::new(first, 0, 1), Flow::new(second, 1, 0)];
        let (rounds, start) = (rounds(), Instant::now());
        let mut last = Instant::now();
        while flows.iter().any(|flow| flow.got < rounds) {
            let moved = flows.iter_mut().map(|flow| flow.go_on(rounds)).fold(false, |a, b| a | b);
            if moved {
                last = Instant::now();
            } else {
                std::thread::yield_now();
            }
            let got = flows.each_ref().map(|flow| flow.got);
            assert!(last.elapsed() < PATIENCE, "nothing moves after {got:?} packets");
        }
        println!("{rounds} packets each way in {:?}", start.elapsed());
        flows.into_iter().for_each(|flow| flow.guest.rig.end());
    }
}
