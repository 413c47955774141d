//! What a console tells its next process: version 1.
//!
//! Invariant: a guest finds the ports that it left, by number, name and kind; what it wrote and nobody
//! has read yet goes with it, and what it has not read yet. Which host's sides there are is the
//! operator's affair: the driver is told when one is open here and was closed there.

use outboard::{Error, Saved, Snapshot};
use serde::{Deserialize, Serialize};

use super::config::Size;
use super::control::Untold;
use super::port::{INPUT, OUTPUT, Port, REQUEST};

/// The newest version that this program reads, and the one that it writes.
pub const STATE_VERSION: u32 = 1;

/// Version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    ports: Vec<PortState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PortState {
    name: String,
    is_console: bool,
    made: bool,
    guest_open: bool,
    told_open: bool,
    untold: Untold,
    size: Size,
    output: Vec<u8>,
    input: Vec<u8>,
}

impl State {
    pub(super) fn of(ports: &[Port]) -> Self {
        let state = |port: &Port| PortState {
            name: port.name.clone(),
            is_console: port.is_console,
            made: port.made,
            guest_open: port.guest_open,
            told_open: port.told_open.unwrap_or(!port.is_open()),
            untold: port.untold,
            size: port.size,
            output: port.output.iter().copied().collect(),
            input: port.input.iter().copied().collect(),
        };
        Self { ports: ports.iter().map(state).collect() }
    }

    pub(super) fn save(self) -> Snapshot {
        Snapshot::of(STATE_VERSION, self)
    }

    /// Reads a state for these ports.
    pub(super) fn read(saved: Saved<'_>, ports: &[Port]) -> Result<Self, Error> {
        let state: Self = saved.read(STATE_VERSION)?;
        if state.ports.len() != ports.len() {
            return Err(Error::refused(format!(
                "state of a console of {} ports, this one has {}",
                state.ports.len(),
                ports.len()
            )));
        }
        let most = u64::try_from(OUTPUT).unwrap_or(REQUEST) + REQUEST;
        for (index, (theirs, ours)) in state.ports.iter().zip(ports).enumerate() {
            if theirs.name != ours.name || theirs.is_console != ours.is_console {
                return Err(Error::refused(format!(
                    "port {index} is {:?} in the state and {:?} here",
                    theirs.name, ours.name
                )));
            }
            if theirs.output.len() as u64 > most || theirs.input.len() > INPUT {
                return Err(Error::refused(format!(
                    "port {index} comes with {} bytes of output and {} of input",
                    theirs.output.len(),
                    theirs.input.len()
                )));
            }
        }
        Ok(state)
    }

    /// Puts it in place.
    pub(super) fn apply(self, ports: &mut [Port]) {
        for (theirs, ours) in self.ports.into_iter().zip(ports) {
            ours.made = theirs.made;
            ours.guest_open = theirs.guest_open;
            ours.told_open = Some(theirs.told_open);
            ours.untold = theirs.untold;
            // A terminal here has its own size.
            ours.untold.size |= theirs.made && theirs.is_console && theirs.size != ours.size;
            ours.output = theirs.output.into();
            ours.input = theirs.input.into();
        }
    }
}
