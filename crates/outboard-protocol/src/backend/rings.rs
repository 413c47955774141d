//! The requests that concern one ring (vhost-user, "Ring states"; protocol facts b.1 and d).
//!
//! Invariant: a ring index stays as wide as it came until it is compared with the number of rings;
//! what a live ring was started with does not change under it.

use super::{Backend, Commit, Handled, Inbound, RingChange};
use crate::effect::{Effect, Notifier};
use crate::features::virtio;
use crate::payload::{VRING_F_LOG, VringAddr, VringFd, VringState, read, read_u64};
use crate::ring::{Given, Ring};
use crate::table::RingRule;
use crate::violation::Violation;

impl<Fd> Backend<Fd> {
    pub(super) fn set_vring_num(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let (index, size) = self.ring_state(m)?;
        let max = self.offer.max_queue_size;
        let bad = Violation::RingSize { index, size, max };
        let Ok(entries) = u16::try_from(size) else { return Err(bad) };
        let shape = entries.is_power_of_two() || self.is_packed();
        if entries == 0 || entries > max || !shape {
            return Err(bad);
        }
        self.store(m, index, |ring| ring.size = Some(entries))
    }

    pub(super) fn set_vring_addr(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let addr: VringAddr = parse(m)?;
        let index = self.index(m, u64::from(addr.index))?;
        if addr.flags & !VRING_F_LOG != 0 {
            return Err(Violation::RingFlags { index, flags: addr.flags });
        }
        let avail_align = if self.is_packed() { 4 } else { 2 };
        let parts = [
            ("descriptor area", addr.desc, 16),
            ("driver area", addr.avail, avail_align),
            ("device area", addr.used, 4),
        ];
        for (part, addr, align) in parts {
            if !addr.is_multiple_of(align) {
                return Err(Violation::RingAlignment { index, part, addr, align });
            }
        }
        let ring = self.ring_at(index);
        let same = ring.addresses.is_some_and(|old| {
            (old.desc, old.avail, old.used) == (addr.desc, addr.avail, addr.used)
        });
        if ring.run.is_live() && !same {
            return Err(Violation::RingLive { message: m.name(), index });
        }
        self.store(m, index, |ring| ring.addresses = Some(addr))
    }

    pub(super) fn set_vring_base(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let (index, base) = self.ring_state(m)?;
        if !self.is_packed() && base > u32::from(u16::MAX) {
            return Err(Violation::RingBase { index, base });
        }
        self.store(m, index, |ring| ring.base = base)
    }

    pub(super) fn get_vring_base(&mut self, m: &Inbound<Fd>, skip_drain: bool) -> Handled<Fd> {
        let (index, _) = self.ring_state(m)?;
        let ticket = self.ticket(m, Commit::Stop(index));
        Ok(Some(Effect::GetVringBase { index, skip_drain, ticket }))
    }

    pub(super) fn set_vring_kick(&mut self, m: Inbound<Fd>) -> Handled<Fd> {
        let (m, index, kick) = self.notifier(m)?;
        let ticket = self.ticket(&m, Commit::Ring(index, RingChange::Kick(given(&kick))));
        Ok(Some(Effect::SetVringKick { index, kick, ticket }))
    }

    pub(super) fn set_vring_call(&mut self, m: Inbound<Fd>) -> Handled<Fd> {
        let (m, index, call) = self.notifier(m)?;
        let ticket = self.ticket(&m, Commit::Ring(index, RingChange::Call(given(&call))));
        Ok(Some(Effect::SetVringCall { index, call, ticket }))
    }

    pub(super) fn set_vring_err(&mut self, m: Inbound<Fd>) -> Handled<Fd> {
        let (m, index, err) = self.notifier(m)?;
        let ticket = self.ticket(&m, Commit::Ring(index, RingChange::Err(given(&err))));
        Ok(Some(Effect::SetVringErr { index, err, ticket }))
    }

    pub(super) fn set_vring_enable(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let (index, num) = self.ring_state(m)?;
        let enabled = boolean(m, "enable value", num)?;
        let ticket = self.ticket(m, Commit::Ring(index, RingChange::Enabled(enabled)));
        Ok(Some(Effect::SetVringEnable { index, enabled, ticket }))
    }

