//! Control messages between driver and device (virtio 1.3 §5.3.6.2), and what a driver still has to be
//! told of a port.
//!
//! Invariant: what waits to be told is a set of facts for each port, not a list of messages: a driver
//! that asks again and again and takes nothing makes nothing grow.

use serde::{Deserialize, Serialize};

use super::config::Size;

/// Bytes of a message without what follows it.
pub(super) const HEADER: usize = 8;

/// `event` of a message.
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// What a driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// It is there, and knows no port.
    DeviceReady,
    /// It has made the port, or could not.
    PortReady { port: u32, made: bool },
    /// Somebody in the guest has opened the port, or closed it.
    PortOpen { port: u32, open: bool },
}

impl Said {
    /// None: no message that a driver sends. It is left out.
    pub(super) fn read(bytes: [u8; HEADER]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h] = bytes;
        let port = u32::from_le_bytes([a, b, c, d]);
        let yes = u16::from_le_bytes([g, h]) == 1;
        match u16::from_le_bytes([e, f]) {
            event::DEVICE_READY => yes.then_some(Self::DeviceReady),
            event::PORT_READY => Some(Self::PortReady { port, made: yes }),
            event::PORT_OPEN => Some(Self::PortOpen { port, open: yes }),
            _ => None,
        }
    }
}

/// What a driver is still to be told of one port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Untold {
    pub(super) add: bool,
    pub(super) console: bool,
    pub(super) name: bool,
    pub(super) size: bool,
    /// Whether its host side is open, once the driver has made the port.
    pub(super) open: bool,
}

/// A fact of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fact {
    Add,
    Console,
    Name,
    Size,
    Open(bool),
}

impl Untold {
    /// The first of them. `open` is what is true of the host side now.
    pub(super) fn next(self, open: bool) -> Option<Fact> {
        let Self { add, console, name, size, open: untold } = self;
        let facts = [
            (add, Fact::Add),
            (console, Fact::Console),
            (name, Fact::Name),
            (size, Fact::Size),
            (untold, Fact::Open(open)),
        ];
        facts.into_iter().find(|(untold, _)| *untold).map(|(_, fact)| fact)
    }

    pub(super) fn told(&mut self, fact: Fact) {
        match fact {
            Fact::Add => self.add = false,
            Fact::Console => self.console = false,
            Fact::Name => self.name = false,
            Fact::Size => self.size = false,
            Fact::Open(_) => self.open = false,
        }
    }
}

/// The message that tells `fact` of port `port`.
pub(super) fn message(port: u32, fact: Fact, name: &str, size: Size) -> Vec<u8> {
    let (event, value) = match fact {
        Fact::Add => (event::PORT_ADD, 1),
        Fact::Console => (event::CONSOLE_PORT, 1),
        Fact::Name => (event::PORT_NAME, 1),
        Fact::Size => (event::RESIZE, 0),
        Fact::Open(open) => (event::PORT_OPEN, u16::from(open)),
    };
    let mut bytes = Vec::with_capacity(HEADER + name.len());
    bytes.extend(port.to_le_bytes());
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    match fact {
        Fact::Name => bytes.extend(name.as_bytes()),
        // §5.3.6.2: cols, then rows. Linux read them the other way round for years; 6.1.176 does not.
        Fact::Size => {
            bytes.extend(size.columns.to_le_bytes());
            bytes.extend(size.rows.to_le_bytes());
        }
        Fact::Add | Fact::Console | Fact::Open(_) => {}
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_right_to_the_byte() {
        let size = Size { columns: 80, rows: 25 };
        let bytes = |fact| message(2, fact, "org.a", size);
        assert_eq!(bytes(Fact::Add), [2, 0, 0, 0, 1, 0, 1, 0]);
        assert_eq!(bytes(Fact::Console), [2, 0, 0, 0, 4, 0, 1, 0]);
        assert_eq!(bytes(Fact::Name), *b"\x02\0\0\0\x07\0\x01\0org.a");
        assert_eq!(bytes(Fact::Size), [2, 0, 0, 0, 5, 0, 0, 0, 80, 0, 25, 0]);
        assert_eq!(bytes(Fact::Open(true)), [2, 0, 0, 0, 6, 0, 1, 0]);
        assert_eq!(bytes(Fact::Open(false)), [2, 0, 0, 0, 6, 0, 0, 0]);
    }

    #[test]
    fn b70_unknown_events_and_those_of_a_device_are_nothing_that_a_driver_says() {
        for event in (0..=u16::MAX).filter(|event| ![0, 3, 6].contains(event)) {
            let [low, high] = event.to_le_bytes();
            assert_eq!(Said::read([0, 0, 0, 0, low, high, 1, 0]), None, "{event}");
        }
        assert_eq!(Said::read([0; 8]), None, "a driver that is not ready");
        let open = Said::PortOpen { port: u32::MAX, open: false };
        assert_eq!(Said::read([255, 255, 255, 255, 6, 0, 2, 0]), Some(open));
    }

    #[test]
    fn facts_are_told_in_an_order_in_which_a_driver_understands_them() {
        let mut untold = Untold { add: true, console: true, name: true, size: true, open: true };
        let mut told = Vec::new();
        while let Some(fact) = untold.next(true) {
            untold.told(fact);
            told.push(fact);
        }
        let order = [Fact::Add, Fact::Console, Fact::Name, Fact::Size, Fact::Open(true)];
        assert_eq!(told, order);
    }
}
