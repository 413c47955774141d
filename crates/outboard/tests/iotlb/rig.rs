//! A front-end with an IOMMU, driven by hand: what it maps, answers and refuses is the test's business.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outboard::protocol::payload::{IOTLB_MISS, Iotlb};
use outboard::protocol::ticket::Ack;
use outboard::protocol::{ProtocolFeatures, virtio};
use outboard::{
    Deferred, DeviceRequestHandler, Error, HandlerOptions, QueueSpec, Request, Served, Worker,
    WorkerDevice,
};
use outboard_frontend::{
    Channel, ChannelSetup, Connection, SharedMemory, SharedObjects, SharedRegions,
};
use outboard_protocol::{
    ChannelEffect, ChannelRequest, ChannelStep, Refusal, Request as Message, Ticket, VringAddr,
};

use crate::common::{FEATURES, Finished, PATIENCE, PROTOCOL, Ring, SIZE, serve};

/// I/O addresses are guest addresses raised by this.
pub(crate) const IO: u64 = 0x10_0000_0000;
pub(crate) const PAGE: u64 = 4096;
/// How long nothing has to happen.
pub(crate) const MOMENT: Duration = Duration::from_millis(60);

/// Requests that the device holds back.
pub(crate) type Held = Arc<Mutex<Vec<Deferred>>>;

/// Echoes; holds back what begins with `h`.
pub(crate) struct Holder(Held);

impl Worker for Holder {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let mut bytes = vec![0; usize::try_from(request.readable().len()).unwrap()];
        request.readable().read_exact(&mut bytes)?;
        if bytes.first() == Some(&b'h') {
            self.0.lock().unwrap().push(request.defer());
            return Ok(Served::later());
        }
        request.writable().write_all(&bytes)?;
        Ok(request.done(u32::try_from(bytes.len()).unwrap()))
    }
}

/// A miss that the device has told.
pub(crate) struct Miss {
    pub(crate) iova: u64,
    pub(crate) perm: u8,
    pub(crate) ticket: Ticket<Ack>,
}

pub(crate) struct Rig {
    pub(crate) features: u64,
    pub(crate) front: Connection,
    pub(crate) channel: Channel,
    pub(crate) memory: SharedMemory,
    pub(crate) held: Held,
    /// I/O page to guest page and permission: what the front-end grants when it is asked.
    pub(crate) pages: BTreeMap<u64, (u64, u8)>,
    pub(crate) misses: u32,
    pub(crate) thread: JoinHandle<Finished<WorkerDevice<outboard::Plain<Holder>>>>,
}

pub(crate) fn channel(front: &mut Connection) -> Channel {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    front.set_backend_req_fd(&theirs).unwrap();
    let setup = ChannelSetup {
        protocol: PROTOCOL | ProtocolFeatures::BACKEND_REQ,
        features: FEATURES | virtio::ACCESS_PLATFORM,
        queues: 3,
        regions: SharedRegions::default(),
        objects: SharedObjects::new(),
        same_process: false,
        patience: PATIENCE,
    };
    Channel::new(ours.into(), setup).unwrap()
}

impl Rig {
    /// Negotiated with an IOMMU, memory shared, nothing mapped.
    pub(crate) fn new() -> Self {
        Self::with(FEATURES)
    }

    /// The same with packed rings.
    pub(crate) fn packed() -> Self {
        Self::with(FEATURES | virtio::RING_PACKED)
    }

    fn with(features: u64) -> Self {
        let held = Held::default();
        let theirs = Arc::clone(&held);
        let queues = [QueueSpec::new("a", 1024), QueueSpec::new("b", 1024)];
        let device = WorkerDevice::plain(&queues, move |_| Ok(Holder(Arc::clone(&theirs))));
        let handler =
            DeviceRequestHandler::new(device.unwrap(), HandlerOptions::default()).unwrap();
        let (ours, thread) = serve(handler);
        let mut front = Connection::from_fd(ours.into(), PATIENCE).unwrap();
        front.set_owner().unwrap();
        let early = front.get_features().unwrap();
        assert_eq!(early & virtio::ACCESS_PLATFORM, 0, "no channel was negotiated yet");
        front.get_protocol_features().unwrap();
        front.set_protocol_features(PROTOCOL | ProtocolFeatures::BACKEND_REQ).unwrap();
        let offered = front.get_features().unwrap();
        assert_ne!(offered & virtio::ACCESS_PLATFORM, 0);
        let channel = channel(&mut front);
        front.set_features(features | virtio::ACCESS_PLATFORM).unwrap();
        let memory = SharedMemory::with_size(1 << 20).unwrap();
        front.set_mem_table(memory.regions()).unwrap();
        Self { features, front, channel, memory, held, pages: BTreeMap::new(), misses: 0, thread }
    }

    /// The front-end will grant a range of guest addresses, page by page.
    pub(crate) fn allow(&mut self, guest: u64, len: u64, perm: u8) {
        for page in (guest & !(PAGE - 1)..guest + len).step_by(4096) {
            self.pages.insert(page + IO, (page, perm));
        }
    }

