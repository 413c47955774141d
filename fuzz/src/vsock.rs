//! Packets of a guest: any header and bytes, of many connections at once, against the socket device behind its own socket
//! and thread, with servers of the host that send back what they get (virtio 1.3 §5.10.6).
//!
//! Held: every packet that is sent is taken once; what comes is sound, from the host to this guest, as long as it says;
//! to a guest whose word is good never more bytes are under way than it has said there is room for, and the bytes are
//! those that it sent, in order; the device never says that it has taken what was not sent. Whatever came before, a new
//! connection carries bytes both ways, so that none of the few places of the table is lost.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Instant;

use outboard_devices::vsock::{
    Address, HOST_CID, Header, Kind, Neighbours, Op, Told, Vsock, VsockOptions, shut,
};
use outboard_frontend::wait_any;
use zerocopy::{FromBytes, IntoBytes};

use crate::cover::{played, reached, wanted};
use crate::input::Input;
use crate::rig::{PATIENCE, Rig, cut, folder};

const CID: u64 = 3;
/// The server that sends everything back; at the next port nobody listens.
const ECHO: u32 = 7;
const ROOM: u32 = 16 << 10;
const CONNECTIONS: usize = 6;
const RX: usize = 0;
const TX: usize = 1;
const BUFFERS: u64 = 16;
const BUFFER: u64 = 2048;
const SENT: u64 = 128 << 10;
const ARENA: usize = 256 << 10;
/// Ports of the guest in one script.
const PORTS: u32 = 3;

/// A connection as the guest knows it.
#[derive(Default)]
struct Stream {
    /// It has told the truth.
    honest: bool,
    open: bool,
    /// What was sent, and how much of it came back.
    sent: Vec<u8>,
    back: usize,
    received: u64,
    taken: u64,
    /// The most that may have been received, by what the guest has told.
    limit: u64,
    /// What it has told last.
    told: Told,
    /// Answers to a request for credit.
    updates: u64,
}

struct Guest {
    rig: Rig,
    /// The first port of this script: what is late of those before names others.
    base: u32,
    streams: HashMap<u32, Stream>,
    /// What was asked for: the guest's port, the other end, and the type's number.
    asked: Vec<(u32, Address, Kind)>,
    /// Buffers that were not given back.
    held: Vec<u64>,
    hoards: bool,
}

thread_local! {
    static GUESTS: std::cell::RefCell<Guest> = std::cell::RefCell::new(Guest::new());
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let ops = (1..=7).map(|op| format!("vsock sent {op}"));
        let heard =
            ["Response", "Reset", "Data", "CreditUpdate"].map(|op| format!("vsock heard {op}"));
        let more =
            ["lie", "no room", "echo", "unknown", "hoard"].map(|what| format!("vsock {what}"));
        ops.chain(heard).chain(more).collect()
    });
    GUESTS.with_borrow_mut(|guest| {
        let mut input = Input::new(data);
        guest.hoards = input.one_in(4);
        while !input.is_empty() {
            guest.step(&mut input);
        }
        guest.end();
    });
}

fn serve(listener: UnixListener) {
    for mut client in listener.incoming().flatten() {
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = client.read(&mut bytes) {
                if count == 0 || client.write_all(&bytes[..count]).is_err() {
                    return;
                }
            }
        });
    }
}

impl Guest {
    fn new() -> Self {
        let folder = folder("vsock");
        let listener = UnixListener::bind(folder.join(format!("vm_{ECHO}"))).expect("listens");
        std::thread::spawn(move || serve(listener));
        let mut options = VsockOptions::new(CID, folder.join("vm"));
        options.connections = CONNECTIONS;
        options.room = ROOM;
        let device = Vsock::new(options, &Neighbours::new()).expect("a device");
        let rig = Rig::new(device, &[0, 1, 2], 64, ARENA);
        let (streams, held) = (HashMap::new(), (0..BUFFERS).collect());
        let asked = Vec::new();
        let mut guest = Self { rig, base: 1024, streams, asked, held, hoards: false };
        guest.refill();
        guest
    }

    fn refill(&mut self) {
        for slot in self.held.drain(..) {
            self.rig.offer(RX, &[], &[(slot * BUFFER, BUFFER as u32)], slot);
        }
    }

