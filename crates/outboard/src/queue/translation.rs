//! A queue behind an IOMMU: what it does when the IOTLB cannot translate an address
//! (vhost-user, "IOMMU support"; VIRTIO_F_ACCESS_PLATFORM).
//!
//! ```text
//!  pop or ring not found: Untranslated ─▶ question (BackendChannel: miss) ─▶ the queue rests: no look, nothing taken
//!     ▲                                      ╎ answer: mailbox, Change::Translated
//!     └── look ◀── Change::Memory (IOTLB_MSG update, on the main socket, before the answer or after it)
//! ```
//! Invariants: the chain stays in the ring, so that a queue that rests has nothing in flight for it: it
//! can be stopped, drained and invalidated at any time, and nobody ever waits for the answer. The same
//! question is not asked twice while it is open.
//!
//! What ends a rest: the next generation of memory, always. An answer "no" is the end of the ring (its
//! driver used an address that is not mapped, or not for that): the failure is reported and the ring is
//! retired. Ring pages that the front-end refuses leave the ring parked, since nothing was taken from it
//! yet. No answer in time is asked again [`REPEATS`] times; after that, and when there is no channel, the
//! queue rests until memory changes or another channel is there: bytes on a socket are not lost, so what
//! was asked will be answered by a front-end that ever answers. A front-end that answers with ranges that
//! do not help is given up after [`MOST_ROUNDS`] answers without a request taken.

use std::sync::Arc;

use outboard_memory::{AccessError, GuestMemory, IOTLB_ENTRIES, Permission};
use outboard_queue::{DeviceQueue, RingError};
use tracing::{debug, warn};

use super::{Changed, Queue, Setup, StartError, find_ring};
use crate::channel::ChannelError;

/// How often a question that was not answered in time is asked again.
const REPEATS: u8 = 3;
/// Questions for one request, or for the parts of the ring: more than the table has entries means that
/// they push each other out, or that the answers are of no use.
const MOST_ROUNDS: usize = 2 * IOTLB_ENTRIES;

/// How a question stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// No answer yet.
    Open,
    /// The front-end says that it has sent an entry, or will.
    Granted,
    /// It said nothing, or could not be asked.
    Silent,
}

/// What the queue has asked its front-end.
#[derive(Debug)]
struct Question {
    number: u64,
    iova: u64,
    access: Permission,
    standing: Standing,
    repeats: u8,
    /// The generation of memory at the time.
    generation: u64,
}

/// What a queue knows of its IOMMU.
#[derive(Debug, Default)]
pub(super) struct Translation {
    question: Option<Question>,
    asked: u64,
    /// Questions for the next request of the ring, and where the ring stood at the first of them.
    rounds: usize,
    base: u32,
    /// Questions for the parts of the ring since it was there.
    ring_rounds: usize,
}

impl Translation {
    /// The ring is there, whole.
    pub(super) fn ring_found(&mut self) {
        self.ring_rounds = 0;
    }

    /// Counts one more question; false: too many without progress.
    fn count(&mut self, ring: Option<u32>) -> bool {
        let rounds = match ring {
            Some(base) => {
                if std::mem::replace(&mut self.base, base) != base {
                    self.rounds = 0;
                }
                &mut self.rounds
            }
            None => &mut self.ring_rounds,
        };
        *rounds += 1;
        *rounds <= MOST_ROUNDS
    }
}

/// An access that the IOTLB does not translate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Missing {
    iova: u64,
    len: u64,
    access: Permission,
    /// An entry is there, but it does not permit the access.
    denied: bool,
}

impl Missing {
    /// What an error says is missing, if it is that.
    fn of(error: AccessError) -> Option<Self> {
        match error {
            AccessError::Miss { iova, len, access } => {
                Some(Self { iova, len, access, denied: false })
            }
            AccessError::Denied { iova, len, access } => {
                Some(Self { iova, len, access, denied: true })
            }
            _ => None,
        }
    }
}

/// The part of the ring that waits for the IOTLB.
fn missing_part(error: &StartError) -> Option<Missing> {
    match error {
        StartError::Ring(RingError::Placement { source, .. }) => Missing::of(*source),
        _ => None,
    }
}

impl Queue {
    /// The ring could not be read on: a rule was broken, or an address has no translation.
    #[cold]
    pub(super) fn failed(&mut self, error: &RingError) {
        match error {
            RingError::Untranslated { source, .. } if let Some(missing) = Missing::of(*source) => {
                self.need(missing);
            }
            error => self.retire(error),
        }
    }

