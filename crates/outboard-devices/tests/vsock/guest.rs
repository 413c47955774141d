//! A guest's driver that speaks packets, and the host's programs.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use outboard::LoopKind;
use outboard_devices::vsock::{
    Address, Credit, HOST_CID, Header, Kind, Neighbours, Op, Vsock, VsockOptions,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::rig::{PATIENCE, Rig, serve};

pub(crate) const BOTH: [LoopKind; 2] = [LoopKind::Epoll, LoopKind::Uring];
pub(crate) const CID: u64 = 3;

/// Queues.
pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
pub(crate) const EVENT: usize = 2;

const SIZE: u16 = 64;
pub(crate) const BUFFERS: u64 = 32;
/// Bytes of a receive buffer: as Linux has them.
pub(crate) const BUFFER: u64 = 4096;
/// Where packets are sent from.
pub(crate) const TRANSMIT: u64 = 1 << 20;
/// Where events go.
const EVENTS: u64 = 512 << 10;
/// What the guest says of its buffers.
pub(crate) const ROOM: u32 = 64 << 10;

/// A number that a person may have changed.
pub(crate) fn number(name: &str, usual: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Bytes that are like no others nearby.
pub(crate) fn bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut all: Vec<_> = (0..count.div_ceil(8)).flat_map(|_| next()).collect();
    all.truncate(count);
    all
}

pub(crate) fn options(folder: &Path) -> VsockOptions {
    VsockOptions::new(CID, path(folder))
}

pub(crate) fn path(folder: &Path) -> PathBuf {
    folder.join("vm")
}

/// The host's server of a port.
pub(crate) fn server(folder: &Path, port: u32) -> UnixListener {
    UnixListener::bind(folder.join(format!("vm_{port}"))).expect("listens")
}

/// A client of the host that has asked for a port of the guest.
pub(crate) fn client(folder: &Path, port: u32) -> UnixStream {
    let mut client = patient(UnixStream::connect(path(folder)).expect("it listens"));
    // It may have been turned away by now.
    let _ = client.write_all(format!("CONNECT {port}\n").as_bytes());
    client
}

pub(crate) fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).expect("a time");
    stream.set_write_timeout(Some(PATIENCE)).expect("a time");
    stream
}

/// The host's port that a client was told of.
pub(crate) fn answer(client: &UnixStream) -> u32 {
    // One byte at a time: what follows is the guest's.
    let mut line = String::new();
    BufReader::with_capacity(1, client).read_line(&mut line).expect("an answer");
    let port = line.strip_prefix("OK ").and_then(|rest| rest.trim_end().parse().ok());
    port.unwrap_or_else(|| panic_with(&line))
}

#[expect(clippy::panic, reason = "a failed step of a test is its end")]
fn panic_with(line: &str) -> u32 {
    panic!("{line:?} is no answer")
}

pub(crate) struct Guest {
    pub(crate) rig: Rig,
    pub(crate) cid: u64,
    /// Packets that came while others were waited for.
    pub(crate) heard: VecDeque<(Header, Vec<u8>)>,
    /// Receive buffers are given back at once.
    pub(crate) refills: bool,
}

/// A guest's end of a connection.
pub(crate) struct Socket {
    pub(crate) ours: Address,
    pub(crate) peer: Address,
    pub(crate) kind: Kind,
    pub(crate) credit: Credit,
}

impl Guest {
    pub(crate) fn start(options: VsockOptions, events: LoopKind) -> Self {
        Self::among(options, &Neighbours::new(), events)
    }

    pub(crate) fn among(options: VsockOptions, neighbours: &Neighbours, events: LoopKind) -> Self {
        let mut guest = Self::asleep(options, neighbours, events, u64::MAX);
        guest.activate();
        guest
    }

    pub(crate) fn asleep(
        options: VsockOptions,
        neighbours: &Neighbours,
        events: LoopKind,
        mask: u64,
    ) -> Self {
        let cid = options.guest_cid;
        let rig = Rig::asleep(Vsock::new(options, neighbours).expect("a device"), events, mask);
        Self { rig, cid, heard: VecDeque::new(), refills: true }
    }

    pub(crate) fn activate(&mut self) {
        self.rig.activate(&[0, 1, 2], SIZE);
        for slot in 0..BUFFERS {
            self.refill(slot);
        }
        for slot in 0..4 {
            let at = self.rig.at(EVENTS + 8 * slot);
            self.rig.offer(EVENT, &[], &[(at, 8)], slot);
        }
    }

    /// Goes on with another device where the last one, which is killed, left everything.
    pub(crate) fn follow(&mut self, next: Vsock, events: LoopKind) {
        let (connection, server) = serve(next, events);
        self.rig.vmm.reconnect(connection).expect("reconnected");
        let last = self.rig.server.replace(server);
        last.expect("running").join().expect("ended well");
    }

    pub(crate) fn refill(&mut self, slot: u64) {
        let at = self.rig.at(slot * BUFFER);
        self.rig.offer(RX, &[], &[(at, 4096)], slot);
    }

    /// The next event's number.
    pub(crate) fn event(&mut self) -> u32 {
        let (slot, length) = self.rig.back(EVENT);
        assert_eq!(length, 4);
        let bytes = self.rig.load(self.rig.at(EVENTS + 8 * slot), 4);
        u32::from_le_bytes(bytes.try_into().expect("four"))
    }

    /// Sends any bytes as a packet.
    pub(crate) fn send_raw(&mut self, bytes: &[u8]) {
        let at = self.rig.at(TRANSMIT);
        self.rig.store(at, bytes);
        let length = u32::try_from(bytes.len()).expect("small");
        self.rig.offer(TX, &[(at, length)], &[], 77);
        assert_eq!(self.rig.back(TX), (77, 0));
    }

