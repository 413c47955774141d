//! An interface of the host, or a stream socket, as one more port of a switch.
//!
//! Invariants: the thread sleeps when there is nothing to move, and ends with the [`Uplink`]; what it takes and cannot
//! pass on is counted.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use outboard::{Counter, Error};
use rustix::event::{PollFd, PollFlags, poll};
use tracing::warn;

use super::frame::Frame;
use super::link::{Link, Sent};
use super::port::PortLink;
use super::switch::Port;
use super::{Wire, open};
use crate::bell::Bell;
use crate::watches::{Ask, Watches};

/// Packets that go one way before the other one has its turn.
const BUDGET: u32 = 64;
/// Tokens of what the thread waits for.
const PORT: u64 = 0;
const LINK: usize = 1;
const STOP: u64 = 4;

/// Moves packets between a switch and an interface of the host, or a stream, until it is dropped.
#[derive(Debug)]
pub struct Uplink {
    stop: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread has.
#[derive(Debug)]
struct Mover {
    port: PortLink,
    link: Link,
    watches: Watches,
    stop: Arc<Bell>,
    to_port: Frame,
    to_link: Frame,
    tally: Tally,
}

/// What went through it; received is what came out of the switch.
#[derive(Debug)]
struct Tally {
    received: Counter,
    sent: Counter,
    /// Packets out of the switch while the link was down.
    link_down: Counter,
    /// Packets out of the switch that the link did not take.
    refused: Counter,
    /// Packets of the link that the switch did not take.
    not_sent: Counter,
    /// Packets of the link that are longer than those of the switch.
    too_long: Counter,
}

impl Uplink {
    /// Plugs an interface, of which one queue is used, or a stream into a port.
    ///
    /// # Errors
    /// The kernel refuses what the thread needs, or the link cannot be made.
    pub fn new(port: Port, wire: &Wire) -> Result<Self, Error> {
        if let Wire::Tap(taps) = wire {
            taps.first().map_or(Ok(()), |tap| tap.set_offloads(0))?;
        }
        let inspect = port.inspect();
        let counter = |name| inspect.counter(name);
        let tally = Tally {
            received: counter("received-packets"),
            sent: counter("sent-packets"),
            link_down: counter("dropped-link-down"),
            refused: counter("dropped-refused"),
            not_sent: counter("dropped-not-sent"),
            too_long: counter("dropped-too-long"),
        };
        let (links, _, name) = open(wire)?;
        inspect.set("link", name);
        let link = links.into_iter().next();
        let mut link = link.ok_or_else(|| Error::refused("no queue of an interface"))?;
        let (mut port, watches, stop) =
            (PortLink::new(port)?, Watches::new()?, Arc::new(Bell::new()?));
        port.watch(&watches, PORT)?;
        link.watch(&watches, LINK)?;
        watches.add(stop.as_fd(), STOP, Ask::Bytes)?;
        let (to_port, to_link, told) = (Frame::new(), Frame::new(), Arc::clone(&stop));
        let mut mover = Mover { port, link, watches, stop: told, to_port, to_link, tally };
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
            if !moved && self.may_sleep() && !self.goes_on() {
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

    /// Whether nothing can be moved out of the switch until something happens.
    fn may_sleep(&mut self) -> bool {
        self.port.may_sleep() || !self.link.has_room()
    }

    /// Whether there may be packets of the link that can be moved.
    fn goes_on(&mut self) -> bool {
        self.link.is_readable() && self.port.has_room()
    }

    fn take_in(&mut self) -> bool {
        let mut moved = false;
        for _ in 0..BUDGET {
            if !self.port.has_room() || !self.link.receive(&mut self.to_port) {
                break;
            }
            match self.port.send(&mut self.to_port) {
                Sent::Yes => self.tally.sent.add(1),
                Sent::Down | Sent::Refused => self.tally.not_sent.add(1),
            }
            moved = true;
        }
        self.port.flush();
        self.tally.too_long.add(self.link.take_too_long());
        moved
    }

    fn send_out(&mut self) -> bool {
        let mut moved = false;
        for _ in 0..BUDGET {
            if !self.link.has_room() || !self.port.receive(&mut self.to_link) {
                break;
            }
            match self.link.send(&mut self.to_link) {
                Sent::Yes => self.tally.received.add(1),
                Sent::Down => self.tally.link_down.add(1),
                Sent::Refused => self.tally.refused.add(1),
            }
            moved = true;
        }
        self.link.flush();
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
                _ if Link::number(edge) == LINK => self.link.edge(edge, &self.watches),
                _ => self.port.edge(edge),
            }
        }
        Ok(true)
    }
}
