//! The device itself: a disk of 1 MiB in memory, on the protocol's state machine and the device side of
//! the queues. It knows its fault and breaks the rule where the rule is kept.

mod alone;
mod inflight;
mod iommu;
mod migration;
mod notify;
mod optional;
mod packed;
mod postcopy;
mod raw;
mod requests;
mod sights;

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) use alone::Seen;
use migration::Transfer;
use notify::{add_one, descriptor};
use outboard_memory::{GuestMemory, MapOptions, Region, RegionSpec, UserFault, View};
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::MemRegion;
use outboard_protocol::{Backend, Effect, Notifier, Offer, Refusal, RingEvent};
use outboard_queue::{DeviceQueue, QueueFeatures, QueueLayout};

/// A ring has run in this process.
static RAN: AtomicBool = AtomicBool::new(false);

const SECTORS: u64 = 2048;
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

#[derive(Default)]
struct Ring {
    queue: Option<DeviceQueue>,
    kick: Option<Notifier<OwnedFd>>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    /// Its memory is gone.
    parked: bool,
    broken: bool,
    /// Its kick came early, and a fault has forgotten it.
    forgotten: bool,
    requests: u32,
    /// The head that was taken last, of those that came together.
    last_head: Option<u16>,
    /// Kicks that were heard.
    kicks: u64,
    /// Requests that were taken together, the last time.
    batch: u32,
    /// Where it started, how often it was stopped, whether it was ever enabled.
    from: u32,
    stops: u32,
    was_enabled: bool,
    /// Call descriptors that were given.
    calls: u32,
}

pub(crate) struct Device {
    pub(crate) fault: String,
    backend: Backend<OwnedFd>,
    memory: Arc<GuestMemory>,
    rings: Vec<Ring>,
    disk: Vec<u8>,
    status: u8,
    channel: Option<OwnedFd>,
    transfer: Option<Transfer>,
    /// It has saved its state.
    saved: bool,
    iommu: iommu::Iommu,
    held: Vec<iommu::Held>,
    region: Option<inflight::Region>,
    incoming: postcopy::Incoming,
    kept: Vec<OwnedFd>,
    marks: Option<migration::Marks>,
    log_fd: Option<OwnedFd>,
    /// The descriptors of the next request, as they lie there.
    parts: Vec<raw::Raw>,
    /// It has run a ring.
    ran: bool,
    /// The requests that have come.
    pub(crate) seen: Vec<Seen>,
    /// The kick of a ring that a fault goes on with.
    spare: Option<OwnedFd>,
    /// A fault has been prepared, and shows later.
    pub(crate) trap: Cell<bool>,
}

fn offer(fault: &str) -> Offer {
    let faults = if UserFault::is_available() { P::PAGEFAULT } else { P::empty() };
    let packed = if packed::are_offered(fault) { virtio::RING_PACKED } else { 0 };
    let read_only = if fault == "writes-read-only" { READ_ONLY } else { 0 };
    Offer {
        features: read_only
            | packed
            | virtio::VERSION_1
            | virtio::LOG_ALL
            | virtio::ACCESS_PLATFORM
            | virtio::RING_INDIRECT_DESC
            | virtio::RING_EVENT_IDX
            | SEG_MAX
            | FLUSH
            | DISCARD
            | WRITE_ZEROES
            | virtio::NET_MTU,
        protocol_features: P::MQ
            | P::REPLY_ACK
            | P::CONFIG
            | P::CONFIGURE_MEM_SLOTS
            | P::RESET_DEVICE
            | P::STATUS
            | P::BACKEND_REQ
            | P::INFLIGHT_SHMFD
            | P::GET_VRING_BASE_INFLIGHT
            | P::SKIP_DRAIN
            | P::LOG_SHMFD
            | faults
            | P::CRYPTO_SESSION
            | P::DEVICE_STATE
            | P::SHMEM
            | P::SHARED_OBJECT
            | P::RARP
            | P::MTU
            | P::INBAND_NOTIFICATIONS,
        queues: 2,
        max_queue_size: 1024,
        mem_slots: 32,
        gpu_socket: false,
    }
}

