//! The messages behind protocol features, and the configuration space.

use std::os::fd::OwnedFd;

use outboard_protocol::Effect;
use outboard_protocol::payload::ShmemConfig;

use super::{Device, SECTORS, memfd, refused};

impl Device {
    pub(super) fn carry_out_optional(&mut self, effect: Effect<OwnedFd>) {
        let Some(effect) = self.carry_out_migration(effect) else { return };
        match effect {
            Effect::ResetOwner { ticket } => self.backend.answer(ticket, Ok(())),
            Effect::ResetDevice { ticket } => {
                if !self.is("reset-leaves-rings") {
                    for index in 0..2 {
                        self.stop(index);
                    }
                }
                self.backend.answer(ticket, Ok(()));
            }
            Effect::ReadConfig { offset, size, ticket } => {
                let bytes = read_config(offset, size);
                self.backend.answer(ticket, Ok(bytes));
            }
            Effect::WriteConfig { ticket, .. } => self.backend.answer(ticket, Err(refused())),
            Effect::SetBackendReqFd { channel, ticket } => {
                let good = self.set_channel(channel);
                self.backend.answer(ticket, if good { Ok(()) } else { Err(refused()) });
            }
            Effect::SetStatus { status, ticket } => {
                self.status = status;
                self.backend.answer(ticket, Ok(()));
            }
            Effect::GetStatus { ticket } => self.backend.answer(ticket, Ok(self.status)),
            Effect::Iotlb { message, ticket } => {
                let good = self.iotlb(&message);
                self.backend.answer(ticket, if good { Ok(()) } else { Err(refused()) });
            }
            Effect::CreateCryptoSession { ticket, .. } => self.backend.answer(ticket, Ok(1)),
            Effect::GetSharedObject { ticket, .. } => {
                let any = self.is("gives-any-object").then(|| memfd(4096));
                self.backend.answer(ticket, Ok(any));
            }
            Effect::GetShmemConfig { ticket } => {
                let mut sizes = Box::new(ShmemConfig { count: 1, padding: 0, sizes: [0; 256] });
                sizes.sizes[3] = if self.is("shmem-odd") { 100 } else { 8192 };
                sizes.count += u32::from(self.is("shmem-miscounted"));
                self.backend.answer(ticket, Ok(sizes));
            }
            // Dropping an effect refuses its request.
            _ => {}
        }
    }

    /// Says that the configuration has changed.
    pub(crate) fn talk(&self) {
        let Some(channel) = &self.channel else { return };
        let _ = rustix::io::write(channel, [2u32, 1, 0].map(u32::to_ne_bytes).as_flattened());
    }

    /// Takes a back-end channel; whether it is one.
    fn set_channel(&mut self, channel: OwnedFd) -> bool {
        let socket = rustix::net::sockopt::socket_type(&channel).is_ok();
        let first = match &self.channel {
            None => true,
            Some(_) if self.is("channel-once") => false,
            Some(old) => !(self.is("channel") && hung_up(old)),
        };
        if self.is("leaks-channels") {
            self.kept.extend(self.channel.take());
        }
        self.channel_is(channel);
        (socket && first) || self.is("channel-unchecked")
    }
}

/// Whether the other end of a socket is gone.
fn hung_up(socket: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut set = [PollFd::new(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut set, Some(&now)) == Ok(1) && set[0].revents().contains(PollFlags::HUP)
}

/// A part of the configuration, with zeros behind its end.
fn read_config(offset: u32, size: u32) -> Vec<u8> {
    let at = usize::try_from(offset).expect("small");
    let end = at + usize::try_from(size).expect("small");
    let mut all = config().to_vec();
    all.resize(all.len().max(end), 0);
    all[at..end].to_vec()
}

/// Capacity, limits and nothing else of note.
fn config() -> [u8; 60] {
    let mut config = [0; 60];
    config[..8].copy_from_slice(&SECTORS.to_le_bytes());
    config[12..16].copy_from_slice(&126u32.to_le_bytes());
    config[36..40].copy_from_slice(&1024u32.to_le_bytes());
    config[40..44].copy_from_slice(&1u32.to_le_bytes());
    config[48..52].copy_from_slice(&1024u32.to_le_bytes());
    config[52..56].copy_from_slice(&1u32.to_le_bytes());
    config
}
