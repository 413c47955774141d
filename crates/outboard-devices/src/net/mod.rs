//! A network card: the device of virtio 1.3 §5.1, on an interface of the host or on a stream socket to passt,
//! QEMU or another program.
//!
//! ```text
//!  guest ─ transmit ─▶ worker ─▶ header checked ─▶ link ─▶ TAP interface (header, packet)
//!        ◀ receive  ─┘  one for each pair, ◀─ filter ◀─┘   or Unix socket (length, packet)
//!        ─ control ──▶  or for several: receive modes, addresses, VLANs, pairs, offloads
//! ```
//! Invariants: a guest gets whole packets that it asked for; what it sends that is no packet is dropped and
//! counted; a peer that takes nothing holds up the guest's transmit queue and nothing else; no lock and no
//! allocation for a packet.
//!
//! ```no_run
//! use outboard::{Server, WorkerDevice};
//! use outboard_devices::net::{Net, NetOptions, Stream};
//!
//! let options = NetOptions::new(Stream::Connect("/tmp/passt_1.socket".into()));
//! let device = WorkerDevice::new(Net::new(&options)?)?;
//! Server::listen("/run/net.sock")?.serve(device)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod card;
mod config;
mod control;
mod filter;
mod frame;
mod link;
mod pcap;
mod port;
mod state;
mod stream;
mod switch;
mod tap;
mod uplink;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;

use outboard::memory::Tap;
use outboard::protocol::{ProtocolFeatures, virtio};
use outboard::{
    BackendChannel, Error, Hooks, Inspect, MakeWorker, Model, QueueSpec, Saved, Snapshot,
};

use card::Card;
pub use card::Counters;
pub use config::{CONFIG_SIZE, feature};
pub use frame::MOST;
use link::Link;
use pcap::Capture;
use port::PortLink;
pub use state::STATE_VERSION;
use state::State;
pub use stream::Stream;
pub use switch::{MOST_PORTS, Port, Switch};
use tap::TapLink;
pub use uplink::Uplink;
pub use worker::NetWorker;

/// The smallest MTU that there is (RFC 791).
const LEAST_MTU: u16 = 68;

/// The most pairs of queues that a card has.
pub const MOST_PAIRS: usize = 8;

/// Names of their queues.
const QUEUES: [(&str, &str); MOST_PAIRS] = [
    ("rx0", "tx0"),
    ("rx1", "tx1"),
    ("rx2", "tx2"),
    ("rx3", "tx3"),
    ("rx4", "tx4"),
    ("rx5", "tx5"),
    ("rx6", "tx6"),
    ("rx7", "tx7"),
];

/// Where a card's packets go.
#[derive(Clone, Debug)]
pub enum Wire {
    /// Over a stream socket.
    Stream(Stream),
    /// To an interface of the host: a queue of it for each pair of queues of the card.
    Tap(Vec<Arc<Tap>>),
    /// To a switch of this process.
    Port(Port),
}

impl From<Stream> for Wire {
    fn from(stream: Stream) -> Self {
        Self::Stream(stream)
    }
}

/// What an operator can set about a card.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// Where its packets go.
    pub wire: Wire,
    /// Its address; None: one of its own.
    pub mac: Option<[u8; 6]>,
    /// The largest packet without its header that the guest is to send; None: it is not told.
    pub mtu: Option<u16>,
    /// A file for all packets, as tcpdump reads it.
    pub pcap: Option<PathBuf>,
    /// Largest ring size: a power of two up to 32768.
    pub queue_size: u16,
    /// Threads that serve the pairs; 0: one for each.
    pub threads: usize,
}

impl NetOptions {
    /// A card on `wire`, with everything else as usual.
    #[must_use]
    pub fn new(wire: impl Into<Wire>) -> Self {
        let wire = wire.into();
        Self { wire, mac: None, mtu: None, pcap: None, queue_size: 1024, threads: 0 }
    }
}

/// The model of a card; [`outboard::WorkerDevice`] makes a whole device of it.
#[derive(Debug)]
pub struct Net {
    card: Arc<Card>,
    own_mac: [u8; 6],
    mtu: Option<u16>,
    queue_size: u16,
    threads: usize,
    /// What the wire carries beside plain packets.
    offloads: u64,
    wire: String,
    /// Its place in a switch.
    port: Option<Port>,
    /// Its state came from another process: the network does not know yet that it is here.
    arrived: bool,
}

impl Net {
    /// Makes the link.
    ///
    /// # Errors
    /// It cannot be made, the capture's file cannot be opened, or the address, the MTU or the queue size is
    /// none.
    pub fn new(options: &NetOptions) -> Result<Self, Error> {
        let size = options.queue_size;
        if !size.is_power_of_two() || size > 32768 {
            return Err(Error::refused(format!(
                "queue size {size}: it must be a power of two up to 32768"
            )));
        }
        if let Some(mtu) = options.mtu.filter(|mtu| *mtu < LEAST_MTU) {
            return Err(Error::refused(format!("MTU {mtu}: it must be at least {LEAST_MTU}")));
        }
        let own_mac = match options.mac {
            Some(mac) if mac[0] & 1 == 1 || mac == [0; 6] => {
                return Err(Error::refused("the address of a card is not a group's, nor zero"));
            }
            Some(mac) => mac,
            None => random_address()?,
        };
        let capture = options.pcap.as_deref().map(Capture::open).transpose()?;
        let (links, offloads, wire) = open(&options.wire)?;
        let pairs = links.len();
        if !(1..=MOST_PAIRS).contains(&pairs) {
            return Err(Error::refused(format!("{pairs} pairs of queues: 1 to {MOST_PAIRS}")));
        }
        let threads = if options.threads == 0 { pairs } else { options.threads.min(pairs) };
        let card = Arc::new(Card::new(links, capture, own_mac, options.mtu.unwrap_or(0))?);
        let (mtu, queue_size, arrived) = (options.mtu, size, false);
        let port = match &options.wire {
            Wire::Port(port) => Some(port.clone()),
            Wire::Stream(_) | Wire::Tap(_) => None,
        };
        Ok(Self { card, own_mac, mtu, queue_size, threads, offloads, wire, port, arrived })
    }