fn no_memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(0, Vec::new()).expect("nothing overlaps nothing"))
}

const fn refused() -> Refusal {
    Refusal::Unsupported
}

impl Device {
    pub(crate) fn new(fault: &str) -> Self {
        // Every connection has a disk of its own: cheap to make, and no two bytes of a sector alike.
        let sector: Vec<u8> = (0..512u64).map(|at| (at % 251).to_le_bytes()[0]).collect();
        let disk = sector.repeat(usize::try_from(SECTORS).expect("small"));
        Self {
            fault: fault.to_owned(),
            backend: Backend::new(offer(fault)),
            memory: no_memory(),
            rings: (0..2).map(|_| Ring::default()).collect(),
            disk,
            status: 0,
            channel: None,
            transfer: None,
            saved: false,
            iommu: iommu::Iommu::new(),
            held: Vec::new(),
            region: None,
            incoming: postcopy::Incoming::default(),
            kept: Vec::new(),
            marks: None,
            log_fd: None,
            parts: Vec::new(),
            ran: false,
            seen: Vec::new(),
            spare: None,
            trap: Cell::new(false),
        }
    }

    pub(crate) fn is(&self, fault: &str) -> bool {
        self.fault == fault
    }

    /// The base of the first ring.
    pub(crate) fn base(&self) -> u32 {
        self.backend.ring(0).map_or(0, |ring| ring.base)
    }

    /// A device that remembers the base of another session.
    pub(crate) fn begin_at(&mut self, base: u32) {
        let msg = [10u32, 1, 8, 0, base].map(u32::to_ne_bytes).concat();
        self.backend.receive(&msg, Vec::new());
        if let Ok(Some(outboard_protocol::Step::Effect(effect))) = self.backend.poll() {
            self.carry_out(effect);
        }
    }

    pub(crate) const fn backend(&mut self) -> &mut Backend<OwnedFd> {
        &mut self.backend
    }

    pub(crate) const fn state(&self) -> &Backend<OwnedFd> {
        &self.backend
    }

    pub(crate) fn carry_out(&mut self, effect: Effect<OwnedFd>) {
        match effect {
            Effect::SetFeatures { ticket, enable_all, .. } => {
                let before = self.backend.acked_features();
                self.backend.answer(ticket, Ok(()));
                let enables = self.features_enable(before, enable_all);
                enables.into_iter().for_each(|on| self.enable_all(on));
            }
            Effect::SetProtocolFeatures { ticket, .. }
            | Effect::RingConfigured { ticket, .. }
            | Effect::SendRarp { ticket, .. }
            | Effect::NetSetMtu { ticket, .. }
            | Effect::VringKick { ticket, .. } => self.backend.answer(ticket, Ok(())),
            Effect::SetMemTable { regions, ticket } => {
                let done = self.table(regions);
                self.backend.answer(ticket, done);
            }
            Effect::AddMemRegion { region, fd, ticket } => {
                let done = self.add(region, fd);
                self.backend.answer(ticket, done);
            }
            Effect::RemMemRegion { region, ticket } => {
                let done = self.memory.without_region(&spec(&region));
                let done = done.map(|memory| self.memory = Arc::new(memory));
                self.flush_iotlb();
                self.backend.answer(ticket, done.map_err(|_| refused()));
            }
            Effect::SetVringKick { index, kick, ticket } => {
                self.set_kick(index, kick);
                self.backend.answer(ticket, Ok(()));
            }
            Effect::SetVringCall { index, call, ticket } => {
                self.set_call(index, call);
                self.backend.answer(ticket, Ok(()));
            }
            Effect::SetVringErr { index, err, ticket } => {
                self.rings[usize::from(index)].err = descriptor(err);
                self.backend.answer(ticket, Ok(()));
            }
            Effect::SetVringEnable { ticket, .. } => self.backend.answer(ticket, Ok(())),
            Effect::GetVringBase { index, skip_drain, ticket } => {
                if skip_drain {
                    self.loses(index);
                }
                let base = self.stop(index) + u32::from(skip_drain && self.miscounts());
                self.backend.answer(ticket, Ok(base));
                if self.is("looks-after-stop") {
                    self.restart(index, Notifier::Poll);
                }
                if let Some(kick) = self.spare.take() {
                    self.restart(index, Notifier::Fd(kick));
                }
            }
            other => self.carry_out_optional(other),
        }
    }

