//! What the tests of both machines share: a host that answers effects, and frames by name.

pub(crate) mod channel_pair;
pub(crate) mod channel_script;
pub(crate) mod host;
pub(crate) mod notation;
pub(crate) mod pair;
pub(crate) mod rows;
pub(crate) mod script;
pub(crate) mod valid;

use outboard_protocol::features::virtio;
use outboard_protocol::{Backend, Offer, ProtocolFeatures};

/// Descriptors are numbers here.
pub(crate) type Fd = u32;

/// Every protocol feature that can be offered at once with the others.
pub(crate) fn all_protocol() -> ProtocolFeatures {
    ProtocolFeatures::all() - ProtocolFeatures::XEN_MMAP
}

/// Everything but memory slots, so that postcopy is open.
pub(crate) fn postcopy_protocol() -> ProtocolFeatures {
    all_protocol() - ProtocolFeatures::CONFIGURE_MEM_SLOTS
}

/// Feature bits of a device that has everything.
pub(crate) const FEATURES: u64 = virtio::VERSION_1
    | virtio::RING_EVENT_IDX
    | virtio::RING_INDIRECT_DESC
    | virtio::RING_PACKED
    | virtio::ACCESS_PLATFORM
    | virtio::LOG_ALL
    | virtio::NET_MTU
    | virtio::PROTOCOL_FEATURES;

/// An offer of everything, with four rings of at most 1024 entries.
pub(crate) fn full_offer() -> Offer {
    Offer {
        features: FEATURES,
        protocol_features: all_protocol(),
        queues: 4,
        max_queue_size: 1024,
        mem_slots: 8,
        gpu_socket: true,
    }
}

/// A back-end with these sets acknowledged.
pub(crate) fn negotiated(offer: Offer, features: u64, protocol: ProtocolFeatures) -> Backend<Fd> {
    let mut backend = Backend::new(offer);
    if backend.offer().features & virtio::PROTOCOL_FEATURES != 0 {
        host::exchange(&mut backend, &valid::set_protocol_features(protocol));
    }
    host::exchange(&mut backend, &valid::set_features(features));
    assert_eq!(backend.acked_features(), features, "the harness negotiated something illegal");
    assert_eq!(backend.acked_protocol_features(), protocol);
    backend
}
