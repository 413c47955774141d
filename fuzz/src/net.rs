//! A card's control queue, its transmit and its receive ring: any command, any frame from the guest or from the wire,
//! against the card behind its own socket and thread, with our end of its wire on a Unix socket (virtio 1.3 §5.1.6).
//!
//! Held, against a model of what a driver has asked for: each command's answer; the guest's packets reach the wire whole
//! and in order, what is no packet does not; packets of the wire reach the guest whole and in order if it wants them, in
//! as many buffers as the header says, and are counted as filtered if it does not.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use outboard_devices::net::{Counters, MOST, Net, NetOptions, Stream, feature};

use crate::cover::{played, reached, wanted};
use crate::input::Input;
use crate::rig::{PATIENCE, Rig, cut, folder};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HEADER: usize = 12;
const ETHERNET: usize = 14;
/// Addresses that a driver may keep.
const TABLE: u64 = 64;
const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;
const BUFFERS: u64 = 48;
const BUFFER: u64 = 2048;
const COMMAND: u64 = 128 << 10;
const ACK: u64 = 136 << 10;
const SENT: u64 = 144 << 10;
const ARENA: usize = 512 << 10;

/// Addresses that packets go to.
const ADDRESSES: [[u8; 6]; 6] = [
    MAC,
    [2, 0, 0, 0, 0, 2],
    [2, 0, 0, 0, 0, 3],
    [1, 0, 0x5e, 0, 0, 1],
    [1, 0, 0x5e, 0, 0, 2],
    [0xff; 6],
];

/// What a driver has asked for.
struct Model {
    /// As the commands are numbered: promiscuous, all multicast, all unicast, no multicast, no unicast, no broadcast.
    modes: [bool; 6],
    mac: [u8; 6],
    /// Unicast, multicast; none: there were too many.
    tables: [Option<BTreeSet<[u8; 6]>>; 2],
    vlans: BTreeSet<u16>,
    /// A VLAN was named: until then all of them pass.
    names_vlans: bool,
}

impl Model {
    fn new() -> Self {
        let modes = [true, false, false, false, false, false];
        let tables = [Some(BTreeSet::new()), Some(BTreeSet::new())];
        Self { modes, mac: MAC, tables, vlans: BTreeSet::new(), names_vlans: false }
    }

    fn wants(&self, packet: &[u8]) -> bool {
        if packet.len() < ETHERNET {
            return false;
        }
        if self.names_vlans && packet.len() >= ETHERNET + 2 && packet[12..14] == [0x81, 0] {
            let vlan = u16::from_be_bytes([packet[14], packet[15]]) & 0xfff;
            if !self.vlans.contains(&vlan) {
                return false;
            }
        }
        let [promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast] =
            self.modes;
        let to: [u8; 6] = packet[..6].try_into().expect("six");
        let listed =
            |table: &Option<BTreeSet<_>>| table.as_ref().is_none_or(|all| all.contains(&to));
        promiscuous
            || match to {
                [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => !no_broadcast,
                [first, ..] if first & 1 == 1 => {
                    !no_multicast && (all_multicast || listed(&self.tables[1]))
                }
                _ => !no_unicast && (all_unicast || to == self.mac || listed(&self.tables[0])),
            }
    }

    /// Carries a command out; false: it is none.
    fn carry_out(&mut self, command: &[u8]) -> bool {
        match command {
            [0, mode @ 0..=5, on, ..] => self.modes[usize::from(*mode)] = *on != 0,
            [1, 0, lists @ ..] => {
                let Some((unicast, rest)) = list(lists) else { return false };
                let Some((multicast, _)) = list(rest) else { return false };
                self.tables = [unicast, multicast];
            }
            [1, 1, mac @ ..] if mac.len() >= 6 => self.mac.copy_from_slice(&mac[..6]),
            [2, add @ 0..=1, low, high, ..] => {
                let vlan = u16::from_le_bytes([*low, *high]);
                if vlan >= 4096 {
                    return false;
                }
                self.names_vlans = true;
                if *add == 0 {
                    self.vlans.insert(vlan)
                } else {
                    self.vlans.remove(&vlan)
                };
            }
            [3, 0, ..] => {}
            _ => return false,
        }
        true
    }
}

/// A table of a command, if it is whole, and what follows it.
#[expect(clippy::type_complexity, reason = "a table or too many, and the rest")]
fn list(bytes: &[u8]) -> Option<(Option<BTreeSet<[u8; 6]>>, &[u8])> {
    let (count, rest) = bytes.split_first_chunk()?;
    let count = u64::from(u32::from_le_bytes(*count));
    let length = usize::try_from(count * 6).ok()?;
    let (all, rest) = rest.split_at_checked(length)?;
    let all = all.chunks(6).filter_map(|one| one.try_into().ok()).collect();
    Some(((count <= TABLE).then_some(all), rest))
}

struct Card {
    rig: Rig,
    counters: Counters,
    wire: UnixStream,
    model: Model,
    /// Packets of the wire, so far.
    told: u64,
    number: u32,
}

thread_local! {
    static CARDS: std::cell::RefCell<Card> = std::cell::RefCell::new(Card::new());
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let classes = [0, 1, 2, 3].map(|class| format!("net command {class} done"));
        let more = [
            "command refused",
            "sent",
            "not sent",
            "received",
            "filtered",
            "in several buffers",
            "VLAN passed",
        ];
        classes.into_iter().chain(more.map(|what| format!("net {what}"))).collect()
    });
    CARDS.with_borrow_mut(|card| {
        card.begin();
        let mut input = Input::new(data);
        while !input.is_empty() {
            match input.below(4) {
                0 => card.command(&mut input),
                1 => card.transmit(&mut input),
                _ => card.receive(&mut input),
            }
        }
    });
}

