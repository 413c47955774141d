//! Features, owner and reset (vhost-user, "Protocol features", "Starting and stopping rings").
//!
//! Invariant: what is acknowledged is a subset of what is offered and replaces what was
//! acknowledged before; a refused set changes nothing.
//!
//! ACCESS_PLATFORM needs a channel for misses, and acknowledgements: GET_FEATURES shows it once the
//! front-end has negotiated both. (A guest that is handed every bit of GET_FEATURES, as User-mode
//! Linux does before it negotiates protocol features, would use an IOMMU that is not there; QEMU asks
//! a second time afterwards.) A front-end that acknowledges it all the same does no harm.

use super::rings::parse;
use super::{Backend, Commit, Handled, Inbound};
use crate::effect::Effect;
use crate::features::{ProtocolFeatures as P, virtio};
use crate::violation::Violation;

/// What may change while rings are live.
const LIVE_TOGGLES: u64 = virtio::LOG_ALL | virtio::PROTOCOL_FEATURES;

impl<Fd> Backend<Fd> {
    /// What GET_FEATURES answers now.
    pub(super) const fn shown_features(&self) -> u64 {
        let channel = P::BACKEND_REQ.union(P::REPLY_ACK);
        let hidden = if self.now.protocol.contains(channel) { 0 } else { virtio::ACCESS_PLATFORM };
        self.offer.features & !hidden
    }

    pub(super) fn set_features(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let features: u64 = parse(m)?;
        let unoffered = features & !self.now.offered;
        if unoffered != 0 {
            return Err(Violation::Unoffered { message: m.name(), bits: unoffered });
        }
        let changed = (features ^ self.now.acked) & !LIVE_TOGGLES;
        if changed != 0 && self.any_live() {
            return Err(Violation::FeaturesLive { bits: changed });
        }
        let enable_all = features & virtio::PROTOCOL_FEATURES == 0;
        let ticket = self.ticket(m, Commit::Features(features));
        Ok(Some(Effect::SetFeatures { features, enable_all, ticket }))
    }

    pub(super) fn set_protocol_features(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let bits: u64 = parse(m)?;
        let unoffered = bits & !self.offer.protocol_features.bits();
        if unoffered != 0 {
            return Err(Violation::Unoffered { message: m.name(), bits: unoffered });
        }
        let features = P::from_bits_truncate(bits);
        check_dependencies(features)?;
        let ticket = self.ticket(m, Commit::ProtocolFeatures(features));
        Ok(Some(Effect::SetProtocolFeatures { features, ticket }))
    }

    pub(super) fn reset_owner(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let ticket = self.ticket(m, Commit::DisableAll);
        Ok(Some(Effect::ResetOwner { ticket }))
    }

    pub(super) fn reset_device(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let ticket = self.ticket(m, Commit::ResetDevice);
        Ok(Some(Effect::ResetDevice { ticket }))
    }
}

fn check_dependencies(features: P) -> Result<(), Violation> {
    let bits = features.bits();
    let inband = P::BACKEND_REQ | P::REPLY_ACK;
    if features.contains(P::INBAND_NOTIFICATIONS) && !features.contains(inband) {
        return Err(Violation::InbandAlone { features: bits });
    }
    let needs = [
        (P::GET_VRING_BASE_INFLIGHT, P::INFLIGHT_SHMFD),
        (P::SKIP_DRAIN, P::GET_VRING_BASE_INFLIGHT | P::INFLIGHT_SHMFD),
    ];
    for (feature, needed) in needs {
        let missing = needed - features;
        if features.contains(feature) && !missing.is_empty() {
            return Err(Violation::Dependency { features: bits, missing: missing.bits() });
        }
    }
    Ok(())
}
