//! One guest's sockets: what its packets do, what happens at the other ends, what it is told next.
//!
//! ```text
//!  transmit ring ─▶ hear ─▶ entry's machine ─▶ link ─▶ host          edges, calls, time
//!  receive ring  ◀─ speak ◀─ next: refusals, then each entry in turn ◀────┘
//! ```
//! Invariants: what waits for the guest is bounded by the number of connections and of refusals: when there are
//! too many of these the transmit ring waits; a guest costs no more descriptors than it was given.

mod clients;
mod heritage;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outboard::{Error, Readable, Writable};
use slab::Slab;
use tracing::{debug, warn};
use zerocopy::IntoBytes;

use clients::Client;
pub(super) use heritage::Connections;

use super::connection::{Connection, Heard, Phase};
use super::host::{Dialed, Host};
use super::link::{Got, Link};
use super::neighbours::{Call, Gate, Neighbours};
use super::packet::{Address, HEADER, HOST_CID, Header, Kind, Op, seq, shut};
use super::stage::Stage;
use super::table::{Entry, Greeting, Key, Table, Way};
use super::{Counters, VsockOptions, feature};
use crate::timer::Timer;
use crate::watches::{self, Ask, Edge, Watches};

/// Refusals that wait for the guest before its transmit ring does.
const REFUSALS: usize = 256;
/// How often deadlines and busy servers are looked at, while there are any.
const TICK: Duration = Duration::from_millis(20);
/// How long a guest may take to answer a connection, a server to accept one, a client to say its line.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a guest may take to confirm an end.
const FAREWELL: Duration = Duration::from_secs(8);
/// Ports of the host's ends of connections that the host asks for: the first one.
const FIRST_PORT: u32 = 1 << 30;

/// Tokens of descriptors: connections have their number, clients that have not said their line one from here.
const CLIENTS: u64 = 1 << 32;
pub(super) const STREAMS: u64 = 1 << 33;
pub(super) const MESSAGES: u64 = STREAMS + 1;
pub(super) const CALLS: u64 = STREAMS + 2;
pub(super) const TIME: u64 = STREAMS + 3;

/// Who speaks to the guest next.
#[derive(Clone, Copy, Debug)]
enum Speaker {
    Refusal,
    Entry(usize, Op),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Hub {
    options: VsockOptions,
    /// The device's own feature bits in force.
    pub(super) features: u64,
    /// The guest is to be told that all of its connections are gone.
    pub(super) owes_reset: bool,
    host: Host,
    gate: Arc<Gate>,
    neighbours: Neighbours,
    watches: Watches,
    timer: Timer,
    timing: bool,
    table: Table,
    clients: Slab<Client>,
    refusals: VecDeque<Header>,
    stage: Stage,
    speaker: Option<Speaker>,
    next_port: u32,
    counters: Counters,
    rest: heritage::Rest,
}

impl Hub {
    pub(super) fn new(
        options: VsockOptions,
        neighbours: Neighbours,
        gate: Arc<Gate>,
    ) -> Result<Self, Error> {
        let (watches, timer) = (Watches::new()?, Timer::new()?);
        let mut host = Host::at(&options.uds_path)?;
        if !options.inherits {
            host.adopt(&options.uds_path, [None, None])?;
            host.own([STREAMS, MESSAGES], &watches)?;
        }
        watches.add(&gate.bell, CALLS, Ask::Bytes)?;
        watches.add(&timer, TIME, Ask::Bytes)?;
        Ok(Self {
            options,
            features: 0,
            owes_reset: false,
            host,
            gate,
            neighbours,
            watches,
            timer,
            timing: false,
            table: Table::default(),
            clients: Slab::new(),
            refusals: VecDeque::new(),
            stage: Stage::new(),
            speaker: None,
            next_port: FIRST_PORT,
            counters: Counters::default(),
            rest: heritage::Rest::default(),
        })
    }

    /// Counts there from now on.
    pub(super) fn shows(&mut self, counters: Counters) {
        self.counters = counters;
    }

    /// Whether packets of the guest can be taken.
    pub(super) fn has_room(&self) -> bool {
        self.refusals.len() < REFUSALS
    }

    /// No guest is there, or it has forgotten everything: all connections end.
    pub(super) fn forget(&mut self) {
        self.table = Table::default();
        self.clients.clear();
        self.refusals.clear();
        self.stage = Stage::new();
        self.speaker = None;
        drop(self.gate.take());
    }

    fn is_full(&self) -> bool {
        self.table.len() + self.clients.len() >= self.options.connections
    }

