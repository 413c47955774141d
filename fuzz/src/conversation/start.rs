//! The model's rings, up to their start: parameters, doorbells, and what has to be there before a
//! ring runs.

use std::rc::Rc;

use outboard_protocol::ProtocolFeatures as P;

use super::guest::Guest;
use super::model::{Given, Model, Msg, No, QUEUES, Ring, TRANSMITS, Then, Wait, half, word};
use super::ring::{Change, KickWay, Live, NoStart, Notify, Setup};
use crate::cover::reached;

impl Model {
    /// NUM, ADDR, BASE: what was said before stays when the ring cannot start with it.
    pub(super) fn configure(
        &mut self,
        payload: &[u8],
        guest: &mut Guest,
        change: impl FnOnce(&mut Ring, &[u8]) -> Result<(), No>,
    ) -> Result<Then, No> {
        let index = self.index(half(payload, 0).into())?;
        let ring = &mut self.rings[index];
        if ring.live.is_some() && !matches!(payload.len(), 40) {
            return Err(No);
        }
        let before = (ring.size, ring.addr, ring.log, ring.base);
        change(ring, payload)?;
        let fits = ring.fits(self.log) && ring.has_place(index, self.inflight);
        if !fits || (ring.waits && self.try_start(index, guest).is_err()) {
            let ring = &mut self.rings[index];
            (ring.size, ring.addr, ring.log, ring.base) = before;
            return Err(No);
        }
        Ok(Then::Nothing)
    }

    pub(super) fn addresses(&mut self, payload: &[u8], guest: &mut Guest) -> Result<Then, No> {
        self.configure(payload, guest, |ring, p| {
            let (desc, used, avail) = (word(p, 8), word(p, 16), word(p, 24));
            let aligned =
                desc.is_multiple_of(16) && avail.is_multiple_of(2) && used.is_multiple_of(4);
            let addr = Some([desc, avail, used]);
            if half(p, 4) > 1 || !aligned || (ring.live.is_some() && ring.addr != addr) {
                return Err(No);
            }
            ring.addr = addr;
            ring.log = (half(p, 4) == 1).then(|| word(p, 32));
            Ok(())
        })
    }

    pub(super) fn in_band(&self) -> bool {
        self.protocol.contains(P::INBAND_NOTIFICATIONS)
    }

    pub(super) fn notify_way(&self, given: Option<Given>) -> Option<Notify> {
        match given {
            Some(Given::Bell(bell)) => Some(Notify::Bell(bell)),
            Some(_) => Some(Notify::Junk),
            None => self.in_band().then_some(Notify::Message),
        }
    }

    /// KICK, CALL, ERR.
    pub(super) fn notifier(
        &mut self,
        msg: &Msg,
        wait: &mut Wait,
        guest: &mut Guest,
    ) -> Result<Then, No> {
        let value = word(&msg.payload, 0);
        let index = self.index(value & !0x100)?;
        let given = msg.fds.first().copied();
        if given.is_some() != (value & 0x100 == 0) {
            return Err(No);
        }
        let notify = self.notify_way(given);
        match msg.id {
            13 => {
                self.rings[index].call = notify;
                wait.post.push_back((index, Change::Call(notify)));
            }
            14 => {
                self.rings[index].err = notify;
                wait.post.push_back((index, Change::Err(notify)));
            }
            _ => {
                let way = match given {
                    Some(Given::Bell(bell)) => KickWay::Bell(bell),
                    Some(_) => KickWay::Junk,
                    None if self.in_band() => KickWay::Message,
                    None => KickWay::Poll,
                };
                self.rings[index].kick = Some(way);
                if self.rings[index].live.is_some() {
                    wait.post.push_back((index, Change::Kick(way)));
                } else {
                    self.try_start(index, guest)?;
                }
                return Ok(Then::Kicked(index));
            }
        }
        Ok(Then::Nothing)
    }

    pub(super) fn start_all(&mut self, guest: &mut Guest) {
        for ring in 0..QUEUES {
            if self.rings[ring].waits && self.try_start(ring, guest).is_err() {
                reached("conversation a waiting ring does not start".into());
            }
        }
    }

    /// Starts a ring when everything is there; it waits otherwise.
    pub(super) fn try_start(&mut self, index: usize, guest: &mut Guest) -> Result<(), No> {
        let in_band = self.in_band().then_some(Notify::Message);
        let ring = &self.rings[index];
        let (Some(size), Some(user), Some(kick)) = (ring.size, ring.addr, ring.kick) else {
            return Ok(());
        };
        if !self.features_set || self.mem.is_empty() || ring.live.is_some() {
            return Ok(());
        }
        let setup = Setup {
            size,
            user,
            features: self.acked,
            base: ring.base,
            enabled: ring.enabled,
            transmits: index == TRANSMITS,
            kick,
            call: ring.call.or(in_band),
            err: ring.err.or(in_band),
            log: self.ring_log(index, self.acked),
            area: self.inflight.and_then(|region| region.area(index)),
        };
        let mut live = match Live::start(setup, Rc::clone(&self.mem), guest) {
            Ok(live) => live,
            Err(NoStart::Absent) => {
                reached("conversation a ring waits for its memory".into());
                return Ok(());
            }
            Err(NoStart::Wrong) => return Err(No),
        };
        self.signals.append(&mut live.signals);
        if std::mem::take(&mut self.refuse_start) {
            return Err(No);
        }
        reached(format!("conversation ring {index} runs"));
        self.rings[index].live = Some(live);
        self.rings[index].waits = false;
        Ok(())
    }
}