impl Card {
    fn new() -> Self {
        let folder = folder("net");
        let path = folder.join("wire");
        let listener = UnixListener::bind(&path).expect("listens");
        let mut options = NetOptions::new(Stream::Connect(path));
        options.mac = Some(MAC);
        let net = Net::new(&options).expect("a card");
        let counters = net.counters().remove(0);
        let rig = Rig::new(net, &[0, 1, 2], 64, ARENA);
        let needed = feature::MRG_RXBUF | feature::CONTROL | feature::CTRL_VQ;
        assert_eq!(rig.vmm.features() & needed, needed, "what the model has");
        let (wire, _) = listener.accept().expect("the card");
        wire.set_read_timeout(Some(PATIENCE)).expect("a time");
        let mut card = Self { rig, counters, wire, model: Model::new(), told: 0, number: 0 };
        for slot in 0..BUFFERS {
            card.refill(slot);
        }
        card
    }

    /// Buffers of several lengths: what is long lies in more than one.
    fn refill(&mut self, slot: u64) {
        let length = [2048, 300, 1024, 64][slot as usize % 4];
        self.rig.offer(RX, &[], &[(slot * BUFFER, length)], slot);
    }

    /// As a driver finds the card.
    fn begin(&mut self) {
        let vlans: Vec<_> = self.model.vlans.iter().copied().collect();
        for vlan in vlans {
            let [low, high] = vlan.to_le_bytes();
            self.order(&[2, 1, low, high], &[]);
        }
        for (mode, on) in [(0, 1), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0)] {
            self.order(&[0, mode, on], &[]);
        }
        self.order(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
        self.order(&[&[1, 1][..], &MAC].concat(), &[]);
    }

    /// Gives a command, in these pieces or in one. The answer is the model's.
    fn order(&mut self, command: &[u8], pieces: &[(u64, u32)]) {
        self.rig.store(COMMAND, command);
        self.rig.store(ACK, &[0xee]);
        let whole = [(COMMAND, command.len() as u32)];
        let pieces = if pieces.is_empty() && !command.is_empty() { &whole[..] } else { pieces };
        self.rig.offer(CONTROL, pieces, &[(ACK, 1)], 5);
        assert_eq!(self.rig.back(CONTROL), (5, 1), "an answer");
        played(1);
        let ack = self.rig.load(ACK, 1)[0];
        let done = self.model.carry_out(command);
        assert_eq!(ack, u8::from(!done), "the answer to {command:?}");
        match command {
            [class, ..] if done => reached(format!("net command {class} done")),
            _ => reached("net command refused".into()),
        }
    }

    fn command(&mut self, input: &mut Input<'_>) {
        let class = if input.one_in(12) { input.byte() } else { input.byte() % 4 };
        let number = if input.one_in(12) { input.byte() } else { input.byte() % 6 };
        let mut command = vec![class, if class == 0 { number } else { number % 2 }];
        match (class, number % 2) {
            (0, _) => command.push(input.byte() % 3),
            (1, 0) => {
                for _ in 0..2 {
                    let count = if input.one_in(8) { input.below(70) } else { input.below(3) };
                    let said = if input.one_in(8) { input.number() as u32 } else { count as u32 };
                    command.extend(said.to_le_bytes());
                    for _ in 0..count {
                        command.extend(ADDRESSES[input.below(ADDRESSES.len())]);
                    }
                }
            }
            (1, _) => command.extend(ADDRESSES[input.below(3)]),
            (2, _) => {
                let vlan =
                    if input.one_in(8) { input.number() as u16 } else { input.below(4) as u16 };
                command.extend(vlan.to_le_bytes());
            }
            _ => command.extend(input.take(9)),
        }
        if input.one_in(12) {
            command.truncate(input.below(command.len() + 1));
        }
        let pieces = cut(input, COMMAND, command.len(), 3);
        self.order(&command, &pieces);
    }

