//! A learning switch between the guests of one process, and an uplink (IEEE 802.1D without its protocols).
//!
//! ```text
//!  port A: transmit ─▶ frame of A's own ─▶ table: where is its address? ─▶ inbox of B ─▶ port B: receive
//!             ▲                                 (unknown, a group's: a copy for every other port)   │
//!             └────────────── the frame goes home, empty ◀────────────────────────────────────────┘
//! ```
//! Packets change hands and are not copied in between: what B had as an empty frame goes to A for it. Invariants: no
//! lock, no allocation and no system call for a packet (a port that sleeps is woken once); each port sends from frames
//! of its own, and looks for room before it puts one into an inbox; a port that takes nothing holds a sender up for
//! a moment and is then passed over until it takes something again; a packet that is lost is counted under a name:
//! what was sent, with copies in the place of what was flooded, is what was received and what was dropped. Ports come
//! and go while packets move (what a port does: `port.rs`). A switch keeps nothing but where addresses are, which the one
//! in the next process finds out anew; what waits at a port as it stops is dropped.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use outboard::{Counter, Error, Inspect};

use super::frame::{ETHERNET, Frame, HEADER};
use crate::bell::Bell;

/// The most ports of a switch: who waits for whom is told in the bits of one number.
pub const MOST_PORTS: usize = 64;
/// Frames of each port.
const FRAMES: usize = 512;
/// How long they wait for a port that takes nothing, if nobody says otherwise.
const PATIENCE: Duration = Duration::from_millis(100);
/// Places of the table of addresses, a power of two; and those that are looked at for an address.
const PLACES: usize = 4096;
const PROBES: usize = 4;
/// Bytes before and behind a packet's payload: addresses, a VLAN, a type; and then some.
const AROUND: usize = 64;

/// A packet, and whose frame it is in.
#[derive(Debug)]
pub(super) struct Parcel {
    pub(super) frame: Frame,
    pub(super) home: usize,
}

/// What a port shares with the others.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) inbox: ArrayQueue<Parcel>,
    /// Empty frames of this port.
    pub(super) free: ArrayQueue<Frame>,
    pub(super) bell: Bell,
    /// Nobody looks into the inbox before the bell rings.
    pub(super) asleep: AtomicBool,
    /// Packets can be received.
    pub(super) runs: AtomicBool,
    /// Packets taken out of the inbox.
    pub(super) taken: AtomicU64,
    /// Ports that wait for room in it.
    pub(super) waiting: AtomicU64,
    /// This port waits for frames of its own.
    pub(super) hungry: AtomicBool,
}

/// What all ports share.
#[derive(Debug)]
pub(super) struct Fabric {
    /// Places for ports; what a place has stays there for the next port.
    places: Vec<OnceLock<Shared>>,
    /// Places that are taken, as bits.
    taken: Mutex<u64>,
    /// Addresses and where they are: the address, shifted by 16, and the port.
    table: Vec<AtomicU64>,
    /// Bytes of a frame.
    room: usize,
    /// How long a port is waited for that takes nothing.
    pub(super) patience: Duration,
    inspect: Inspect,
}

/// See the module. A clone is the same switch.
#[derive(Clone, Debug)]
pub struct Switch {
    fabric: Arc<Fabric>,
}

/// A port's place in a switch: what a card is plugged into. The place is free again once the card and all clones of
/// this are gone.
#[derive(Clone, Debug)]
pub struct Port(Arc<Plug>);

#[derive(Debug)]
struct Plug {
    fabric: Arc<Fabric>,
    number: usize,
    tally: Tally,
    inspect: Inspect,
}

/// What a port did with packets beside passing them on. Each is counted where it was sent from, but `stopped`.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    /// Packets that went to every other port.
    pub(super) flooded: Counter,
    /// Copies of them.
    pub(super) copies: Counter,
    /// Copies that were not made: there was no room.
    pub(super) crowded: Counter,
    /// Packets for all others while there were none.
    pub(super) nobody: Counter,
    /// Packets that waited at a port, or for it, which took nothing for too long.
    pub(super) passed_over: Counter,
    /// Packets that waited at this port, or went to another one, as it stopped.
    pub(super) stopped: Counter,
}

impl Tally {
    fn of(inspect: &Inspect) -> Self {
        let counter = |name| inspect.counter(name);
        Self {
            flooded: counter("flooded"),
            copies: counter("flooded-copies"),
            crowded: counter("dropped-crowded"),
            nobody: counter("dropped-nobody"),
            passed_over: counter("dropped-passed-over"),
            stopped: counter("dropped-stopped"),
        }
    }

    /// Shows the same on another branch.
    fn show(&self, inspect: &Inspect) {
        inspect.show("flooded", &self.flooded);
        inspect.show("flooded-copies", &self.copies);
        inspect.show("dropped-crowded", &self.crowded);
        inspect.show("dropped-nobody", &self.nobody);
        inspect.show("dropped-passed-over", &self.passed_over);
        inspect.show("dropped-stopped", &self.stopped);
    }
}

