//! From an effect of the protocol machine to what carries it out, and back with its answer.
//!
//! Invariant: each arm answers its ticket, whatever happened; what ends the connection is an error
//! of the function.

use std::os::fd::OwnedFd;

use outboard_protocol::ticket::Ack;
use outboard_protocol::{Effect, Refusal, Ticket};
use tracing::warn;

use super::session::Session;
use crate::device::VhostUserDevice;
use crate::error::{Error, HostError};
use crate::hooks::Hooks;
use crate::reactor::Reactor;

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// One line per message, by what it concerns: first the session as a whole. What is in none of
    /// these lists cannot come, for its feature is not offered; the dropped ticket would refuse it.
    pub(super) async fn carry_out(&mut self, effect: Effect<OwnedFd>) -> Result<(), HostError> {
        match effect {
            Effect::SetFeatures { features, enable_all, ticket } => {
                let done = self.set_features(features, enable_all).await;
                let accepted = done.is_ok();
                self.acknowledge(ticket, done);
                let protocol = self.backend.acked_protocol_features();
                self.channel.negotiate(protocol, self.backend.acked_features());
                if let Err(refusal) = self.turn_iommu().await {
                    warn!("IOMMU: {refusal}");
                }
                if accepted {
                    // Kicked before the features were known: started before the answer is sent.
                    self.start_all_ready().await;
                }
            }
            Effect::SetProtocolFeatures { ticket, .. } => self.acknowledge(ticket, Ok(())),
            Effect::ResetOwner { ticket } => {
                let done = self.enable_all(false).await;
                self.acknowledge(ticket, done);
            }
            Effect::ResetDevice { ticket } => {
                self.reset_device().await?;
                self.acknowledge(ticket, Ok(()));
                if let Err(refusal) = self.turn_iommu().await {
                    warn!("IOMMU: {refusal}");
                }
            }
            Effect::SetBackendReqFd { channel, ticket } => {
                let done = self.set_channel(channel).await;
                self.acknowledge(ticket, done);
            }
            Effect::SetStatus { status, ticket } => {
                self.set_status(status).await?;
                self.acknowledge(ticket, Ok(()));
            }
            Effect::GetStatus { ticket } => {
                let status = self.status();
                self.backend.answer(ticket, Ok(status));
            }
            other => return self.carry_out_memory(other).await,
        }
        Ok(())
    }

    /// The messages that concern guest memory, and what is written beside it.
    async fn carry_out_memory(&mut self, effect: Effect<OwnedFd>) -> Result<(), HostError> {
        match effect {
            Effect::SetMemTable { regions, ticket } => {
                let done = self.set_mem_table(regions).await;
                self.acknowledge(ticket, done);
            }
            Effect::AddMemRegion { region, fd, ticket } => {
                let done = self.add_mem_region(region, fd).await;
                self.acknowledge(ticket, done);
            }
            Effect::RemMemRegion { region, ticket } => {
                let done = self.rem_mem_region(region).await;
                self.acknowledge(ticket, done);
            }
            Effect::SetLogBase { log, fd, ticket } => {
                let done = self.set_log_base(log, fd).await;
                self.acknowledge(ticket, done);
            }
            Effect::SetLogFd { fd, ticket } => {
                let done = self.set_log_fd(fd).await;
                self.acknowledge(ticket, done);
            }
            Effect::GetInflightFd { num_queues, queue_size, ticket } => {
                let made = self.get_inflight_fd(num_queues, queue_size);
                self.backend.answer(ticket, made);
            }
            Effect::SetInflightFd { inflight, fd, ticket } => {
                let done = self.set_inflight_fd(inflight, fd);
                self.acknowledge(ticket, done);
            }
            Effect::Iotlb { message, ticket } => {
                let done = self.iotlb_message(&message).await;
                self.acknowledge(ticket, done);
            }
            other => return self.carry_out_ring(other).await,
        }
        Ok(())
    }

    /// The messages that concern one ring.
    async fn carry_out_ring(&mut self, effect: Effect<OwnedFd>) -> Result<(), HostError> {
        match effect {
            Effect::RingConfigured { index, ticket } => {
                let done = self.check_ring_inflight(index);
                let done = done.and(self.set_ring_log(index).await);
                let late = self.claim_deadline();
                let done = match done {
                    Ok(()) => self.start_if_ready(index, late).await,
                    refused => refused,
                };
                self.acknowledge(ticket, done);
            }
            Effect::SetVringKick { index, kick, ticket } => {
                let done = self.set_kick(index, kick).await;
                self.acknowledge(ticket, done);
            }
            Effect::SetVringCall { index, call, ticket } => {
                let done = self.set_call(index, call).await;
                self.acknowledge(ticket, done);
            }
            Effect::SetVringErr { index, err, ticket } => {
                let done = self.set_err(index, err).await;
                self.acknowledge(ticket, done);
            }
            Effect::SetVringEnable { index, enabled, ticket } => {
                let done = self.enable(index, enabled).await;
                self.acknowledge(ticket, done);
            }
            Effect::GetVringBase { index, skip_drain, ticket } => {
                let base = self.get_base(index, skip_drain).await?;
                self.backend.answer(ticket, base);
            }
            Effect::VringKick { index, ticket } => {
                let done = self.kick_in_band(index).await;
                self.acknowledge(ticket, done);
            }
            other => self.carry_out_device(other).await,
        }
        Ok(())
    }

    /// The messages that concern the device behind the rings.
    async fn carry_out_device(&mut self, effect: Effect<OwnedFd>) {
        match effect {
            Effect::ReadConfig { offset, size, ticket } => {
                let bytes = self.read_config(offset, size);
                self.backend.answer(ticket, bytes);
            }
            Effect::WriteConfig { offset, bytes, migration, ticket } => {
                let done = self.write_config(offset, &bytes, migration);
                self.acknowledge(ticket, done);
            }
            Effect::SetDeviceStateFd { direction, fd, ticket } => {
                let way = self.set_state_fd(direction, fd).await;
                if let Err(refusal) = &way {
                    warn!("refused: {refusal}");
                }
                self.backend.answer(ticket, way);
            }
            Effect::CheckDeviceState { ticket } => {
                let done = self.check_state().await;
                self.acknowledge(ticket, done);
            }
            Effect::GetShmemConfig { ticket } => {
                let config = self.shmem_config();
                self.backend.answer(ticket, Ok(config));
            }
            Effect::SendRarp { mac, ticket } => {
                let done = self.hook(|hooks| hooks.send_rarp(mac));
                self.acknowledge(ticket, done);
            }
            Effect::NetSetMtu { mtu, ticket } => {
                let done = self.hook(|hooks| hooks.set_mtu(mtu));
                self.acknowledge(ticket, done);
            }
            Effect::CreateCryptoSession { session, ticket } => {
                let id = self.hook(|hooks| hooks.create_crypto_session(&session));
                self.backend.answer(ticket, id);
            }
            Effect::CloseCryptoSession { id, ticket } => {
                let done = self.hook(|hooks| hooks.close_crypto_session(id));
                self.acknowledge(ticket, done);
            }
            Effect::GpuSetSocket { socket, ticket } => {
                let done = self.hook(|hooks| hooks.set_gpu_socket(socket));
                self.acknowledge(ticket, done);
            }
            Effect::GetSharedObject { uuid, ticket } => {
                let object = self.hook(|hooks| hooks.shared_object(uuid.bytes));
                self.backend.answer(ticket, object);
            }
            other => self.carry_out_postcopy(other).await,
        }
    }

    /// Has the device's hooks carry something out.
    fn hook<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Hooks) -> Result<T, Error>,
    ) -> Result<T, Refusal> {
        let hooks = self.device.hooks();
        let hooks = hooks.ok_or_else(|| Refusal::because("the device has no such hook"))?;
        call(hooks).map_err(Refusal::because)
    }

    /// Answers a message that has no reply of its own; a refusal is worth a line in the log.
    pub(super) fn acknowledge(&mut self, ticket: Ticket<Ack>, done: Result<(), Refusal>) {
        if let Err(refusal) = &done {
            warn!("refused: {refusal}");
        }
        self.backend.answer(ticket, done);
    }
}
