//! A pair's link over one queue of a TAP interface of the host.
//!
//! One system call for a packet: the kernel's interface has no other way. Big packets make up for it where the
//! offloads are on: 64 KiB go at once. Invariants: nothing here waits; an interface that is down or gone costs
//! packets, which are counted, and no turns of the loop (case C27); the link is down until somebody makes one of that
//! name again.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use outboard::Error;
use outboard::memory::Tap;
use rustix::io::Errno;
use tracing::{info, warn};

use super::config::feature;
use super::frame::{Frame, HEADER};
use super::link::Sent;
use crate::timer::Timer;
use crate::watches::{Ask, Edge, Watches};

/// How often an interface that is gone is looked for.
const AGAIN: Duration = Duration::from_millis(500);

/// TUN_F_*, linux/if_tun.h, beside the feature bits that they stand for.
const OFFLOADS: [(u64, u32); 6] = [
    (feature::GUEST_CSUM, 0x01),
    (feature::GUEST_TSO4, 0x02),
    (feature::GUEST_TSO6, 0x04),
    (feature::GUEST_ECN, 0x08),
    (feature::GUEST_USO4, 0x20),
    (feature::GUEST_USO6, 0x40),
];
const _: () = assert!(Tap::HEADER == HEADER);

/// The kernel's word for offloads in feature bits.
pub(super) fn offloads(features: u64) -> u32 {
    let on = OFFLOADS.iter().filter(|(bit, _)| features & bit != 0);
    on.fold(0, |all, (_, offload)| all | offload)
}

/// Whether the kernel knows USO, with which Linux 6.2 came. All offloads are off afterwards.
pub(super) fn has_uso(tap: &Tap) -> bool {
    let all = feature::GUEST_CSUM | feature::GUEST_USO4 | feature::GUEST_USO6;
    let known = tap.set_offloads(offloads(all)).is_ok();
    known && tap.set_offloads(0).is_ok()
}

/// See the module.
#[derive(Debug)]
pub(super) struct TapLink {
    pub(super) tap: Arc<Tap>,
    pub(super) readable: bool,
    gone: bool,
    /// Runs while it is gone.
    timer: Timer,
    token: u64,
    /// Packets that were longer than the frame that they were to come in.
    pub(super) too_long: u64,
}

impl TapLink {
    pub(super) fn new(tap: Arc<Tap>) -> Result<Self, Error> {
        let timer = Timer::new()?;
        Ok(Self { tap, readable: true, gone: false, timer, token: 0, too_long: 0 })
    }

    /// Has `watches` report what happens, under `token` and the next one.
    pub(super) fn watch(&mut self, watches: &Watches, token: u64) -> Result<(), Error> {
        (self.token, self.readable) = (token, true);
        watches.add(self.tap.as_fd(), token, Ask::Bytes)?;
        watches.add(self.timer.as_fd(), token + 1, Ask::Bytes)?;
        Ok(())
    }

    pub(super) fn edge(&mut self, edge: Edge) {
        if edge.token == self.token {
            self.readable |= edge.readable && !self.gone;
            if edge.hung_up {
                // Told before it is gone: reading may still find nothing, and nothing is told again.
                self.failed(Errno::BADFD);
            }
        } else if self.timer.take() && self.gone {
            self.look_for_it();
        }
    }

    /// Whether there is an interface.
    pub(super) fn is_up(&self) -> bool {
        !self.gone
    }

    fn look_for_it(&mut self) {
        if self.tap.again().is_ok() {
            info!("{}: the interface is there again", self.tap.name());
            (self.gone, self.readable) = (false, true);
        } else {
            // It cannot fail with such a time.
            let _ = self.timer.start(AGAIN);
        }
    }

    /// The next packet; false: there is none now.
    pub(super) fn receive(&mut self, frame: &mut Frame) -> bool {
        while self.readable {
            let room = frame.room().len();
            match rustix::io::read(&*self.tap, frame.room()) {
                // The kernel cuts what does not fit; a packet that fills the room is longer than any.
                Ok(length) if length >= room => self.too_long += 1,
                Ok(length) if length > HEADER => {
                    frame.set_length(length);
                    return true;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.readable = false,
                Err(error) => self.failed(error),
            }
        }
        false
    }

    pub(super) fn send(&mut self, frame: &Frame) -> Sent {
        loop {
            match rustix::io::write(&*self.tap, frame.bytes()) {
                Ok(_) => return Sent::Yes,
                Err(Errno::INTR) => {}
                // The interface is down.
                Err(Errno::IO) => return Sent::Down,
                Err(Errno::BADFD | Errno::NODEV) => {
                    self.failed(Errno::BADFD);
                    return Sent::Down;
                }
                Err(_) => return Sent::Refused,
            }
        }
    }

    fn failed(&mut self, error: Errno) {
        self.readable = false;
        // A queue that was taken off its interface says this until it is put back.
        let gone = error == Errno::BADFD && self.tap.is_attached();
        if gone && !std::mem::replace(&mut self.gone, true) {
            warn!("{}: the interface is gone", self.tap.name());
            self.look_for_it();
        }
    }
}
