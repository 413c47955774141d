//! The model of a back-end: what each message is answered with, and what it does to the rings,
//! written down a second time from the specification and the contract, as plainly as can be.
//!
//! What a message's shape is (lengths, descriptors, features, forms of its errors) comes from the
//! message table; what it means does not.

use outboard_protocol::ProtocolFeatures as P;
use outboard_protocol::table::{ErrorForm, MessageInfo, Negotiated, Side, info};
use std::collections::VecDeque;

use super::guest::{Guest, Mem, Reg};
use super::log::{LOG_ALL, LogBase};
use super::notes::Region;
use super::ring::{Change, KickWay, Live, Notify};
use crate::cover::reached;

/// Rings of the device.
pub const QUEUES: usize = 3;
/// The ring whose requests are dropped while it is disabled.
pub const TRANSMITS: usize = 2;
/// Entries of the largest ring.
pub const MAX_SIZE: u32 = 16;
/// Bytes of configuration.
pub const CONFIG: usize = 16;
/// The device's own feature bits.
pub const OWN_FEATURES: u64 = 0b111;
/// Bit 30.
pub const BIT_30: u64 = 1 << 30;
/// Everything that is offered: rings' bits, VERSION_1, RING_RESET.
pub const FEATURES: u64 = OWN_FEATURES | LOG_ALL | 3 << 28 | BIT_30 | 1 << 32 | 1 << 40;
/// Protocol features that the model knows; the others are not offered.
pub const PROTOCOL: P = P::MQ
    .union(P::REPLY_ACK)
    .union(P::BACKEND_REQ)
    .union(P::CONFIG)
    .union(P::RESET_DEVICE)
    .union(P::INBAND_NOTIFICATIONS)
    .union(P::CONFIGURE_MEM_SLOTS)
    .union(P::STATUS)
    .union(P::LOG_SHMFD)
    .union(P::INFLIGHT_SHMFD)
    .union(P::GPA_ADDRESSES);
const MEM_SLOTS: u64 = 509;
const NEED_REPLY: u32 = 8;

/// What a descriptor of a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    Bell(usize),
    File(usize),
    Log(usize),
    Junk,
    Channel,
}

/// A message as it is sent.
#[derive(Clone, Debug)]
pub struct Msg {
    pub id: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    /// The size in the header, when that is a lie.
    pub size: u32,
    pub fds: Vec<Given>,
    /// Descriptors that do not ride with the first byte.
    pub misplaced: bool,
}

/// What a front-end said of a ring.
#[derive(Debug, Default)]
pub struct Ring {
    pub size: Option<u16>,
    pub addr: Option<[u64; 3]>,
    /// Where writes to the used ring are noted.
    pub(super) log: Option<u64>,
    pub base: u16,
    pub enabled: bool,
    /// Kicked, and something was missing.
    pub waits: bool,
    pub kick: Option<KickWay>,
    pub(super) call: Option<Notify>,
    pub(super) err: Option<Notify>,
    pub live: Option<Live>,
}

/// A request turned down, or refused.
pub struct No;

/// What a message has to wait for, in this order.
#[derive(Default)]
pub(super) struct Wait {
    /// Posted one after the other.
    pub(super) post: VecDeque<(usize, Change)>,
    awaiting: VecDeque<usize>,
    stops: VecDeque<usize>,
}

/// What a message does when nothing is to be waited for any more.
pub(super) enum Then {
    Features(u64),
    DisableAll,
    ResetDevice,
    Status(u8),
    Memory(Vec<([u64; 4], Reg)>),
    /// The ring, and whether it ran.
    Base(usize, bool),
    Kicked(usize),
    Enable(usize, bool),
    /// The payload comes back.
    Echo,
    Nothing,
}

