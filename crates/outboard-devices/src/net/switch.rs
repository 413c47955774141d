//! A learning switch between the guests of one process, and an uplink (IEEE 802.1D without its protocols).
//!
//! ```text
//!  port A: transmit ─▶ frame of A's own ─▶ table: where is its address? ─▶ inbox of B ─▶ port B: receive
//!             ▲                                 (unknown, a group's: a copy for every other port)   │
//!             └────────────── the frame goes home, empty ◀────────────────────────────────────────┘
//! ```
//! Packets change hands and are not copied in between: what B had as an empty frame goes to A for it. Invariants: no
//! lock, no allocation and no system call for a packet (a port that sleeps is woken once); each port sends from frames
//! of its own, so that inboxes have room for all that there is; a port that takes nothing holds a sender up for
//! a moment and is then passed over until it takes something again.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use outboard::Error;

use super::frame::{ETHERNET, Frame, HEADER};
use super::link::Sent;
use crate::bell::Bell;
use crate::timer::Timer;
use crate::watches::{Ask, Edge, Watches};

/// The most ports of a switch: who waits for whom is told in the bits of one number.
pub const MOST_PORTS: usize = 64;
/// Frames of each port.
const FRAMES: usize = 512;
/// Packets that wait at a port before those who send to it wait too.
const CROWDED: usize = 384;
/// Packets that a port gets which takes nothing, so that it can show that it does again.
const TRICKLE: usize = 16;
/// Empty frames at which a port that had none goes on.
const FED: usize = 32;
/// How long they wait for a port that takes nothing, if nobody says otherwise.
const PATIENCE: Duration = Duration::from_millis(100);
/// Places of the table of addresses, a power of two; and those that are looked at for an address.
const PLACES: usize = 4096;
const PROBES: usize = 4;
/// Bytes before and behind a packet's payload: addresses, a VLAN, a type; and then some.
const AROUND: usize = 64;

/// A packet, and whose frame it is in.
#[derive(Debug)]
struct Parcel {
    frame: Frame,
    home: usize,
}

/// What a port shares with the others.
#[derive(Debug)]
struct Shared {
    inbox: ArrayQueue<Parcel>,
    /// Empty frames of this port.
    free: ArrayQueue<Frame>,
    bell: Bell,
    /// Nobody looks into the inbox before the bell rings.
    asleep: AtomicBool,
    /// Packets can be received.
    runs: AtomicBool,
    /// Packets taken out of the inbox.
    taken: AtomicU64,
    /// Ports that wait for room in it.
    waiting: AtomicU64,
    /// This port waits for frames of its own.
    hungry: AtomicBool,
}

/// What all ports share.
#[derive(Debug)]
struct Fabric {
    ports: Vec<Shared>,
    /// Addresses and where they are: the address, shifted by 16, and the port.
    table: Vec<AtomicU64>,
    /// How long a port is waited for that takes nothing.
    patience: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Switch {
    fabric: Arc<Fabric>,
}

/// A port's place in a switch: what a card is plugged into.
#[derive(Clone, Debug)]
pub struct Port {
    fabric: Arc<Fabric>,
    number: usize,
}

impl Switch {
    /// A switch with so many ports for packets with so many bytes of payload.
    ///
    /// # Errors
    /// It is too many ports, or a bell cannot be made.
    pub fn new(ports: usize, mtu: u16) -> Result<Self, Error> {
        Self::with_patience(ports, mtu, PATIENCE)
    }

