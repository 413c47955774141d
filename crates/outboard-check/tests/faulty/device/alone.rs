//! Faults of the device that show in one situation: each has the name of the one check that it breaks.
//!
//! Invariant: without such a name every function here says that nothing is wrong.

use std::sync::atomic::{AtomicU32, Ordering};

use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_queue::DeviceQueue;

use super::raw::{INDIRECT, Raw, WRITE};
use super::{Device, Transfer, notify};

/// Front-ends that came to say nothing, and such that asked one thing.
static SILENT: AtomicU32 = AtomicU32::new(0);
static CURIOUS: AtomicU32 = AtomicU32::new(0);

/// One request of the front-end, as far as faults remember it.
pub(crate) struct Seen {
    pub(crate) id: u32,
    /// The first two words of its body.
    pub(crate) words: [u32; 2],
}

/// What faults want to know of this connection.
impl Device {
    /// Whether these were the last messages, in this order.
    pub(crate) fn came(&self, ids: &[u32]) -> bool {
        let from = self.seen.len().checked_sub(ids.len());
        from.is_some_and(|from| self.seen[from..].iter().map(|one| &one.id).eq(ids))
    }

    /// How often a message has come.
    pub(crate) fn times(&self, id: u32) -> usize {
        self.seen.iter().filter(|one| one.id == id).count()
    }

    pub(crate) fn owned(&self) -> bool {
        self.times(3) > 0
    }

    pub(crate) fn last_was_polled(&self) -> bool {
        self.seen.last().is_some_and(|one| one.words[0] & 0x100 != 0)
    }

    pub(crate) fn has(&self, feature: P) -> bool {
        self.state().acked_protocol_features().contains(feature)
    }

    pub(crate) fn acks(&self) -> bool {
        self.has(P::REPLY_ACK)
    }

    pub(crate) fn is_live(&self, ring: u32) -> bool {
        let ring = u16::try_from(ring).ok().and_then(|ring| self.state().ring(ring));
        ring.is_some_and(|ring| ring.run.is_live())
    }

    /// Whether its memory is one region of so many pages.
    pub(crate) fn has_one_of(&self, pages: u64) -> bool {
        matches!(self.state().regions(), [one] if one.size == pages * 4096)
    }

    /// Where the regions end for the front-end.
    pub(crate) fn user_ends(&self) -> impl Iterator<Item = u64> {
        self.state().regions().iter().map(|one| one.user_addr + one.size)
    }

    /// The available index of the first ring while that runs.
    pub(crate) fn avail_index(&self) -> Option<u16> {
        let queue = self.rings[0].queue.as_ref()?;
        Some(super::raw::word(queue, queue.layout().avail + 2))
    }

    /// Whether a state is to come.
    pub(crate) const fn loads(&self) -> bool {
        matches!(self.transfer, Some(Transfer::Loads(_)))
    }

    /// Whether nothing runs.
    fn is_still(&self) -> bool {
        self.rings.iter().all(|ring| ring.queue.is_none())
    }
}

/// Starting, enabling, looking.
impl Device {
    /// A ring that was given all it needs, and is not started.
    pub(super) fn stays_stopped(&self, index: usize) -> bool {
        match self.fault.as_str() {
            "restarted-by-kick" => {
                let since = self.seen.iter().rev().take_while(|one| one.id != 11);
                self.rings[index].stops > 0 && !{ since }.any(|one| one.id == 9)
            }
            "ring-reset" => {
                let reset =
                    |two: &&[Seen]| two[0].id == 18 && two[0].words[1] == 0 && two[1].id == 11;
                self.seen.windows(2).filter(reset).count() >= 4
            }
            "enable-before-kick" => self.came(&[18, 12]) && !self.awaits(index),
            _ => false,
        }
    }

    /// Whether there are requests in a ring that is to be started.
    fn awaits(&self, index: usize) -> bool {
        let number = u16::try_from(index).expect("small");
        let Some(layout) = self.layout(number) else { return false };
        let mut avail = [0; 2];
        let view = outboard_memory::View::new(std::sync::Arc::clone(&self.memory));
        let read = view.read(layout.avail + 2, &mut avail).is_ok();
        let base = self.backend.ring(number).map_or(0, |ring| ring.base);
        read && u32::from(u16::from_le_bytes(avail)) != base
    }