/// See the module.
#[derive(Default)]
pub struct Model {
    pub protocol: P,
    pub acked: u64,
    pub own_acked: u64,
    pub(super) features_set: bool,
    pub rings: [Ring; QUEUES],
    pub regions: Vec<([u64; 4], Reg)>,
    pub mem: Mem,
    status: u8,
    pub(super) log: Option<LogBase>,
    pub(super) log_bell: Option<Notify>,
    pub inflight: Option<Region>,
    /// Bytes of the files that the front-end has to have received.
    pub files: Vec<u64>,
    pub channel: bool,
    pub config: [u8; CONFIG],
    pub resets: u32,
    pub refuse_start: bool,
    pub refuse_ack: bool,
    pub refuse_config: bool,
    pub inbox: VecDeque<Msg>,
    waiting: Option<(Msg, Wait, Then)>,
    /// Where the ring stood that was stopped last.
    stopped: u16,
    /// Calls and errors that were signalled while queues were stopped.
    pub signals: Vec<Notify>,
    /// What the front-end has to have received.
    pub out: Vec<u8>,
    /// The connection has ended by now.
    pub closed: bool,
}

pub(super) fn word(payload: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(payload[at..at + 8].try_into().expect("the table checked the length"))
}

pub(super) fn half(payload: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(payload[at..at + 4].try_into().expect("the table checked the length"))
}

impl Model {
    /// What the device keeps when another front-end comes.
    pub fn next_front_end(&self) -> Self {
        let (config, resets, own_acked) = (self.config, self.resets, self.own_acked);
        Self { config, resets, own_acked, ..Self::default() }
    }

    /// Whether a message has not been answered yet.
    pub fn is_busy(&self) -> bool {
        self.waiting.is_some() || !self.inbox.is_empty()
    }

    /// The message that waits.
    pub fn busy_with(&self) -> Option<u32> {
        self.waiting.as_ref().map(|(msg, ..)| msg.id)
    }

    /// Goes on as far as nothing has to be waited for.
    pub fn advance(&mut self, guest: &mut Guest) {
        while !self.closed {
            let Some((msg, mut wait, then)) = self.waiting.take() else {
                let Some(msg) = self.inbox.pop_front() else { return };
                self.take(msg, guest);
                continue;
            };
            if let Some(&ring) = wait.awaiting.front() {
                let live = self.rings[ring].live.as_ref();
                if live.is_some_and(Live::owes) {
                    if live.is_some_and(|live| live.next_mem.is_some()) {
                        reached(format!("conversation drain before {}", msg.id));
                    }
                    self.waiting = Some((msg, wait, then));
                    return;
                }
                wait.awaiting.pop_front();
            } else if let Some((ring, change)) = wait.post.pop_front() {
                self.post(ring, change, &mut wait);
            } else if let Some(&ring) = wait.stops.front() {
                if self.rings[ring].live.as_ref().is_some_and(|live| !live.held.is_empty()) {
                    reached(format!("conversation drain before {}", msg.id));
                    self.waiting = Some((msg, wait, then));
                    return;
                }
                self.stop(ring, guest);
                wait.stops.pop_front();
            } else {
                let payload = self.finish(&msg, then, guest);
                self.succeed(&msg, payload);
                continue;
            }
            self.waiting = Some((msg, wait, then));
        }
    }

    pub(super) fn post(&mut self, ring: usize, change: Change, wait: &mut Wait) {
        if let Some(live) = &mut self.rings[ring].live {
            live.posted.push_back(change);
            wait.awaiting.push_back(ring);
        }
    }

    fn stop(&mut self, ring: usize, guest: &mut Guest) {
        if let Some(mut live) = self.rings[ring].live.take() {
            self.rings[ring].waits = false;
            live.publish(guest);
            self.signals.append(&mut live.signals);
            self.stopped = live.base();
        }
    }

