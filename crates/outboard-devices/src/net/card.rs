//! The card, as far as its workers, its model and its control queue share it.
//!
//! ```text
//!  control queue ─▶ Rules (behind a number that grows) ─▶ each worker's own copy
//!                └▶ offloads, pairs ─▶ the kernel's interface
//! ```
//! Invariant: no packet takes a lock here. A worker looks at a number and takes the rules when it has changed; a
//! capture is the exception, and costs only who asked for one.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard::memory::Tap;
use outboard::{BackendChannel, Counter, Inspect};

use super::config::{Shown, feature};
use super::control::Command;
use super::filter::Filter;
use super::link::Link;
use super::pcap::Capture;
use super::tap;
use crate::bell::Bell;

/// What went through a pair of queues since the card was made.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Packets that the guest got.
    pub received: Counter,
    /// Bytes of them.
    pub received_bytes: Counter,
    /// Packets that passed no filter.
    pub filtered: Counter,
    /// Packets for which the guest's buffers were too small, or which need what it has not agreed to.
    pub too_large: Counter,
    /// Packets that the guest sent.
    pub sent: Counter,
    /// Bytes of them.
    pub sent_bytes: Counter,
    /// What the guest sent that is no packet: too short, too long, with an offload that was never agreed on.
    pub malformed: Counter,
    /// Packets that the guest sent while the link was down.
    pub link_down: Counter,
    /// Packets that the link did not take.
    pub refused: Counter,
    /// Packets that were on their way to the guest as the device ended.
    pub stopped: Counter,
}

impl Counters {
    pub(super) fn show(&self, inspect: &Inspect) {
        for (name, counter) in [
            ("received-packets", &self.received),
            ("received-bytes", &self.received_bytes),
            ("filtered", &self.filtered),
            ("too-large", &self.too_large),
            ("sent-packets", &self.sent),
            ("sent-bytes", &self.sent_bytes),
            ("malformed", &self.malformed),
            ("dropped-link-down", &self.link_down),
            ("dropped-refused", &self.refused),
            ("dropped-stopped", &self.stopped),
        ] {
            inspect.show(name, counter);
        }
    }
}

/// Which packets a driver gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rules {
    pub(super) mac: [u8; 6],
    pub(super) filter: Filter,
    /// The driver has named a VLAN: before that all pass.
    pub(super) names_vlans: bool,
}

impl Rules {
    pub(super) fn new(mac: [u8; 6]) -> Self {
        Self { mac, filter: Filter::default(), names_vlans: false }
    }
}

/// What the driver has said about pairs and offloads, beside its features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
    pub(super) pairs: Option<u16>,
    /// VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET.
    pub(super) offloads: Option<u64>,
}

