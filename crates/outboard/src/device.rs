//! `VhostUserDevice`: the full contract between a device and its handler (contract §1).
//!
//! Most authors write a [`crate::Model`] and a [`crate::Worker`] instead and get this from
//! [`crate::WorkerDevice`]. Calls that may have to wait are `async`: they never block the
//! executor, other connections or running rings.

use std::future::{Future, ready};

use crate::error::{Error, HostError};
use crate::hooks::Hooks;
use crate::queue::{Queue, QueueSpec};
use crate::snapshot::{Saved, Snapshot, named_by};

/// Who writes the configuration space (vhost-user, VhostUserConfig flags).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigWrite {
    /// The guest's driver: only writable fields may change.
    Guest,
    /// The front-end, at the destination of a migration: read-only fields may change too.
    Migration,
}

/// A virtio device, driven by a [`crate::DeviceRequestHandler`].
pub trait VhostUserDevice: Send {
    /// Its queues; the same for as long as the device lives.
    fn queues(&self) -> &[QueueSpec];

    /// The device's own feature bits. Ring and transport bits are the handler's.
    fn features(&self) -> u64;

    /// The driver acknowledged these of [`VhostUserDevice::features`]; replaces an earlier set.
    ///
    /// # Errors
    /// The front-end gets a NAK and the old set stays.
    fn ack_features(&mut self, features: u64) -> Result<(), Error>;

    /// Number of bytes of the configuration space.
    fn config_size(&self) -> u32;

    /// Copies configuration from byte `offset`; the range is inside the space.
    ///
    /// # Errors
    /// The front-end gets an answer of length 0.
    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error>;

    /// Writes configuration; the range is inside the space.
    ///
    /// # Errors
    /// The front-end gets a NAK.
    fn write_config(&mut self, offset: u32, bytes: &[u8], origin: ConfigWrite)
    -> Result<(), Error>;

    /// Starts serving `queue`; returns at once and leaves the suspended state. The ring may hold
    /// requests already: they are served without waiting for a kick.
    ///
    /// # Errors
    /// The front-end gets a NAK; the ring stays stopped and can be set up again. After
    /// [`Error::Busy`] the handler first tries again for a while, with the same ring.
    fn start_queue(&mut self, index: u16, queue: Queue) -> Result<(), Error>;

    /// Stops serving and gives the queue back. Afterwards nothing of it is in flight, and there is
    /// no access to guest memory and no call.
    ///
    /// # Errors
    /// [`HostError::NotStarted`] for a queue that was never started; anything else ends the
    /// connection.
    fn stop_queue(&mut self, index: u16) -> impl Future<Output = Result<Queue, HostError>> + Send;

    /// Whether [`VhostUserDevice::abandon_queue`] does what it says: GET_VRING_BASE_INFLIGHT and
    /// GET_VRING_BASE_SKIP_DRAIN are offered then.
    fn can_abandon(&self) -> bool {
        false
    }

    /// Stops serving without finishing what is under way, and gives the queue back. Asked only of
    /// queues that have an in-flight region, at once or after a [`VhostUserDevice::stop_queue`] that
    /// was given up waiting for. Afterwards there is no access to guest memory and no call, now or
    /// later; requests that were not finished are left in the region and are never answered from
    /// here. Their effects elsewhere (writes to a disk) may still be coming: see
    /// [`VhostUserDevice::is_settled`].
    ///
    /// # Errors
    /// As [`VhostUserDevice::stop_queue`].
    fn abandon_queue(
        &mut self,
        index: u16,
    ) -> impl Future<Output = Result<Queue, HostError>> + Send {
        self.stop_queue(index)
    }

    /// False after [`VhostUserDevice::enter_suspended_state`] when the device keeps what it has
    /// claimed, because something of abandoned requests is still under way: nobody else may work
    /// with it yet.
    fn is_settled(&self) -> bool {
        true
    }

    /// Resolves when nothing of abandoned requests is under way any more; the suspended state is
    /// asked for again then.
    fn settle(&mut self) -> impl Future<Output = ()> + Send {
        ready(())
    }

    /// To the power-on state. No queue is started.
    ///
    /// # Errors
    /// The connection ends.
    fn reset(&mut self) -> impl Future<Output = Result<(), Error>> + Send;

    /// No queue is started any more, or the device has just been made: no guest memory is written
    /// and nothing is signalled until the next [`VhostUserDevice::start_queue`].
    ///
    /// # Errors
    /// At construction the handler's `new` returns it; later the request that caused it is refused.
    fn enter_suspended_state(&mut self) -> impl Future<Output = Result<(), Error>> + Send;

    /// The front-end has left, or its session has failed; all queues are stopped. Another one may come: the
    /// next one of the same guest, or somebody new. Not called when another process has taken over.
    fn front_end_left(&mut self) {}

    /// Kind of the device, up to 32 bytes: a state that was saved by another kind is refused. The
    /// names of its queues by itself.
    fn device_type(&self) -> String {
        named_by(self.queues())
    }

    /// The device's own state, of which it is the power-on state that has none. No queue is
    /// started; what takes its time belongs into [`Snapshot::later`].
    ///
    /// # Errors
    /// CHECK_DEVICE_STATE says no; the device can go on.
    fn snapshot(&mut self) -> impl Future<Output = Result<Snapshot, Error>> + Send {
        ready(Ok(Snapshot::none()))
    }

    /// Takes a state that [`VhostUserDevice::snapshot`] made, perhaps in an older or a newer
    /// program. No queue is started; kind, queues and features of the device were compared.
    ///
    /// # Errors
    /// CHECK_DEVICE_STATE says no; nothing has changed, and the device can run or load again.
    fn restore(&mut self, saved: Saved<'_>) -> impl Future<Output = Result<(), Error>> + Send {
        ready(saved.nothing())
    }

    /// What only some devices have; the same answer for as long as the device lives.
    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        None
    }
}
