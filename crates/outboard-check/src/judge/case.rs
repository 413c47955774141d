//! What a check has in its hands: the back-end, what is known about it, and the time it may take.
//!
//! Invariant: a check makes its connections here, so that the runner can tell afterwards whether the
//! back-end kept something of them.

use std::time::Duration;

use outboard_protocol::features::ProtocolFeatures;

use super::disk::Disk;
use super::finding::{Finding, Outcome, Verdict};
use super::peer::{Life, Peer};
use super::session::{PLAIN, Session, USUAL};
use super::wire::Wire;

/// What was found out about the back-end before the first check.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traits {
    /// Feature bits offered.
    pub(crate) features: u64,
    pub(crate) protocol: ProtocolFeatures,
    /// Rings, where it says.
    pub(crate) queues: u64,
    /// Sectors, when it is a block device.
    pub(crate) capacity: Option<u64>,
    /// It serves another front-end after one has left.
    pub(crate) serves_again: bool,
    /// It is busy with nothing to do, always.
    pub(crate) never_sleeps: bool,
}

/// One case: a check and the back-end that it is played against.
pub(crate) struct Case<'p> {
    pub(crate) peer: &'p mut Peer,
    pub(crate) traits: Traits,
    /// Longest wait for one answer or one request.
    pub(crate) limit: Duration,
    /// How long silence is listened to.
    pub(crate) quiet: Duration,
    pub(crate) seed: u64,
    /// Smaller counts.
    pub(crate) quick: bool,
    /// The check has ended the process: nothing is left to look at.
    pub(crate) ended: bool,
}

impl Case<'_> {
    /// A connection on which nothing was said.
    pub(crate) fn wire(&mut self) -> Outcome<Wire> {
        if !self.traits.serves_again {
            self.peer.renew()?;
        }
        self.peer.connect(self.limit)
    }

    /// A connection that negotiated the usual.
    pub(crate) fn session(&mut self) -> Outcome<Session> {
        self.session_with(PLAIN, USUAL)
    }

    /// A connection that negotiated what is offered of this.
    pub(crate) fn session_with(
        &mut self,
        features: u64,
        protocol: ProtocolFeatures,
    ) -> Outcome<Session> {
        Session::open(self.wire()?, features, protocol)
    }

    /// A connection that negotiated the usual and one protocol feature more.
    pub(crate) fn session_for(
        &mut self,
        feature: ProtocolFeatures,
        name: &str,
    ) -> Outcome<Session> {
        let session = self.session_with(PLAIN, USUAL | feature)?;
        session.needs(feature, name)?;
        Ok(session)
    }

    /// A connection that can show refusals.
    pub(crate) fn acking(&mut self) -> Outcome<Session> {
        let session = self.session()?;
        session.needs_acks()?;
        Ok(session)
    }

    /// Sectors of the block device; other devices have no request that the judge knows.
    pub(crate) fn capacity(&self) -> Outcome<u64> {
        self.traits.capacity.ok_or_else(|| {
            Finding::not_offered("no request is known for this device; it is no block device")
        })
    }

    /// That one process serves one front-end after another; the specification leaves that to the program.
    pub(crate) fn needs_another_turn(&self) -> Outcome {
        match self.traits.serves_again {
            true => Ok(()),
            false => Err(Finding::not_offered("it serves one front-end and ends")),
        }
    }

    /// That the judge may kill the process and start another one.
    pub(crate) fn needs_restarts(&self) -> Outcome {
        match self.peer.was_started_here() {
            true => Ok(()),
            false => Err(Finding::not_offered(
                "its process was found running: only one that the judge starts can be killed",
            )),
        }
    }

    /// Kills the process with SIGKILL, wherever it is, and starts another one in its place. Connections are
    /// the caller's to make anew.
    pub(crate) fn restart(&mut self) -> Outcome {
        self.needs_restarts()?;
        self.lives()?;
        self.peer.replace(Duration::from_secs(10)).map_err(|why| {
            Finding::hangs(format!("killed and started again it does not come up: {why}"))
        })
    }

    /// Rings that the device may have at most. GET_QUEUE_NUM counts "queues" ("Multiple queue support"), which of
    /// a network device are pairs for some (DPDK), and one more controls them.
    pub(crate) const fn most_rings(&self) -> u64 {
        match self.traits.capacity {
            Some(_) => self.traits.queues,
            None => self.traits.queues.saturating_mul(2).saturating_add(1),
        }
    }

    /// A block device with ring 0 running.
    pub(crate) fn disk(&mut self) -> Outcome<Disk> {
        let capacity = self.capacity()?;
        Disk::start(self.session()?, capacity)
    }

    /// A block device with memory shared and no ring set up.
    pub(crate) fn still_disk(&mut self) -> Outcome<Disk> {
        let capacity = self.capacity()?;
        Disk::prepare(self.session()?, capacity)
    }

    /// A block device with ring 0 running and these features.
    pub(crate) fn disk_with(&mut self, features: u64, protocol: ProtocolFeatures) -> Outcome<Disk> {
        let capacity = self.capacity()?;
        Disk::start(self.session_with(PLAIN | features, USUAL | protocol)?, capacity)
    }

    /// A block device with memory shared, no ring set up, and these features.
    pub(crate) fn unstarted_disk(
        &mut self,
        features: u64,
        protocol: ProtocolFeatures,
    ) -> Outcome<Disk> {
        let capacity = self.capacity()?;
        Disk::prepare(self.session_with(PLAIN | features, USUAL | protocol)?, capacity)
    }

    /// That the back-end does not burn processor time now, with nothing to do.
    pub(crate) fn rests(&mut self, when: &str) -> Outcome {
        if self.traits.never_sleeps {
            return Ok(());
        }
        // Again and again: what it still had to finish is no spinning. A fifth: it may have to share the
        // processors with others.
        match self.peer.settles(&[12, 40, 150, 150, 150, 150], 0.2) {
            Some(Err(_)) => {}
            Some(Ok(())) | None => return Ok(()),
        }
        Err(Finding::new(Verdict::Spins, format!("it burns processor time {when}")))
    }

    /// Waits until the back-end has had its turn with what was just sent or kicked: silence before that says nothing.
    pub(crate) fn digests(&self) {
        if !self.traits.never_sleeps {
            self.peer.digests(self.quiet * 8);
        }
    }

    /// That the process lives.
    pub(crate) fn lives(&mut self) -> Outcome {
        match self.peer.life() {
            Life::Died(how) => Err(Finding::new(Verdict::Crashes, how)),
            Life::Alive | Life::Left => Ok(()),
        }
    }
}