    fn stream(&mut self, port: u32) -> &mut Stream {
        let fresh = || Stream { honest: true, ..Stream::default() };
        self.streams.entry(port).or_insert_with(fresh)
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let ours = match input.byte() {
            0xff => input.number() as u32,
            other => self.base + u32::from(other) % PORTS,
        };
        let op = match input.byte() {
            0xf8.. => 1 + u16::from(input.byte()) % 9,
            other => [1, 5, 5, 5, 5, 6, 7, 4, 3, 1][usize::from(other) % 10],
        };
        let peer = match input.byte() {
            0xf0.. => Address { cid: input.number(), port: input.number() as u32 },
            0xe0..0xf0 => Address { cid: HOST_CID, port: ECHO + 1 },
            _ => Address { cid: HOST_CID, port: ECHO },
        };
        let kind = if input.one_in(16) { Kind::Seqpacket } else { Kind::Stream };
        let flags =
            if op == 4 { [shut::BOTH, shut::SEND, shut::RECEIVE, 9][input.below(4)] } else { 0 };
        let count = if op == 5 { input.below(64) * [1, 60][input.below(2)] } else { 0 };
        let fill = input.byte();
        let bytes: Vec<_> = (0..count).map(|at| fill.wrapping_add(at as u8)).collect();
        let told = self.tell(ours, input);
        let mut header = Header::new(Address { cid: CID, port: ours }, peer, kind, Op::Data)
            .with_length(count as u32)
            .with_flags(flags)
            .with_credit(told);
        // No operation has a number of its own here: some are none.
        header.as_mut_bytes()[30..32].copy_from_slice(&op.to_le_bytes());
        let mut packet = [header.as_bytes(), &bytes].concat();
        let spoilt = input.one_in(24);
        if spoilt {
            let at = input.below(44);
            packet[at] = input.byte();
            packet.truncate(packet.len().saturating_sub(input.below(50)));
            // It may speak for any of them now.
            self.streams.values_mut().for_each(|stream| stream.honest = false);
        }
        let to_echo = peer == Address { cid: HOST_CID, port: ECHO } && kind == Kind::Stream;
        self.note(ours, op, to_echo && !spoilt, &bytes);
        if Op::of(op).is_some() {
            reached(format!("vsock sent {op}"))
        } else {
            reached("vsock unknown".into())
        }
        self.remember(&packet);
        let pieces = cut(input, SENT, packet.len(), 2);
        self.send(&packet, &pieces);
        self.hear();
    }

    /// What may have a place in the table from now on.
    fn remember(&mut self, packet: &[u8]) {
        let Ok((header, _)) = Header::read_from_prefix(packet) else { return };
        if let (Some(Op::Request), Some(kind)) = (header.op(), header.kind()) {
            self.asked.push((header.source().port, header.destination(), kind));
        }
    }

    /// What the guest says of its buffer; sometimes it lies.
    fn tell(&mut self, port: u32, input: &mut Input<'_>) -> Told {
        let lies = input.one_in(16);
        let room = u32::from(input.byte()) * 64;
        let step = u64::from(input.byte());
        let stream = self.stream(port);
        if lies {
            stream.honest = false;
            reached("vsock lie".into());
            return Told { room, taken: input.number() as u32 };
        }
        stream.taken = (stream.taken + step * 16).min(stream.received);
        stream.limit = stream.limit.max(stream.taken + u64::from(room));
        if room == 0 {
            reached("vsock no room".into());
        }
        stream.told = Told { room, taken: stream.taken as u32 };
        stream.told
    }

    /// What the packet means for what may come back.
    fn note(&mut self, port: u32, op: u16, plain: bool, bytes: &[u8]) {
        let stream = self.stream(port);
        match (op, stream.open) {
            _ if !plain => stream.honest = false,
            (1, false) => stream.open = true,
            (5, true) => stream.sent.extend(bytes),
            (6 | 7, true) => {}
            // It is over, or means nothing: bytes that are under way are anybody's.
            _ => stream.honest = false,
        }
    }