    fn takes(&self, kind: Kind) -> bool {
        let has = |bit| self.features & bit != 0;
        match kind {
            Kind::Stream => has(feature::STREAM) || !has(feature::NO_IMPLIED_STREAM),
            Kind::Seqpacket => has(feature::SEQPACKET),
        }
    }

    // The guest speaks.

    /// Takes one packet of the guest.
    pub(super) fn hear(&mut self, mut from: Readable<'_>) {
        let Ok(header) = from.read_obj::<Header>() else { return self.counters.malformed.add(1) };
        let (guest, peer) = (header.source(), header.destination());
        let length = if header.op() == Some(Op::Data) { header.length() } else { 0 };
        if guest.cid != self.options.guest_cid || from.len() < u64::from(length) {
            // Nobody to tell: it is not who it says, or does not send what it says.
            return self.counters.malformed.add(1);
        }
        let key = Key { port: guest.port, peer };
        match (header.kind(), header.op(), self.table.find(key)) {
            (Some(kind), Some(op), Some(id)) => self.hear_entry(id, kind, op, &header, from),
            (Some(kind), Some(Op::Request), None) => self.open(key, kind, &header),
            (_, Some(Op::Reset), None) => {}
            (_, _, Some(id)) => self.abort(id),
            (_, _, None) => self.refuse(&header),
        }
    }

    fn refuse(&mut self, packet: &Header) {
        self.counters.refused.add(1);
        self.refusals.push_back(packet.refusal());
    }

    fn hear_entry(&mut self, id: usize, kind: Kind, op: Op, header: &Header, from: Readable<'_>) {
        let Some(entry) = self.table.get(id) else { return };
        if entry.kind != kind {
            return self.abort(id);
        }
        let graceful = entry.machine.is_closing() || !entry.machine.peer_sends();
        match entry.machine.hear(op, header) {
            Heard::Nothing => {}
            Heard::Opened => self.opened(id),
            Heard::Data(length) => self.data(id, length, header.flags(), from),
            Heard::Shut => self.guest_shut(id),
            // What the guest sent before it left in an orderly way still goes to the host.
            Heard::Reset if graceful => {}
            Heard::Reset => entry.way = Way::Gone,
            Heard::Broken => {
                self.counters.broken.add(1);
                entry.way = Way::Gone;
            }
        }
        self.settle(id);
    }

    fn data(&mut self, id: usize, length: u32, flags: u32, from: Readable<'_>) {
        self.counters.from_guest.add(length.into());
        let Some(entry) = self.table.get(id) else { return };
        let whole = flags & seq::END_OF_MESSAGE != 0;
        let Way::Up(link) = &mut entry.way else { return entry.machine.took(length) };
        match link.put(from, length, whole) {
            Ok(gone) => {
                if link.is_closed() {
                    entry.machine.shut(shut::RECEIVE);
                }
                entry.machine.took(gone);
            }
            Err(_) => entry.abort(),
        }
    }

    fn guest_shut(&mut self, id: usize) {
        let Some(entry) = self.table.get(id) else { return };
        let (sends, receives) = (entry.machine.peer_sends(), entry.machine.peer_receives());
        let Some(link) = entry.way.link() else { return };
        if !receives {
            link.end_reading();
        }
        if !sends {
            match link.end() {
                Ok(gone) => entry.machine.took(gone),
                Err(_) => entry.abort(),
            }
        }
    }

    /// The guest has accepted a connection that was asked for here.
    fn opened(&mut self, id: usize) {
        let Some(entry) = self.table.get(id) else { return };
        entry.deadline = None;
        let greeting = std::mem::replace(&mut entry.greeting, Greeting::None);
        let port = entry.key.peer.port;
        let Some(link) = entry.way.link() else { return };
        let greeted = match greeting {
            Greeting::None => Ok(()),
            Greeting::Line => link.greet(format!("OK {port}\n").as_bytes()),
            Greeting::Byte => link.greet(&[1]),
        };
        if greeted.is_err() {
            entry.abort();
        }
    }

    /// The guest asks for a connection.
    fn open(&mut self, key: Key, kind: Kind, request: &Header) {
        if !self.takes(kind) || self.is_full() {
            debug!(port = key.peer.port, "connection refused");
            return self.refuse(request);
        }
        let mut entry =
            Entry::new(key, kind, Connection::asked(self.options.room, request), Way::Dialing);
        let from = Address { cid: self.options.guest_cid, port: key.port };
        let up = if key.peer.cid == HOST_CID {
            if !self.options.host_ports.contains(key.peer.port) {
                return self.refuse(request);
            }
            self.host.dial(key.peer.port, kind)
        } else {
            match self.neighbours.call(&self.options.groups, from, key.peer, kind) {
                Some(socket) => Dialed::Up(socket),
                None => Dialed::Refused,
            }
        };
        let id = match up {
            Dialed::Refused => return self.refuse(request),
            Dialed::Busy => self.table.insert(entry),
            Dialed::Up(socket) => {
                let link = Link::new(socket, kind);
                if self.watches.add(&link, self.table.next_id() as u64, link.asks()).is_err() {
                    return self.refuse(request);
                }
                if key.peer.cid == HOST_CID {
                    entry.way = Way::Up(link);
                    entry.machine.accept();
                } else {
                    entry.way = Way::Calling(link);
                }
                self.table.insert(entry)
            }
        };
        self.counters.opened.add(1);
        if self.table.get(id).is_some_and(|entry| matches!(entry.way, Way::Dialing)) {
            self.set_deadline(id, PATIENCE);
        }
        self.settle(id);
    }

