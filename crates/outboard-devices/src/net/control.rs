//! The control queue's commands (virtio 1.3 §5.1.6.5).
//!
//! ```text
//!  class  command  data …                                          ack
//!  readable ───────────────▶                                       writable ▶
//! ```
//! Invariant: a command is carried out as a whole or answered with VIRTIO_NET_ERR and nothing has changed
//! (case B65).

use outboard::Readable;

use super::config::feature;
use super::filter::{MOST, Mode, Table};

/// `ack` of a command that was carried out, and of one that was not.
pub(super) const OK: u8 = 0;
pub(super) const ERR: u8 = 1;

/// Bytes of an address.
const ADDRESS: u64 = 6;

/// A command that can be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Mode {
        mode: Mode,
        on: bool,
    },
    Tables {
        unicast: Table,
        multicast: Table,
    },
    Address([u8; 6]),
    Vlan {
        vlan: u16,
        passes: bool,
    },
    /// The driver has announced itself.
    Announced,
    /// So many pairs are used.
    Pairs(u16),
    /// What the driver understands from now on, as feature bits.
    Offloads(u64),
}

/// Reads a command of a driver that acknowledged `features`, for a card of so many pairs; None: it is none.
pub(super) fn read(mut from: Readable<'_>, features: u64, pairs: usize) -> Option<Command> {
    let [class, command] = from.read_obj::<[u8; 2]>().ok()?;
    let needs = |bit: u64| (features & bit != 0).then_some(());
    match (class, command) {
        (0, 0..=5) => {
            needs(if command < 2 { feature::CTRL_RX } else { feature::CTRL_RX_EXTRA })?;
            let mode = match command {
                0 => Mode::Promiscuous,
                1 => Mode::AllMulticast,
                2 => Mode::AllUnicast,
                3 => Mode::NoMulticast,
                4 => Mode::NoUnicast,
                _ => Mode::NoBroadcast,
            };
            let [on] = from.read_obj::<[u8; 1]>().ok()?;
            Some(Command::Mode { mode, on: on != 0 })
        }
        (1, 0) => {
            needs(feature::CTRL_RX)?;
            let (unicast, multicast) = (table(&mut from)?, table(&mut from)?);
            Some(Command::Tables { unicast, multicast })
        }
        (1, 1) => {
            needs(feature::CTRL_MAC_ADDR)?;
            from.read_obj().ok().map(Command::Address)
        }
        (2, 0 | 1) => {
            needs(feature::CTRL_VLAN)?;
            let vlan = u16::from_le_bytes(from.read_obj().ok()?);
            (vlan < 4096).then_some(Command::Vlan { vlan, passes: command == 0 })
        }
        (3, 0) => needs(feature::GUEST_ANNOUNCE).map(|()| Command::Announced),
        (4, 0) => {
            needs(feature::MQ)?;
            let used = u16::from_le_bytes(from.read_obj().ok()?);
            (1..=pairs).contains(&usize::from(used)).then_some(Command::Pairs(used))
        }
        (5, 0) => {
            needs(feature::CTRL_GUEST_OFFLOADS)?;
            let offloads = u64::from_le_bytes(from.read_obj().ok()?);
            let agreed = features & feature::GUEST;
            (offloads & !agreed == 0).then_some(Command::Offloads(offloads))
        }
        _ => None,
    }
}

/// One of the two tables of addresses. However many it says there are, all must be there.
fn table(from: &mut Readable<'_>) -> Option<Table> {
    let count = u64::from(u32::from_le_bytes(from.read_obj().ok()?));
    let mut addresses = Vec::new();
    if count > MOST as u64 {
        from.skip(count * ADDRESS).ok()?;
    } else {
        for _ in 0..count {
            addresses.push(from.read_obj::<[u8; 6]>().ok()?);
        }
    }
    Some(Table::new(addresses, count))
}
