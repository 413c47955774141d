//! Where a pair's packets go, and where they come from.

use outboard::Error;

use super::frame::Frame;
use super::port::PortLink;
use super::stream;
use super::tap::TapLink;
use crate::watches::{Edge, Watches};

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    Yes,
    /// The link is down.
    Down,
    /// It is none that the link takes, or there was no room.
    Refused,
}

/// See the module.
#[derive(Debug)]
pub(super) enum Link {
    Stream(stream::Link),
    Tap(TapLink),
    Port(PortLink),
}

impl Link {
    /// Has `watches` report what happens to it, under its number.
    pub(super) fn watch(&mut self, watches: &Watches, number: usize) -> Result<(), Error> {
        let token = (number as u64) << 1;
        match self {
            Self::Stream(link) => link.watch(watches, token)?,
            Self::Port(link) => link.watch(watches, token)?,
            Self::Tap(link) => link.watch(watches, token)?,
        }
        Ok(())
    }

    /// The number under which a link is watched that something has happened to.
    pub(super) fn number(edge: Edge) -> usize {
        usize::try_from(edge.token >> 1).unwrap_or(usize::MAX)
    }

    /// Something has happened to a descriptor.
    pub(super) fn edge(&mut self, edge: Edge, watches: &Watches) {
        match self {
            Self::Stream(link) => link.edge(edge, watches),
            Self::Port(link) => link.edge(edge),
            Self::Tap(link) => link.edge(edge),
        }
    }

    /// Whether somebody is at the other end.
    pub(super) fn is_up(&self) -> bool {
        match self {
            Self::Stream(link) => link.is_up(),
            Self::Tap(link) => link.is_up(),
            Self::Port(_) => true,
        }
    }

    /// The next packet, with its header; false: there is none now.
    pub(super) fn receive(&mut self, frame: &mut Frame) -> bool {
        match self {
            Self::Stream(link) => link.receive(frame),
            Self::Tap(link) => link.receive(frame),
            Self::Port(link) => link.receive(frame),
        }
    }

    /// Whether there may be packets that nothing will announce; asked before a thread sleeps.
    pub(super) fn is_readable(&self) -> bool {
        match self {
            Self::Stream(link) => link.is_readable(),
            Self::Tap(link) => link.readable,
            Self::Port(link) => !link.may_sleep(),
        }
    }

    /// Whether a packet can be sent now, or dropped because nobody is there.
    pub(super) fn has_room(&mut self) -> bool {
        match self {
            Self::Stream(link) => link.has_room(),
            Self::Tap(_) => true,
            Self::Port(link) => link.has_room(),
        }
    }

    /// Sends a packet. What is in `frame` afterwards is no packet any more.
    pub(super) fn send(&mut self, frame: &mut Frame) -> Sent {
        match self {
            Self::Stream(link) => link.send(frame.packet()),
            Self::Tap(link) => link.send(frame),
            Self::Port(link) => link.send(frame),
        }
    }

    /// Packets that came and had no room in a frame, since the last time that it was asked.
    pub(super) fn take_too_long(&mut self) -> u64 {
        match self {
            Self::Stream(link) => std::mem::take(&mut link.too_long),
            Self::Tap(link) => std::mem::take(&mut link.too_long),
            Self::Port(_) => 0,
        }
    }

    /// The pair's receive ring runs, or no more.
    pub(super) fn runs(&mut self, runs: bool) {
        if let Self::Port(link) = self {
            link.runs(runs);
        }
    }

    /// Everything so far is on its way, as far as the other end takes it.
    pub(super) fn flush(&mut self) {
        match self {
            Self::Stream(link) => link.flush(),
            Self::Port(link) => link.flush(),
            Self::Tap(_) => {}
        }
    }
}
