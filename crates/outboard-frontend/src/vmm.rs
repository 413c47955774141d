//! The VMM's side of one device: negotiation, memory, and the life-cycle of its queues.
//!
//! Carries out what a front-end does in vhost-user ("Starting and stopping rings") in this order:
//! ```text
//!  new       SET_OWNER, GET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES
//!  [open_channel  GET_QUEUE_NUM, GET_SHMEM_CONFIG, SET_BACKEND_REQ_FD]
//!  activate  SET_FEATURES, SET_MEM_TABLE, then per queue NUM, ADDR, BASE, CALL, KICK, ENABLE 1
//!  reset     per queue ENABLE 0, GET_VRING_BASE; the rings are gone
//!  sleep     per queue ENABLE 0, GET_VRING_BASE; rings and bases are kept
//!  wake      as activate, with the kept bases
//!  (snapshot and restore: `snapshot.rs`)
//! ```
//! Invariant: a queue is either stopped, and then the back-end has confirmed it, or it is in `active`;
//! `sleep` and `reset` without an active queue send nothing.

mod inflight;
mod iommu;
mod log;

use std::sync::Arc;

use outboard_memory::DirtyLog;
use outboard_protocol::features::{ProtocolFeatures, virtio};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::channel::{Channel, ChannelSetup, SharedObjects, SharedRegions};
use crate::connection::{Connection, DEFAULT_TIMEOUT};
use crate::error::Error;
use crate::memory::SharedMemory;
use crate::virtqueue::{RingShare, Virtqueue};

pub use self::iommu::Iommu;

/// What the front-end is ready to use, if the back-end offers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Virtio and vhost feature bits.
    pub features: u64,
    /// Protocol features.
    pub protocol: ProtocolFeatures,
    /// How memory is shared when the back-end can do both.
    pub sharing: Sharing,
}

impl Default for Wanted {
    /// Everything that this crate knows how to use.
    fn default() -> Self {
        // Packed rings, an IOMMU, the dirty log and what belongs to the VMM's own transport stay off.
        let unused = virtio::RING_PACKED
            | virtio::ACCESS_PLATFORM
            | virtio::LOG_ALL
            | virtio::SR_IOV
            | virtio::NOTIFICATION_DATA
            | virtio::NOTIF_CONFIG_DATA
            | virtio::IN_ORDER
            | virtio::NOTIFY_ON_EMPTY
            | virtio::ADMIN_VQ;
        Self {
            features: !unused,
            protocol: ProtocolFeatures::MQ
                | ProtocolFeatures::REPLY_ACK
                | ProtocolFeatures::CONFIG
                | ProtocolFeatures::CONFIGURE_MEM_SLOTS
                | ProtocolFeatures::DEVICE_STATE,
            sharing: Sharing::Table,
        }
    }
}

impl Wanted {
    /// Also packed rings.
    #[must_use]
    pub const fn with_packed_rings(mut self) -> Self {
        self.features |= virtio::RING_PACKED;
        self
    }

    /// Also requests that are answered in the order in which they were made.
    #[must_use]
    pub const fn with_in_order(mut self) -> Self {
        self.features |= virtio::IN_ORDER;
        self
    }

    /// Also the back-end channel and what comes over it: config changes, shared-memory regions, shared
    /// objects, host notifiers. In-band notifications stay off: they replace kicks and calls.
    #[must_use]
    pub fn with_channel(mut self) -> Self {
        self.protocol |= ProtocolFeatures::BACKEND_REQ
            | ProtocolFeatures::BACKEND_SEND_FD
            | ProtocolFeatures::HOST_NOTIFIER
            | ProtocolFeatures::SHARED_OBJECT
            | ProtocolFeatures::SHMEM;
        self
    }
}

/// How the memory is made known to the back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// All regions at once, with SET_MEM_TABLE.
    Table,
    /// One by one, with ADD_MEM_REG; needs CONFIGURE_MEM_SLOTS.
    Slots,
}

/// One queue to activate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// Its number.
    pub index: u16,
    /// Its number of descriptors: a power of two, unless packed rings are negotiated.
    pub size: u16,
    /// Requests of up to this many segments go into indirect tables (if negotiated); 0 = none do.
    pub indirect: u16,
}