    /// A ring whose pages would be granted, started and enabled: it asks for them.
    pub(crate) fn started(&mut self, index: u16) -> Ring {
        let ring = Ring::new(&self.memory, index, self.features);
        self.allow(ring.area.guest(), PAGE, 3);
        self.allow(ring.data.guest(), PAGE, 1);
        self.allow(ring.data.guest() + PAGE, PAGE, 3);
        self.start(&ring, ring.driver.base());
        ring
    }

    pub(crate) fn start(&mut self, ring: &Ring, base: u32) {
        let index = ring.index;
        self.front.set_vring_num(index, SIZE).unwrap();
        self.front
            .call(Message::SetVringAddr(VringAddr {
                index: u32::from(index),
                flags: 0,
                desc: ring.layout.desc + IO,
                avail: ring.layout.avail + IO,
                used: ring.layout.used + IO,
                log_guest_addr: 0,
            }))
            .unwrap();
        self.front.set_vring_base(index, base).unwrap();
        self.front.set_vring_call(index, &ring.call).unwrap();
        self.front.set_vring_err(index, &ring.err).unwrap();
        self.front.set_vring_kick(index, &ring.kick).unwrap();
        self.front.set_vring_enable(index, true).unwrap();
    }

    /// The next miss; none within `time`.
    pub(crate) fn miss(&mut self, time: Duration) -> Option<Miss> {
        match self.request(time)? {
            (Iotlb { iova, perm, kind: IOTLB_MISS, .. }, ticket) => {
                self.misses += 1;
                Some(Miss { iova, perm, ticket })
            }
            (other, _) => panic!("not a miss: {other:?}"),
        }
    }

    /// The next message about the IOTLB; none within `time`.
    pub(crate) fn request(&mut self, time: Duration) -> Option<(Iotlb, Ticket<Ack>)> {
        match self.channel.next_step(time).unwrap()? {
            ChannelStep::Effect(ChannelEffect::Request {
                request: ChannelRequest::Iotlb(entry),
                ticket,
            }) => Some((entry, ticket)),
            other => panic!("not about the IOTLB: {other:?}"),
        }
    }

    /// The entry of the page comes, then the answer. False: the front-end refuses.
    pub(crate) fn settle(&mut self, miss: Miss) -> bool {
        let page = miss.iova & !(PAGE - 1);
        let granted = self.pages.get(&page).copied();
        let granted = granted.filter(|(_, perm)| perm & miss.perm == miss.perm);
        let answer = match granted {
            Some((guest, perm)) => {
                let user = SharedMemory::user_address(guest);
                self.front.iotlb_update(page, PAGE, user, perm).unwrap();
                Ok(())
            }
            None => Err(Refusal::because("not mapped")),
        };
        self.channel.answer(miss.ticket, answer).unwrap();
        granted.is_some()
    }

    /// Answers every miss until the ring gives the request back; its length.
    pub(crate) fn answered(&mut self, ring: &mut Ring) -> u32 {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some((_, written)) = ring.driver.pop_used().unwrap() {
                return written;
            }
            assert!(Instant::now() < until, "no answer on ring {}", ring.index);
            if let Some(miss) = self.miss(Duration::from_millis(5)) {
                self.settle(miss);
            }
        }
    }

    /// One round, misses answered.
    pub(crate) fn round(&mut self, ring: &mut Ring, text: &[u8]) {
        offer(ring, text);
        ring.kick();
        assert_eq!(self.answered(ring) as usize, text.len());
        let mut back = vec![0; text.len()];
        ring.data.read(4096, &mut back).unwrap();
        assert_eq!(back, text);
    }

    /// As [`Rig::round`]; the last miss has its entry, and its answer is still owed.
    pub(crate) fn round_but_for_the_last_answer(&mut self, ring: &mut Ring, text: &[u8]) -> Miss {
        offer(ring, text);
        ring.kick();
        let (until, mut owed) = (Instant::now() + PATIENCE, None::<Miss>);
        while ring.driver.pop_used().unwrap().is_none() {
            assert!(Instant::now() < until, "no answer on ring {}", ring.index);
            let Some(miss) = self.miss(Duration::from_millis(5)) else { continue };
            let page = miss.iova & !(PAGE - 1);
            let (guest, perm) = self.pages[&page];
            let user = SharedMemory::user_address(guest);
            self.front.iotlb_update(page, PAGE, user, perm).unwrap();
            if let Some(before) = owed.replace(miss) {
                self.channel.answer(before.ticket, Ok(())).unwrap();
            }
        }
        owed.unwrap()
    }

    /// Ends the session; it ended well.
    pub(crate) fn leave(self) {
        drop((self.front, self.channel));
        let (ended, _) = self.thread.join().unwrap();
        ended.unwrap();
    }
}

/// One request, its buffers at I/O addresses; not kicked.
pub(crate) fn offer(ring: &mut Ring, text: &[u8]) {
    ring.data.write(0, text).unwrap();
    ring.data.write(4096, &vec![0; text.len()]).unwrap();
    let length = u32::try_from(text.len()).unwrap();
    let at = ring.data.guest() + IO;
    ring.driver.add(&[(at, length)], &[(at + 4096, length)], 7).unwrap();
    ring.driver.publish();
}
