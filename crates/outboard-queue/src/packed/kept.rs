//! The device side of a packed ring whose requests are kept track of in an in-flight region: see `inflight.rs` for what
//! is noted there and when.
//!
//! Invariant: as with a log, the quick walk takes nothing and every publication is an unusual one.

use super::device::PackedDevice;
use super::inflight::{Inflight, Resumed};
use super::walk::Piece;
use crate::chain::Chain;
use crate::error::RingError;
use crate::inflight::InflightArea;
use crate::walk::Health;

impl PackedDevice {
    /// Keeps track of requests in `area` from now on, and takes up what an earlier process left there: its requests are
    /// owed, and where the ring goes on follows from them.
    pub(crate) fn set_inflight(&mut self, area: InflightArea) -> Result<(), RingError> {
        let ring = &self.cells.ring;
        let (inflight, resumed) = Inflight::start(area, ring, self.used_place(), self.is_anew)?;
        if let Some(Resumed { used, held }) = resumed {
            self.go_on_at(used, held)?;
        }
        self.inflight = Some(Box::new(inflight));
        self.choose_way();
        Ok(())
    }

    /// Chains of an earlier process that were not taken again.
    pub(crate) fn owed(&self) -> u16 {
        self.inflight.as_ref().map_or(0, |inflight| inflight.owed())
    }

    /// The oldest chain of an earlier process. Its descriptors were accounted for when the region was taken up.
    pub(crate) fn pop_owed(&mut self) -> Result<Option<Chain>, RingError> {
        if self.health != Health::Live {
            return self.tell(None);
        }
        let Some(pieces) = self.inflight.as_ref().and_then(|inflight| inflight.next_owed()) else {
            return Ok(None);
        };
        let chain = self.take_again(&pieces);
        self.tell(chain)
    }

    fn take_again(&mut self, pieces: &[Piece]) -> Option<Chain> {
        let mut parts = self.chains.take_any(&self.source.view);
        let count = u16::try_from(pieces.len()).unwrap_or(u16::MAX);
        let walked = self.source.walk_again(pieces, &mut parts.buffers);
        let walked = walked.and_then(|walked| {
            self.chains.budget.charge(&mut parts, walked.pieces)?;
            let id = walked.taken.id;
            let left = 16 * u32::from(self.layout.size - self.owed_at.at);
            self.chains.hold(id, 16 * u32::from(count), left).map(|()| id)
        });
        match walked {
            Ok(id) => {
                self.owed_at.advance(count, self.layout.size);
                self.owed = self.owed.saturating_sub(16 * u32::from(count));
                parts.is_named(id);
                if let Some(log) = &mut self.log {
                    log.taken(id, &parts.buffers);
                }
                if let Some(inflight) = &mut self.inflight {
                    inflight.took_owed(id);
                }
                Some(Chain(parts))
            }
            Err(error) => self.refuse(parts, error),
        }
    }

    /// A chain that was taken is noted before the device sees it.
    pub(super) fn note_taken(&mut self, chain: Chain, pieces: &[Piece]) -> Option<Chain> {
        let id = chain.head();
        if let Some(inflight) = &mut self.inflight
            && let Err(error) = inflight.taken(id, pieces)
        {
            // It is not in flight after all.
            self.left += self.chains.release(u32::from(id));
            return self.refuse(chain.0, error);
        }
        Some(chain)
    }
}