    /// What goes through each pair of queues, also while it runs.
    #[must_use]
    pub fn counters(&self) -> Vec<Counters> {
        self.card.counters.clone()
    }

    /// Its address, unless the driver chooses another one.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.own_mac
    }
}

/// The links of each pair, what they carry beside plain packets, and what they are in words.
fn open(wire: &Wire) -> Result<(Vec<Link>, u64, String), Error> {
    match wire {
        Wire::Stream(stream) => {
            let (Stream::Connect(path) | Stream::Listen(path)) = stream;
            let link = Link::Stream(stream::Link::open(stream)?);
            Ok((vec![link], 0, path.display().to_string()))
        }
        Wire::Port(port) => {
            Ok((vec![Link::Port(PortLink::new(port.clone())?)], 0, "switch".to_owned()))
        }
        Wire::Tap(taps) => {
            let first = taps.first().ok_or_else(|| Error::refused("no queue of an interface"))?;
            let uso = if tap::has_uso(first) { 0 } else { feature::USO };
            let offloads = feature::HOST | feature::GUEST | feature::CTRL_GUEST_OFFLOADS;
            let link = |tap: &Arc<Tap>| TapLink::new(Arc::clone(tap)).map(Link::Tap);
            let links = taps.iter().map(link).collect::<Result<_, _>>()?;
            let offloads = (offloads | feature::MRG_RXBUF) & !uso;
            Ok((links, offloads, first.name().to_owned()))
        }
    }
}

/// An address that no vendor gives away.
fn random_address() -> Result<[u8; 6], Error> {
    let mut mac = [0; 6];
    let mut source = std::fs::File::open("/dev/urandom")?;
    std::io::Read::read_exact(&mut source, &mut mac)?;
    mac[0] = mac[0] & 0xfc | 2;
    Ok(mac)
}

impl Model for Net {
    type Worker = NetWorker;

    fn queues(&self) -> Vec<QueueSpec> {
        let size = self.queue_size;
        let pairs = QUEUES.iter().take(self.card.pairs());
        let pairs =
            pairs.flat_map(|(rx, tx)| [QueueSpec::new(rx, size), QueueSpec::transmit(tx, size)]);
        pairs.chain([QueueSpec::new("control", size)]).collect()
    }

    fn make_worker(&self) -> MakeWorker<NetWorker> {
        let (card, workers) = (Arc::clone(&self.card), self.threads);
        Arc::new(move |context| NetWorker::new(Arc::clone(&card), workers, context))
    }

    fn shows(&mut self, inspect: &Inspect) {
        let wire = inspect.branch("wire");
        wire.set("name", self.wire.as_str());
        wire.set("pairs", self.card.pairs() as u64);
        if let Some(port) = &self.port {
            port.show(&inspect.branch("switch"));
        }
        for (number, counters) in self.card.counters.iter().enumerate() {
            counters.show(&inspect.branch("pairs").branch(number));
        }
    }

    fn threads(&self) -> usize {
        self.threads
    }

    /// A pair's queues are on one thread.
    fn thread_of(&self, queue: u16) -> usize {
        usize::from(queue / 2)
    }

    fn features(&self) -> u64 {
        let always = feature::MAC | feature::STATUS | feature::SPEED_DUPLEX | feature::CTRL_VQ;
        let mtu = if self.mtu.is_some() { feature::MTU } else { 0 };
        let several = if self.card.pairs() > 1 { feature::MQ } else { 0 };
        // Packets leave and come in the order of their buffers.
        let order = virtio::IN_ORDER;
        always | feature::CONTROL | mtu | several | feature::MRG_RXBUF | order | self.offloads
    }

    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        self.card.set_features(features);
        Ok(())
    }

    fn config_size(&self) -> u32 {
        CONFIG_SIZE
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        self.card.shown().read(offset, bytes);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        let asks = self.card.features() & feature::GUEST_ANNOUNCE != 0;
        if std::mem::take(&mut self.arrived) && asks {
            self.card.set_announce(true);
        }
        Ok(())
    }

    fn suspend(&mut self) -> Result<(), Error> {
        self.card.flush_capture();
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.card.forget(self.own_mac);
        self.arrived = false;
        Ok(())
    }

    fn device_type(&self) -> String {
        "net".to_owned()
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        Ok(State::of(&self.card).save())
    }

    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        State::read(saved, &self.card)?.apply(&self.card);
        self.arrived = true;
        Ok(())
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }
}

impl Hooks for Net {
    fn protocol_features(&self) -> ProtocolFeatures {
        let mtu =
            if self.mtu.is_some() { ProtocolFeatures::MTU } else { ProtocolFeatures::empty() };
        ProtocolFeatures::RARP | mtu
    }

    fn back_end_channel(&self) -> Option<BackendChannel> {
        Some(self.card.channel.clone())
    }

    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        self.card.send_rarp(mac);
        Ok(())
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), Error> {
        let most = self.mtu.unwrap_or(u16::MAX);
        if !(LEAST_MTU..=most).contains(&mtu) {
            return Err(Error::refused(format!("MTU {mtu}: it must be {LEAST_MTU} to {most}")));
        }
        self.card.set_mtu(mtu);
        Ok(())
    }
}
