//! The connections of one guest: found by their addresses, and those in turn that have something to say.
//!
//! Invariants: each is in the turn once at most; what is gone is found by nobody.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use slab::Slab;

use super::connection::{Connection, Phase};
use super::link::{Got, Link, SavedLink};
use super::packet::{Address, Header, Kind, Op, seq, shut};
use super::stage::{CHUNK, ROOM, Stage};

/// What tells connections apart: the guest's port, and who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Key {
    pub(super) port: u32,
    pub(super) peer: Address,
}

/// What is told at the other end when the guest has accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Greeting {
    None,
    /// A line with the port that it has.
    Line,
    /// One byte, to another guest's end.
    Byte,
}

/// How far the way to the other end is.
#[derive(Debug)]
pub(super) enum Way {
    /// The host's server has had no time yet.
    Dialing,
    /// Another guest has not answered yet.
    Calling(Link),
    /// It is there.
    Up(Link),
    /// There is none any more.
    Gone,
}

impl Way {
    pub(super) fn link(&mut self) -> Option<&mut Link> {
        match self {
            Self::Calling(link) | Self::Up(link) => Some(link),
            Self::Dialing | Self::Gone => None,
        }
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: Key,
    pub(super) kind: Kind,
    pub(super) machine: Connection,
    pub(super) way: Way,
    pub(super) greeting: Greeting,
    /// When it is given up, unless something has happened.
    pub(super) deadline: Option<Instant>,
    /// What was read and had no credit any more.
    left: Vec<u8>,
    in_turn: bool,
}

/// A connection in a state, beside its socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedEntry {
    key: Key,
    kind: Kind,
    pub(super) machine: Connection,
    /// Whether another guest has not answered yet, and the socket's side; none: there is no socket.
    link: Option<(bool, SavedLink)>,
    greeting: Greeting,
    /// Whether it is given up unless something happens.
    pub(super) waits: bool,
    left: Vec<u8>,
}

impl SavedEntry {
    /// Whether a device can have left it so.
    pub(super) fn is_sound(&self) -> bool {
        let untaken = self.machine.untaken();
        self.machine.is_sound()
            && self.left.len() <= ROOM
            && self.link.as_ref().is_none_or(|(_, link)| link.is_sound(self.kind, untaken))
    }
}

impl Entry {
    /// As it stands, with what was read for it and not said yet.
    pub(super) fn save(&mut self, staged: &[u8]) -> SavedEntry {
        let link = match &self.way {
            Way::Calling(link) => Some((true, link.save())),
            Way::Up(link) => Some((false, link.save())),
            Way::Dialing | Way::Gone => None,
        };
        SavedEntry {
            key: self.key,
            kind: self.kind,
            machine: self.machine.clone(),
            link,
            greeting: self.greeting,
            waits: self.deadline.is_some(),
            left: [staged, &self.left].concat(),
        }
    }

    /// Goes on where another process was; its way is given apart.
    pub(super) fn restored(saved: SavedEntry) -> (Self, Option<(bool, SavedLink)>) {
        let SavedEntry { key, kind, machine, link, greeting, left, .. } = saved;
        (Self { greeting, left, ..Self::new(key, kind, machine, Way::Gone) }, link)
    }

    pub(super) fn new(key: Key, kind: Kind, machine: Connection, way: Way) -> Self {
        Self {
            key,
            kind,
            machine,
            way,
            greeting: Greeting::None,
            deadline: None,
            left: Vec::new(),
            in_turn: false,
        }
    }

    /// Whether nobody has anything of it any more.
    pub(super) fn is_done(&mut self) -> bool {
        self.machine.is_done() && !self.way.link().is_some_and(|link| link.is_draining())
    }

    /// Ends it at once, at both ends.
    pub(super) fn abort(&mut self) {
        self.machine.abort();
        self.way = Way::Gone;
    }

    /// What it has to say to the guest, with bytes of the host in `stage` if it is bytes.
    fn next(&mut self, id: usize, stage: &mut Stage) -> Option<Op> {
        let may_send = self.machine.may_send();
        let mut has_bytes = !stage.bytes_of(id).is_empty();
        if has_bytes && may_send == 0 {
            // The guest's buffer has shrunk, or a message is longer than what is free of it.
            self.left.extend(stage.bytes_of(id));
            stage.forget(id);
        }
        if !has_bytes && may_send > 0 {
            has_bytes = self.read(id, stage, may_send);
        } else if may_send == 0 {
            has_bytes = !self.left.is_empty() || self.is_readable();
        }
        self.machine.next(has_bytes)
    }

    fn is_readable(&self) -> bool {
        matches!(&self.way, Way::Up(link) if link.is_readable()) && self.machine.peer_receives()
    }