/// One device as its VMM sees it. See the module's text for the messages of each call.
#[derive(Debug)]
pub struct Vmm {
    connection: Connection,
    memory: Option<SharedMemory>,
    offered: u64,
    acked: u64,
    offered_protocol: ProtocolFeatures,
    acked_protocol: ProtocolFeatures,
    sharing: Sharing,
    slots_sent: bool,
    active: Vec<Arc<RingShare>>,
    asleep: Option<Vec<(Arc<RingShare>, u32)>>,
    /// Asked for when the first channel is opened. What is mapped goes with a reset and with this.
    regions: Option<SharedRegions>,
    /// What the device sees guest memory through.
    iommu: Option<Iommu>,
    /// As the first back-end made it; it goes with a reset.
    inflight: Option<inflight::InflightRegion>,
    /// On while it is there.
    log: Option<DirtyLog>,
}

impl Vmm {
    /// Negotiates: takes the connection over and acknowledges what is both offered and wanted. The
    /// features themselves are sent by [`Self::activate`], as a VMM does once its driver has chosen.
    ///
    /// # Errors
    /// Anything the connection can fail with.
    pub fn new(mut connection: Connection, wanted: Wanted) -> Result<Self, Error> {
        connection.set_owner()?;
        let mut offered = connection.get_features()?;
        let mut offered_protocol = ProtocolFeatures::empty();
        let mut acked_protocol = ProtocolFeatures::empty();
        if offered & virtio::PROTOCOL_FEATURES != 0 {
            offered_protocol = connection.get_protocol_features()?;
            acked_protocol = offered_protocol & wanted.protocol;
            connection.set_protocol_features(acked_protocol)?;
            if wanted.features & virtio::ACCESS_PLATFORM != 0 {
                // An IOMMU needs a channel: it may be shown only to who has one.
                offered = connection.get_features()?;
            }
        }
        let slots = acked_protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        if wanted.sharing == Sharing::Slots && !slots {
            return Err(Error::NotOffered("CONFIGURE_MEM_SLOTS"));
        }
        Ok(Self {
            connection,
            memory: None,
            offered,
            acked: offered & wanted.features,
            offered_protocol,
            acked_protocol,
            sharing: wanted.sharing,
            slots_sent: false,
            active: Vec::new(),
            asleep: None,
            regions: None,
            iommu: None,
            inflight: None,
            log: None,
        })
    }

    /// Feature bits that the back-end offers.
    #[must_use]
    pub const fn offered(&self) -> u64 {
        self.offered
    }

    /// Feature bits that are used: offered and wanted.
    #[must_use]
    pub const fn features(&self) -> u64 {
        self.acked
    }

    /// Gives up feature bits before the first [`Self::activate`]: what a driver does not understand.
    pub fn mask_features(&mut self, mask: u64) {
        self.acked &= mask;
    }

    /// Protocol features that the back-end offers.
    #[must_use]
    pub const fn offered_protocol(&self) -> ProtocolFeatures {
        self.offered_protocol
    }

    /// Protocol features that are used.
    #[must_use]
    pub const fn protocol_features(&self) -> ProtocolFeatures {
        self.acked_protocol
    }