    // The guest is spoken to.

    /// Whether there is something to say.
    pub(super) fn has_words(&mut self) -> bool {
        if !self.refusals.is_empty() {
            self.speaker = Some(Speaker::Refusal);
        } else {
            let next = self.table.next(&mut self.stage);
            self.speaker = next.map(|(id, op)| Speaker::Entry(id, op));
        }
        self.speaker.is_some()
    }

    /// Says one packet; returns its bytes. A buffer that is too short comes back empty, and the packet waits for
    /// another one.
    pub(super) fn speak(&mut self, mut to: Writable<'_>) -> Result<u32, Error> {
        if self.speaker.is_none() && !self.has_words() {
            return Ok(0);
        }
        let room = to.len().saturating_sub(HEADER as u64);
        match self.speaker.take() {
            _ if to.len() < HEADER as u64 => Ok(0),
            None => Ok(0),
            Some(Speaker::Refusal) => {
                if let Some(refusal) = self.refusals.pop_front() {
                    to.write_all(refusal.as_bytes())?;
                }
                Ok(u32::try_from(HEADER).unwrap_or(0))
            }
            Some(Speaker::Entry(_, Op::Data)) if room == 0 => Ok(0),
            Some(Speaker::Entry(id, op)) => self.speak_for(id, op, room, to),
        }
    }

    fn speak_for(
        &mut self,
        id: usize,
        op: Op,
        room: u64,
        mut to: Writable<'_>,
    ) -> Result<u32, Error> {
        let Some(entry) = self.table.get(id) else { return Ok(0) };
        let bytes = if op == Op::Data { self.stage.bytes_of(id) } else { &[] };
        let header = entry.say(self.options.guest_cid, op, bytes.len(), room);
        to.write_all(header.as_bytes())?;
        let count = usize::try_from(header.length()).unwrap_or(0);
        to.write_all(bytes.get(..count).unwrap_or_default())?;
        if op == Op::Data {
            self.counters.to_guest.add(count as u64);
            self.stage.spend(count);
            if self.stage.bytes_of(id).is_empty() {
                self.table.pass_on();
            }
        } else {
            if entry.machine.is_closing() {
                self.set_deadline(id, FAREWELL);
            }
            self.settle(id);
        }
        Ok(u32::try_from(HEADER + count).unwrap_or(u32::MAX))
    }

    // The other ends.

    /// Something has happened to descriptors; true: there may be more.
    pub(super) fn look(&mut self) -> Result<bool, Error> {
        let edges = self.watches.look()?;
        // Fewer than there is room for are all; whatever happens later wakes the worker again.
        let more = edges.len() >= watches::BATCH;
        self.counters.host_events.add(edges.len() as u64);
        if self.rest.on {
            self.rest.late.extend(edges);
            return Ok(more);
        }
        edges.for_each(|edge| self.happened(edge));
        Ok(more)
    }

    fn happened(&mut self, edge: Edge) {
        match edge.token {
            STREAMS => self.accept(Kind::Stream),
            MESSAGES => self.accept(Kind::Seqpacket),
            CALLS => self.gate.take().into_iter().for_each(|call| self.called(call)),
            TIME => self.time_passed(),
            token if token >= CLIENTS => self.client_speaks(index(token - CLIENTS)),
            token => self.edge(index(token), edge),
        }
    }

    fn edge(&mut self, id: usize, edge: Edge) {
        let Some(entry) = self.table.get(id) else { return };
        if let Some(link) = entry.way.link() {
            link.edge(edge);
        }
        match &mut entry.way {
            Way::Calling(_) => self.answered(id),
            Way::Up(link) => {
                match link.flush() {
                    Ok(gone) => {
                        if link.is_closed() {
                            entry.machine.shut(shut::RECEIVE);
                        }
                        entry.machine.took(gone);
                    }
                    Err(_) => entry.abort(),
                }
                self.edge_of_waiting(id, edge);
            }
            Way::Dialing | Way::Gone => {}
        }
        self.settle(id);
    }