    fn enable_all(&mut self, on: u32) {
        for index in 0..2u32 {
            let msg = [18u32, 1, 8, index, on].map(u32::to_ne_bytes).concat();
            self.backend.receive(&msg, Vec::new());
        }
    }

    fn table(&mut self, regions: Vec<(MemRegion, OwnedFd)>) -> Result<(), Refusal> {
        let mut mapped = Vec::new();
        if self.is("minds-holes") || self.is("trusts-sizes") {
            self.kept.clear();
        }
        for (region, fd) in regions {
            if ["leaks-memory-files", "trusts-sizes", "minds-holes"].contains(&&*self.fault) {
                self.kept.push(fd.try_clone().expect("a descriptor"));
            }
            let region = Region::map(
                spec(&region),
                fd,
                MapOptions { dont_fork: true, ..MapOptions::default() },
            );
            mapped.push(Arc::new(region.map_err(|_| refused())?));
        }
        let memory = GuestMemory::new(1, mapped).map_err(|_| refused())?;
        self.memory = Arc::new(memory);
        self.flush_iotlb();
        Ok(())
    }

    fn add(&mut self, region: MemRegion, fd: OwnedFd) -> Result<(), Refusal> {
        if self.is("leaks-slot-files") {
            self.kept.push(fd.try_clone().expect("a descriptor"));
        }
        let region =
            Region::map(spec(&region), fd, MapOptions { dont_fork: true, ..MapOptions::default() });
        let region = region.map_err(|_| refused())?;
        self.memory = Arc::new(self.memory.with_region(region).map_err(|_| refused())?);
        self.flush_iotlb();
        Ok(())
    }

    /// Everything that may follow from a message: memory is looked at again, rings are started.
    pub(crate) fn settle(&mut self) {
        for index in 0..self.rings.len() {
            self.refresh(index);
            self.try_start(index);
        }
        self.look(None);
        for (ring, state) in self.rings.iter_mut().zip(self.backend.rings()) {
            ring.was_enabled |= state.enabled;
        }
        self.look_for_holes();
    }

    /// Gives a running ring the memory of the moment.
    fn refresh(&mut self, index: usize) {
        let space = self.space();
        let Some(mut queue) = self.rings[index].queue.take() else { return };
        let known = Arc::ptr_eq(queue.view().memory(), &space);
        let stays = self.rings[index].broken || known || self.misses_memory(index, &queue);
        let done = if stays { None } else { Some(queue.set_memory(View::new(space))) };
        let ring = &mut self.rings[index];
        ring.queue = Some(queue);
        let Some(done) = done else { return };
        ring.parked = done.is_err();
        if done.is_err() {
            self.rings[index].broken = self.gives_up();
        }
        match done {
            // It goes on where the ring was.
            Err(_) if self.is("iotlb-ring-stays") && self.translates() => {
                self.rings[index].parked = false;
            }
            Err(error) if self.translates() => _ = self.need(index, &error),
            _ => {}
        }
    }