    /// The connection, for messages that no call here stands for.
    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Opens a back-end channel (SET_BACKEND_REQ_FD); one that was open before is replaced, and what was
    /// mapped stays. Asks for the number of queues and (once) for the shared-memory regions first, where the
    /// back-end has them. What the device looks up is found in `objects`.
    ///
    /// # Errors
    /// [`Error::NotOffered`] without BACKEND_REQ, [`Error::Region`] when the list of regions makes no sense,
    /// and anything the connection can fail with.
    pub fn open_channel(&mut self, objects: SharedObjects) -> Result<Channel, Error> {
        if !self.acked_protocol.contains(ProtocolFeatures::BACKEND_REQ) {
            return Err(Error::NotOffered("BACKEND_REQ"));
        }
        let queues = self.queue_count()?.unwrap_or(256);
        let regions = match &self.regions {
            Some(regions) => regions.clone(),
            None => self.ask_regions()?,
        };
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|errno| Error::host("socketpair", errno))?;
        let setup = ChannelSetup {
            protocol: self.acked_protocol,
            features: self.acked,
            queues: u16::try_from(queues).unwrap_or(u16::MAX),
            regions,
            objects,
            same_process: false,
            patience: DEFAULT_TIMEOUT,
        };
        let mut channel = Channel::new(ours, setup)?;
        if let Some(iommu) = &self.iommu {
            channel.translate(iommu.clone());
        }
        self.connection.set_backend_req_fd(&theirs)?;
        Ok(channel)
    }

    fn ask_regions(&mut self) -> Result<SharedRegions, Error> {
        let regions = if self.acked_protocol.contains(ProtocolFeatures::SHMEM) {
            SharedRegions::new(&*self.connection.get_shmem_config()?)?
        } else {
            SharedRegions::default()
        };
        self.regions = Some(regions.clone());
        Ok(regions)
    }

    fn forget_mappings(&self) {
        if let Some(regions) = &self.regions {
            regions.clear();
        }
    }

    /// The number of queues that the back-end has at most, when it says (MQ).
    ///
    /// # Errors
    /// Anything the connection can fail with.
    pub fn queue_count(&mut self) -> Result<Option<u64>, Error> {
        if !self.acked_protocol.contains(ProtocolFeatures::MQ) {
            return Ok(None);
        }
        self.connection.get_queue_num().map(Some)
    }

    /// Gives the device the memory that [`Self::activate`] will share.
    ///
    /// # Errors
    /// [`Error::State`] while queues are active or asleep in other memory.
    pub fn share_memory(&mut self, memory: SharedMemory) -> Result<(), Error> {
        if !self.active.is_empty() || self.asleep.is_some() {
            return Err(Error::State("memory cannot be replaced under active queues"));
        }
        self.memory = Some(memory);
        self.slots_sent = false;
        Ok(())
    }

    /// Reads `size` bytes of the device's configuration space.
    ///
    /// # Errors
    /// [`Error::NotOffered`] without CONFIG, [`Error::NoConfig`] when the back-end refuses.
    pub fn read_config(&mut self, offset: u32, size: u32) -> Result<Vec<u8>, Error> {
        self.need_config()?;
        self.connection.get_config(offset, size)
    }

    /// Writes to the device's configuration space, as the guest does.
    ///
    /// # Errors
    /// [`Error::NotOffered`] without CONFIG, [`Error::Refused`] when the back-end refuses.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        self.need_config()?;
        self.connection.set_config(offset, bytes, false)
    }

    fn need_config(&self) -> Result<(), Error> {
        if self.acked_protocol.contains(ProtocolFeatures::CONFIG) {
            return Ok(());
        }
        Err(Error::NotOffered("CONFIG"))
    }

    /// Starts these queues on fresh rings and hands out their driver sides, in the same order.
    ///
    /// # Errors
    /// [`Error::State`] when queues are active or asleep already, or no memory was given.
    pub fn activate(&mut self, queues: &[QueueSetup]) -> Result<Vec<Virtqueue>, Error> {
        if !self.active.is_empty() || self.asleep.is_some() {
            return Err(Error::State("the device is active already"));
        }
        let memory = self.memory.clone().ok_or(Error::State("no memory was shared"))?;
        let mut driven = Vec::with_capacity(queues.len());
        let mut rings = Vec::with_capacity(queues.len());
        for setup in queues {
            let indirect = if self.iommu.is_some() { 0 } else { setup.indirect };
            let setup = QueueSetup { indirect, ..*setup };
            let ring = RingShare::new(&memory, setup, self.acked)?;
            let queue = Virtqueue::new(Arc::clone(&ring), self.acked)?;
            rings.push((ring, queue.base()));
            driven.push(queue);
        }
        self.start(rings)?;
        Ok(driven)
    }

    /// Stops every active queue for good; the driver's sides are given back and gone. What was in flight
    /// has been finished by the back-end and is lost. Mappings of shared-memory regions end with it.
    ///
    /// # Errors
    /// Anything the connection can fail with.
    pub fn reset(&mut self, queues: Vec<Virtqueue>) -> Result<(), Error> {
        self.asleep = None;
        self.stop(false)?;
        self.forget_mappings();
        self.inflight = None;
        drop(queues);
        Ok(())
    }

    /// Stops every active queue and keeps its base. The driver's sides stay valid: what was in flight has
    /// been finished, and can be popped. `None`, and no message, when no queue is active.
    ///
    /// # Errors
    /// Anything the connection can fail with.
    pub fn sleep(&mut self) -> Result<Option<Vec<(u16, u32)>>, Error> {
        self.fall_asleep(false)
    }

    fn fall_asleep(&mut self, skip_drain: bool) -> Result<Option<Vec<(u16, u32)>>, Error> {
        if self.active.is_empty() {
            return Ok(None);
        }
        let kept = self.stop(skip_drain)?;
        let bases = kept.iter().map(|(ring, base)| (ring.index, *base)).collect();
        self.asleep = Some(kept);
        Ok(Some(bases))
    }

    /// Starts the sleeping queues where they stopped. Nothing is sent when none sleeps. After a refusal
    /// they sleep on, and it can be tried again.
    ///
    /// # Errors
    /// Anything the connection can fail with.
    pub fn wake(&mut self) -> Result<(), Error> {
        let Some(rings) = self.asleep.take() else { return Ok(()) };
        let woken = self.start(rings.clone());
        if woken.is_err() {
            self.back_to_sleep(rings);
        }
        woken
    }

    /// Some of these were started, some not.
    fn back_to_sleep(&mut self, mut rings: Vec<(Arc<RingShare>, u32)>) {
        // Of a connection that is lost nothing more can be known.
        for (stopped, base) in self.stop(false).unwrap_or_default() {
            for (_, kept) in rings.iter_mut().filter(|(ring, _)| ring.index == stopped.index) {
                *kept = base;
            }
        }
        self.asleep = Some(rings);
    }

    /// Whether queues are active.
    pub(crate) fn is_active(&self) -> bool {
        !self.active.is_empty()
    }

    /// The queues that sleep, each with its base.
    pub(crate) fn sleeping(&self) -> &[(Arc<RingShare>, u32)] {
        self.asleep.as_deref().unwrap_or_default()
    }

    /// The memory that was given.
    pub(crate) const fn memory(&self) -> Option<&SharedMemory> {
        self.memory.as_ref()
    }

    /// These queues sleep from now on, with these features.
    pub(crate) fn take_up(&mut self, features: u64, rings: Vec<(Arc<RingShare>, u32)>) {
        self.acked = features;
        self.asleep = Some(rings);
    }

    fn start(&mut self, rings: Vec<(Arc<RingShare>, u32)>) -> Result<(), Error> {
        self.connection.set_features(self.features_now())?;
        self.send_memory()?;
        self.send_inflight(&rings)?;
        let enables = self.acked & virtio::PROTOCOL_FEATURES != 0;
        for (ring, base) in rings {
            let index = ring.index;
            self.connection.set_vring_num(index, ring.layout.size)?;
            let used = self.log.as_ref().map(|_| ring.layout.used);
            match self.ring_addresses(&ring)? {
                Some(io) => self.connection.set_vring_addr_io(index, &io, used)?,
                None => self.connection.set_vring_addr_logged(index, &ring.layout, used)?,
            }
            self.connection.set_vring_base(index, base)?;
            self.connection.set_vring_call(index, &ring.call)?;
            self.connection.set_vring_kick(index, &*ring.kick())?;
            if enables {
                self.connection.set_vring_enable(index, true)?;
            }
            self.active.push(ring);
        }
        if !self.acked_protocol.contains(ProtocolFeatures::REPLY_ACK) {
            // Without acknowledgements this is the only way to know that all of it has taken effect.
            self.connection.get_features()?;
        }
        Ok(())
    }

    fn send_memory(&mut self) -> Result<(), Error> {
        let memory = self.memory.as_ref().ok_or(Error::State("no memory was shared"))?;
        match self.sharing {
            Sharing::Table => self.connection.set_mem_table(memory.regions()),
            Sharing::Slots if self.slots_sent => Ok(()),
            Sharing::Slots => {
                let slots = self.connection.get_max_mem_slots()?;
                let regions = crate::memory::wide(memory.regions().count());
                if regions > slots {
                    return Err(Error::Memory(format!(
                        "{regions} regions, the back-end has {slots} memory slots"
                    )));
                }
                for (spec, file) in memory.regions() {
                    self.connection.add_mem_region(spec, file)?;
                }
                self.slots_sent = true;
                Ok(())
            }
        }
    }

    fn stop(&mut self, skip_drain: bool) -> Result<Vec<(Arc<RingShare>, u32)>, Error> {
        let disables = self.acked & virtio::PROTOCOL_FEATURES != 0;
        let mut kept = Vec::with_capacity(self.active.len());
        for ring in &self.active {
            if disables {
                self.connection.set_vring_enable(ring.index, false)?;
            }
            let base = match skip_drain {
                true => self.connection.get_vring_base_skip_drain(ring.index)?,
                false => self.connection.get_vring_base(ring.index)?,
            };
            kept.push((Arc::clone(ring), base));
        }
        // Only now: after an error the back-end may still use every ring, and none is freed.
        self.active.clear();
        Ok(kept)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.forget_mappings();
    }
}
