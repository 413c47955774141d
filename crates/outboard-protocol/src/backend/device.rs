//! The requests that concern the device as a whole: configuration, channel, status, state
//! transfer, and those of single device types (vhost-user, "Front-end message types").
//!
//! Invariant: values reach the device only in the range their message allows.

use super::memory::take_fd;
use super::rings::{parse, wrong_size};
use super::{Backend, Commit, Handled, Inbound};
use crate::effect::{Effect, StateDirection};
use crate::payload::{ConfigHead, CryptoSession, DeviceState, MAX_CONFIG_SIZE, Uuid, read};
use crate::violation::Violation;

const CONFIG_GUEST: u32 = 0;
const CONFIG_MIGRATION: u32 = 1;
/// The smallest MTU of IPv4, the lower bound of virtio-net.
const MIN_MTU: u64 = 68;

impl<Fd> Backend<Fd> {
    pub(super) fn get_config(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let (ConfigHead { offset, size, .. }, _) = config(m)?;
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::ReadConfig { offset, size, ticket }))
    }

    pub(super) fn set_config(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let (ConfigHead { offset, flags, .. }, bytes) = config(m)?;
        let migration = match flags {
            CONFIG_GUEST => false,
            CONFIG_MIGRATION => true,
            _ => return Err(illegal(m, "flags", u64::from(flags))),
        };
        let bytes = bytes.to_vec();
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::WriteConfig { offset, bytes, migration, ticket }))
    }

    pub(super) fn set_backend_req_fd(&mut self, mut m: Inbound<Fd>) -> Handled<Fd> {
        let channel = take_fd(&mut m)?;
        let ticket = self.ticket(&m, Commit::Nothing);
        Ok(Some(Effect::SetBackendReqFd { channel, ticket }))
    }

    pub(super) fn gpu_set_socket(&mut self, mut m: Inbound<Fd>) -> Handled<Fd> {
        let socket = take_fd(&mut m)?;
        let ticket = self.ticket(&m, Commit::Nothing);
        Ok(Some(Effect::GpuSetSocket { socket, ticket }))
    }

    pub(super) fn set_device_state_fd(&mut self, mut m: Inbound<Fd>) -> Handled<Fd> {
        let state: DeviceState = parse(&m)?;
        let direction = match state.direction {
            0 => StateDirection::Save,
            1 => StateDirection::Load,
            other => return Err(illegal(&m, "direction", u64::from(other))),
        };
        if state.phase != 0 {
            return Err(illegal(&m, "phase", u64::from(state.phase)));
        }
        let fd = take_fd(&mut m)?;
        let ticket = self.ticket(&m, Commit::Nothing);
        Ok(Some(Effect::SetDeviceStateFd { direction, fd, ticket }))
    }

    pub(super) fn check_device_state(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::CheckDeviceState { ticket }))
    }

    pub(super) fn set_status(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let value: u64 = parse(m)?;
        let status = u8::try_from(value).map_err(|_| illegal(m, "status", value))?;
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::SetStatus { status, ticket }))
    }

    pub(super) fn get_status(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::GetStatus { ticket }))
    }

    pub(super) fn send_rarp(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let mac: [u8; 6] = parse(m)?;
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::SendRarp { mac, ticket }))
    }

    pub(super) fn net_set_mtu(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let value: u64 = parse(m)?;
        let mtu = match u16::try_from(value) {
            Ok(mtu) if value >= MIN_MTU => mtu,
            _ => return Err(illegal(m, "MTU", value)),
        };
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::NetSetMtu { mtu, ticket }))
    }

    pub(super) fn create_crypto_session(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let session: Box<CryptoSession> = Box::new(parse(m)?);
        let keys = session.keys();
        for (len, room) in [(keys.key_len, keys.key_room), (keys.auth_len, keys.auth_room)] {
            if len > room {
                return Err(illegal(m, "key length", u64::from(len)));
            }
        }
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::CreateCryptoSession { session, ticket }))
    }

    pub(super) fn close_crypto_session(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let id: u64 = parse(m)?;
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::CloseCryptoSession { id, ticket }))
    }

    pub(super) fn get_shared_object(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        // QEMU leaves the length at 0, so that no name travels: there is no such object.
        let Some(uuid) = read::<Uuid>(&m.payload) else {
            return self.no_shared_object(m);
        };
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::GetSharedObject { uuid, ticket }))
    }

    pub(super) fn get_shmem_config(&mut self, m: &Inbound<Fd>) -> Handled<Fd> {
        let ticket = self.ticket(m, Commit::Nothing);
        Ok(Some(Effect::GetShmemConfig { ticket }))
    }
}

/// The head and the bytes of a configuration message: at least one byte, as many as announced,
/// within the 256 that exist.
fn config<Fd>(m: &Inbound<Fd>) -> Result<(ConfigHead, &[u8]), Violation> {
    let head: ConfigHead = parse(m)?;
    let bytes = m.payload.get(size_of::<ConfigHead>()..).ok_or_else(|| wrong_size(m))?;
    let ConfigHead { offset, size, .. } = head;
    let inside = offset.checked_add(size).is_some_and(|end| end <= MAX_CONFIG_SIZE);
    if size == 0 || !inside || u32::try_from(bytes.len()) != Ok(size) {
        let payload = bytes.len();
        return Err(Violation::ConfigRange { message: m.name(), offset, size, payload });
    }
    Ok((head, bytes))
}

const fn illegal<Fd>(m: &Inbound<Fd>, what: &'static str, value: u64) -> Violation {
    Violation::Value { message: m.name(), what, value }
}
