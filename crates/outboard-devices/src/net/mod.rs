//! A network card: the device of virtio 1.3 §5.1, on a stream socket to passt, QEMU or another program.
//!
//! ```text
//!  guest ─ transmit ─▶ worker ─▶ card ─▶ link ─▶ length, packet ─▶ Unix socket
//!        ◀ receive  ─┘             └ filter ◀─ link
//!        ─ control ──▶ receive modes, addresses, VLANs
//! ```
//! Invariants: a guest gets whole packets that it asked for; what it sends that is no packet is dropped and
//! counted; a peer that takes nothing holds up the guest's transmit queue and nothing else.
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
mod pcap;
mod state;
mod stream;
mod worker;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard::protocol::ProtocolFeatures;
use outboard::{BackendChannel, Error, Hooks, MakeWorker, Model, QueueSpec, Saved, Snapshot};

use card::Card;
pub use card::Counters;
pub use config::{CONFIG_SIZE, feature};
use filter::Filter;
use pcap::Capture;
pub use state::STATE_VERSION;
use state::State;
use stream::Link;
pub use stream::{MOST, Stream};
pub use worker::NetWorker;

use crate::watches::Watches;

/// The smallest MTU that there is (RFC 791).
const LEAST_MTU: u16 = 68;

/// What an operator can set about a card.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// Where its packets go.
    pub stream: Stream,
    /// Its address; None: one of its own.
    pub mac: Option<[u8; 6]>,
    /// The largest packet without its header that the guest is to send; None: it is not told.
    pub mtu: Option<u16>,
    /// A file for all packets, as tcpdump reads it.
    pub pcap: Option<PathBuf>,
    /// Largest ring size: a power of two up to 32768.
    pub queue_size: u16,
}

impl NetOptions {
    /// A card on `stream`, with everything else as usual.
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self { stream, mac: None, mtu: None, pcap: None, queue_size: 1024 }
    }
}

/// What the worker and the model share. The model takes the lock while no ring runs, and for RARP and
/// configuration.
#[derive(Debug)]
struct Shared {
    card: Mutex<Card>,
    counters: Arc<Counters>,
    watches: Watches,
    channel: BackendChannel,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Card> {
        self.card.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the front-end of a link that came or went.
    fn notice_link(&self) {
        if self.lock().link_has_changed() {
            self.channel.config_changed();
        }
    }
}

/// The model of a card; [`outboard::WorkerDevice`] makes a whole device of it.
#[derive(Debug)]
pub struct Net {
    shared: Arc<Shared>,
    own_mac: [u8; 6],
    mtu: Option<u16>,
    queue_size: u16,
    /// The driver's features, as far as they are known.
    features: u64,
    /// Its state came from another process: the network does not know yet that it is here.
    arrived: bool,
}

impl Net {
    /// Makes the link.
    ///
    /// # Errors
    /// It cannot be made, the capture's file cannot be written, or the address, the MTU or the queue size is
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
        let capture = match &options.pcap {
            Some(path) => Capture::create(path)?,
            None => Capture::none(),
        };
        let watches = Watches::new()?;
        let link = Link::open(&options.stream, &watches)?;
        let card = Card::new(link, capture, own_mac, options.mtu.unwrap_or(0));
        let (card, counters) = (Mutex::new(card), Arc::default());
        let shared = Shared { card, counters, watches, channel: BackendChannel::new() };
        let (mtu, queue_size) = (options.mtu, size);
        let shared = Arc::new(shared);
        Ok(Self { shared, own_mac, mtu, queue_size, features: 0, arrived: false })
    }

    /// What goes through it, also while it runs.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.shared.counters)
    }

    /// Its address, unless the driver chooses another one.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.own_mac
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
        vec![
            QueueSpec::new("rx", size),
            QueueSpec::transmit("tx", size),
            QueueSpec::new("control", size),
        ]
    }

    fn make_worker(&self) -> MakeWorker<NetWorker> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move |context| NetWorker::new(Arc::clone(&shared), context))
    }

    fn features(&self) -> u64 {
        let always = feature::MAC | feature::STATUS | feature::SPEED_DUPLEX | feature::CTRL_VQ;
        let mtu = if self.mtu.is_some() { feature::MTU } else { 0 };
        always | feature::CONTROL | mtu
    }

    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        self.features = features;
        Ok(())
    }

    fn config_size(&self) -> u32 {
        CONFIG_SIZE
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        self.shared.lock().shown().read(offset, bytes);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        let asks = self.features & feature::GUEST_ANNOUNCE != 0;
        if std::mem::take(&mut self.arrived) && asks {
            self.shared.lock().announce = true;
            self.shared.channel.config_changed();
        }
        Ok(())
    }

    fn suspend(&mut self) -> Result<(), Error> {
        let mut card = self.shared.lock();
        card.link.flush();
        card.capture.flush();
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        let mut card = self.shared.lock();
        card.mac = self.own_mac;
        card.filter = Filter::default();
        (card.names_vlans, card.announce) = (false, false);
        (self.features, self.arrived) = (0, false);
        Ok(())
    }

    fn device_type(&self) -> String {
        "net".to_owned()
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        Ok(State::of(&self.shared.lock()).save())
    }

    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        let mut card = self.shared.lock();
        State::read(saved, &card)?.apply(&mut card);
        drop(card);
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
        Some(self.shared.channel.clone())
    }

    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        self.shared.lock().send_rarp(mac, &self.shared.counters);
        Ok(())
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), Error> {
        let most = self.mtu.unwrap_or(u16::MAX);
        if !(LEAST_MTU..=most).contains(&mtu) {
            return Err(Error::refused(format!("MTU {mtu}: it must be {LEAST_MTU} to {most}")));
        }
        self.shared.lock().mtu = mtu;
        Ok(())
    }
}