    /// A packet of so many bytes that is like no other.
    fn packet(&mut self, input: &mut Input<'_>, length: usize) -> Vec<u8> {
        self.number += 1;
        let mut packet =
            [&ADDRESSES[input.below(ADDRESSES.len())][..], &ADDRESSES[1], &[8, 0]].concat();
        if input.one_in(3) {
            packet[12] = 0x81;
            packet.extend([input.byte() & 0xf0, input.below(4) as u8]);
        }
        packet.extend(self.number.to_le_bytes());
        let byte = self.number.to_le_bytes()[0];
        packet.resize(length.max(packet.len()), byte);
        packet.truncate(length);
        packet
    }

    /// The guest sends.
    fn transmit(&mut self, input: &mut Input<'_>) {
        let length = match input.byte() {
            0xff => MOST - 2 + input.below(4),
            0xf0..0xff => input.below(ETHERNET + 4),
            _ => ETHERNET + input.below(200) * 8,
        };
        let packet = self.packet(input, length);
        let mut sent = vec![0; HEADER];
        if input.one_in(4) {
            let at = input.below(HEADER);
            sent[at] = input.byte();
        }
        let sound = sent[1] == 0 && (ETHERNET..=MOST).contains(&packet.len());
        sent.extend(&packet);
        let cut_off = input.one_in(24);
        if cut_off {
            sent.truncate(input.below(HEADER + ETHERNET));
        }
        let pieces = cut(input, SENT, sent.len(), 3);
        if pieces.is_empty() {
            return;
        }
        self.rig.store(SENT, &sent);
        self.rig.offer(TX, &pieces, &[], 9);
        played(1);
        let goes = sound && !cut_off;
        if goes {
            let mut prefix = [0; 4];
            self.wire.read_exact(&mut prefix).expect("a packet on the wire");
            let mut there = vec![0; u32::from_be_bytes(prefix) as usize];
            self.wire.read_exact(&mut there).expect("all of it");
            assert!(there == packet, "the packet on the wire is another one");
            reached("net sent".into());
        } else {
            reached("net not sent".into());
        }
        assert_eq!(self.rig.back(TX), (9, 0), "taken once");
    }

    /// The wire brings some packets.
    fn receive(&mut self, input: &mut Input<'_>) {
        let mut wanted = Vec::new();
        for _ in 0..1 + input.below(3) {
            let length =
                if input.one_in(8) { 1 + input.below(20) } else { ETHERNET + input.below(180) * 8 };
            let packet = self.packet(input, length);
            let framed = [&(length as u32).to_be_bytes()[..], &packet].concat();
            self.wire.write_all(&framed).expect("the card takes it");
            self.told += 1;
            played(1);
            match self.model.wants(&packet) {
                true => wanted.push(packet),
                false => reached("net filtered".into()),
            }
        }
        for packet in wanted {
            let got = self.next();
            assert!(got == packet, "another packet than the wire's next");
            reached("net received".into());
            if packet.len() > 15 && packet[12..14] == [0x81, 0] {
                reached("net VLAN passed".into());
            }
        }
        // What is not wanted is over before a command changes what is.
        let until = Instant::now() + PATIENCE;
        while self.seen() < self.told {
            assert!(Instant::now() < until, "{} packets of {}", self.seen(), self.told);
            std::thread::yield_now();
        }
        assert_eq!(self.seen(), self.told, "each packet is counted once");
        assert!(self.rig.queues[RX].pop().expect("a sound ring").is_none(), "nothing else came");
    }

    /// Packets of the wire that the card has done with.
    fn seen(&self) -> u64 {
        let Counters { received, filtered, too_large, .. } = &self.counters;
        received.get() + filtered.get() + too_large.get()
    }

    /// The next packet of the guest, out of as many buffers as its header says.
    fn next(&mut self) -> Vec<u8> {
        let mut bytes = self.buffer();
        assert!(bytes.len() >= HEADER, "a header in one buffer");
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        assert!(buffers > 0 && bytes[..10].iter().all(|byte| *byte == 0), "a plain header");
        for _ in 1..buffers {
            bytes.extend(self.buffer());
            reached("net in several buffers".into());
        }
        bytes.split_off(HEADER)
    }

    fn buffer(&mut self) -> Vec<u8> {
        let (slot, length) = self.rig.back(RX);
        let bytes = self.rig.load(slot * BUFFER, length as usize);
        self.refill(slot);
        bytes
    }
}
