//! What a session shows of itself ([`Inspect`]): the front-end, its memory, its rings.
//!
//! Invariant: looked at after each message, written only where something has changed; a session that is
//! over leaves nothing but its counters.

use outboard_protocol::{Backend, Ring, RunState, virtio};

use crate::inspect::Inspect;
use crate::queue::QueueSpec;

/// What was shown of a ring.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct RingShown {
    run: RunState,
    enabled: bool,
    size: Option<u16>,
}

impl RingShown {
    fn of(ring: &Ring) -> Self {
        Self { run: ring.run, enabled: ring.enabled, size: ring.size }
    }
}

/// See the module.
pub(super) struct Shown {
    front_end: Inspect,
    memory: Inspect,
    rings: Vec<(Inspect, RingShown)>,
    features: Option<(u64, u64)>,
    regions: Option<(usize, u64)>,
}

impl Shown {
    /// A front-end has come.
    pub(super) fn new(inspect: &Inspect, queues: &[QueueSpec]) -> Self {
        let front_end = inspect.branch("front-end");
        front_end.set("connected", true);
        front_end.counter("sessions").add(1);
        let rings = (0u16..).zip(queues).map(|(index, spec)| {
            let ring = inspect.branch("rings").branch(index);
            ring.set("name", spec.name);
            ring.set("state", word(RunState::Stopped));
            (ring, RingShown::default())
        });
        let rings = rings.collect();
        Self { front_end, memory: inspect.branch("memory"), rings, features: None, regions: None }
    }

    /// Shows what is no longer as it was; `broken` says whether a ring's queue has retired it by now. A queue latches
    /// that before it shows it itself: one of the two is last, whoever writes.
    pub(super) fn look<Fd>(&mut self, backend: &Backend<Fd>, broken: impl Fn(usize) -> bool) {
        let features = (backend.acked_features(), backend.acked_protocol_features().bits());
        if self.features.replace(features) != Some(features) {
            self.front_end.set("features", format!("{:#x}", features.0));
            self.front_end.set("protocol-features", format!("{:#x}", features.1));
            let packed = features.0 & virtio::RING_PACKED != 0;
            self.front_end.set("rings", if packed { "packed" } else { "split" });
        }
        let sizes = backend.regions().iter().map(|region| region.size);
        let regions = (backend.regions().len(), sizes.fold(0, u64::saturating_add));
        if self.regions.replace(regions) != Some(regions) {
            self.memory.set("regions", regions.0 as u64);
            self.memory.set("bytes", regions.1);
        }
        let rings = self.rings.iter_mut().zip(backend.rings()).enumerate();
        for (index, ((inspect, shown), ring)) in rings {
            let now = RingShown::of(ring);
            if *shown != now {
                *shown = now;
                inspect.set("state", word(now.run));
                if broken(index) {
                    inspect.set("state", word(RunState::Broken));
                }
                inspect.set("enabled", now.enabled);
                inspect.set("size", u64::from(now.size.unwrap_or(0)));
            }
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.front_end.clear();
        self.front_end.set("connected", false);
        self.memory.clear();
        self.rings.iter().for_each(|(ring, _)| ring.clear());
    }
}

fn word(run: RunState) -> &'static str {
    match run {
        RunState::Stopped => "stopped",
        RunState::Waiting => "waiting",
        RunState::Running => "running",
        RunState::Parked => "parked",
        RunState::Broken => "broken",
    }
}
