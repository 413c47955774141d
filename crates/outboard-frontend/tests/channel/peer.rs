//! Two peers: one at the other end of a channel, and a device at the other end of the main socket.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outboard_frontend::{
    Channel, ChannelEvent, ChannelSetup, Connection, SharedObjects, SharedRegions, Socket,
    SocketError,
};
use outboard_protocol::payload::{ShmemConfig, ShmemMap};
use outboard_protocol::{
    Backend, ChannelAnswer, ChannelBackend, ChannelRequest, Effect, Offer, ProtocolFeatures, Step,
    virtio,
};

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough to see that nothing comes.
pub(crate) const MOMENT: Duration = Duration::from_millis(50);
/// A page of the host that runs this.
pub(crate) fn page() -> u64 {
    outboard_memory::page_size()
}

/// Everything that a device can offer at once.
pub(crate) fn all_protocol() -> ProtocolFeatures {
    ProtocolFeatures::all() - ProtocolFeatures::XEN_MMAP
}

/// Two regions: number 1 of 16 pages, number 7 of 4.
pub(crate) fn config() -> ShmemConfig {
    let mut config = ShmemConfig { count: 2, ..ShmemConfig::default() };
    config.sizes[1] = 16 * page();
    config.sizes[7] = 4 * page();
    config
}

pub(crate) fn setup() -> ChannelSetup {
    ChannelSetup {
        protocol: all_protocol(),
        features: virtio::ACCESS_PLATFORM,
        queues: 2,
        regions: SharedRegions::new(&config()).expect("regions that make sense"),
        objects: SharedObjects::new(),
        same_process: false,
        patience: PATIENCE,
    }
}

/// A mapping of `pages` pages of region 1 at page `at`, of the file's beginning.
pub(crate) fn map(at: u64, pages: u64) -> ShmemMap {
    ShmemMap {
        shmid: 1,
        shm_offset: at * page(),
        len: pages * page(),
        flags: 1,
        ..ShmemMap::default()
    }
}

/// A file with the number of each page in all of its bytes.
pub(crate) fn file(pages: u8) -> OwnedFd {
    let file = tempfile::tempfile().expect("a file");
    for at in 0..pages {
        let page = vec![at; page().try_into().expect("small")];
        std::io::Write::write_all(&mut &file, &page).expect("room");
    }
    file.into()
}

/// A channel, and the back-end's end of it.
pub(crate) fn channel(setup: ChannelSetup) -> (Channel, BackEnd) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let machine = ChannelBackend::new(setup.protocol, setup.features);
    let channel = Channel::new(ours.into(), setup).expect("a socket");
    (channel, BackEnd::over(theirs.into(), machine))
}

/// The back-end's end of a channel.
pub(crate) struct BackEnd {
    pub(crate) socket: Socket,
    pub(crate) machine: ChannelBackend<OwnedFd>,
}

impl BackEnd {
    pub(crate) fn over(socket: OwnedFd, machine: ChannelBackend<OwnedFd>) -> Self {
        Self { socket: Socket::from_fd(socket).expect("a socket"), machine }
    }

    /// Sends a request.
    pub(crate) fn ask(&mut self, request: ChannelRequest<OwnedFd>) {
        let sent = self.machine.send(request).expect("legal");
        assert!(sent.answer);
        self.flush();
    }

    pub(crate) fn flush(&mut self) {
        while let Some(frame) = self.machine.transmit() {
            let fds: Vec<_> = frame.fds.iter().map(AsFd::as_fd).collect();
            self.socket.send(&frame.bytes, &fds, soon()).expect("room in the socket");
        }
    }

    /// The next answer.
    pub(crate) fn answer(&mut self) -> ChannelAnswer<OwnedFd> {
        loop {
            if let Some(answer) = self.machine.poll().expect("in step") {
                return answer;
            }
            let mut buffer = [0; 64];
            let wanted = self.machine.wanted().min(64);
            let got = self.socket.receive(&mut buffer[..wanted], soon()).expect("an answer");
            self.machine.receive(&buffer[..got.bytes], got.fds);
        }
    }

    /// Sends a request and lets `channel` serve it: the event, and whether the answer was success.
    pub(crate) fn round(
        &mut self,
        channel: &mut Channel,
        request: ChannelRequest<OwnedFd>,
    ) -> (ChannelEvent, Result<Option<OwnedFd>, u64>) {
        self.ask(request);
        let event = channel.next_event(PATIENCE).expect("the channel lives").expect("an event");
        (event, self.answer().result)
    }

    /// As [`Self::round`], for requests that are refused; the reason.
    pub(crate) fn refused(
        &mut self,
        channel: &mut Channel,
        request: ChannelRequest<OwnedFd>,
    ) -> String {
        match self.round(channel, request) {
            (ChannelEvent::Refused { reason }, Err(1)) => reason,
            other => panic!("not refused: {other:?}"),
        }
    }
}

pub(crate) fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// What a device offers that has everything.
pub(crate) fn offer() -> Offer {
    Offer {
        features: virtio::VERSION_1 | virtio::ACCESS_PLATFORM | virtio::NET_MTU,
        protocol_features: all_protocol(),
        queues: 2,
        max_queue_size: 256,
        mem_slots: 8,
        gpu_socket: true,
    }
}

/// A connection to a device whose effects `host` carries out, in a thread.
pub(crate) fn device(
    host: impl FnMut(&mut Backend<OwnedFd>, Effect<OwnedFd>) + Send + 'static,
) -> (Connection, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let thread = std::thread::spawn(move || serve(theirs.into(), host));
    (Connection::from_fd(ours.into(), PATIENCE).expect("a socket"), thread)
}

fn serve(socket: OwnedFd, mut host: impl FnMut(&mut Backend<OwnedFd>, Effect<OwnedFd>)) {
    let socket = Socket::from_fd(socket).expect("a socket");
    let mut machine = Backend::new(offer());
    loop {
        while let Some(step) = machine.poll().expect("in step") {
            match step {
                Step::Effect(effect) => host(&mut machine, effect),
                Step::Violation(violation) => panic!("{violation}"),
            }
        }
        while let Some(frame) = machine.transmit() {
            let fds: Vec<_> = frame.fds.iter().map(AsFd::as_fd).collect();
            socket.send(&frame.bytes, &fds, soon()).expect("room in the socket");
        }
        let mut buffer = [0; 4096];
        let wanted = machine.wanted().min(4096);
        match socket.receive(&mut buffer[..wanted], soon()) {
            Ok(got) => machine.receive(&buffer[..got.bytes], got.fds),
            Err(SocketError::Closed) => return,
            Err(error) => panic!("{error}"),
        }
    }
}