    pub(crate) fn send(&mut self, header: Header, bytes: &[u8]) {
        self.send_raw(&[header.as_bytes(), bytes].concat());
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        let (slot, length) = self.rig.back(RX);
        let bytes = self.rig.load(self.rig.at(slot * BUFFER), length);
        if self.refills {
            self.refill(slot);
        }
        let (header, rest) = Header::read_from_prefix(&bytes).expect("a header");
        assert_eq!(rest.len(), header.length() as usize);
        assert_eq!(header.destination().cid, self.cid);
        (header, rest.to_vec())
    }

    /// The next packet, whoever's it is.
    pub(crate) fn any(&mut self) -> (Header, Vec<u8>) {
        self.heard.pop_front().unwrap_or_else(|| self.next())
    }

    /// Whether a packet has come for this port.
    pub(crate) fn has_any(&mut self, port: u32) -> bool {
        while let Some((slot, length)) = self.rig.queues[RX].pop().expect("a sound ring") {
            let bytes = self.rig.load(self.rig.at(slot * BUFFER), length);
            if self.refills {
                self.refill(slot);
            }
            let (header, rest) = Header::read_from_prefix(&bytes).expect("a header");
            self.heard.push_back((header, rest.to_vec()));
        }
        self.heard.iter().any(|(header, _)| header.destination().port == port)
    }

    /// The next packet of a connection.
    pub(crate) fn hear(&mut self, socket: &mut Socket) -> (Op, Header, Vec<u8>) {
        let of_socket = |header: &Header| {
            header.source() == socket.peer && header.destination().port == socket.ours.port
        };
        let at = self.heard.iter().position(|(header, _)| of_socket(header));
        let (header, bytes) = match at.and_then(|at| self.heard.remove(at)) {
            Some(packet) => packet,
            None => loop {
                let (header, bytes) = self.next();
                if of_socket(&header) {
                    break (header, bytes);
                }
                self.heard.push_back((header, bytes));
            },
        };
        let op = header.op().expect("an operation");
        if op != Op::Reset {
            assert_eq!(header.kind(), Some(socket.kind));
            socket.credit.hear(header.credit()).expect("true");
        }
        socket.credit.received(header.length()).expect("no more than there is room for");
        (op, header, bytes)
    }

    /// The next packet of a connection, which must be this one.
    pub(crate) fn expect(&mut self, socket: &mut Socket, expected: Op) -> (Header, Vec<u8>) {
        let (op, header, bytes) = self.hear(socket);
        assert_eq!(op, expected);
        (header, bytes)
    }

    pub(crate) fn say(&mut self, socket: &mut Socket, op: Op) {
        self.say_with(socket, op, 0, &[]);
    }

    pub(crate) fn say_with(&mut self, socket: &mut Socket, op: Op, flags: u32, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).expect("small");
        let header = Header::new(socket.ours, socket.peer, socket.kind, op).with_length(length);
        socket.credit.sent(length);
        let header = header.with_flags(flags).with_credit(socket.credit.tell());
        self.send(header, bytes);
    }

    /// A connection of the guest to a port of the host, granted.
    pub(crate) fn connect(&mut self, ours: u32, port: u32) -> Socket {
        let mut socket = self.socket(ours, Address { cid: HOST_CID, port }, Kind::Stream);
        self.say(&mut socket, Op::Request);
        self.expect(&mut socket, Op::Response);
        socket
    }

    pub(crate) fn socket(&self, port: u32, peer: Address, kind: Kind) -> Socket {
        let ours = Address { cid: self.cid, port };
        Socket { ours, peer, kind, credit: Credit::new(ROOM) }
    }

    /// Grants the next connection that is asked for, at this port.
    pub(crate) fn accept(&mut self, port: u32) -> Socket {
        let mut others = Vec::new();
        let header = loop {
            let (header, bytes) = self.any();
            if (header.op(), header.destination().port) == (Some(Op::Request), port) {
                break header;
            }
            others.push((header, bytes));
        };
        others.into_iter().rev().for_each(|packet| self.heard.push_front(packet));
        let kind = header.kind().expect("a type");
        let mut socket = self.socket(port, header.source(), kind);
        socket.credit.hear(header.credit()).expect("true");
        self.say(&mut socket, Op::Response);
        socket
    }

    /// Sends bytes as far as credit goes, waiting for more.
    pub(crate) fn send_all(&mut self, socket: &mut Socket, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let most = (socket.credit.may_send() as usize).min(32 << 10).min(rest.len());
            if most == 0 {
                self.expect(socket, Op::CreditUpdate);
                continue;
            }
            let (now, later) = rest.split_at(most);
            self.say_with(socket, Op::Data, 0, now);
            rest = later;
        }
    }

    /// Receives so many bytes and gives the credit back.
    pub(crate) fn receive(&mut self, socket: &mut Socket, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            all.extend(self.receive_some(socket));
        }
        assert_eq!(all.len(), count);
        all
    }

    /// Receives one packet, which may have no bytes, and gives the credit back.
    pub(crate) fn receive_some(&mut self, socket: &mut Socket) -> Vec<u8> {
        let (op, _, bytes) = self.hear(socket);
        assert!(matches!(op, Op::Data | Op::CreditRequest | Op::CreditUpdate), "{op:?}");
        socket.credit.took(u32::try_from(bytes.len()).expect("small"));
        if socket.credit.should_tell() || op == Op::CreditRequest {
            self.say(socket, Op::CreditUpdate);
        }
        bytes
    }
}
