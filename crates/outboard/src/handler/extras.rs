//! The virtio status byte, in-band kicks and the shared-memory regions (vhost-user messages 35, 39,
//! 40 and 44).

use outboard_protocol::payload::ShmemConfig;
use outboard_protocol::{Refusal, RunState};

use super::session::Session;
use crate::device::VhostUserDevice;
use crate::error::HostError;
use crate::mailbox::Change;
use crate::notify::Kick;
use crate::reactor::Reactor;

/// virtio 1.3 §2.1: FEATURES_OK.
const FEATURES_OK: u8 = 8;
/// virtio 1.3 §2.1: DEVICE_NEEDS_RESET.
const NEEDS_RESET: u8 = 0x40;

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// SET_STATUS: 0 resets; FEATURES_OK stays clear until features were accepted.
    pub(super) async fn set_status(&mut self, status: u8) -> Result<(), HostError> {
        if status == 0 {
            self.stop_all().await?;
            self.forget_state().await;
            self.device.reset().await?;
            self.channel.forget_mappings();
        }
        let refused = if self.backend.features_set() { 0 } else { FEATURES_OK };
        self.status = status & !refused & !NEEDS_RESET;
        Ok(())
    }

    /// GET_STATUS: a ring that its driver broke needs a reset.
    pub(super) fn status(&self) -> u8 {
        let broken = self.backend.rings().iter().any(|ring| ring.run == RunState::Broken);
        self.status | if broken { NEEDS_RESET } else { 0 }
    }

    /// VRING_KICK: starts the ring if it is stopped; answered when the ring was processed.
    pub(super) async fn kick_in_band(&mut self, index: u16) -> Result<(), Refusal> {
        if !self.is_running(index) {
            self.set_kick_way(index, Kick::Message).await?;
        }
        self.change(index, Change::Process).await
    }

    /// GET_SHMEM_CONFIG: the same for as long as the connection lives.
    pub(super) fn shmem_config(&mut self) -> Box<ShmemConfig> {
        let mut config = Box::new(ShmemConfig::default());
        let regions = self.device.hooks().map(|hooks| hooks.shared_memory());
        for region in regions.unwrap_or_default() {
            if let Some(size) = config.sizes.get_mut(usize::from(region.id)) {
                *size = region.size;
            }
        }
        let used = config.sizes.iter().filter(|size| **size != 0).count();
        config.count = u32::try_from(used).unwrap_or(u32::MAX);
        config
    }
}
