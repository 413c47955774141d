//! What a start of a ring needs, and finding the ring in guest memory (virtio 1.3 §2.6).
//!
//! Invariant: a ring's pointers are resolved once per start and generation of memory, never per request.

use std::sync::Arc;

use outboard_memory::{GuestMemory, View};
use outboard_queue::{DeviceQueue, InflightArea, QueueFeatures, QueueLayout, RingError, RingLog};

use super::WhenDisabled;
use crate::channel::BackendChannel;
use crate::inspect::{Counter, Inspect};
use crate::notify::{Call, Kick};

/// Where a ring lies and how to notify: everything that a start of the ring needs.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) index: u16,
    pub(crate) when_disabled: WhenDisabled,
    pub(crate) size: u16,
    /// Descriptor table, available ring, used ring: addresses of the front-end's own space.
    pub(crate) user: [u64; 3],
    pub(crate) features: u64,
    /// Where writes are noted, when they are.
    pub(crate) log: Option<RingLog>,
    /// Where requests are kept track of, for a process that follows this one after a crash.
    pub(crate) inflight: Option<InflightArea>,
    /// Whether the front-end may stop the ring without waiting for them.
    pub(crate) abandonable: bool,
    pub(crate) base: u32,
    pub(crate) enabled: bool,
    pub(crate) kick: Kick,
    pub(crate) call: Option<Arc<Call>>,
    pub(crate) err: Option<Arc<Call>>,
    /// Where misses of the IOTLB are told.
    pub(crate) channel: BackendChannel,
    pub(crate) counted: Counted,
}

/// What a queue counts, for whoever looks; one owner at a time counts.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    /// Requests that the driver was shown as finished.
    pub(super) finished: Counter,
    /// Times that it was called.
    pub(super) calls: Counter,
    /// Where it is told why the ring is of no more use.
    pub(super) ring: Inspect,
}

impl Counted {
    pub(crate) fn new(ring: &Inspect) -> Self {
        // What went wrong before it was set up anew.
        ring.forget("broken");
        let (finished, calls) = (ring.counter("finished"), ring.counter("calls"));
        Self { finished, calls, ring: ring.clone() }
    }
}

/// Why a ring cannot be served where it is said to lie.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// No region of guest memory holds this part of it.
    #[error("ring part at {address:#x} of {length} bytes is in no region of guest memory")]
    Unmapped {
        /// In the front-end's space.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// It is no ring.
    #[error("{0}")]
    Ring(#[from] RingError),
}

/// Where the ring lies in guest-physical memory.
fn guest_layout(setup: &Setup, memory: &GuestMemory) -> Result<QueueLayout, StartError> {
    let features = QueueFeatures::from_bits(setup.features);
    let lengths = QueueLayout::sizes(setup.size, features);
    let [desc, avail, used] = setup.user;
    let find = |address, length| {
        memory.user_to_guest(address, length).ok_or(StartError::Unmapped { address, length })
    };
    Ok(QueueLayout {
        size: setup.size,
        desc: find(desc, lengths.0)?,
        avail: find(avail, lengths.1)?,
        used: find(used, lengths.2)?,
    })
}

/// Resolves the ring's pointers: once per start and generation, never per request.
pub(super) fn find_ring(
    setup: &Setup,
    base: u32,
    memory: &Arc<GuestMemory>,
) -> Result<DeviceQueue, StartError> {
    let layout = guest_layout(setup, memory)?;
    let view = View::new(Arc::clone(memory));
    let mut ring = DeviceQueue::new(layout, setup.features, base, view)?;
    if let Some(area) = &setup.inflight {
        ring.set_inflight(area.clone())?;
    }
    ring.set_log(setup.log.clone());
    Ok(ring)
}
