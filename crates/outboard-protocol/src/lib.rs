//! The vhost-user wire protocol as pure state machines, both ends.
#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing)]

mod backend;
pub mod channel;
pub mod decoder;
mod effect;
pub mod features;
mod frame;
mod frontend;
pub mod header;
pub mod payload;
mod regions;
mod ring;
pub mod table;
pub mod ticket;
mod violation;

pub use backend::{Backend, Offer};
pub use effect::{Effect, Notifier, StateDirection, Step};
pub use features::{ProtocolFeatures, virtio};
pub use frame::Frame;
pub use frontend::{Answer, Expect, Frontend, Request};
pub use payload::{MemRegion, VringAddr};
pub use ring::{Given, Ring, RingEvent, RunState};
pub use table::{BackendCode, FrontendCode, MessageInfo, table};
pub use ticket::{Reply, Ticket};
pub use violation::{Refusal, Violation};