    /// Brings bytes of the host to the stage.
    fn read(&mut self, id: usize, stage: &mut Stage, may_send: u32) -> bool {
        if !self.left.is_empty() {
            let room = stage.room(self.left.len());
            room.copy_from_slice(self.left.get(..room.len()).unwrap_or_default());
            stage.filled(id, self.left.len());
            self.left = Vec::new();
            return true;
        }
        let Way::Up(link) = &mut self.way else { return false };
        if !link.is_readable() {
            return false;
        }
        let most = match self.kind {
            Kind::Stream => usize::try_from(may_send).unwrap_or(CHUNK).min(CHUNK),
            Kind::Seqpacket => ROOM,
        };
        match link.read(stage.room(most)) {
            Got::Bytes(count) => {
                let fits =
                    u32::try_from(count).is_ok_and(|count| count <= self.machine.peer_room());
                if self.kind == Kind::Seqpacket && !fits {
                    // It could never be delivered whole.
                    self.abort();
                    return false;
                }
                stage.filled(id, count);
                true
            }
            Got::Nothing => false,
            Got::End => {
                self.machine.shut(if link.is_hung_up() { shut::BOTH } else { shut::SEND });
                false
            }
            Got::Failed => {
                self.abort();
                false
            }
        }
    }

    /// The packet that says `op`, with at most `room` bytes of `bytes`.
    pub(super) fn say(&mut self, cid: u64, op: Op, bytes: usize, room: u64) -> Header {
        let (from, to) = (self.key.peer, Address { cid, port: self.key.port });
        let mut header = Header::new(from, to, self.kind, op);
        if op == Op::Data {
            let most = u64::from(self.machine.may_send()).min(room).min(bytes as u64);
            header = header.with_length(u32::try_from(most).unwrap_or(0));
            if self.kind == Kind::Seqpacket && most == bytes as u64 {
                header = header.with_flags(seq::END_OF_MESSAGE);
            }
        }
        self.machine.say(op, header)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Slab<Entry>,
    ids: HashMap<Key, usize>,
    turn: VecDeque<usize>,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn find(&self, key: Key) -> Option<usize> {
        self.ids.get(&key).copied()
    }

    pub(super) fn get(&mut self, id: usize) -> Option<&mut Entry> {
        self.entries.get_mut(id)
    }

    pub(super) fn ids(&self) -> Vec<usize> {
        self.entries.iter().map(|(id, _)| id).collect()
    }

    /// Where the next one will be.
    pub(super) fn next_id(&self) -> usize {
        self.entries.vacant_key()
    }

    pub(super) fn insert(&mut self, entry: Entry) -> usize {
        let key = entry.key;
        let id = self.entries.insert(entry);
        self.ids.insert(key, id);
        id
    }

    /// It may have something to say.
    pub(super) fn call_up(&mut self, id: usize) {
        if let Some(entry) = self.entries.get_mut(id).filter(|entry| !entry.in_turn) {
            entry.in_turn = true;
            self.turn.push_back(id);
        }
    }

    /// Its addresses are free again.
    fn release(&mut self, id: usize) {
        if let Some(entry) = self.entries.get(id)
            && self.ids.get(&entry.key) == Some(&id)
        {
            self.ids.remove(&entry.key);
        }
    }

    /// Removes it if it is done; gives its addresses away once the guest has heard of its end.
    pub(super) fn settle(&mut self, id: usize, stage: &mut Stage) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if entry.machine.phase() == Phase::Over
            && !entry.way.link().is_some_and(|link| link.is_draining())
        {
            // Its other end need not wait until the guest has heard of it.
            entry.way = Way::Gone;
        }
        if !entry.machine.is_done() {
            return self.call_up(id);
        }
        stage.forget(id);
        if entry.is_done() {
            self.release(id);
            if let Some(entry) = self.entries.try_remove(id)
                && entry.in_turn
            {
                self.turn.retain(|other| *other != id);
            }
        } else {
            self.release(id);
        }
    }

    /// Who is to speak, and what it says.
    pub(super) fn next(&mut self, stage: &mut Stage) -> Option<(usize, Op)> {
        while let Some(id) = self.turn.front().copied() {
            if let Some(entry) = self.entries.get_mut(id) {
                if let Some(op) = entry.next(id, stage) {
                    return Some((id, op));
                }
                entry.in_turn = false;
            }
            self.turn.pop_front();
            self.settle_silent(id, stage);
        }
        None
    }

    fn settle_silent(&mut self, id: usize, stage: &mut Stage) {
        if self.entries.get(id).is_some_and(|entry| entry.machine.phase() == Phase::Over) {
            self.settle(id, stage);
        }
    }

    /// The one that spoke lets the others speak first.
    pub(super) fn pass_on(&mut self) {
        if self.turn.len() > 1 {
            self.turn.rotate_left(1);
        }
    }
}