    /// The same, with how long those who send to a port wait while it takes nothing. Not zero.
    ///
    /// # Errors
    /// As [`Switch::new`].
    pub fn with_patience(ports: usize, mtu: u16, patience: Duration) -> Result<Self, Error> {
        if !(1..=MOST_PORTS).contains(&ports) || patience.is_zero() {
            return Err(Error::refused(format!("{ports} ports: a switch has 1 to {MOST_PORTS}")));
        }
        let room = HEADER + AROUND + usize::from(mtu);
        let port = |()| -> Result<Shared, Error> {
            let free = ArrayQueue::new(FRAMES);
            for _ in 0..FRAMES {
                // It is as large as what is put in.
                let _ = free.push(Frame::with_room(room));
            }
            Ok(Shared {
                inbox: ArrayQueue::new(FRAMES * ports),
                free,
                bell: Bell::new()?,
                asleep: AtomicBool::new(false),
                runs: AtomicBool::new(false),
                taken: AtomicU64::new(0),
                waiting: AtomicU64::new(0),
                hungry: AtomicBool::new(false),
            })
        };
        let ports = vec![(); ports].into_iter().map(port).collect::<Result<_, _>>()?;
        let table = vec![(); PLACES].into_iter().map(|()| AtomicU64::new(0)).collect();
        Ok(Self { fabric: Arc::new(Fabric { ports, table, patience }) })
    }

