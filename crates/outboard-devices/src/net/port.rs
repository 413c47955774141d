//! One end of a port of a [switch](super::switch::Switch): who sends and receives there.
//!
//! Invariant: a frame of a port that is taken out of its store goes back there, whatever becomes of its packet.

use std::os::fd::AsFd;
use std::sync::atomic::{Ordering, fence};

use outboard::{Counter, Error};

use super::frame::Frame;
use super::link::Sent;
use super::switch::{Parcel, Port, Shared, number_of};
use crate::timer::Timer;
use crate::watches::{Ask, Edge, Watches};

/// Packets that wait at a port before those who send to it wait too.
pub(super) const CROWDED: usize = 384;
/// Packets that a port gets which takes nothing, so that it can show that it does again.
const TRICKLE: usize = 16;
/// Empty frames at which a port that had none goes on.
const FED: usize = 32;

/// See the module.
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
        let ports = port.fabric().most();
        let (before, stalled) = (vec![0; ports], vec![None; ports]);
        Ok(Self { port, timer, pending: None, before, waits: false, stalled, told: 0, token: 0 })
    }

    fn own(&self) -> Option<&Shared> {
        self.port.fabric().port(self.port.number())
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
        for (number, port) in self.port.fabric().ports() {
            if let Some(before) = self.before.get_mut(number) {
                *before = port.taken.load(Ordering::Relaxed);
            }
        }
        // It cannot fail with such a time; without it the bell still wakes.
        let _ = self.timer.start(self.port.fabric().patience);
    }

    /// Ports that took nothing while this one waited are passed over, and what they have goes home.
    pub(super) fn give_up(&mut self) {
        if !std::mem::take(&mut self.waits) {
            return;
        }
        for (number, port) in self.port.fabric().ports() {
            let taken = port.taken.load(Ordering::Relaxed);
            if self.before.get(number) != Some(&taken) || port.inbox.len() <= TRICKLE {
                continue;
            }
            if let Some(stalled) = self.stalled.get_mut(number) {
                *stalled = Some(taken);
            }
            self.clear(port, &self.port.tally().passed_over);
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
            // Whoever puts a packet there now sees that it does not run (`flush`).
            fence(Ordering::SeqCst);
            self.clear(own, &self.port.tally().stopped);
        }
        self.wake_waiting(0);
    }

    /// A packet that was received is not passed on after all, for its guest takes none any more.
    pub(super) fn lose(&self) {
        self.port.tally().stopped.add(1);
    }

    /// What waits at a port goes home, and is counted.
    fn clear(&self, port: &Shared, lost: &Counter) {
        while let Some(parcel) = port.inbox.pop() {
            self.send_home(parcel);
            lost.add(1);
        }
    }

    fn send_home(&self, mut parcel: Parcel) {
        parcel.frame.clear();
        let Some(home) = self.port.fabric().port(parcel.home) else { return };
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
        let ports = self.port.fabric().ports();
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
            // It was told to be on its way.
            match self.put(port, parcel) {
                Sent::Yes => {}
                Sent::Down => self.port.tally().stopped.add(1),
                Sent::Refused => self.port.tally().passed_over.add(1),
            }
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
        let number = self.port.number();
        // A group sends nothing.
        if from >> 40 & 1 == 0 && from != 0 {
            self.port.fabric().learn(from, number);
        }
        let found = if group { None } else { self.port.fabric().find(to) };
        match found {
            Some(port) if port == number => Sent::Refused,
            Some(port) => {
                let Some(mut empty) = self.own().and_then(|own| own.free.pop()) else {
                    return Sent::Refused;
                };
                std::mem::swap(&mut empty, frame);
                self.put(port, Parcel { frame: empty, home: number })
            }
            None => {
                self.flood(frame);
                Sent::Yes
            }
        }
    }

    /// A copy for every other port that has room for it.
    fn flood(&mut self, frame: &Frame) {
        let number = self.port.number();
        self.port.tally().flooded.add(1);
        let mut nobody = true;
        for (port, other) in self.port.fabric().ports() {
            if port == number || !other.runs.load(Ordering::Relaxed) {
                continue;
            }
            nobody = false;
            match self.copy_for(other, frame) {
                Some(copy) => {
                    self.port.tally().copies.add(1);
                    self.push(other, Parcel { frame: copy, home: number });
                    self.told |= 1 << port;
                }
                None => self.port.tally().crowded.add(1),
            }
        }
        self.port.tally().nobody.add(nobody.into());
    }

    /// A copy in a frame of its own; None: there is no room for it.
    fn copy_for(&self, other: &Shared, frame: &Frame) -> Option<Frame> {
        if other.inbox.len() >= CROWDED {
            return None;
        }
        let mut copy = self.own()?.free.pop()?;
        if copy.copy_from(frame) {
            return Some(copy);
        }
        self.send_home(Parcel { frame: copy, home: self.port.number() });
        None
    }

    /// Puts a packet into an inbox, or has it wait.
    fn put(&mut self, port: usize, parcel: Parcel) -> Sent {
        let other = self.port.fabric().port(port);
        let Some(other) = other.filter(|it| it.runs.load(Ordering::Relaxed)) else {
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
            other.waiting.fetch_or(1 << self.port.number(), Ordering::SeqCst);
            if other.inbox.len() >= CROWDED {
                self.pending = Some((parcel, port));
                return Sent::Yes;
            }
        }
        self.push(other, parcel);
        self.told |= 1 << port;
        Sent::Yes
    }

    fn push(&self, other: &Shared, parcel: Parcel) {
        if let Err(parcel) = other.inbox.push(parcel) {
            // It does not come to this: there is more room than all who have seen some can fill.
            self.send_home(parcel);
            self.port.tally().passed_over.add(1);
        }
    }

    /// Wakes the ports that got packets and sleep.
    pub(super) fn flush(&mut self) {
        if self.told == 0 {
            return;
        }
        fence(Ordering::SeqCst);
        let mut told = std::mem::take(&mut self.told);
        while told != 0 {
            let number = told.trailing_zeros() as usize;
            told &= told - 1;
            let Some(other) = self.port.fabric().port(number) else { continue };
            if !other.runs.load(Ordering::Relaxed) {
                // It stopped as they were put there, and may have looked before that.
                self.clear(other, &self.port.tally().stopped);
            }
            if other.asleep.load(Ordering::Relaxed) && other.asleep.swap(false, Ordering::SeqCst) {
                other.bell.ring();
            }
        }
    }
}

impl Drop for PortLink {
    fn drop(&mut self) {
        self.runs(false);
        if let Some((parcel, _)) = self.pending.take() {
            self.send_home(parcel);
            self.port.tally().stopped.add(1);
        }
    }
}
