//! From a whole message to its handler: the table's checks, then one call per message.
//!
//! Invariant: a handler sees a request only when its feature is negotiated, its length and its
//! descriptor count can be right, and the state of all rings allows it.

use super::{Backend, Handled, Head, Inbound, Postcopy, code_of};
use crate::decoder::Message;
use crate::table::{FrontendCode as C, MessageInfo, RingRule, Side, info};
use crate::violation::Violation;

impl<Fd> Backend<Fd> {
    /// Checks one message and carries it out. Descriptors of a message that is turned down are
    /// dropped (and so closed) with it.
    pub(super) fn dispatch(&mut self, message: Message<Fd>) -> Handled<Fd> {
        let Message { header, payload, fds, misplaced } = message;
        let request = header.request;
        let (Some(row), Some(code)) = (info(Side::FrontEnd, request), code_of(&header)) else {
            return Err(Violation::UnknownRequest { request });
        };
        if !row.needs.is_open(&self.now) {
            return Err(Violation::NotNegotiated { message: row.name });
        }
        if misplaced > 0 {
            return Err(Violation::FdsMisplaced { request, count: misplaced });
        }
        if !row.payload.sizes().allows(header.size) {
            return Err(Violation::Size { message: row.name, size: payload.len() });
        }
        if !row.fds.may_be(fds.len()) {
            return Err(Violation::FdCount { message: row.name, got: fds.len() });
        }
        self.check_rings(row)?;
        let inbound = Inbound { head: Head { header, info: row }, payload, fds };
        self.call(code, inbound)
    }

    /// The part of the ring rule that concerns all rings; the rest needs the ring's index.
    fn check_rings(&self, row: &MessageInfo) -> Result<(), Violation> {
        let message = row.name;
        match row.rings {
            RingRule::AllStopped if self.any_live() => Err(Violation::RingsLive { message }),
            RingRule::NoMemory
                if !self.regions.is_empty() || self.postcopy != Postcopy::Advised =>
            {
                Err(Violation::PostcopyOrder { message })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn any_live(&self) -> bool {
        self.rings.iter().any(|ring| ring.run.is_live())
    }

    fn call(&mut self, code: C, m: Inbound<Fd>) -> Handled<Fd> {
        match code {
            C::GetFeatures => self.reply_number(&m, self.shown_features()),
            C::SetFeatures => self.set_features(&m),
            C::SetOwner => self.acknowledge(&m),
            C::ResetOwner => self.reset_owner(&m),
            C::SetMemTable => self.set_mem_table(m),
            C::SetLogBase => self.set_log_base(m),
            C::SetLogFd => self.set_log_fd(m),
            C::SetVringNum => self.set_vring_num(&m),
            C::SetVringAddr => self.set_vring_addr(&m),
            C::SetVringBase => self.set_vring_base(&m),
            C::GetVringBase => self.get_vring_base(&m, false),
            C::SetVringKick => self.set_vring_kick(m),
            C::SetVringCall => self.set_vring_call(m),
            C::SetVringErr => self.set_vring_err(m),
            C::GetProtocolFeatures => self.reply_number(&m, self.offer.protocol_features.bits()),
            C::SetProtocolFeatures => self.set_protocol_features(&m),
            C::GetQueueNum => self.reply_number(&m, u64::from(self.offer.queues)),
            C::SetVringEnable => self.set_vring_enable(&m),
            C::SendRarp => self.send_rarp(&m),
            C::NetSetMtu => self.net_set_mtu(&m),
            C::SetBackendReqFd => self.set_backend_req_fd(m),
            C::IotlbMsg => self.iotlb(&m),
            C::SetVringEndian => self.set_vring_endian(&m),
            C::GetConfig => self.get_config(&m),
            C::SetConfig => self.set_config(&m),
            C::CreateCryptoSession => self.create_crypto_session(&m),
            C::CloseCryptoSession => self.close_crypto_session(&m),
            C::PostcopyAdvise => self.postcopy_advise(&m),
            C::PostcopyListen => self.postcopy_listen(&m),
            C::PostcopyEnd => self.postcopy_end(&m),
            C::GetInflightFd => self.get_inflight_fd(&m),
            C::SetInflightFd => self.set_inflight_fd(m),
            C::GpuSetSocket => self.gpu_set_socket(m),
            C::ResetDevice => self.reset_device(&m),
            C::VringKick => self.vring_kick(&m),
            C::GetMaxMemSlots => self.reply_number(&m, self.offer.mem_slots),
            C::AddMemReg => self.add_mem_reg(m),
            C::RemMemReg => self.rem_mem_reg(&m),
            C::SetStatus => self.set_status(&m),
            C::GetStatus => self.get_status(&m),
            C::GetSharedObject => self.get_shared_object(&m),
            C::SetDeviceStateFd => self.set_device_state_fd(m),
            C::CheckDeviceState => self.check_device_state(&m),
            C::GetShmemConfig => self.get_shmem_config(&m),
            C::GetVringBaseSkipDrain => self.get_vring_base(&m, true),
        }
    }
}