    /// A queue without its ring was to look at it: behind an IOMMU the parts that are missing are asked for.
    #[cold]
    pub(super) fn seek_ring(&mut self) {
        if !self.memory.is_behind_iommu() || self.ring.is_some() {
            return;
        }
        match find_ring(&self.setup, self.setup.base, &self.memory) {
            Ok(ring) => {
                self.recovering = ring.owed() != 0;
                self.ring = Some(ring);
                self.translation.ring_found();
            }
            Err(error) => match missing_part(&error) {
                Some(missing) => self.need(missing),
                None => warn!(queue = self.setup.index, "ring parked: {error}"),
            },
        }
    }

    /// Asks for what is missing, unless that was asked already, and rests.
    fn need(&mut self, missing: Missing) {
        let generation = self.memory.generation();
        self.resting = true;
        let asked = self.translation.question.as_ref();
        let same = asked.filter(|q| (q.iova, q.access) == (missing.iova, missing.access));
        match same {
            // The entry may come after the answer.
            Some(Question { standing: Standing::Open, .. }) => return,
            Some(Question { standing: Standing::Granted, generation: then, .. }) => {
                if *then == generation {
                    return;
                }
                if missing.denied {
                    self.refuse_access(missing);
                    return;
                }
            }
            Some(Question { standing: Standing::Silent, .. }) | None => {}
        }
        self.ask(missing, 0);
    }

    fn ask(&mut self, missing: Missing, repeats: u8) {
        let translation = &mut self.translation;
        if !translation.count(self.ring.as_ref().map(DeviceQueue::base)) {
            self.retire(&format_args!("{MOST_ROUNDS} entries of the IOTLB are not enough"));
            return;
        }
        translation.asked += 1;
        let number = translation.asked;
        let Missing { iova, access, .. } = missing;
        let generation = self.memory.generation();
        let standing = Standing::Open;
        translation.question =
            Some(Question { number, iova, access, standing, repeats, generation });
        debug!(queue = self.setup.index, "no entry to {access} {iova:#x}: asking");
        self.setup.channel.ask_translation(iova, access, &self.mailbox, number);
    }

    /// The device may not do that, and the front-end says so: reported, and the ring's end.
    fn refuse_access(&mut self, missing: Missing) {
        let Missing { iova, len, access, .. } = missing;
        warn!(queue = self.setup.index, "the IOMMU does not let the device {access} {iova:#x}");
        self.setup.channel.report_access_failure(iova, len, access);
        self.retire(&format_args!("no access to I/O address {iova:#x}"));
    }

    /// The front-end's answer to question `number`.
    pub(super) fn answered(
        &mut self,
        number: u64,
        told: Result<(), ChannelError>,
        changed: &mut Changed,
    ) {
        let question = self.translation.question.as_mut().filter(|q| q.number == number);
        let Some(question) = question else { return };
        let (iova, access, repeats) = (question.iova, question.access, question.repeats);
        match told {
            Ok(()) => {
                question.standing = Standing::Granted;
                // Memory may have changed since it was asked, in vain: look with what is known now.
                self.resting &= self.broken;
                changed.look = true;
            }
            Err(ChannelError::Failed(code)) => {
                question.standing = Standing::Silent;
                debug!(queue = self.setup.index, "no entry to {access} {iova:#x}: {code:#x}");
                if self.ring.is_some() && self.resting && !self.broken {
                    self.refuse_access(Missing { iova, len: 1, access, denied: true });
                }
            }
            Err(ChannelError::Late) if repeats < REPEATS && self.resting && !self.broken => {
                self.ask(Missing { iova, len: 1, access, denied: false }, repeats + 1);
            }
            Err(error) => {
                question.standing = Standing::Silent;
                debug!(queue = self.setup.index, "no answer for {iova:#x}: {error}");
            }
        }
    }

    /// Memory or the channel has changed: what could not be done may be possible now.
    pub(super) fn look_again(&mut self, changed: &mut Changed) {
        if self.resting && !self.broken {
            self.resting = false;
            changed.look = true;
        }
    }

    /// A channel is there: what could not be asked is asked, what is open on the old one too.
    pub(super) fn ask_again(&mut self, changed: &mut Changed) {
        self.translation.question = None;
        self.look_again(changed);
    }
}

/// The ring in `memory`, or nothing yet when parts of it wait for the IOTLB.
pub(super) fn find_or_wait(
    setup: &Setup,
    memory: &Arc<GuestMemory>,
) -> Result<Option<DeviceQueue>, StartError> {
    match find_ring(setup, setup.base, memory) {
        Ok(ring) => Ok(Some(ring)),
        Err(error) if missing_part(&error).is_some() => Ok(None),
        Err(error) => Err(error),
    }
}
