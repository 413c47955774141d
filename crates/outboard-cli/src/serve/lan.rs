//! A `[[switch]]` of a file: what connects network cards of the file with each other, and how they name it.
//!
//! Its options are those of `outboard switch`, so that they are declared once. Invariant: as for devices, what is wrong
//! is told with its line.

use std::sync::{Mutex, PoisonError};

use clap::Parser;
use outboard_devices::net::{Port, Switch, Uplink};
use toml::Spanned;
use toml::de::DeValue;

use super::plan::{Field, Wrong, line_of, string};
use super::worker::named;
use crate::switch::SwitchArgs;

/// One `[[switch]]`.
pub(crate) struct SwitchEntry {
    pub(crate) name: String,
    args: SwitchArgs,
    /// Where it begins.
    line: usize,
}

/// Its options.
#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: SwitchArgs,
}

impl SwitchEntry {
    /// Reads a table.
    pub(super) fn read(text: &str, table: &Spanned<DeValue<'_>>) -> Result<Self, Wrong> {
        let (name, parsed): (_, Line) = named("switch", table)?;
        Ok(Self { name, args: parsed.args, line: line_of(text, table.span().start) })
    }

    /// The switch; nothing of the host is connected to it yet.
    ///
    /// # Errors
    /// Its line, and why there is none.
    pub(crate) fn make(self) -> Result<Lan, (usize, String)> {
        let Self { name, args, line } = self;
        let switch = args.make().map_err(|why| (line, why))?;
        Ok(Lan { name, switch, args, line, uplinks: Mutex::default() })
    }
}

/// A switch that runs.
pub(crate) struct Lan {
    pub(crate) name: String,
    pub(crate) switch: Switch,
    args: SwitchArgs,
    line: usize,
    uplinks: Mutex<Vec<Uplink>>,
}

impl Lan {
    /// Connects it to the host's interfaces and streams.
    ///
    /// # Errors
    /// The switch's line, which link cannot be made, and why.
    pub(crate) fn connect(&self) -> Result<(), (usize, String)> {
        let made = self.args.connect(&self.switch).map_err(|why| (self.line, why))?;
        *self.uplinks.lock().unwrap_or_else(PoisonError::into_inner) = made;
        Ok(())
    }

    /// Leaves the host's interfaces and streams to whoever comes after.
    pub(crate) fn disconnect(&self) {
        self.uplinks.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// A place for the card of this name.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub(crate) fn plug(&self, card: &str) -> Result<Plugged, String> {
        let port = self.switch.plug(card).map_err(|error| format!("{}: {error}", self.name))?;
        Ok(Plugged { port, switch: self.name.clone(), mtu: self.args.mtu })
    }
}

/// A card's place in a switch.
pub(crate) struct Plugged {
    pub(crate) port: Port,
    /// The name of the switch.
    pub(crate) switch: String,
    /// What it takes at most.
    pub(crate) mtu: u16,
}

/// Options of a card about the link that a switch is in the place of.
const LINKS: [&str; 5] = ["tap", "tap-fd", "stream", "stream-listen", "queue-pairs"];

/// The switch that a device of this kind names, which is known.
pub(super) fn of_card(
    kind: &str,
    (_, value, at): &Field<'_>,
    options: &[Field<'_>],
    known: &dyn Fn(&str) -> bool,
) -> Result<String, Wrong> {
    let name = string("switch", value)?;
    if kind != "net" {
        return Err(Wrong(at.clone(), format!("{kind} has no switch: cards have, type = \"net\"")));
    }
    if !known(&name) {
        return Err(Wrong(value.span(), format!("there is no switch '{name}'")));
    }
    match options.iter().find(|(key, ..)| LINKS.contains(key)) {
        Some((key, _, at)) => {
            Err(Wrong(at.clone(), format!("{key}: the card is on the switch '{name}'")))
        }
        None => Ok(name),
    }
}