/// Which queues of the kernel's interface get packets.
#[derive(Debug)]
struct Steering {
    /// Pairs whose receive rings run.
    runs: Vec<bool>,
    /// Queues of the interface that packets come to.
    attached: Vec<bool>,
    said: Said,
    /// The control queue is served here, not by the front-end.
    controlled: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Card {
    rules: Mutex<Arc<Rules>>,
    /// How often the rules have changed.
    changes: AtomicU64,
    steering: Mutex<Steering>,
    /// Pairs that get packets; the others are to get none.
    active: AtomicU16,
    /// The driver's features.
    features: AtomicU64,
    /// Offloads that it understands now, as feature bits.
    offloads: AtomicU64,
    mtu: AtomicU16,
    announce: AtomicBool,
    link_up: AtomicBool,
    /// One for each pair; each worker takes its own.
    links: Vec<Mutex<Option<Link>>>,
    /// The same, where they are the kernel's.
    taps: Vec<Arc<Tap>>,
    pub(super) counters: Vec<Counters>,
    capture: Option<Mutex<Capture>>,
    /// Packets that the first worker is to send.
    errands: Mutex<Vec<Vec<u8>>>,
    pub(super) bell: Bell,
    pub(super) channel: BackendChannel,
}

/// Packets of the card's own that wait for its worker.
const ERRANDS: usize = 64;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Card {
    pub(super) fn new(
        links: Vec<Link>,
        capture: Option<Capture>,
        mac: [u8; 6],
        mtu: u16,
    ) -> std::io::Result<Self> {
        let link_up = links.iter().any(Link::is_up);
        let taps = links.iter().filter_map(|link| match link {
            Link::Tap(link) => Some(Arc::clone(&link.tap)),
            Link::Stream(_) | Link::Port(_) => None,
        });
        let taps: Vec<_> = taps.collect();
        let pairs = links.len();
        let steering = Steering {
            runs: vec![false; pairs],
            attached: vec![true; taps.len()],
            said: Said::default(),
            controlled: false,
        };
        Ok(Self {
            rules: Mutex::new(Arc::new(Rules::new(mac))),
            changes: AtomicU64::new(0),
            steering: Mutex::new(steering),
            active: AtomicU16::new(u16::MAX),
            features: AtomicU64::new(0),
            offloads: AtomicU64::new(0),
            mtu: AtomicU16::new(mtu),
            announce: AtomicBool::new(false),
            link_up: AtomicBool::new(link_up),
            counters: vec![(); pairs].into_iter().map(|()| Counters::default()).collect(),
            links: links.into_iter().map(|link| Mutex::new(Some(link))).collect(),
            taps,
            capture: capture.map(Mutex::new),
            errands: Mutex::new(Vec::new()),
            bell: Bell::new()?,
            channel: BackendChannel::new(),
        })
    }

    pub(super) fn pairs(&self) -> usize {
        self.links.len()
    }

    pub(super) fn shown(&self) -> Shown {
        Shown {
            mac: self.rules().mac,
            link_up: self.link_up.load(Ordering::Relaxed),
            announce: self.announce.load(Ordering::Relaxed),
            mtu: self.mtu(),
            pairs: u16::try_from(self.pairs()).unwrap_or(1),
        }
    }

    pub(super) fn mtu(&self) -> u16 {
        self.mtu.load(Ordering::Relaxed)
    }

    pub(super) fn set_mtu(&self, mtu: u16) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// The driver is to announce itself, or has done so.
    pub(super) fn set_announce(&self, announce: bool) {
        self.announce.store(announce, Ordering::Relaxed);
        if announce {
            self.channel.config_changed();
        }
    }

    /// The link is up, or down; the front-end hears of a change.
    pub(super) fn notice_link(&self, up: bool) {
        if self.link_up.swap(up, Ordering::Relaxed) != up {
            self.channel.config_changed();
        }
    }

    pub(super) fn rules(&self) -> Arc<Rules> {
        Arc::clone(&lock(&self.rules))
    }

    /// Changes whenever [`Card::rules`] does.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    pub(super) fn change_rules(&self, change: impl FnOnce(&mut Rules)) {
        change(Arc::make_mut(&mut lock(&self.rules)));
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// The link of a pair, once: until it is put back.
    pub(super) fn take_link(&self, pair: usize) -> Option<Link> {
        lock(self.links.get(pair)?).take()
    }

    pub(super) fn put_link(&self, pair: usize, link: Link) {
        if let Some(place) = self.links.get(pair) {
            *lock(place) = Some(link);
        }
    }

    pub(super) fn features(&self) -> u64 {
        self.features.load(Ordering::Relaxed)
    }

    /// Offloads that the driver understands now.
    pub(super) fn offloads(&self) -> u64 {
        self.offloads.load(Ordering::Relaxed)
    }

    /// Whether a pair is to get packets.
    pub(super) fn is_active(&self, pair: usize) -> bool {
        pair < usize::from(self.active.load(Ordering::Relaxed))
    }

    /// The queue of commands, if the driver knows of one (virtio 1.3 §5.1.2).
    pub(super) fn control_queue(&self) -> Option<u16> {
        let features = self.features();
        let pairs = if features & feature::MQ != 0 { self.pairs() } else { 1 };
        let index = u16::try_from(2 * pairs).ok();
        index.filter(|_| features & feature::CTRL_VQ != 0)
    }

    pub(super) fn said(&self) -> Said {
        lock(&self.steering).said
    }

    pub(super) fn set_said(&self, said: Said) {
        let mut steering = lock(&self.steering);
        steering.said = said;
        self.apply(&mut steering);
    }

    pub(super) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        self.apply(&mut lock(&self.steering));
    }

    /// A pair's receive ring runs, or no more.
    pub(super) fn runs(&self, pair: usize, runs: bool) {
        let mut steering = lock(&self.steering);
        if let Some(place) = steering.runs.get_mut(pair) {
            *place = runs;
        }
        self.apply(&mut steering);
    }

    /// The control queue runs here: one pair is active until the driver says so (§5.1.6.5.5).
    pub(super) fn is_controlled(&self) {
        let mut steering = lock(&self.steering);
        steering.controlled = true;
        self.apply(&mut steering);
    }

