//! The card between its queues and its link: what passes, what is counted, what a command changes.
//!
//! Invariant: a packet is whole, or it is dropped and counted; nothing of a driver's header is believed
//! that no feature allows (case B62).

use std::sync::atomic::{AtomicU64, Ordering};

use super::config::Shown;
use super::control::Command;
use super::filter::{ETHERNET, Filter};
use super::pcap::Capture;
use super::stream::Link;

/// Packets looked at for one that passes, before other work has its turn.
const LOOKS: u32 = 64;

/// What went through a card since it was made. Each is read by itself: sums of them may be a packet apart.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets that the guest got.
    pub received: AtomicU64,
    /// Bytes of them.
    pub received_bytes: AtomicU64,
    /// Packets that passed no filter.
    pub filtered: AtomicU64,
    /// Packets for which the guest's buffer was too small.
    pub too_large: AtomicU64,
    /// Packets that the guest sent.
    pub sent: AtomicU64,
    /// Bytes of them.
    pub sent_bytes: AtomicU64,
    /// What the guest sent that is no packet: too short, too long, with an offload that was never agreed on.
    pub malformed: AtomicU64,
    /// Packets that the guest sent while the link was down.
    pub link_down: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, more: usize) {
    counter.fetch_add(u64::try_from(more).unwrap_or(0), Ordering::Relaxed);
}

#[derive(Debug)]
pub(super) struct Card {
    pub(super) link: Link,
    pub(super) capture: Capture,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    pub(super) filter: Filter,
    /// The driver has named a VLAN: before that all pass.
    pub(super) names_vlans: bool,
    /// The driver is to announce itself.
    pub(super) announce: bool,
    /// What the driver was last shown of the link.
    shown_up: bool,
    /// The packet that the guest gets next; empty: none.
    packet: Vec<u8>,
}

impl Card {
    pub(super) fn new(link: Link, capture: Capture, mac: [u8; 6], mtu: u16) -> Self {
        let shown_up = link.is_up();
        let (filter, packet) = (Filter::default(), Vec::new());
        let (names_vlans, announce) = (false, false);
        Self { link, capture, mac, mtu, filter, names_vlans, announce, shown_up, packet }
    }

    pub(super) fn shown(&self) -> Shown {
        let Self { mac, announce, mtu, .. } = *self;
        Shown { mac, link_up: self.link.is_up(), announce, mtu }
    }

    /// Whether the link is up or down since this was asked last.
    pub(super) fn link_has_changed(&mut self) -> bool {
        let up = self.link.is_up();
        std::mem::replace(&mut self.shown_up, up) != up
    }

    /// Whether there is a packet for the guest.
    pub(super) fn has_packet(&mut self, counters: &Counters) -> bool {
        for _ in 0..LOOKS {
            if !self.packet.is_empty() {
                return true;
            }
            let Some(length) = self.link.next() else { break };
            self.link.receive(length, &mut self.packet);
            if !self.filter.passes(self.mac, &self.packet) {
                self.packet.clear();
                count(&counters.filtered, 1);
            }
        }
        if self.packet.is_empty() {
            self.capture.flush();
        }
        !self.packet.is_empty()
    }

    /// The packet that [`Card::has_packet`] found; it is gone then.
    pub(super) fn take_packet(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.packet)
    }

    /// The room that a packet had, for the next one.
    pub(super) fn give_back(&mut self, mut room: Vec<u8>) {
        room.clear();
        self.packet = room;
    }

    /// Sends what the guest sent.
    pub(super) fn send(&mut self, packet: &[u8], counters: &Counters) {
        if packet.len() < ETHERNET {
            count(&counters.malformed, 1);
            return;
        }
        self.capture.packet(packet);
        if self.link.send(packet) {
            count(&counters.sent, 1);
            count(&counters.sent_bytes, packet.len());
        } else {
            count(&counters.link_down, 1);
        }
    }

    pub(super) fn carry_out(&mut self, command: Command) {
        match command {
            Command::Mode { mode, on } => self.filter.set_mode(mode, on),
            Command::Tables { unicast, multicast } => {
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
            }
            Command::Address(mac) => self.mac = mac,
            Command::Vlan { vlan, passes } => {
                if !std::mem::replace(&mut self.names_vlans, true) {
                    self.filter.start_vlans(true);
                }
                self.filter.set_vlan(vlan, passes);
            }
            Command::Announced => self.announce = false,
        }
    }

    /// Tells the network where `mac` is now: a RARP request for itself (RFC 903), as QEMU sends it.
    pub(super) fn send_rarp(&mut self, mac: [u8; 6], counters: &Counters) {
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
        self.send(&packet, counters);
    }
}