    /// What a start or an ENABLE finds in the ring is not seen.
    pub(super) fn overlooks(&self, index: usize) -> bool {
        let enabled = self.is_enabled(index);
        match self.fault.as_str() {
            "start-looks" => self.came(&[12]) && enabled,
            "enable-looks" => self.came(&[18]) && !self.was_kicked(index),
            // Where acknowledgements are awaited no later kick can be there already.
            "kick-before-enable" => self.came(&[18]) && self.acks() && self.was_kicked(index),
            _ => false,
        }
    }

    fn is_enabled(&self, index: usize) -> bool {
        let number = u16::try_from(index).expect("small");
        self.backend.ring(number).is_some_and(|ring| ring.enabled)
    }

    /// Whether a kick has come; one that was not heard yet is taken and forgotten.
    fn was_kicked(&self, index: usize) -> bool {
        let ring = &self.rings[index];
        match &ring.kick {
            Some(outboard_protocol::Notifier::Fd(kick)) if notify::readable(kick) => {
                let _ = rustix::io::read(kick, &mut [0; 8]);
                true
            }
            _ => ring.kicks > 0,
        }
    }

    /// A ring that is not enabled is served.
    pub(super) fn serves_disabled(&self, index: usize) -> bool {
        match self.fault.as_str() {
            "enable-gates" => self.came(&[12]) && !self.rings[index].was_enabled,
            "disable-gates" => self.rings[index].was_enabled,
            _ => false,
        }
    }

    /// Without PROTOCOL_FEATURES rings stay disabled.
    pub(super) fn wants_enable(&self) -> bool {
        let first = self.seen.first().is_some_and(|one| one.id == 3);
        self.is("enables-nothing-by-itself") || (first && self.is("without-bit-30"))
    }

    /// Starts without SET_VRING_KICK.
    pub(super) fn starts_unkicked(&self) -> bool {
        self.is("starts-unkicked") || (self.is("silent-before-start") && self.came(&[18]))
    }

    /// SET_FEATURES changes what ENABLE has said: to what. Features were these before.
    pub(super) fn features_enable(&self, before: u64, by_themselves: bool) -> Option<u32> {
        let live = self.is_live(0);
        let quiet = (before | self.backend.acked_features()) & virtio::LOG_ALL == 0;
        match self.fault.as_str() {
            "enable-inverted" if !by_themselves => Some(1),
            "bit-30-keeps-disabled" if live && !by_themselves => Some(1),
            "bit-30-keeps-enabled" if live && !by_themselves && quiet => Some(0),
            _ => None,
        }
    }
}

/// Stopping.
impl Device {
    /// The base that is answered for a ring that ran from `from` to `to`.
    pub(super) fn told_base(&self, index: usize, from: u32, to: u32) -> u32 {
        let ring = &self.rings[index];
        let plain = self.came(&[11]) && !self.has(P::DEVICE_STATE);
        match self.fault.as_str() {
            "base-off-by-one" => to + 1,
            "base-counts" if to == 5 && ring.kicks == 5 && plain => 6,
            "base-round-trip" if from > 0 && ring.stops > 0 => from,
            "base-wraps" if to < from => to + 1,
            "packed-base" if to > 0xffff => to & 0xffff,
            "drains" if ring.batch > 1 => to - 1,
            "stop-after-disable" if to == 1 && ring.stops == 0 && !self.is_enabled(index) => 2,
            _ => to,
        }
    }

    /// A stopped ring that still listens to its kick.
    pub(super) fn listens_on(&self, index: usize) -> bool {
        let ring = &self.rings[index];
        let young = ring.requests == 1 && ring.stops == 0 && !ring.broken;
        self.is("silent-when-stopped") && young && self.is_enabled(index)
    }
}

/// Memory.
impl Device {
    /// A running ring does not hear of its new memory.
    pub(super) fn misses_memory(&self, index: usize, queue: &DeviceQueue) -> bool {
        let (old, new) = (queue.view().memory().regions(), self.memory.regions());
        match self.fault.as_str() {
            "keeps-old-memory" => true,
            "table-moves" => {
                let same = old.iter().map(|one| one.spec()).eq(new.iter().map(|one| one.spec()));
                same && !self.rings[index].parked
            }
            "table-grows" => {
                let grown = old.len() == 1 && new.len() == 2;
                grown && self.came(&[5]) && !self.rings[index].parked
            }
            _ => false,
        }
    }

    /// A ring whose memory is gone never runs again.
    pub(super) fn gives_up(&self) -> bool {
        match self.fault.as_str() {
            "slot-of-the-ring" => self.came(&[38]),
            "table-without-ring" => self.came(&[5]),
            _ => false,
        }
    }

