//! The device side of a queue, whatever its layout.

use outboard_memory::View;

use crate::chain::Chain;
use crate::error::RingError;
use crate::inflight::InflightArea;
use crate::layout::{QueueFeatures, QueueLayout};
use crate::packed::device::PackedDevice;
use crate::split::device::SplitDevice;
use crate::split::log::RingLog;

/// A queue that a device serves: takes chains, gives them back in any order, tells the driver in batches.
///
/// The life of a batch: [`pop`](Self::pop) until `None`, [`complete`](Self::complete) each, [`publish`](Self::publish)
/// once (a `true` calls the driver), then [`arm`](Self::arm) and sleep when that is `false`.
#[derive(Debug)]
pub struct DeviceQueue {
    ring: Ring,
}

/// The layouts. (With a tag of its own: a niche would be compared with a constant that takes up a register.)
#[derive(Debug)]
enum Ring {
    Split(SplitDevice),
    Packed(PackedDevice),
}

/// The same of either layout.
macro_rules! each {
    ($ring:expr, $this:ident => $what:expr) => {
        match $ring {
            Ring::Split($this) => $what,
            Ring::Packed($this) => $what,
        }
    };
}

impl DeviceQueue {
    /// A queue on the ring at `layout`. `features` are the acknowledged virtio features, `base` is what SET_VRING_BASE
    /// carries. Split: the next available index; the used index is read from guest memory, once. Packed: the next
    /// available index and its wrap counter in the low half, the used ones in the high half, which is 0 where it says
    /// nothing.
    ///
    /// # Errors
    /// The ring cannot be served as described; nothing was written.
    pub fn new(
        layout: QueueLayout,
        features: u64,
        base: u32,
        view: View,
    ) -> Result<Self, RingError> {
        let features = QueueFeatures::from_bits(features);
        let ring = if features.packed {
            Ring::Packed(PackedDevice::new(layout, features, base, view)?)
        } else {
            Ring::Split(SplitDevice::new(layout, features, base, view)?)
        };
        Ok(Self { ring })
    }

    /// The next chain, walked and translated whole.
    ///
    /// # Errors
    /// The driver broke a rule, or guest memory is gone: the ring is retired. Said once; `Ok(None)` afterwards. Or the
    /// IOTLB cannot translate the chain ([`RingError::Untranslated`]): it stays in the ring.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.pop(),
            Ring::Packed(ring) => ring.pop(),
        }
    }

    /// Whether the driver offers something: a look that takes nothing, for a device that polls.
    #[inline]
    pub fn has_available(&self) -> bool {
        each!(&self.ring, ring => ring.has_available())
    }

    /// Gives a chain back, with the bytes that were written to it, tail included. The driver sees it after the next
    /// [`publish`](Self::publish), and when order was promised not before those that were taken earlier. A chain of
    /// another queue is not given back.
    #[inline(always)]
    pub fn complete(&mut self, chain: Chain, written: u32) {
        each!(&mut self.ring, ring => ring.complete(chain, written));
    }

    /// Shows the driver what was completed since the last time. True: it wants to be called.
    ///
    /// # Errors
    /// Guest memory is gone: nothing is shown, the ring is retired. Said once.
    #[inline(always)]
    pub fn publish(&mut self) -> Result<bool, RingError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.publish(),
            Ring::Packed(ring) => ring.publish(),
        }
    }

    /// Asks for a kick, then takes a last look. True: there is work after all, so do not sleep.
    #[inline(always)]
    pub fn arm(&mut self) -> bool {
        each!(&mut self.ring, ring => ring.arm())
    }

    /// Wants no kicks: the device looks by itself. Costs nothing when kicks were not wanted before.
    #[inline(always)]
    pub fn disarm(&mut self) {
        each!(&mut self.ring, ring => ring.disarm());
    }

    /// Goes on in another generation of guest memory, which holds the same ring at the same guest addresses. Chains in
    /// flight keep the generation they were taken from.
    ///
    /// # Errors
    /// The ring is not there; the queue stays as it was.
    pub fn set_memory(&mut self, view: View) -> Result<(), RingError> {
        each!(&mut self.ring, ring => ring.set_memory(view))
    }

    /// Notes every write to guest memory in a dirty log from now on, or in another one, or no more. Requests in flight
    /// are noted in the new log too.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        each!(&mut self.ring, ring => ring.set_log(log));
    }

    /// Keeps track of requests in this area of an in-flight region from now on, before the first one is taken. What an
    /// earlier process had taken and not shown as used is [`owed`](Self::owed) then, and the ring goes on behind it,
    /// whatever base it was made with.
    ///
    /// # Errors
    /// The area holds what no device leaves behind, or is not for a ring of this size and layout. Nothing was written.
    pub fn set_inflight(&mut self, area: InflightArea) -> Result<(), RingError> {
        each!(&mut self.ring, ring => ring.set_inflight(area))
    }

    /// Requests of an earlier process that are to be served again, and before any new one.
    pub fn owed(&self) -> u16 {
        each!(&self.ring, ring => ring.owed())
    }

    /// The next of them, in the order in which the earlier process took them.
    ///
    /// # Errors
    /// As for [`pop`](Self::pop).
    pub fn pop_owed(&mut self) -> Result<Option<Chain>, RingError> {
        each!(&mut self.ring, ring => ring.pop_owed())
    }

    /// What GET_VRING_BASE answers: where the ring goes on.
    pub fn base(&self) -> u32 {
        each!(&self.ring, ring => ring.base())
    }

    /// Whether every chain that was taken was completed.
    #[inline]
    pub fn is_idle(&self) -> bool {
        each!(&self.ring, ring => ring.is_idle())
    }

    /// Chains that were taken and not completed. Counts them: for whoever wants to know whether there are any,
    /// [`is_idle`](Self::is_idle) is quicker.
    pub fn in_flight(&self) -> u16 {
        each!(&self.ring, ring => ring.in_flight())
    }

    /// Descriptors in the ring.
    pub fn size(&self) -> u16 {
        self.layout().size
    }

    /// Where the ring lies.
    pub fn layout(&self) -> &QueueLayout {
        each!(&self.ring, ring => ring.layout())
    }

    /// The features the ring was made with.
    pub fn features(&self) -> QueueFeatures {
        each!(&self.ring, ring => ring.features())
    }

    /// The guest memory the queue works in.
    pub fn view(&self) -> &View {
        each!(&self.ring, ring => ring.view())
    }

    /// Whether the ring was retired.
    pub fn is_broken(&self) -> bool {
        each!(&self.ring, ring => ring.is_broken())
    }
}
