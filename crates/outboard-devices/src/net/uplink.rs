//! An interface of the host as one more port of a switch.
//!
//! Invariant: the thread sleeps when there is nothing to move, and ends with the [`Uplink`].

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use outboard::Error;
use outboard::memory::Tap;
use rustix::event::{PollFd, PollFlags, poll};
use tracing::warn;

use super::frame::Frame;
use super::link::Sent;
use super::switch::{Port, PortLink};
use super::tap::TapLink;
use crate::bell::Bell;
use crate::watches::{Ask, Watches};

/// Packets that go one way before the other one has its turn.
const BUDGET: u32 = 64;
/// Tokens of what the thread waits for.
const PORT: u64 = 0;
const TAP: u64 = 2;
const STOP: u64 = 3;

/// Moves packets between a switch and an interface of the host until it is dropped.
#[derive(Debug)]
pub struct Uplink {
    stop: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread has.
#[derive(Debug)]
struct Mover {
    port: PortLink,
    tap: TapLink,
    watches: Watches,
    stop: Arc<Bell>,
    to_port: Frame,
    to_tap: Frame,
}

impl Uplink {
    /// Plugs an interface into a port.
    ///
    /// # Errors
    /// The kernel refuses what the thread needs.
    pub fn new(port: Port, tap: Arc<Tap>) -> Result<Self, Error> {
        tap.set_offloads(0)?;
        let (mut port, tap, watches) = (PortLink::new(port)?, TapLink::new(tap), Watches::new()?);
        let stop = Arc::new(Bell::new()?);
        port.watch(&watches, PORT)?;
        watches.add(tap.tap.as_fd(), TAP, Ask::Bytes)?;
        watches.add(stop.as_fd(), STOP, Ask::Bytes)?;
        let (to_port, to_tap, told) = (Frame::new(), Frame::new(), Arc::clone(&stop));
        let mut mover = Mover { port, tap, watches, stop: told, to_port, to_tap };
        let thread = Builder::new().name("uplink".to_owned()).spawn(move || mover.run())?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.stop.ring();
        if let Some(thread) = self.thread.take() {
            // What it panicked with was printed.
            let _ = thread.join();
        }
    }
}

impl Mover {
    fn run(&mut self) {
        self.port.runs(true);
        loop {
            let moved = self.take_in() | self.send_out();
            if !moved && self.port.may_sleep() && !self.goes_on() {
                let mut watched = [PollFd::new(&self.watches, PollFlags::IN)];
                // A signal wakes too.
                let _ = poll(&mut watched, None);
            }
            match self.edges() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    warn!("uplink: {error}");
                    break;
                }
            }
        }
        self.port.runs(false);
    }

    /// Whether there may be packets of the interface that can be moved.
    fn goes_on(&mut self) -> bool {
        self.tap.readable && self.port.has_room()
    }

    fn take_in(&mut self) -> bool {
        let mut moved = false;
        for _ in 0..BUDGET {
            if !self.port.has_room() || !self.tap.receive(&mut self.to_port) {
                break;
            }
            self.port.send(&mut self.to_port);
            moved = true;
        }
        self.port.flush();
        moved
    }

    fn send_out(&mut self) -> bool {
        let mut moved = false;
        for _ in 0..BUDGET {
            if !self.port.receive(&mut self.to_tap) {
                break;
            }
            // Down, or not taken: as on any wire.
            let _: Sent = self.tap.send(&self.to_tap);
            moved = true;
        }
        moved
    }

    /// What has happened; false: it is to end.
    fn edges(&mut self) -> Result<bool, Error> {
        for edge in self.watches.look()? {
            match edge.token {
                STOP => {
                    self.stop.take();
                    return Ok(false);
                }
                TAP => self.tap.readable |= edge.readable && !self.tap.gone,
                _ => self.port.edge(edge),
            }
        }
        Ok(true)
    }
}