    fn try_start(&mut self, index: usize) {
        let number = u16::try_from(index).expect("small");
        let state = *self.backend.ring(number).expect("it is there");
        if self.starts_unkicked() && self.rings[index].kick.is_none() && state.is_configured() {
            self.rings[index].kick = Some(Notifier::Poll);
        }
        if self.rings[index].forgotten || self.stays_stopped(index) {
            return;
        }
        let kicked = state.kicked || self.starts_unkicked();
        let waits = kicked && state.is_configured() && self.rings[index].queue.is_none();
        if !waits || !self.backend.features_set() {
            return;
        }
        let Some(layout) = self.layout(number) else { return };
        if self.is("serves-one-disk") && !self.ran && RAN.swap(true, Ordering::Relaxed) {
            return;
        }
        self.ran = true;
        let base = state.base;
        let view = View::new(self.space());
        if self.is("used-follows-base") {
            let used = layout.used + 2;
            let _ = view.write(used, &u16::try_from(base).expect("16 bits").to_le_bytes());
        }
        let features = self.backend.acked_features();
        let features = match self.is("no-indirect") {
            true => features & !virtio::RING_INDIRECT_DESC,
            false if self.is("indirect-unagreed") => features | virtio::RING_INDIRECT_DESC,
            false => features,
        };
        let features = if self.is("ignores-event-idx") {
            features & !virtio::RING_EVENT_IDX
        } else {
            features
        };
        let mut queue = match DeviceQueue::new(layout, features, base, view) {
            Ok(queue) => queue,
            Err(error) => {
                if self.translates() {
                    self.need(index, &error);
                }
                return;
            }
        };
        let good = self.take_up(index, &mut queue);
        if self.backend.ring_event(number, RingEvent::Started) {
            let ring = &mut self.rings[index];
            (ring.queue, ring.parked, ring.from) = (Some(queue), false, base);
            ring.broken &= self.fault == "ring-revives";
            if !good {
                self.broke(index);
            }
        }
    }

    fn layout(&self, index: u16) -> Option<QueueLayout> {
        let state = self.backend.ring(index)?;
        let (size, addr) = (state.size?, state.addresses?);
        let features = QueueFeatures::from_bits(self.backend.acked_features());
        let (desc, avail, used) = QueueLayout::sizes(size, features);
        let space = self.space();
        Some(QueueLayout {
            size,
            desc: space.user_to_guest(addr.desc, desc)?,
            avail: space.user_to_guest(addr.avail, avail)?,
            used: space.user_to_guest(addr.used, used)?,
        })
    }

    fn stop(&mut self, index: u16) -> u32 {
        let fallback = self.backend.ring(index).map_or(0, |ring| ring.base);
        let listens = self.listens_on(index.into());
        let ring = &mut self.rings[usize::from(index)];
        let kick = ring.kick.take().and_then(descriptor);
        if self.fault == "leaks-at-stops" {
            self.kept.extend(kick);
        } else if listens {
            self.spare = kick;
        }
        let Some(queue) = &ring.queue else {
            return if self.fault == "base-0-when-stopped" { 0 } else { fallback };
        };
        let (from, to) = (ring.from, queue.base());
        if self.fault != "busy-after-stop" {
            ring.queue = None;
        }
        self.spoil_stop();
        let told = self.told_base(index.into(), from, to);
        self.rings[usize::from(index)].stops += 1;
        if index == 1 && self.is("rings-independent") {
            // Not to be started again with what the backend knows of it.
            (self.rings[0].queue, self.rings[0].forgotten) = (None, true);
        }
        told
    }

    /// A ring that goes on although it was stopped.
    fn restart(&mut self, index: u16, kick: Notifier<OwnedFd>) {
        let Some(layout) = self.layout(index) else { return };
        let base = self.backend.ring(index).map_or(0, |ring| ring.base);
        let view = View::new(Arc::clone(&self.memory));
        let queue = DeviceQueue::new(layout, self.backend.acked_features(), base, view);
        let ring = &mut self.rings[usize::from(index)];
        (ring.queue, ring.kick) = (queue.ok(), Some(kick));
    }

