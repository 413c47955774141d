//! What is said on the control socket of `outboard serve`: one line of JSON each way, for each
//! order.
//!
//! Invariant: an order is understood whole or refused; nothing is carried out in part.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The longest line.
pub(crate) const LONGEST: usize = 256 << 10;

/// What can be asked for.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "order", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Order {
    /// All devices.
    List,
    /// What they show of themselves; all of them without a name.
    Stats { device: Option<String> },
    /// Serve the devices of this text too: TOML as in the file.
    Add { toml: String },
    /// Finish what is under way, then end the device.
    Remove { device: String },
    /// Have the guest see the size that the image has now.
    Resize { device: String },
    /// Let the asking process take the device over: a descriptor comes with the answer.
    TakeOver { device: String },
    /// Keep the connection until this process ends.
    Watch,
}

/// What comes back.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// It is done: in words.
    Done(String),
    /// It is not, and why.
    Refused(String),
    /// The devices.
    Devices(Vec<Listed>),
    /// What they show, by their names.
    Stats(BTreeMap<String, Value>),
}

/// One device of the list.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Listed {
    /// Its name.
    pub(crate) name: String,
    /// The command that it is.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// In words.
    pub(crate) what: String,
    /// Whether a front-end is there.
    pub(crate) connected: bool,
    /// Requests finished since it was started.
    pub(crate) finished: u64,
}
