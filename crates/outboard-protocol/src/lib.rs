//! The vhost-user wire protocol as pure state machines, both ends: no I/O, no thread, no clock.
//!
//! ```text
//!                 bytes, descriptors                         what the host has to do
//!   socket ──▶ Backend::receive ──▶ Backend::poll ──▶ Effect + Ticket ──▶ your device
//!     ▲                                  │                                    │
//!     └── Backend::transmit ◀── Frame ◀──┴───────── Backend::answer ◀─────────┘
//! ```
//! [`Backend`] is the device's end of the main socket and [`Frontend`] the VMM's; both are generic
//! over the descriptor, `OwnedFd` in a program and a number in a test. [`mod@channel`] has both
//! ends of the second socket, on which the device asks and the VMM answers. [`mod@table`] is the
//! one table that all of it derives from.
//!
//! # How to drive a back-end
//!
//! 1. Read at most [`Backend::wanted`] bytes with their descriptors, and give them to
//!    [`Backend::receive`].
//! 2. Call [`Backend::poll`] until it returns `None`. Carry out each [`Effect`] and answer its
//!    [`Ticket`] with [`Backend::answer`], now or later; log each [`Step::Violation`]. Nothing moves
//!    while a ticket is outstanding; one that is dropped refuses its request.
//! 3. Send everything that [`Backend::transmit`] returns, descriptors with the first byte. Go to 1.
//! 4. An error of `poll` ends the connection. A peer that leaves does so properly if
//!    [`Backend::at_message_boundary`].
//!
//! Beside that, [`Backend::ring_event`] tells the machine what really happens to a ring. The
//! example `by_hand` does all of this on a page.
//!
//! ```
//! use outboard_protocol::{Backend, Frame, Offer, ProtocolFeatures, virtio};
//!
//! let mut backend: Backend<u32> = Backend::new(Offer {
//!     features: virtio::VERSION_1,
//!     protocol_features: ProtocolFeatures::MQ,
//!     queues: 2,
//!     max_queue_size: 256,
//!     mem_slots: 0,
//!     gpu_socket: false,
//! });
//! let request = Frame::<u32>::request(1, false, &[], Vec::new()); // GET_FEATURES
//! backend.receive(&request.bytes, request.fds);
//! assert!(backend.poll().is_ok_and(|step| step.is_none())); // answered without the host
//! let offered = virtio::VERSION_1 | virtio::PROTOCOL_FEATURES;
//! assert_eq!(backend.transmit(), Some(Frame::reply(1, &offered.to_ne_bytes(), Vec::new())));
//! ```
//!
//! # What a peer cannot do
//!
//! A payload longer than 4096 bytes is refused from its header, so no allocation follows the peer's
//! numbers. Ring indices stay as wide as they came until they are compared. Ranges are added with
//! checks. Descriptors are owned from the start and closed with the message that is turned down;
//! those that do not ride with the first byte are closed at once. No input panics.
//!
//! # Where the specification leaves a choice
//!
//! - Reserved flag bits of a header are ignored.
//! - A memory table without regions is accepted: there is no memory then. Whole surplus slots in
//!   its body are ignored, up to the eight-slot size.
//! - A request that breaks a rule is answered with the error form of its message; where that is the
//!   acknowledgement, only if one was asked for. GET_VRING_BASE and a few others have none: there
//!   the acknowledgement is all ones if one was asked for, and else the connection ends, because
//!   the peer waits for an answer that cannot be given.
//! - An unknown request, or one whose feature was not negotiated, gets a non-zero acknowledgement if
//!   one was asked for, and else its error form if it has one.
//! - SET_PROTOCOL_FEATURES is acknowledged under the set that it brings, and may be repeated.
//! - While a ring is live (its queue is with a worker), SET_FEATURES may change LOG_ALL and bit 30
//!   only; NUM, BASE and changed addresses are refused.
//! - A stop forgets the kick. Size, addresses, call, err and the enable flag survive.
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
pub use channel::{
    ChannelAnswer, ChannelBackend, ChannelEffect, ChannelFrontend, ChannelRequest, ChannelStep,
    RequestId, Sent,
};
pub use effect::{Effect, Notifier, StateDirection, Step};
pub use features::{ProtocolFeatures, virtio};
pub use frame::Frame;
pub use frontend::{Answer, Expect, Frontend, Request};
pub use payload::{MemRegion, VringAddr};
pub use ring::{Given, Ring, RingEvent, RunState};
pub use table::{BackendCode, FrontendCode, MessageInfo, table};
pub use ticket::{Reply, Ticket};
pub use violation::{Refusal, Violation};