    /// The session is given up: what is in flight goes back with length 0.
    pub fn abandon(&mut self, guest: &mut Guest) {
        self.waiting = None;
        self.inbox.clear();
        for ring in &mut self.rings {
            let Some(mut live) = ring.live.take() else { continue };
            // What comes back to a queue is shown at once. A batch that was complete before is shown
            // at its stop, behind the changes: a new call hears of it besides the one of the swap.
            let comes_back = !live.held.is_empty();
            for taken in std::mem::take(&mut live.held) {
                live.put_used(guest, &taken, 0);
            }
            if comes_back {
                live.publish(guest);
            }
            live.poll_control(guest);
            live.publish(guest);
            self.signals.append(&mut live.signals);
        }
    }

    pub fn is_suspended(&self) -> bool {
        self.live().is_empty()
    }

    pub fn live(&self) -> Vec<usize> {
        (0..QUEUES).filter(|ring| self.rings[*ring].live.is_some()).collect()
    }

    fn row(msg: &Msg) -> Option<&'static MessageInfo> {
        info(Side::FrontEnd, msg.id)
    }

    fn asked(&self, msg: &Msg) -> bool {
        msg.flags & NEED_REPLY != 0 && self.protocol.contains(P::REPLY_ACK)
    }

    fn send(&mut self, id: u32, payload: &[u8]) {
        for word in [id, 5, payload.len() as u32] {
            self.out.extend(word.to_le_bytes());
        }
        self.out.extend(payload);
    }

    fn succeed(&mut self, msg: &Msg, payload: Option<Vec<u8>>) {
        let Some(row) = Self::row(msg) else { return };
        reached(format!("conversation {} done", msg.id));
        match payload {
            Some(payload) => self.send(msg.id, &payload),
            None if row.acknowledges(msg.flags & NEED_REPLY != 0, self.protocol) => {
                self.send(msg.id, &0u64.to_le_bytes());
            }
            None => {}
        }
    }

    /// The error form of a message, or the end where there is none.
    fn refuse(&mut self, msg: &Msg) {
        let Some(row) = Self::row(msg) else { return };
        reached(format!("conversation {} refused", msg.id));
        let asked = row.acknowledges(msg.flags & NEED_REPLY != 0, self.protocol);
        match row.error {
            ErrorForm::Nak if asked => self.send(msg.id, &1u64.to_le_bytes()),
            ErrorForm::Nak => {}
            ErrorForm::Empty => self.send(msg.id, &[]),
            ErrorForm::Status(word) => self.send(msg.id, &word.to_le_bytes()),
            ErrorForm::NoInflight => self.send(msg.id, &[0; 24]),
            ErrorForm::NoSession => {
                let mut session = vec![0; 1072];
                session[1064..].fill(0xff);
                self.send(msg.id, &session);
            }
            ErrorForm::None if asked => self.send(msg.id, &u64::MAX.to_le_bytes()),
            ErrorForm::None => self.close("no error form"),
        }
    }

    fn close(&mut self, why: &str) {
        reached(format!("conversation close: {why}"));
        self.closed = true;
    }

    /// A message is looked at.
    fn take(&mut self, msg: Msg, guest: &mut Guest) {
        if msg.flags & 3 != 1 {
            return self.close("version");
        }
        if msg.flags & 4 != 0 {
            return self.close("reply");
        }
        if msg.size > 4096 {
            return self.close("length");
        }
        let Some(row) = Self::row(&msg) else {
            if self.asked(&msg) {
                self.send(msg.id, &1u64.to_le_bytes());
            }
            return reached("conversation unknown message".into());
        };
        let offered = FEATURES;
        let now =
            Negotiated { offered, acked: self.acked, protocol: self.protocol, gpu_socket: false };
        if !row.needs.is_open(&now) {
            reached("conversation not negotiated".into());
            return match row.error {
                _ if self.asked(&msg) => self.send(msg.id, &1u64.to_le_bytes()),
                ErrorForm::None => {}
                _ => self.refuse(&msg),
            };
        }
        let shaped = row.payload.sizes().allows(msg.size) && row.fds.may_be(msg.fds.len());
        if msg.misplaced || !shaped {
            return self.refuse(&msg);
        }
        let mut wait = Wait::default();
        match self.begin(&msg, &mut wait, guest) {
            Ok((then, None)) => self.waiting = Some((msg, wait, then)),
            Ok((_, Some(payload))) => self.succeed(&msg, Some(payload)),
            Err(No) => self.refuse(&msg),
        }
    }

    fn begin(
        &mut self,
        msg: &Msg,
        wait: &mut Wait,
        guest: &mut Guest,
    ) -> Result<(Then, Option<Vec<u8>>), No> {
        let p = &msg.payload;
        let number = |value: u64| Ok((Then::Nothing, Some(value.to_le_bytes().to_vec())));
        let then = match msg.id {
            1 | 15 | 17 | 36 | 40 => return number(self.number(msg.id)),
            24 => return self.read_config(p).map(|reply| (Then::Nothing, reply)),
            2 => self.set_features(word(p, 0), wait)?,
            3 => Then::Nothing,
            4 => {
                self.enable_all(false, wait);
                Then::DisableAll
            }
            5 | 37 | 38 => self.memory(msg, wait)?,
            6 | 7 => self.set_log(msg, wait)?,
            31 => return self.new_region(msg).map(|reply| (Then::Nothing, Some(reply))),
            32 => self.set_region(msg)?,
            8..=14 | 18 | 35 => self.ring_message(msg, wait, guest)?,
            16 => self.set_protocol(word(p, 0))?,
            21 => {
                if msg.fds != [Given::Channel] {
                    return Err(No);
                }
                self.channel = true;
                Then::Nothing
            }
            25 => self.write_config(p)?,
            34 => {
                wait.stops = self.live().into();
                Then::ResetDevice
            }
            39 => {
                let status = u8::try_from(word(p, 0)).map_err(|_| No)?;
                if status == 0 {
                    wait.stops = self.live().into();
                }
                Then::Status(status)
            }
            other => unreachable!("message {other} is not offered"),
        };
        Ok((then, None))
    }

    /// What a message that asks for a number is answered with.
    fn number(&self, id: u32) -> u64 {
        let broken = |ring: &Ring| ring.live.as_ref().is_some_and(|live| live.broken);
        match id {
            1 => FEATURES,
            15 => PROTOCOL.bits(),
            17 => QUEUES as u64,
            36 => MEM_SLOTS,
            _ => u64::from(self.status | if self.rings.iter().any(broken) { 0x40 } else { 0 }),
        }
    }

    /// The messages that concern one ring.
    fn ring_message(&mut self, msg: &Msg, wait: &mut Wait, guest: &mut Guest) -> Result<Then, No> {
        let p = &msg.payload;
        Ok(match msg.id {
            8 => self.configure(p, guest, |ring, p| {
                let size = half(p, 4);
                if !size.is_power_of_two() || size > MAX_SIZE {
                    return Err(No);
                }
                ring.size = Some(size as u16);
                Ok(())
            })?,
            9 => {
                // The queue hears of it: the log's part of the addresses may have changed.
                let live = self.live();
                let heard = live.into_iter().find(|ring| *ring as u64 == u64::from(half(p, 0)));
                let then = self.addresses(p, guest)?;
                let acked = self.acked;
                let log = heard.map(|ring| (ring, Change::Log(self.ring_log(ring, acked))));
                wait.post.extend(log);
                then
            }
            10 => self.configure(p, guest, |ring, p| {
                ring.base = u16::try_from(half(p, 4)).map_err(|_| No)?;
                Ok(())
            })?,
            11 => {
                let ring = self.index(half(p, 0).into())?;
                let ran = self.rings[ring].live.is_some();
                wait.stops.extend(ran.then_some(ring));
                Then::Base(ring, ran)
            }
            12..=14 => self.notifier(msg, wait, guest)?,
            18 => {
                let ring = self.index(half(p, 0).into())?;
                if half(p, 4) > 1 {
                    return Err(No);
                }
                let enabled = half(p, 4) == 1;
                wait.post.push_back((ring, Change::Enable(enabled)));
                Then::Enable(ring, enabled)
            }
            _ => {
                let ring = self.index(half(p, 0).into())?;
                if self.rings[ring].live.is_none() {
                    self.rings[ring].kick = Some(KickWay::Message);
                    self.try_start(ring, guest)?;
                }
                wait.post.push_back((ring, Change::Process));
                Then::Kicked(ring)
            }
        })
    }

    /// Everything that was waited for has happened.
    fn finish(&mut self, msg: &Msg, then: Then, guest: &mut Guest) -> Option<Vec<u8>> {
        match then {
            Then::Nothing => {}
            Then::Echo => return Some(msg.payload.clone()),
            Then::Features(features) => {
                (self.acked, self.features_set) = (features, true);
                if features & BIT_30 == 0 {
                    self.each(|ring| ring.enabled = true);
                }
                self.start_all(guest);
            }
            Then::DisableAll => self.each(|ring| ring.enabled = false),
            Then::ResetDevice => {
                self.reset();
                (self.acked, self.features_set) = (0, false);
                self.each(|ring| (ring.enabled, ring.waits) = (false, false));
            }
            Then::Status(status) => {
                if status == 0 {
                    self.reset();
                }
                let refused = if self.features_set { 0 } else { 8 };
                self.status = status & !refused & !0x40;
            }
            Then::Memory(regions) => {
                self.start_all(guest);
                self.regions = regions;
            }
            Then::Base(ring, ran) => {
                let stopped = self.stopped;
                let ring = &mut self.rings[ring];
                if ran {
                    ring.base = stopped;
                }
                (ring.kick, ring.waits) = (None, false);
                let mut reply = msg.payload[..4].to_vec();
                reply.extend(u32::from(ring.base).to_le_bytes());
                return Some(reply);
            }
            Then::Kicked(ring) => {
                let ring = &mut self.rings[ring];
                ring.waits = ring.live.is_none();
            }
            Then::Enable(ring, enabled) => self.rings[ring].enabled = enabled,
        }
        None
    }

    fn each(&mut self, change: impl Fn(&mut Ring)) {
        self.rings.iter_mut().for_each(change);
    }

    fn reset(&mut self) {
        self.resets += 1;
        self.config = [0; CONFIG];
    }

    pub(super) fn index(&self, index: u64) -> Result<usize, No> {
        usize::try_from(index).ok().filter(|index| *index < QUEUES).ok_or(No)
    }

    fn enable_all(&self, enabled: bool, wait: &mut Wait) {
        wait.post.extend(self.live().into_iter().map(|ring| (ring, Change::Enable(enabled))));
    }

    fn set_features(&mut self, features: u64, wait: &mut Wait) -> Result<Then, No> {
        let changed = features ^ self.acked;
        let lives = !self.live().is_empty();
        if features & !FEATURES != 0 || (changed & !(BIT_30 | LOG_ALL) != 0 && lives) {
            return Err(No);
        }
        if std::mem::take(&mut self.refuse_ack) {
            return Err(No);
        }
        self.own_acked = features & OWN_FEATURES;
        if changed & LOG_ALL != 0 {
            self.spread_log(features, wait);
        }
        if features & BIT_30 == 0 {
            self.enable_all(true, wait);
        }
        Ok(Then::Features(features))
    }

    fn set_protocol(&mut self, bits: u64) -> Result<Then, No> {
        let features = P::from_bits_retain(bits);
        if !PROTOCOL.contains(features) {
            return Err(No);
        }
        let base = P::BACKEND_REQ | P::REPLY_ACK;
        if features.contains(P::INBAND_NOTIFICATIONS) && !features.contains(base) {
            self.close("in-band notifications alone");
            return Ok(Then::Nothing);
        }
        self.protocol = features;
        Ok(Then::Nothing)
    }
}