    /// A descriptor over the border of two regions.
    pub(super) fn crosses(&self, part: &Raw) -> bool {
        let last = part.addr.wrapping_add(u64::from(part.len).saturating_sub(1));
        let of = |at: u64| {
            self.memory.regions().iter().position(|one| {
                let spec = one.spec();
                at.checked_sub(spec.guest_addr).is_some_and(|offset| offset < spec.size)
            })
        };
        matches!((of(part.addr), of(last)), (Some(one), Some(other)) if one != other)
    }
}

/// Requests.
impl Device {
    /// A request is taken and never comes back.
    pub(super) fn forgets(&self, index: usize, together: u32) -> bool {
        let ring = &self.rings[index];
        match self.fault.as_str() {
            "served" => ring.requests > 35 && ring.kicks > 35 && self.came(&[18]),
            "batch" => together == 5 && matches!(self.parts[..], [_, Raw { len: 512, .. }, _]),
            _ => false,
        }
    }

    /// A call that is due does not come.
    pub(super) fn is_mute(&self, index: usize) -> bool {
        let ring = &self.rings[index];
        let event_idx = self.backend.acked_features() & virtio::RING_EVENT_IDX != 0;
        match self.fault.as_str() {
            "never-calls" => true,
            "called" => ring.requests == 15 && !event_idx && ring.calls == 1,
            "event-idx-calls" => ring.requests == 15 && event_idx,
            _ => false,
        }
    }

    /// A layout that is not understood: the request fails.
    pub(super) fn minds_layout(&self) -> bool {
        let parts = self.parts.as_slice();
        let readable = parts.iter().filter(|part| part.flags & WRITE == 0 && part.len > 0).count();
        let writable = parts.iter().filter(|part| part.flags & WRITE != 0 && part.len > 0).count();
        let crumbs = parts.first().is_some_and(|part| part.len < 16 && part.flags & WRITE == 0);
        match (self.fault.as_str(), parts) {
            ("across-regions", _) => parts.iter().any(|part| self.crosses(part)),
            ("wants-aligned-data", [_, Raw { addr, len: 512, .. }, _]) => addr % 4 != 0,
            ("header-split", _) => crumbs && readable == 2,
            ("header-in-crumbs", _) => crumbs && readable == 13,
            ("data-split", _) => readable == 1 && (3..6).contains(&writable),
            ("indirect", [one]) => {
                one.flags == INDIRECT && one.addr % 16 == 0 && self.marks.is_none()
            }
            ("indirect-odd-address", [one]) => one.flags == INDIRECT && one.addr % 16 != 0,
            ("indirect-write-flag", [one]) => one.flags == INDIRECT | WRITE,
            _ => false,
        }
    }
}

/// The end of a connection, and rest.
impl Device {
    /// The front-end has left with `bytes` and `fds` of a message that was not over.
    pub(crate) fn is_left(&self, bytes: usize, fds: &mut Vec<std::os::fd::OwnedFd>) {
        let ring = &self.rings[0];
        let counted = |counter: &AtomicU32| counter.fetch_add(1, Ordering::Relaxed) > 60;
        let aborts = match self.fault.as_str() {
            "half-a-header" => self.state().features_set() && (1..12).contains(&bytes),
            "half-a-body" => bytes == 19,
            "gone-busy" => {
                let reset = self.times(4) + self.times(34) > 0;
                self.avail_index() == Some(3) && ring.kicks < 2 && !reset
            }
            "slots-serve" => self.times(37) > 0 && self.times(38) == 0 && ring.requests > 0,
            "storm-silent" => self.seen.is_empty() && counted(&SILENT),
            "storm-reconnects" => self.seen.len() == 1 && counted(&CURIOUS),
            _ => false,
        };
        if aborts {
            std::process::abort();
        }
        match self.fault.as_str() {
            "fd-with-half" => fds.drain(..).for_each(std::mem::forget),
            "leak-sessions" if ring.requests > 0 => std::mem::forget(vec![1u8; 1 << 19]),
            _ => {}
        }
    }

    /// It looks all the time, in this situation.
    pub(crate) fn is_restless(&self) -> bool {
        let ring = &self.rings[0];
        match self.fault.as_str() {
            "idle-connected" => self.came(&[2]) && self.is_still(),
            "idle-running" => {
                let runs = ring.queue.is_some() && !ring.broken;
                runs && ring.requests == 1 && self.came(&[18])
            }
            "idle-stopped" => self.came(&[11]) && ring.requests == 1 && self.is_still(),
            _ => false,
        }
    }
}
