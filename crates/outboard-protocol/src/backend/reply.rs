//! Answers: success replies, acknowledgements, error forms, commits and roll-backs
//! (vhost-user, "Communication", REPLY_ACK).
//!
//! Invariant: each request passes exactly once through `succeed`, `refuse` or `turn_down`, and
//! these queue at most one frame.

use zerocopy::{FromZeros, IntoBytes};

use super::{Backend, Commit, Handled, Head, Inbound, Pending, Postcopy};
use crate::features::virtio;
use crate::frame::Frame;
use crate::header::Header;
use crate::payload::{
    ConfigHead, CryptoSession, Inflight, MemRegion, MemTableHead, VRING_NO_FD, VringState, read,
};
use crate::ring::{Ring, RingEvent};
use crate::table::{ErrorForm, MessageInfo, ReplyKind};
use crate::ticket::Outcome;
use crate::violation::{Refusal, Violation};

impl<Fd> Backend<Fd> {
    /// Answers a request with a number at once.
    pub(super) fn reply_number(&mut self, m: &Inbound<Fd>, value: u64) -> Handled<Fd> {
        self.succeed(m.head, &m.payload, Outcome::Number(value));
        Ok(None)
    }

    /// Acknowledges a request at once.
    pub(super) fn acknowledge(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        self.succeed(m.head, &m.payload, Outcome::Done);
        Ok(None)
    }

    /// Answers GET_SHARED_OBJECT at once: there is none.
    pub(super) fn no_shared_object(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        self.succeed(m.head, &m.payload, Outcome::Fd(None));
        Ok(None)
    }

    /// Commits or rolls back what a ticket stood for, and replies.
    pub(super) fn finish(&mut self, pending: Pending, outcome: Result<Outcome<Fd>, Refusal>) {
        let Pending { head, echo, commit, .. } = pending;
        match outcome {
            Ok(outcome) => {
                self.commit(commit, &outcome);
                self.succeed(head, &echo, outcome);
            }
            Err(refusal) => {
                // Addresses are waited for, and there is no way to say that there are none.
                let stranded = matches!(commit, Commit::MapTable(_));
                self.roll_back(commit);
                if stranded {
                    let (message, reason) = (head.info.name, refusal.to_string());
                    self.close(Violation::NoErrorForm { message, reason });
                } else if let Err(fatal) = self.refuse(head, &refusal) {
                    self.close(fatal);
                }
            }
        }
    }

    fn commit(&mut self, commit: Commit, outcome: &Outcome<Fd>) {
        match commit {
            Commit::Nothing | Commit::Stored(..) => {}
            Commit::Features(features) => {
                self.now.acked = features;
                self.features_set = true;
                if features & virtio::PROTOCOL_FEATURES == 0 {
                    self.each_ring(|ring| ring.enabled = true);
                }
            }
            Commit::ProtocolFeatures(features) => self.now.protocol = features,
            Commit::DisableAll => self.each_ring(|ring| ring.enabled = false),
            Commit::ResetDevice => {
                self.now.acked = 0;
                self.features_set = false;
                self.each_ring(|ring| {
                    ring.enabled = false;
                    ring.apply(RingEvent::Stopped);
                });
            }
            Commit::Table(regions) => self.regions = regions,
            Commit::MapTable(regions) => {
                (self.mapped, self.postcopy) = (regions, Postcopy::Mapped);
            }
            Commit::RegisterTable => {
                self.regions = std::mem::take(&mut self.mapped);
                self.postcopy = Postcopy::Listening;
            }
            Commit::AddRegion(region) => self.regions.push(region),
            Commit::RemRegion(region) => self.regions.retain(|old| !old.same_slot(&region)),
            Commit::Ring(index, change) => {
                if let Some(ring) = self.ring_mut(index) {
                    change.make(ring);
                }
            }
            Commit::Stop(index) => {
                if let (Some(ring), Outcome::Base(base)) = (self.ring_mut(index), outcome) {
                    ring.apply(RingEvent::Stopped);
                    ring.base = *base;
                }
            }
            Commit::Postcopy(state) => self.postcopy = state,
        }
    }

    fn roll_back(&mut self, commit: Commit) {
        match commit {
            Commit::Stored(index, old) => {
                if let Some(ring) = self.ring_mut(index) {
                    // What the handler reported about the ring meanwhile stays true.
                    *ring = Ring { run: ring.run, kicked: ring.kicked, kick: ring.kick, ..old };
                }
            }
            // END closes the userfaultfd whether or not that went well.
            Commit::Postcopy(Postcopy::Off) => self.postcopy = Postcopy::Off,
            _ => {}
        }
    }

    fn each_ring(&mut self, change: impl Fn(&mut Ring)) {
        self.rings.iter_mut().for_each(change);
    }

