//! A card's driver, and the peer at the other end of its link.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use outboard::LoopKind;
use outboard_devices::net::{Net, NetOptions, Stream};

use crate::rig::{PATIENCE, Rig};

pub(crate) const BOTH: [LoopKind; 2] = [LoopKind::Epoll, LoopKind::Uring];
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
pub(crate) const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
pub(crate) const ALL: [u8; 6] = [0xff; 6];
/// Bytes before each packet in a ring.
pub(crate) const HEADER: usize = 12;

/// Queues.
pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
pub(crate) const CONTROL: usize = 2;

const SIZE: u16 = 64;
const BUFFERS: u64 = 32;
/// Bytes of a receive buffer.
const BUFFER: u64 = 2048;
/// Where packets are sent from.
const TRANSMIT: u64 = 1 << 20;

pub(crate) struct Guest {
    pub(crate) rig: Rig,
    /// The place of the queue of commands.
    pub(crate) control: usize,
}

/// A packet of so many bytes.
pub(crate) fn packet(to: [u8; 6], fill: u8, length: usize) -> Vec<u8> {
    let mut packet = [&to[..], &OTHER, &[8, 0]].concat();
    packet.resize(length.max(14), fill);
    packet
}

pub(crate) fn options(folder: &Path) -> NetOptions {
    let mut options = NetOptions::new(Stream::Listen(link(folder)));
    options.mac = Some(MAC);
    options
}

pub(crate) fn link(folder: &Path) -> PathBuf {
    folder.join("link")
}

/// The program at the other end of the link.
pub(crate) struct Peer(pub(crate) UnixStream);

impl Peer {
    pub(crate) fn connect(folder: &Path) -> Self {
        Self::of(UnixStream::connect(link(folder)).expect("it listens"))
    }

    pub(crate) fn of(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a time");
        stream.set_write_timeout(Some(PATIENCE)).expect("a time");
        Self(stream)
    }

    pub(crate) fn send(&mut self, packet: &[u8]) {
        let length = u32::try_from(packet.len()).expect("small");
        let frame = [&length.to_be_bytes()[..], packet].concat();
        self.0.write_all(&frame).expect("sent");
    }

    pub(crate) fn receive(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).expect("a length");
        let mut packet = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut packet).expect("a packet");
        packet
    }
}

impl Guest {
    pub(crate) fn start(options: &NetOptions, events: LoopKind) -> Self {
        let mut guest = Self::of(Net::new(options).expect("a card"), events, u64::MAX);
        guest.activate();
        guest
    }

    pub(crate) fn of(net: Net, events: LoopKind, mask: u64) -> Self {
        Self { rig: Rig::asleep(net, events, mask), control: CONTROL }
    }

    pub(crate) fn activate(&mut self) {
        self.rig.activate(&[0, 1, 2], SIZE);
        for slot in 0..BUFFERS {
            self.refill(slot);
        }
    }

    fn refill(&mut self, slot: u64) {
        let at = self.rig.at(slot * BUFFER);
        self.rig.offer(RX, &[], &[(at, 2048)], slot);
    }

    /// The next packet, without its header, which must be that of a plain packet.
    pub(crate) fn receive(&mut self) -> Vec<u8> {
        let (slot, length) = self.rig.back(RX);
        let bytes = self.rig.load(self.rig.at(slot * BUFFER), length);
        self.refill(slot);
        let (header, packet) = bytes.split_at(HEADER);
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        packet.to_vec()
    }

    /// The next packet, if it is there already.
    pub(crate) fn take(&mut self) -> Option<Vec<u8>> {
        let (slot, length) = self.rig.queues[RX].pop().expect("a sound ring")?;
        let bytes = self.rig.load(self.rig.at(slot * BUFFER), length);
        self.refill(slot);
        Some(bytes[HEADER..].to_vec())
    }

    pub(crate) fn send(&mut self, packet: &[u8]) {
        self.send_raw(&[&[0; HEADER], packet].concat());
    }

    /// Offers a packet so many times, and takes all of them back.
    pub(crate) fn send_many(&mut self, count: u64, packet: &[u8]) {
        let at = self.rig.at(TRANSMIT);
        self.rig.store(at, &[&[0; HEADER], packet].concat());
        let length = u32::try_from(HEADER + packet.len()).expect("small");
        for number in 0..count {
            self.rig.offer(TX, &[(at, length)], &[], number);
        }
        for number in 0..count {
            assert_eq!(self.rig.back(TX), (number, 0));
        }
    }

    pub(crate) fn send_raw(&mut self, bytes: &[u8]) {
        let at = self.rig.at(TRANSMIT);
        self.rig.store(at, bytes);
        let length = u32::try_from(bytes.len()).expect("small");
        self.rig.offer(TX, &[(at, length)], &[], 77);
        assert_eq!(self.rig.back(TX), (77, 0));
    }

    /// Sends a command; what came of it (None: no answer).
    pub(crate) fn command(&mut self, bytes: &[u8], room: u32) -> Option<u8> {
        let (at, ack) = (self.rig.at(TRANSMIT), self.rig.at(TRANSMIT + (1 << 20)));
        self.rig.store(at, bytes);
        self.rig.store(ack, &[0xee]);
        let readable = [(at, u32::try_from(bytes.len()).expect("small"))];
        let readable = if bytes.is_empty() { &[][..] } else { &readable[..] };
        let writable = [(ack, room)];
        let writable = if room == 0 { &[][..] } else { &writable[..] };
        self.rig.offer(self.control, readable, writable, 5);
        let (_, used) = self.rig.back(self.control);
        (used == 1).then(|| self.rig.load(ack, 1)[0])
    }
}
