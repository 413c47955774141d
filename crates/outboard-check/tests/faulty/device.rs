//! The device itself: a disk of 1 MiB in memory, on the protocol's state machine and the device side of
//! the queues. It knows its fault and breaks the rule where the rule is kept.

mod optional;
mod requests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use outboard_memory::{GuestMemory, MapOptions, Region, RegionSpec, View};
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::MemRegion;
use outboard_protocol::{Backend, Effect, Notifier, Offer, Refusal, RingEvent};
use outboard_queue::{DeviceQueue, QueueLayout};
use rustix::io::Errno;

const SECTORS: u64 = 2048;
const SEG_MAX: u64 = 1 << 2;
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
}

pub(crate) struct Device {
    pub(crate) fault: String,
    backend: Backend<OwnedFd>,
    memory: Arc<GuestMemory>,
    rings: Vec<Ring>,
    disk: Vec<u8>,
    status: u8,
    channel: Option<OwnedFd>,
    transfer: Option<bool>,
    kept: Vec<OwnedFd>,
    /// SET_OWNER has come.
    pub(crate) owned: std::cell::Cell<bool>,
}

fn offer() -> Offer {
    Offer {
        features: virtio::VERSION_1
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
            backend: Backend::new(offer()),
            memory: no_memory(),
            rings: (0..2).map(|_| Ring::default()).collect(),
            disk,
            status: 0,
            channel: None,
            transfer: None,
            kept: Vec::new(),
            owned: std::cell::Cell::new(false),
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

    /// Descriptors to sleep on.
    pub(crate) fn kicks(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.rings.iter().filter(|ring| ring.queue.is_some()).filter_map(|ring| match &ring.kick {
            Some(Notifier::Fd(fd)) => Some(fd.as_fd()),
            _ => None,
        })
    }

    /// Whether a ring has no kick descriptor.
    pub(crate) fn polls(&self) -> bool {
        !self.is("ignores-poll")
            && self.rings.iter().any(|ring| matches!(ring.kick, Some(Notifier::Poll)))
    }

    pub(crate) fn carry_out(&mut self, effect: Effect<OwnedFd>) {
        match effect {
            Effect::SetFeatures { ticket, enable_all, .. } => {
                self.backend.answer(ticket, Ok(()));
                let inverted = self.is("enable-inverted") && !enable_all;
                if inverted {
                    self.enable_all();
                }
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
            Effect::GetVringBase { index, ticket, .. } => {
                let base = self.stop(index);
                self.backend.answer(ticket, Ok(base));
                if self.is("looks-after-stop") {
                    self.restart(index);
                }
            }
            other => self.carry_out_optional(other),
        }
    }

    fn enable_all(&mut self) {
        for index in 0..2u32 {
            let msg = [18u32, 1, 8, index, 1].map(u32::to_ne_bytes).concat();
            self.backend.receive(&msg, Vec::new());
        }
    }

    fn table(&mut self, regions: Vec<(MemRegion, OwnedFd)>) -> Result<(), Refusal> {
        let mut mapped = Vec::new();
        for (region, fd) in regions {
            if self.is("leaks-memory-files") {
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
        Ok(())
    }

    fn add(&mut self, region: MemRegion, fd: OwnedFd) -> Result<(), Refusal> {
        let region =
            Region::map(spec(&region), fd, MapOptions { dont_fork: true, ..MapOptions::default() });
        let region = region.map_err(|_| refused())?;
        self.memory = Arc::new(self.memory.with_region(region).map_err(|_| refused())?);
        Ok(())
    }

    fn set_kick(&mut self, index: u16, kick: Notifier<OwnedFd>) {
        let early = !self.backend.ring(index).is_some_and(outboard_protocol::Ring::is_configured);
        self.rings[usize::from(index)].forgotten = early && self.is("forgets-early-kicks");
        let runs = self.rings[usize::from(index)].queue.is_some();
        if runs && self.is("keeps-old-kick") {
            return;
        }
        let old = self.rings[usize::from(index)].kick.replace(kick);
        if let (true, Some(Notifier::Fd(old))) = (self.is("leaks-kicks"), old) {
            self.kept.push(old);
        }
    }

    fn set_call(&mut self, index: u16, call: Notifier<OwnedFd>) {
        let ring = &mut self.rings[usize::from(index)];
        let (runs, had) = (ring.queue.is_some(), ring.call.is_some());
        let keeps = runs && had && self.fault == "keeps-old-call";
        let never = runs && !had && self.fault == "takes-no-late-call";
        let polls = matches!(call, Notifier::Poll) && self.fault == "calls-although-polled";
        if !(keeps || never || polls) {
            ring.call = descriptor(call);
        }
    }

    /// Everything that may follow from a message: memory is looked at again, rings are started.
    pub(crate) fn settle(&mut self) {
        let stale = self.is("keeps-old-memory");
        for index in 0..self.rings.len() {
            if !stale {
                self.refresh(index);
            }
            self.try_start(index);
        }
        self.look(None);
    }

    /// Gives a running ring the memory of the moment.
    fn refresh(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        let Some(queue) = &mut ring.queue else { return };
        if ring.broken || Arc::ptr_eq(queue.view().memory(), &self.memory) {
            return;
        }
        let good = queue.set_memory(View::new(Arc::clone(&self.memory))).is_ok();
        ring.parked = !good;
        if !good && self.fault == "gives-up-without-memory" {
            ring.broken = true;
        }
    }

    fn try_start(&mut self, index: usize) {
        let number = u16::try_from(index).expect("small");
        let state = *self.backend.ring(number).expect("it is there");
        if self.is("starts-unkicked") && self.rings[index].kick.is_none() && state.is_configured() {
            self.rings[index].kick = Some(Notifier::Poll);
        }
        if self.rings[index].forgotten {
            return;
        }
        let kicked = state.kicked || self.is("starts-unkicked");
        let waits = kicked && state.is_configured() && self.rings[index].queue.is_none();
        if !waits || !self.backend.features_set() {
            return;
        }
        let Some(layout) = self.layout(number) else { return };
        let base = state.base;
        let view = View::new(Arc::clone(&self.memory));
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
        if let Ok(queue) = DeviceQueue::new(layout, features, base, view)
            && self.backend.ring_event(number, RingEvent::Started)
        {
            let ring = &mut self.rings[index];
            (ring.queue, ring.parked, ring.broken) = (Some(queue), false, false);
        }
    }

    fn layout(&self, index: u16) -> Option<QueueLayout> {
        let state = self.backend.ring(index)?;
        let (size, addr) = (state.size?, state.addresses?);
        let (desc, avail, used) = QueueLayout::split_sizes(size);
        Some(QueueLayout {
            size,
            desc: self.memory.user_to_guest(addr.desc, desc)?,
            avail: self.memory.user_to_guest(addr.avail, avail)?,
            used: self.memory.user_to_guest(addr.used, used)?,
        })
    }

    fn stop(&mut self, index: u16) -> u32 {
        let fallback = self.backend.ring(index).map_or(0, |ring| ring.base);
        let ring = &mut self.rings[usize::from(index)];
        ring.kick = None;
        let mut base = fallback;
        if let Some(queue) = &ring.queue {
            base = queue.base();
            if self.fault != "busy-after-stop" {
                ring.queue = None;
            }
        } else if self.fault == "base-0-when-stopped" {
            base = 0;
        }
        if self.fault == "base-off-by-one" && base != fallback { base + 1 } else { base }
    }

    /// A ring that goes on although it was stopped.
    fn restart(&mut self, index: u16) {
        let Some(layout) = self.layout(index) else { return };
        let base = self.backend.ring(index).map_or(0, |ring| ring.base);
        let view = View::new(Arc::clone(&self.memory));
        let queue = DeviceQueue::new(layout, self.backend.acked_features(), base, view);
        let ring = &mut self.rings[usize::from(index)];
        ring.queue = queue.ok();
        ring.kick = Some(Notifier::Poll);
    }

    /// Kicks that came in.
    pub(crate) fn serve_rings(&mut self) {
        for index in 0..self.rings.len() {
            if let Some(Notifier::Fd(kick)) = &self.rings[index].kick
                && readable(kick)
            {
                let mut count = [0; 8];
                match rustix::io::read(kick, &mut count) {
                    Ok(1..) if count != [0; 8] => self.look(Some(index)),
                    Err(Errno::AGAIN) => {}
                    // What is no eventfd kicks no more.
                    _ if self.is("spins-on-bad-kicks") => {}
                    _ if self.is("aborts-on-bad-kicks") => std::process::abort(),
                    _ => self.rings[index].kick = None,
                }
            }
            if matches!(self.rings[index].kick, Some(Notifier::Poll)) {
                self.look(Some(index));
            }
        }
    }

    /// Serves one ring that was kicked, or all when something about them changed.
    fn look(&mut self, kicked: Option<usize>) {
        for index in 0..self.rings.len() {
            let number = u16::try_from(index).expect("small");
            let wanted = match kicked {
                Some(which) => which == index,
                None => !self.is("waits-for-a-kick"),
            };
            let by_itself = self.backend.acked_features() & virtio::PROTOCOL_FEATURES == 0;
            let enabled = self.backend.ring(number).is_some_and(|ring| ring.enabled)
                && !(by_itself && self.is("enables-nothing-by-itself"));
            if wanted && (enabled || self.is("ignores-enable")) {
                self.serve(index);
            }
        }
    }

    fn serve(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        let Some(mut queue) = ring.queue.take() else { return };
        if !ring.parked && !ring.broken {
            let outcome = self.drain(index, &mut queue);
            if outcome.is_err() {
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
        loop {
            while let Some(mut chain) = queue.pop()? {
                self.rings[index].requests += 1;
                if self.is("tires-of-requests") && self.rings[index].requests > 35 {
                    continue;
                }
                let mut written = self.request(&mut chain);
                if self.is("used-length-0") {
                    written = 0;
                }
                queue.complete(chain, written);
                if self.is("one-per-kick") {
                    break;
                }
            }
            let call = queue.publish()? || self.is("ignores-event-idx");
            if (call && !self.is("never-calls")) || self.is("always-calls") {
                self.call(index);
            }
            if self.is("never-asks-for-kicks") || self.is("one-per-kick") || !queue.arm() {
                return Ok(());
            }
        }
    }

    fn call(&self, index: usize) {
        let Some(call) = &self.rings[index].call else { return };
        if self.is("blocks-on-calls") {
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        } else if add_one(call).is_err() && self.is("aborts-on-bad-calls") {
            std::process::abort();
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
        match self.fault.as_str() {
            "aborts-on-broken-rings" => std::process::abort(),
            "spins-on-broken-rings" => loop {
                std::hint::spin_loop();
            },
            _ => {}
        }
        if self.is("one-broken-all-broken") {
            self.rings.iter_mut().for_each(|ring| ring.broken = true);
        }
    }

    pub(crate) fn finish_held(&mut self) {
        self.serve_rings();
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

fn descriptor(notifier: Notifier<OwnedFd>) -> Option<OwnedFd> {
    match notifier {
        Notifier::Fd(fd) => Some(fd),
        Notifier::Poll => None,
    }
}

pub(crate) fn memfd(size: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("faulty", rustix::fs::MemfdFlags::CLOEXEC);
    let file = file.expect("a file");
    rustix::fs::ftruncate(&file, size).expect("a size");
    file
}

fn readable(fd: &OwnedFd) -> bool {
    let mut set = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut set, Some(&now)), Ok(1..))
}

/// Signals without ever blocking.
fn add_one(fd: &OwnedFd) -> Result<(), Errno> {
    let mut set = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::OUT)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut set, Some(&now)) {
        Ok(1..) => rustix::io::write(fd, &1u64.to_ne_bytes()).map(|_| ()),
        _ => Ok(()),
    }
}