    /// Nobody is there any more, and what comes next would not say so.
    fn edge_of_waiting(&mut self, id: usize, edge: Edge) {
        let Some(entry) = self.table.get(id).filter(|_| edge.hung_up) else { return };
        match entry.machine.phase() {
            // A client that did not wait for its answer.
            Phase::Asking => entry.abort(),
            _ if !entry.machine.peer_receives() => entry.machine.shut(shut::BOTH),
            _ => {}
        }
    }

    /// Another guest has accepted, or not.
    fn answered(&mut self, id: usize) {
        let Some(entry) = self.table.get(id) else { return };
        let Way::Calling(link) = &mut entry.way else { return };
        match link.read(&mut [0; 1]) {
            Got::Nothing => {}
            Got::Bytes(_) => {
                if let Way::Calling(link) = std::mem::replace(&mut entry.way, Way::Gone) {
                    entry.way = Way::Up(link);
                }
                entry.machine.accept();
            }
            _ => entry.abort(),
        }
    }

    /// Another guest wants a connection.
    fn called(&mut self, call: Call) {
        let Call { from, port, kind, socket } = call;
        let key = Key { port, peer: from };
        if !self.takes(kind) || self.is_full() || self.table.find(key).is_some() {
            return self.counters.refused.add(1);
        }
        self.ask_guest(key, kind, socket, Greeting::Byte);
    }

    fn ask_guest(&mut self, key: Key, kind: Kind, socket: OwnedFd, greeting: Greeting) {
        let link = Link::new(socket, kind);
        let token = self.table.next_id() as u64;
        let watched = match greeting {
            // It was waited for as a client.
            Greeting::Line => self.watches.change(&link, token, link.asks()),
            _ => self.watches.add(&link, token, link.asks()).map(drop),
        };
        if let Err(error) = watched {
            return warn!("a connection cannot be served: {error}");
        }
        let mut entry = Entry::new(key, kind, Connection::ask(self.options.room), Way::Up(link));
        entry.greeting = greeting;
        let id = self.table.insert(entry);
        self.counters.opened.add(1);
        self.set_deadline(id, PATIENCE);
        self.settle(id);
    }

    // Time.

    fn set_deadline(&mut self, id: usize, patience: Duration) {
        if let Some(entry) = self.table.get(id) {
            entry.deadline = Some(Instant::now() + patience);
        }
        self.start_timer();
    }

    fn start_timer(&mut self) {
        if !std::mem::replace(&mut self.timing, true)
            && let Err(error) = self.timer.start(TICK)
        {
            warn!("no timer: {error}");
        }
    }

    fn time_passed(&mut self) {
        self.timer.take();
        self.timing = false;
        let now = Instant::now();
        self.clients.retain(|_, client| client.deadline > now);
        let mut waits = !self.clients.is_empty();
        for id in self.table.ids() {
            let Some(entry) = self.table.get(id) else { continue };
            let Some(deadline) = entry.deadline else { continue };
            if deadline <= now {
                entry.deadline = None;
                self.abort(id);
                continue;
            }
            waits = true;
            if matches!(entry.way, Way::Dialing) {
                self.dial_again(id);
            }
        }
        if waits {
            self.start_timer();
        }
    }

    fn dial_again(&mut self, id: usize) {
        let Some(entry) = self.table.get(id) else { return };
        match self.host.dial(entry.key.peer.port, entry.kind) {
            Dialed::Busy => return,
            Dialed::Refused => return self.abort(id),
            Dialed::Up(socket) => {
                let link = Link::new(socket, entry.kind);
                if self.watches.add(&link, id as u64, link.asks()).is_err() {
                    return self.abort(id);
                }
                (entry.way, entry.deadline) = (Way::Up(link), None);
                entry.machine.accept();
            }
        }
        self.settle(id);
    }

    /// Ends a connection at both ends.
    fn abort(&mut self, id: usize) {
        self.counters.broken.add(1);
        if let Some(entry) = self.table.get(id) {
            entry.abort();
        }
        self.settle(id);
    }

    fn settle(&mut self, id: usize) {
        self.table.settle(id, &mut self.stage);
        let Some(link) = self.table.get(id).and_then(|entry| entry.way.link()) else { return };
        if let Some(ask) = link.asks_anew()
            && self.watches.change(&*link, id as u64, ask).is_err()
        {
            self.abort(id);
        }
    }
}

impl AsFd for Hub {
    /// Readable when [`Hub::look`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watches.as_fd()
    }
}

fn index(token: u64) -> usize {
    usize::try_from(token).unwrap_or(usize::MAX)
}
