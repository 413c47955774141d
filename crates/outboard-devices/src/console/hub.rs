//! All ports of a console: who is told what, and where edges of descriptors go.
//!
//! Invariant: without MULTIPORT there is port 0 and nothing is told of it.

use super::config::Size;
use super::control::{Fact, Said, message};
use super::host::Part;
use super::port::Port;
use super::{Shared, feature};
use crate::watches::Edge;

/// The token of the worker's bell; ports have two numbers each, from 0.
pub(super) const BELL: u64 = u64::MAX;

#[derive(Debug)]
pub(super) struct Hub {
    pub(super) ports: Vec<Port>,
    /// The driver acknowledged [`feature::MULTIPORT`].
    pub(super) multiport: bool,
    /// Nothing is known of a driver: none has introduced itself, and no state has come.
    pub(super) fresh: bool,
    /// What waits belongs to another process, as far as this one knows.
    pub(super) moved: bool,
    /// Another process has, or may get all of this ([`super::heritage`]).
    pub(super) rests: bool,
    /// What happened meanwhile.
    pub(super) late: Vec<Edge>,
}

impl Hub {
    pub(super) fn new(ports: Vec<Port>) -> Self {
        let (rests, late) = (false, Vec::new());
        Self { ports, multiport: false, fresh: true, moved: false, rests, late }
    }

    /// Of port 0: what the configuration says.
    pub(super) fn size(&self) -> Size {
        self.ports.first().map_or_else(Size::default, |port| port.size)
    }

    /// Whether the guest is to get bytes of this port.
    pub(super) fn has_input(&mut self, port: usize) -> bool {
        let multiport = self.multiport;
        let port = self.ports.get_mut(port).filter(|_| multiport || port == 0);
        port.is_some_and(|port| (!multiport || port.guest_open) && port.has_input())
    }

    /// Whether the guest may transmit on this port.
    pub(super) fn has_room(&mut self, port: usize) -> bool {
        self.ports.get_mut(port).is_none_or(Port::has_room)
    }

    /// What the driver is to be told next: of which port, what, in bytes.
    pub(super) fn next_message(&mut self) -> Option<(usize, Fact, Vec<u8>)> {
        if !self.multiport {
            return None;
        }
        self.ports.iter_mut().enumerate().find_map(|(index, port)| {
            let fact = port.next_fact()?;
            let id = u32::try_from(index).unwrap_or(u32::MAX);
            Some((index, fact, message(id, fact, &port.name, port.size)))
        })
    }

    pub(super) fn told(&mut self, port: usize, fact: Fact) {
        if let Some(port) = self.ports.get_mut(port) {
            port.told(fact);
        }
    }

    /// A driver that has introduced itself to another process, which was killed: its ports are taken to be made and
    /// open, and it hears again what may have changed.
    pub(super) fn driver_returns(&mut self) {
        if std::mem::take(&mut self.fresh) && self.multiport {
            self.ports.iter_mut().for_each(Port::driver_returns);
        }
    }

    /// What the driver says. Of a port that is not there it says nothing.
    pub(super) fn hear(&mut self, said: Said) {
        if !self.multiport {
            return;
        }
        match said {
            Said::DeviceReady => {
                self.fresh = false;
                self.ports.iter_mut().for_each(Port::introduce);
            }
            Said::PortReady { port, made } => {
                if let Some(port) = self.port(port) {
                    port.ready(made);
                }
            }
            Said::PortOpen { port, open } => {
                if let Some(port) = self.port(port) {
                    port.guest_open = open;
                }
            }
        }
    }

    /// By the number that a driver gave.
    fn port(&mut self, number: u32) -> Option<&mut Port> {
        self.ports.get_mut(usize::try_from(number).ok()?)
    }

    /// Sets a size; whether it is another one.
    pub(super) fn resize(&mut self, port: usize, size: Size) -> bool {
        let Some(port) = self.ports.get_mut(port).filter(|port| port.size != size) else {
            return false;
        };
        port.size = size;
        port.untold.size |= port.made && port.is_console;
        true
    }

    /// This process has the console: what waits is handed over.
    pub(super) fn go_on(&mut self) {
        self.moved = false;
        self.ports.iter_mut().for_each(Port::flush);
    }

    /// Something has happened to a descriptor.
    pub(super) fn edge(&mut self, edge: Edge, shared: &Shared) {
        if edge.token == BELL {
            shared.bell.take();
            return;
        }
        if self.rests {
            self.late.push(edge);
            return;
        }
        let index = usize::try_from(edge.token / 2).unwrap_or(usize::MAX);
        let part = if edge.token.is_multiple_of(2) { Part::Main } else { Part::Other };
        let moved = self.moved;
        let Some(port) = self.ports.get_mut(index) else { return };
        port.edge(part, edge, &shared.watches);
        if !moved {
            port.flush();
        }
        if let Some(size) = port.new_size() {
            shared.resize(self, index, size);
        }
    }
}

const _: () = assert!(feature::MULTIPORT == 2, "virtio 1.3 §5.3.3");