    /// Serves one ring that was kicked, or all when something about them changed.
    fn look(&mut self, kicked: Option<usize>) {
        for index in 0..self.rings.len() {
            let number = u16::try_from(index).expect("small");
            let wanted = match kicked {
                Some(which) => which == index,
                None => !self.is("waits-for-a-kick") && !self.overlooks(index),
            };
            let by_itself = self.backend.acked_features() & virtio::PROTOCOL_FEATURES == 0;
            let enabled = self.backend.ring(number).is_some_and(|ring| ring.enabled)
                && !(by_itself && self.wants_enable());
            let anyhow = self.is("ignores-enable") || self.serves_disabled(index);
            if wanted && (enabled || anyhow) {
                self.serve(index);
            }
        }
    }

    fn serve(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        let Some(mut queue) = ring.queue.take() else { return };
        if !ring.parked && !ring.broken {
            let outcome = self.drain(index, &mut queue);
            if let Err(error) = outcome
                && (!self.translates() || self.need(index, &error))
            {
                self.broke(index);
            }
        }
        self.rings[index].queue = Some(queue);
    }

    fn drain(
        &mut self,
        index: usize,
        queue: &mut DeviceQueue,
    ) -> Result<(), outboard_queue::RingError> {
        if self.is("reads-used-back") {
            let (base, view) = (queue.base(), queue.view().clone());
            *queue = DeviceQueue::new(*queue.layout(), queue.features().bits(), base, view)?;
        }
        if self.holds(index, queue)? || self.puts_off(queue) {
            return Ok(());
        }
        loop {
            let mut done = Vec::new();
            let mut together = 0;
            loop {
                self.looks_at_region();
                if !self.trips(index, queue) {
                    return Ok(());
                }
                let raw = if queue.features().packed {
                    packed::parts(queue)
                } else {
                    raw::next(queue).map(|(_, parts)| parts).unwrap_or_default()
                };
                let owed = queue.pop_owed()?;
                let next = if owed.is_some() { owed } else { queue.pop()? };
                let Some(mut chain) = next else { break };
                let head = chain.head();
                together += 1;
                self.rings[index].requests += 1;
                self.rings[index].batch = together;
                if self.forgets(index, together) {
                    continue;
                }
                let mut written = self.request(&mut chain);
                let long =
                    self.is("used-length") && raw.get(1).is_some_and(|part| part.len == 1024);
                if long || self.is("used-length-0") {
                    written = 0;
                }
                self.mark(index, queue, &raw);
                queue.complete(chain, written);
                self.confess();
                self.clears_late(&mut done, head, queue);
                if self.is("one-per-kick") {
                    break;
                }
            }
            self.clears_now(done);
            let call = queue.publish()? || self.is("ignores-event-idx");
            if (call && !self.is_mute(index)) || self.is("always-calls") {
                self.call(index);
            }
            if self.is("never-asks-for-kicks") || self.is("one-per-kick") || !queue.arm() {
                return Ok(());
            }
        }
    }

    fn broke(&mut self, index: usize) {
        let number = u16::try_from(index).expect("small");
        self.backend.ring_event(number, RingEvent::Broken);
        let ring = &mut self.rings[index];
        ring.broken = true;
        if let (Some(err), true) = (&ring.err, self.fault != "silent-about-errors") {
            let _ = add_one(err);
        }
        while self.is("spins-on-broken-rings") {
            std::hint::spin_loop();
        }
        if self.is("one-broken-all-broken") {
            self.rings.iter_mut().for_each(|ring| ring.broken = true);
        }
    }

    pub(crate) fn finish_held(&mut self) {
        self.serve_rings();
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.is("leaks-mappings") {
            std::mem::forget(Arc::clone(&self.memory));
        }
    }
}

const fn spec(region: &MemRegion) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_addr,
        user_addr: region.user_addr,
        size: region.size,
        offset: region.offset,
    }
}

pub(crate) fn memfd(size: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("faulty", rustix::fs::MemfdFlags::CLOEXEC);
    let file = file.expect("a file");
    rustix::fs::ftruncate(&file, size).expect("a size");
    file
}

pub(crate) fn size_of(file: &OwnedFd) -> u64 {
    rustix::fs::fstat(file).map_or(0, |stat| stat.st_size.unsigned_abs())
}