    fn send(&mut self, packet: &[u8], pieces: &[(u64, u32)]) {
        if pieces.is_empty() {
            return;
        }
        self.rig.store(SENT, packet);
        self.rig.offer(TX, pieces, &[], 77);
        played(1);
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = self.rig.queues[TX].pop().expect("a sound ring") {
                assert_eq!(done, (77, 0), "taken once");
                return;
            }
            assert!(Instant::now() < until, "a packet is not taken");
            // It may wait for room for an answer.
            self.hoards = false;
            self.wait();
        }
    }

    fn wait(&mut self) {
        self.hear();
        if let [rx, tx, ..] = &mut self.rig.queues[..] {
            let short = std::time::Duration::from_millis(20);
            wait_any(&mut [rx, tx], short).expect("waits");
        }
    }

    /// Takes what has come.
    fn hear(&mut self) {
        while let Some((slot, length)) = self.rig.queues[RX].pop().expect("a sound ring") {
            let bytes = self.rig.load(slot * BUFFER, length as usize);
            self.held.push(slot);
            self.packet(&bytes);
        }
        if self.hoards && !self.held.is_empty() {
            reached("vsock hoard".into());
        } else {
            self.refill();
        }
    }

    fn packet(&mut self, bytes: &[u8]) {
        let (header, bytes) = Header::read_from_prefix(bytes).expect("a header");
        let op = header.op().expect("an operation");
        assert_eq!(bytes.len(), header.length() as usize, "as long as it says");
        assert_eq!(header.destination().cid, CID, "to this guest");
        assert!(bytes.is_empty() || op == Op::Data, "{op:?} has no bytes");
        reached(format!("vsock heard {op:?}"));
        let Some(stream) = self.streams.get_mut(&header.destination().port) else { return };
        stream.received += bytes.len() as u64;
        stream.updates += u64::from(op == Op::CreditUpdate);
        if !stream.honest || header.source() != (Address { cid: HOST_CID, port: ECHO }) {
            return;
        }
        if op == Op::Reset {
            // There was no place for it, or the server is gone.
            stream.honest = false;
            return;
        }
        let (received, limit) = (stream.received, stream.limit);
        assert!(received <= limit, "{received} bytes, there was room for {limit}");
        let taken = header.credit().taken as usize;
        assert!(taken <= stream.sent.len(), "{taken} taken of {}", stream.sent.len());
        assert_eq!(header.credit().room, ROOM);
        let end = stream.back + bytes.len();
        assert!(stream.sent.get(stream.back..end) == Some(bytes), "other bytes than were sent");
        stream.back = end;
        if end > 0 {
            reached("vsock echo".into());
        }
    }

    /// What there is room for comes, and nothing more: bytes would come before the answer to a request for credit.
    fn settle(&mut self, port: u32) {
        let until = Instant::now() + PATIENCE;
        let goes = |stream: &Stream| stream.honest && stream.open && !stream.sent.is_empty();
        loop {
            let stream = self.stream(port);
            let room = u64::from(stream.told.taken) + u64::from(stream.told.room);
            let due = room.min(stream.sent.len() as u64);
            if !goes(stream) || stream.received >= due {
                break;
            }
            assert!(Instant::now() < until, "{} bytes of {due}", stream.received);
            self.wait();
        }
        if !goes(self.stream(port)) {
            return;
        }
        let (told, updates) = (self.stream(port).told, self.stream(port).updates);
        let from = Address { cid: CID, port };
        let header = Header::new(
            from,
            Address { cid: HOST_CID, port: ECHO },
            Kind::Stream,
            Op::CreditRequest,
        );
        let header = header.with_credit(told);
        self.send(header.as_bytes(), &[(SENT, header.as_bytes().len() as u32)]);
        while goes(self.stream(port)) && self.stream(port).updates == updates {
            assert!(Instant::now() < until, "no answer to a request for credit");
            self.wait();
        }
    }

    /// Ends all connections; then a new one has to carry bytes.
    fn end(&mut self) {
        self.hoards = false;
        let echo = Address { cid: HOST_CID, port: ECHO };
        let ports: Vec<_> = self.streams.keys().copied().collect();
        ports.into_iter().for_each(|port| self.settle(port));
        for (port, peer, kind) in std::mem::take(&mut self.asked) {
            self.plain(port, peer, kind, Op::Reset, &[]);
        }
        self.streams.clear();
        self.base = 1024 + (self.base + PORTS) % (1 << 30);
        let port = self.base + PORTS;
        *self.stream(port) = Stream { honest: true, open: true, limit: 64, ..Stream::default() };
        self.plain(port, echo, Kind::Stream, Op::Request, &[]);
        self.stream(port).sent = b"alive".to_vec();
        self.plain(port, echo, Kind::Stream, Op::Data, b"alive");
        let until = Instant::now() + PATIENCE;
        while self.stream(port).back < 5 {
            assert!(self.stream(port).honest, "a new connection is refused");
            assert!(Instant::now() < until, "a new connection carries nothing");
            self.wait();
        }
        self.plain(port, echo, Kind::Stream, Op::Reset, &[]);
        self.streams.clear();
        self.base += PORTS;
    }

    fn plain(&mut self, port: u32, peer: Address, kind: Kind, op: Op, bytes: &[u8]) {
        let header = Header::new(Address { cid: CID, port }, peer, kind, op)
            .with_length(bytes.len() as u32)
            .with_credit(Told { room: 64, taken: 0 });
        let packet = [header.as_bytes(), bytes].concat();
        self.send(&packet, &[(SENT, packet.len() as u32)]);
    }
}