impl Shared {
    fn new(room: usize) -> Result<Self, Error> {
        let free = ArrayQueue::new(FRAMES);
        for _ in 0..FRAMES {
            // It is as large as what is put in.
            let _ = free.push(Frame::with_room(room));
        }
        Ok(Self {
            inbox: ArrayQueue::new(FRAMES),
            free,
            bell: Bell::new()?,
            asleep: AtomicBool::new(false),
            runs: AtomicBool::new(false),
            taken: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            hungry: AtomicBool::new(false),
        })
    }
}

impl Switch {
    /// A switch with places for so many ports, for packets with so many bytes of payload.
    ///
    /// # Errors
    /// It is too many ports.
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
        let places = vec![(); ports].into_iter().map(|()| OnceLock::new()).collect();
        let table = vec![(); PLACES].into_iter().map(|()| AtomicU64::new(0)).collect();
        let (taken, inspect) = (Mutex::new(0), Inspect::new());
        let fabric = Fabric { places, taken, table, room, patience, inspect };
        Ok(Self { fabric: Arc::new(fabric) })
    }

    /// One more port, to plug a card or an uplink into; it is shown as `ports/NAME`. Packets go on meanwhile.
    ///
    /// # Errors
    /// All places are taken, or a bell cannot be made.
    pub fn plug(&self, name: &str) -> Result<Port, Error> {
        let fabric = Arc::clone(&self.fabric);
        let mut taken = fabric.taken();
        let mut places = fabric.places.iter().enumerate();
        let free = places.find(|(number, _)| *taken & (1 << number) == 0);
        let most = fabric.places.len();
        let full = || Error::refused(format!("all {most} ports of the switch are taken"));
        let (number, place) = free.ok_or_else(full)?;
        if place.get().is_none() {
            // Nobody else does this meanwhile: `taken` is locked.
            let _ = place.set(Shared::new(fabric.room)?);
        }
        *taken |= 1 << number;
        drop(taken);
        let inspect = fabric.inspect.branch("ports").branch(name);
        let tally = Tally::of(&inspect);
        Ok(Port(Arc::new(Plug { fabric, number, tally, inspect })))
    }

    /// What its ports did with packets, beside what their cards show.
    #[must_use]
    pub fn inspect(&self) -> &Inspect {
        &self.fabric.inspect
    }
}

impl Port {
    pub(super) fn fabric(&self) -> &Arc<Fabric> {
        &self.0.fabric
    }

    pub(super) fn number(&self) -> usize {
        self.0.number
    }

    pub(super) fn tally(&self) -> &Tally {
        &self.0.tally
    }

    /// Where the switch shows this port.
    pub(super) fn inspect(&self) -> &Inspect {
        &self.0.inspect
    }

    /// Shows on `inspect` what the switch shows of this port.
    pub(super) fn show(&self, inspect: &Inspect) {
        self.0.tally.show(inspect);
    }
}

impl Drop for Plug {
    fn drop(&mut self) {
        self.fabric.forget(self.number);
        *self.fabric.taken() &= !(1 << self.number);
    }
}

/// Six bytes as a number.
pub(super) fn number_of(address: &[u8]) -> u64 {
    address.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl Fabric {
    /// A port that somebody was plugged into.
    pub(super) fn port(&self, number: usize) -> Option<&Shared> {
        self.places.get(number).and_then(OnceLock::get)
    }

    /// All of them, with their numbers.
    pub(super) fn ports(&self) -> impl Iterator<Item = (usize, &Shared)> {
        let places = self.places.iter().enumerate();
        places.filter_map(|(number, place)| Some((number, place.get()?)))
    }

    /// Places for ports.
    pub(super) fn most(&self) -> usize {
        self.places.len()
    }

    fn taken(&self) -> MutexGuard<'_, u64> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is known of addresses at a port any more.
    fn forget(&self, port: usize) {
        for place in &self.table {
            let held = place.load(Ordering::Relaxed);
            if held != 0 && held & 0xffff == port as u64 {
                // Whoever has learnt something meanwhile keeps it.
                let _ = place.compare_exchange(held, 0, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
    }

    fn near(&self, address: u64) -> impl Iterator<Item = &AtomicU64> {
        let first = (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize;
        (first..first + PROBES).filter_map(|place| self.table.get(place % PLACES))
    }

    /// An address was seen at a port.
    pub(super) fn learn(&self, address: u64, port: usize) {
        let entry = address << 16 | port as u64;
        let mut empty = None;
        for place in self.near(address) {
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
        if let Some(place) = empty.or_else(|| self.near(address).next()) {
            place.store(entry, Ordering::Relaxed);
        }
    }

    /// Where an address was seen, if its port still takes packets.
    pub(super) fn find(&self, address: u64) -> Option<usize> {
        let mut held = self.near(address).map(|place| place.load(Ordering::Relaxed));
        let port = held.find(|held| *held != 0 && held >> 16 == address)?;
        let port = usize::try_from(port & 0xffff).ok()?;
        self.port(port).filter(|shared| shared.runs.load(Ordering::Relaxed)).map(|_| port)
    }
}

const _: () = assert!(AROUND > ETHERNET + 4);
// Whoever puts a packet into an inbox has seen room: each of the others may have done the same.
const _: () = assert!(super::port::CROWDED + MOST_PORTS <= FRAMES);