    /// Queues the reply of a request that succeeded, if it has one.
    fn succeed(&mut self, head: Head, request: &[u8], outcome: Outcome<Fd>) {
        let Head { header, info } = head;
        if let Outcome::Bases(bases) = outcome {
            let reply = with_bases(request, &bases);
            return self.push(header, &reply, None);
        }
        if !info.reply.is_own() {
            if info.acknowledges(header.need_reply(), self.now.protocol) {
                self.push(header, &0u64.to_ne_bytes(), None);
            }
            return;
        }
        let mut echo = request.to_vec();
        match (info.reply, outcome) {
            (ReplyKind::Fd | ReplyKind::MaybeFd, Outcome::Fd(fd)) => self.push(header, &[], fd),
            (ReplyKind::DeviceState, Outcome::Fd(fd)) => {
                let word = if fd.is_some() { 0 } else { VRING_NO_FD };
                self.push(header, &word.to_ne_bytes(), fd);
            }
            (ReplyKind::Inflight, Outcome::Inflight(area)) => {
                let (inflight, fd) =
                    area.map_or((Inflight::new_zeroed(), None), |(a, f)| (a, Some(f)));
                self.push(header, inflight.as_bytes(), fd);
            }
            (_, Outcome::Number(number)) => self.push(header, &number.to_ne_bytes(), None),
            (_, Outcome::Base(base)) => {
                let index = read::<VringState>(&echo).unwrap_or_default().index;
                self.push(header, VringState { index, num: base }.as_bytes(), None);
            }
            (_, Outcome::Bytes(bytes)) => {
                overlay(&mut echo, size_of::<ConfigHead>(), &bytes);
                self.push(header, &echo, None);
            }
            (_, Outcome::Session(session_id)) => {
                let session = read::<CryptoSession>(&echo).unwrap_or_default();
                self.push(header, CryptoSession { session_id, ..session }.as_bytes(), None);
            }
            (_, Outcome::Shmem(config)) => self.push(header, config.as_bytes(), None),
            (ReplyKind::Log, _) => self.push(header, &echo, None),
            // The rest are status replies: success is 0.
            (_, Outcome::Done | Outcome::Fd(_) | Outcome::Inflight(_) | Outcome::Bases(_)) => {
                self.push(header, &0u64.to_ne_bytes(), None);
            }
        }
    }

    /// Refuses a request that was legal.
    fn refuse(&mut self, head: Head, reason: &Refusal) -> Result<(), Violation> {
        self.error_form(head.header, head.info, reason)
    }

    /// Answers a message that broke a rule, as far as an answer is due. An unknown message, or one
    /// whose feature is missing, has no reply of its own: it is acknowledged with failure when
    /// that was asked for. The error is fatal: no answer is possible where one is waited for.
    pub(super) fn turn_down(
        &mut self,
        header: Header,
        row: Option<&'static MessageInfo>,
        violation: &Violation,
    ) -> Result<(), Violation> {
        let out_of_gate = matches!(violation, Violation::NotNegotiated { .. });
        let asked =
            header.need_reply() && self.now.protocol.contains(crate::ProtocolFeatures::REPLY_ACK);
        match row {
            None if asked => self.push(header, &1u64.to_ne_bytes(), None),
            None => {}
            Some(_) if out_of_gate && asked => self.push(header, &1u64.to_ne_bytes(), None),
            Some(row) if out_of_gate && matches!(row.error, ErrorForm::None) => {}
            Some(row) => return self.error_form(header, row, violation),
        }
        Ok(())
    }

    fn error_form(
        &mut self,
        header: Header,
        row: &'static MessageInfo,
        reason: &impl std::fmt::Display,
    ) -> Result<(), Violation> {
        let asked = row.acknowledges(header.need_reply(), self.now.protocol);
        match row.error {
            ErrorForm::Nak if asked => self.push(header, &1u64.to_ne_bytes(), None),
            ErrorForm::Nak => {}
            ErrorForm::Empty => self.push(header, &[], None),
            ErrorForm::Status(word) => self.push(header, &word.to_ne_bytes(), None),
            ErrorForm::NoInflight => self.push(header, Inflight::new_zeroed().as_bytes(), None),
            ErrorForm::NoSession => {
                let session = CryptoSession { session_id: -1, ..CryptoSession::default() };
                self.push(header, session.as_bytes(), None);
            }
            // All ones: not taken for ring 1, base 0.
            ErrorForm::None if asked => self.push(header, &u64::MAX.to_ne_bytes(), None),
            ErrorForm::None => {
                let (message, reason) = (row.name, reason.to_string());
                return Err(self.close(Violation::NoErrorForm { message, reason }));
            }
        }
        Ok(())
    }

    fn push(&mut self, header: Header, payload: &[u8], fd: Option<Fd>) {
        self.out.push_back(Frame::reply(header.request, payload, fd.into_iter().collect()));
    }
}

/// The table of a request with our addresses in place of the front-end's; as long as it was.
fn with_bases(table: &[u8], bases: &[u64]) -> Vec<u8> {
    let mut table = table.to_vec();
    let slots = table.get_mut(size_of::<MemTableHead>()..).unwrap_or_default();
    for (slot, base) in slots.chunks_exact_mut(size_of::<MemRegion>()).zip(bases) {
        if let Some(region) = read::<MemRegion>(slot) {
            slot.copy_from_slice(MemRegion { user_addr: *base, ..region }.as_bytes());
        }
    }
    table
}

/// Writes `bytes` over `message` from `at` on; what is too long is cut, what is missing is zero.
fn overlay(message: &mut [u8], at: usize, bytes: &[u8]) {
    for (place, byte) in message.iter_mut().skip(at).zip(bytes.iter().chain(std::iter::repeat(&0)))
    {
        *place = *byte;
    }
}