    pub(super) fn set_vring_endian(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let (index, num) = self.ring_state(m)?;
        let big_endian = boolean(m, "byte order", num)?;
        let ticket = self.ticket(m, Commit::Ring(index, RingChange::BigEndian(big_endian)));
        Ok(Some(Effect::SetVringEndian { index, big_endian, ticket }))
    }

    pub(super) fn vring_kick(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let (index, _) = self.ring_state(m)?;
        let ticket = self.ticket(m, Commit::Ring(index, RingChange::InbandKick));
        Ok(Some(Effect::VringKick { index, ticket }))
    }

    pub(super) fn ring_mut(&mut self, index: u16) -> Option<&mut Ring> {
        self.rings.get_mut(usize::from(index))
    }

    fn ring_at(&self, index: u16) -> Ring {
        self.ring(index).copied().unwrap_or_default()
    }

    const fn is_packed(&self) -> bool {
        self.now.acked & virtio::RING_PACKED != 0
    }

    /// Narrows a ring index, once it is known to be one.
    fn index(&self, m: &Inbound<Fd>, index: u64) -> Result<u16, Violation> {
        let queues = self.rings.len();
        match u16::try_from(index) {
            Ok(narrow) if usize::from(narrow) < queues => Ok(narrow),
            _ => Err(Violation::RingIndex { message: m.name(), index, queues }),
        }
    }

    /// The ring and the number of a [`VringState`], when the ring is in a state for the message.
    fn ring_state(&self, m: &Inbound<Fd>) -> Result<(u16, u32), Violation> {
        let state: VringState = parse(m)?;
        let index = self.index(m, u64::from(state.index))?;
        let needs_stop = m.head.info.rings == RingRule::RingStopped;
        if needs_stop && self.ring_at(index).run.is_live() {
            return Err(Violation::RingLive { message: m.name(), index });
        }
        Ok((index, state.num))
    }

    /// The ring and the descriptor of KICK, CALL and ERR.
    fn notifier(&self, m: Inbound<Fd>) -> Result<(Inbound<Fd>, u16, Notifier<Fd>), Violation> {
        let word = read_u64(&m.payload).map(VringFd).ok_or_else(|| wrong_size(&m))?;
        let index = self.index(&m, word.index())?;
        let Inbound { head, payload, mut fds } = m;
        let got = fds.len();
        let notifier = match (word.has_fd(), fds.pop()) {
            (true, Some(fd)) => Notifier::Fd(fd),
            (false, None) => Notifier::Poll,
            _ => return Err(Violation::FdCount { message: head.info.name, got }),
        };
        Ok((Inbound { head, payload, fds }, index, notifier))
    }

    /// Stores a ring parameter now and remembers the old record for a refusal.
    fn store(
        &mut self,
        m: &Inbound<Fd>,
        index: u16,
        change: impl FnOnce(&mut Ring),
    ) -> Handled<Fd> {
        let old = self.ring_at(index);
        if let Some(ring) = self.ring_mut(index) {
            change(ring);
        }
        let ticket = self.ticket(m, Commit::Stored(index, old));
        Ok(Some(Effect::RingConfigured { index, ticket }))
    }
}

const fn given<Fd>(notifier: &Notifier<Fd>) -> Given {
    match notifier {
        Notifier::Fd(_) => Given::Fd,
        Notifier::Poll => Given::Poll,
    }
}

fn boolean<Fd>(m: &Inbound<Fd>, what: &'static str, num: u32) -> Result<bool, Violation> {
    match num {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Violation::Value { message: m.name(), what, value: u64::from(num) }),
    }
}

/// Reads the payload; its length was checked against the table already.
pub(super) fn parse<Fd, T: zerocopy::FromBytes>(m: &Inbound<Fd>) -> Result<T, Violation> {
    read(&m.payload).ok_or_else(|| wrong_size(m))
}

pub(super) const fn wrong_size<Fd>(m: &Inbound<Fd>) -> Violation {
    Violation::Size { message: m.name(), size: m.payload.len() }
}