    /// Nobody has said anything (a reset).
    pub(super) fn forget(&self, mac: [u8; 6]) {
        self.change_rules(|rules| *rules = Rules::new(mac));
        self.announce.store(false, Ordering::Relaxed);
        self.features.store(0, Ordering::Relaxed);
        let mut steering = lock(&self.steering);
        (steering.said, steering.controlled) = (Said::default(), false);
        self.apply(&mut steering);
    }

    /// Has the kernel do what the driver has said.
    fn apply(&self, steering: &mut Steering) {
        let features = self.features();
        let offloads = steering.said.offloads.unwrap_or(u64::MAX) & features & feature::GUEST;
        self.offloads.store(offloads, Ordering::Relaxed);
        if let Some(tap) = self.taps.first() {
            // It was asked for all of them before they were offered.
            let _ = tap.set_offloads(tap::offloads(offloads));
        }
        let unsaid = if steering.controlled && features & feature::MQ != 0 { 1 } else { u16::MAX };
        let active = steering.said.pairs.unwrap_or(unsaid);
        self.active.store(active, Ordering::Relaxed);
        if self.taps.len() < 2 {
            return;
        }
        for (pair, tap) in self.taps.iter().enumerate() {
            let (Some(runs), Some(attached)) =
                (steering.runs.get(pair), steering.attached.get_mut(pair))
            else {
                continue;
            };
            // The first one stays: what comes before a driver is ready waits in one place.
            let comes = pair == 0 || (*runs && pair < usize::from(active));
            if *attached != comes && tap.attach(comes).is_ok() {
                *attached = comes;
            }
        }
    }

    pub(super) fn carry_out(&self, command: Command) {
        match command {
            Command::Mode { mode, on } => {
                self.change_rules(|rules| rules.filter.set_mode(mode, on));
            }
            Command::Tables { unicast, multicast } => self.change_rules(|rules| {
                (rules.filter.unicast, rules.filter.multicast) = (unicast, multicast);
            }),
            Command::Address(mac) => self.change_rules(|rules| rules.mac = mac),
            Command::Vlan { vlan, passes } => self.change_rules(|rules| {
                if !std::mem::replace(&mut rules.names_vlans, true) {
                    rules.filter.start_vlans(true);
                }
                rules.filter.set_vlan(vlan, passes);
            }),
            Command::Announced => self.set_announce(false),
            Command::Pairs(pairs) => self.set_said(Said { pairs: Some(pairs), ..self.said() }),
            Command::Offloads(offloads) => {
                self.set_said(Said { offloads: Some(offloads), ..self.said() });
            }
        }
    }

    /// A packet on its way, for the capture.
    pub(super) fn capture(&self, packet: &[u8]) {
        if let Some(capture) = &self.capture {
            lock(capture).packet(packet);
        }
    }

    pub(super) fn flush_capture(&self) {
        if let Some(capture) = &self.capture {
            lock(capture).flush();
        }
    }

    /// Tells the network where `mac` is now: a RARP request for itself (RFC 903), as QEMU sends it.
    pub(super) fn send_rarp(&self, mac: [u8; 6]) {
        let mut packet = Vec::with_capacity(60);
        packet.extend([0xff; 6]);
        packet.extend(mac);
        packet.extend([0x80, 0x35]);
        // Ethernet, IPv4, lengths of their addresses, request reverse.
        packet.extend([0, 1, 8, 0, 6, 4, 0, 3]);
        for address in [mac, mac] {
            packet.extend(address);
            packet.extend([0; 4]);
        }
        packet.resize(60, 0);
        let mut errands = lock(&self.errands);
        // The network is told the same again by the next one.
        if errands.len() < ERRANDS {
            errands.push(packet);
        }
        drop(errands);
        self.bell.ring();
    }

    pub(super) fn errands(&self) -> Vec<Vec<u8>> {
        self.bell.take();
        std::mem::take(&mut *lock(&self.errands))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// R11: they wait for a worker, however many the front-end asks for.
    #[test]
    fn r11_packets_that_the_front_end_has_sent_do_not_pile_up() {
        let card = Card::new(Vec::new(), None, [2; 6], 0).expect("a card");
        (0..1000).for_each(|_| card.send_rarp([2; 6]));
        let waiting = card.errands();
        assert_eq!((waiting.len(), waiting[0].len()), (ERRANDS, 60));
        assert!(card.errands().is_empty());
    }
}