    /// Its ports, to plug a card or an uplink into.
    #[must_use]
    pub fn ports(&self) -> Vec<Port> {
        let ports = 0..self.fabric.ports.len();
        ports.map(|number| Port { fabric: Arc::clone(&self.fabric), number }).collect()
    }
}

/// Six bytes as a number.
fn number_of(address: &[u8]) -> u64 {
    address.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl Fabric {
    fn places(&self, address: u64) -> impl Iterator<Item = &AtomicU64> {
        let first = (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize;
        (first..first + PROBES).filter_map(|place| self.table.get(place % PLACES))
    }

    /// An address was seen at a port.
    fn learn(&self, address: u64, port: usize) {
        let entry = address << 16 | port as u64;
        let mut empty = None;
        for place in self.places(address) {
            let held = place.load(Ordering::Relaxed);
            if held == entry {
                return;
            }
            if held >> 16 == address {
                place.store(entry, Ordering::Relaxed);
                return;
            }
            if held == 0 {
                empty = empty.or(Some(place));
            }
        }
        // With none empty the first one is forgotten.
        if let Some(place) = empty.or_else(|| self.places(address).next()) {
            place.store(entry, Ordering::Relaxed);
        }
    }

    /// Where an address was seen, if its port still takes packets.
    fn find(&self, address: u64) -> Option<usize> {
        let mut held = self.places(address).map(|place| place.load(Ordering::Relaxed));
        let port = held.find(|held| *held != 0 && held >> 16 == address)?;
        let port = usize::try_from(port & 0xffff).ok()?;
        self.ports.get(port).filter(|shared| shared.runs.load(Ordering::Relaxed)).map(|_| port)
    }
}

/// One end of a port: who sends and receives there.
#[derive(Debug)]
pub(super) struct PortLink {
    port: Port,
    timer: Timer,
    /// A packet that waits for room at another port.
    pending: Option<(Parcel, usize)>,
    /// What each port had taken when this one began to wait; it waits now if the timer runs.
    before: Vec<u64>,
    waits: bool,
    /// What ports had taken that have not taken anything for long.
    stalled: Vec<Option<u64>>,
    /// Ports that got packets and may be asleep, as bits.
    told: u64,
    token: u64,
}

impl PortLink {
    pub(super) fn new(port: Port) -> Result<Self, Error> {
        let timer = Timer::new()?;
        let ports = port.fabric.ports.len();
        let (before, stalled) = (vec![0; ports], vec![None; ports]);
        Ok(Self { port, timer, pending: None, before, waits: false, stalled, told: 0, token: 0 })
    }

    fn own(&self) -> Option<&Shared> {
        self.port.fabric.ports.get(self.port.number)
    }

    /// Has `watches` report what happens, under `token` and the next one.
    pub(super) fn watch(&mut self, watches: &Watches, token: u64) -> Result<(), Error> {
        self.token = token;
        if let Some(own) = self.own() {
            watches.add(own.bell.as_fd(), token, Ask::Bytes)?;
        }
        watches.add(self.timer.as_fd(), token + 1, Ask::Bytes)?;
        Ok(())
    }

    pub(super) fn edge(&mut self, edge: Edge) {
        if edge.token == self.token {
            if let Some(own) = self.own() {
                own.bell.take();
            }
        } else if self.timer.take() {
            self.give_up();
        }
    }

    /// Begins to wait: for room elsewhere, or for frames.
    fn wait(&mut self) {
        if std::mem::replace(&mut self.waits, true) {
            return;
        }
        for (before, port) in self.before.iter_mut().zip(&self.port.fabric.ports) {
            *before = port.taken.load(Ordering::Relaxed);
        }
        // It cannot fail with such a time; without it the bell still wakes.
        let _ = self.timer.start(self.port.fabric.patience);
    }

    /// Ports that took nothing while this one waited are passed over, and what they have goes home.
    pub(super) fn give_up(&mut self) {
        if !std::mem::take(&mut self.waits) {
            return;
        }
        let fabric = Arc::clone(&self.port.fabric);
        let ports = fabric.ports.iter().zip(&self.before).zip(&mut self.stalled);
        let mut idle = Vec::new();
        for ((port, before), stalled) in ports {
            let taken = port.taken.load(Ordering::Relaxed);
            if taken == *before && port.inbox.len() > TRICKLE {
                *stalled = Some(taken);
                idle.push(port);
            }
        }
        for port in idle {
            while let Some(parcel) = port.inbox.pop() {
                self.send_home(parcel);
            }
        }
        self.has_room();
    }

    /// Whether a port took nothing for long and has not since.
    fn is_stalled(&self, port: usize, shared: &Shared) -> bool {
        let stalled = self.stalled.get(port).copied().flatten();
        stalled.is_some_and(|taken| taken == shared.taken.load(Ordering::Relaxed))
    }

    /// The port takes packets, or no more.
    pub(super) fn runs(&mut self, runs: bool) {
        let Some(own) = self.own() else { return };
        own.runs.store(runs, Ordering::SeqCst);
        if !runs {
            while let Some(parcel) = own.inbox.pop() {
                self.send_home(parcel);
            }
        }
        self.wake_waiting(0);
    }

    fn send_home(&self, mut parcel: Parcel) {
        parcel.frame.clear();
        let Some(home) = self.port.fabric.ports.get(parcel.home) else { return };
        // A port's frames have room there.
        let _ = home.free.push(parcel.frame);
        let fed = home.hungry.load(Ordering::SeqCst) && home.free.len() >= FED;
        if fed && home.hungry.swap(false, Ordering::SeqCst) {
            home.bell.ring();
        }
    }

    /// Those who wait for room hear of it once at most `most` packets are left.
    fn wake_waiting(&self, most: usize) {
        let Some(own) = self.own() else { return };
        if own.waiting.load(Ordering::Relaxed) == 0 || own.inbox.len() > most {
            return;
        }
        let waiting = own.waiting.swap(0, Ordering::SeqCst);
        let ports = self.port.fabric.ports.iter().enumerate();
        for (_, other) in ports.filter(|(number, _)| waiting & (1 << number) != 0) {
            other.bell.ring();
        }
    }

    /// Nobody looks before the bell rings, from now on; false: there is something after all.
    pub(super) fn may_sleep(&self) -> bool {
        let Some(own) = self.own() else { return true };
        own.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        own.inbox.is_empty()
    }

    /// The next packet, in the place of what `frame` was; false: there is none now.
    pub(super) fn receive(&mut self, frame: &mut Frame) -> bool {
        let Some(own) = self.own() else { return false };
        let Some(mut parcel) = own.inbox.pop() else { return false };
        own.taken.store(own.taken.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        std::mem::swap(frame, &mut parcel.frame);
        self.send_home(parcel);
        self.wake_waiting(CROWDED / 2);
        true
    }

    /// Whether a packet can be sent now: none waits, and there is an empty frame.
    pub(super) fn has_room(&mut self) -> bool {
        if let Some((parcel, port)) = self.pending.take() {
            self.put(port, parcel);
            self.flush();
        }
        let has_room = self.pending.is_none() && self.has_frames();
        if has_room {
            self.waits = false;
        } else {
            self.wait();
        }
        has_room
    }

    fn has_frames(&self) -> bool {
        let Some(own) = self.own().filter(|own| own.free.is_empty()) else { return true };
        own.hungry.store(true, Ordering::SeqCst);
        own.free.len() >= FED
    }

    /// Sends a packet; an empty frame takes its place.
    pub(super) fn send(&mut self, frame: &mut Frame) -> Sent {
        let packet = frame.packet();
        let Some((to, from)) = packet.get(..12).and_then(|both| both.split_first_chunk::<6>())
        else {
            return Sent::Refused;
        };
        let (group, to, from) = (to[0] & 1 != 0, number_of(to), number_of(from));
        let number = self.port.number;
        // A group sends nothing.
        if from >> 40 & 1 == 0 && from != 0 {
            self.port.fabric.learn(from, number);
        }
        let found = if group { None } else { self.port.fabric.find(to) };
        match found {
            Some(port) if port == number => Sent::Refused,
            Some(port) => {
                let Some(mut empty) = self.own().and_then(|own| own.free.pop()) else {
                    return Sent::Refused;
                };
                std::mem::swap(&mut empty, frame);
                self.put(port, Parcel { frame: empty, home: number })
            }
            None if self.flood(frame) => Sent::Yes,
            None => Sent::Refused,
        }
    }

    /// A copy for every other port; false: one of them got none, for want of room.
    fn flood(&mut self, frame: &Frame) -> bool {
        let mut all = true;
        let fabric = Arc::clone(&self.port.fabric);
        for (port, other) in fabric.ports.iter().enumerate() {
            let number = self.port.number;
            if port == number || !other.runs.load(Ordering::Relaxed) {
                continue;
            }
            if other.inbox.len() >= CROWDED {
                all = false;
                continue;
            }
            let Some(mut copy) = self.own().and_then(|own| own.free.pop()) else { return false };
            if copy.copy_from(frame) {
                self.push(other, port, Parcel { frame: copy, home: number });
            } else {
                self.send_home(Parcel { frame: copy, home: number });
                all = false;
            }
        }
        all
    }

    /// Puts a packet into an inbox, or has it wait.
    fn put(&mut self, port: usize, parcel: Parcel) -> Sent {
        let fabric = Arc::clone(&self.port.fabric);
        let Some(other) = fabric.ports.get(port).filter(|it| it.runs.load(Ordering::Relaxed))
        else {
            self.send_home(parcel);
            return Sent::Down;
        };
        let waits = other.inbox.len();
        let stalled = waits >= TRICKLE && self.is_stalled(port, other);
        // One that waits already is not to be lost: this comes out of its turn.
        if stalled || self.pending.is_some() {
            self.send_home(parcel);
            return Sent::Refused;
        }
        if waits >= CROWDED {
            other.waiting.fetch_or(1 << self.port.number, Ordering::SeqCst);
            if other.inbox.len() >= CROWDED {
                self.pending = Some((parcel, port));
                return Sent::Yes;
            }
        }
        self.push(other, port, parcel);
        Sent::Yes
    }

    fn push(&mut self, other: &Shared, port: usize, parcel: Parcel) {
        if let Err(parcel) = other.inbox.push(parcel) {
            // It does not come to this: there is room for all frames.
            self.send_home(parcel);
        }
        self.told |= 1 << port;
    }

    /// Wakes the ports that got packets and sleep.
    pub(super) fn flush(&mut self) {
        if self.told == 0 {
            return;
        }
        fence(Ordering::SeqCst);
        let told = std::mem::take(&mut self.told);
        for (number, other) in self.port.fabric.ports.iter().enumerate() {
            let got = told & (1 << number) != 0;
            if got
                && other.asleep.load(Ordering::Relaxed)
                && other.asleep.swap(false, Ordering::SeqCst)
            {
                other.bell.ring();
            }
        }
    }
}

const _: () = assert!(AROUND > ETHERNET + 4);
