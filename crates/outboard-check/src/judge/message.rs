//! Requests as the judge sends them: any id, any flags, any payload, any descriptors.
//!
//! Invariant: nothing is checked here. The functions make what the specification describes ("Message
//! Specification"), and every part of it can be changed before it is sent.

use std::os::fd::{AsFd, BorrowedFd};

use outboard_memory::RegionSpec;
use outboard_protocol::FrontendCode as Code;
use outboard_protocol::header::{FLAG_NEED_REPLY, Header, VERSION};
use outboard_protocol::payload::{self, MemRegion, VringAddr, VringFd, VringState};
use outboard_protocol::table::{Side, info};
use zerocopy::IntoBytes as _;

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Msg<'f> {
    pub(crate) id: u32,
    pub(crate) flags: u32,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<BorrowedFd<'f>>,
    /// What the header says; the payload's own length when `None`.
    pub(crate) size: Option<u32>,
}

impl<'f> Msg<'f> {
    pub(crate) const fn new(id: u32, payload: Vec<u8>) -> Self {
        Self { id, flags: VERSION, payload, fds: Vec::new(), size: None }
    }

    pub(crate) const fn bare(code: Code) -> Self {
        Self::new(code.id(), Vec::new())
    }

    pub(crate) fn u64(code: Code, value: u64) -> Self {
        Self::new(code.id(), value.to_ne_bytes().to_vec())
    }

    pub(crate) fn state(code: Code, index: u32, num: u32) -> Self {
        Self::new(code.id(), VringState { index, num }.as_bytes().to_vec())
    }

    pub(crate) fn fd(mut self, fd: &'f impl AsFd) -> Self {
        self.fds.push(fd.as_fd());
        self
    }

    pub(crate) const fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    pub(crate) const fn need_reply(mut self) -> Self {
        self.flags |= FLAG_NEED_REPLY;
        self
    }

    pub(crate) const fn says(mut self, size: u32) -> Self {
        self.size = Some(size);
        self
    }

    pub(crate) fn header(&self) -> Header {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        Header { request: self.id, flags: self.flags, size: self.size.unwrap_or(length) }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header().as_bytes().to_vec();
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    pub(crate) fn name(&self) -> String {
        name_of(self.id)
    }
}

/// The name of a front-end message, or its number.
pub(crate) fn name_of(id: u32) -> String {
    info(Side::FrontEnd, id).map_or_else(|| format!("message {id}"), |row| row.name.to_owned())
}

pub(crate) fn get_features() -> Msg<'static> {
    Msg::bare(Code::GetFeatures)
}

pub(crate) fn set_features(value: u64) -> Msg<'static> {
    Msg::u64(Code::SetFeatures, value)
}

pub(crate) fn vring_num(index: u32, num: u32) -> Msg<'static> {
    Msg::state(Code::SetVringNum, index, num)
}

pub(crate) fn vring_base(index: u32, num: u32) -> Msg<'static> {
    Msg::state(Code::SetVringBase, index, num)
}

pub(crate) fn get_base(index: u32) -> Msg<'static> {
    Msg::state(Code::GetVringBase, index, 0)
}

pub(crate) fn enable(index: u32, num: u32) -> Msg<'static> {
    Msg::state(Code::SetVringEnable, index, num)
}

pub(crate) fn vring_addr(addr: &VringAddr) -> Msg<'static> {
    Msg::new(Code::SetVringAddr.id(), addr.as_bytes().to_vec())
}

/// KICK, CALL or ERR with a descriptor.
pub(crate) fn notifier<'f>(code: Code, index: u8, fd: &'f impl AsFd) -> Msg<'f> {
    Msg::u64(code, VringFd::new(index, true).0).fd(fd)
}

/// KICK, CALL or ERR without one (bit 8).
pub(crate) fn polled(code: Code, index: u8) -> Msg<'static> {
    Msg::u64(code, VringFd::new(index, false).0)
}

pub(crate) fn get_config(offset: u32, size: u32) -> Msg<'static> {
    let room = vec![0; usize::try_from(size).unwrap_or(0)];
    Msg::new(Code::GetConfig.id(), payload::encode_config(offset, 0, &room))
}

pub(crate) fn set_config(offset: u32, flags: u32, bytes: &[u8]) -> Msg<'static> {
    Msg::new(Code::SetConfig.id(), payload::encode_config(offset, flags, bytes))
}

/// The wire form of a region.
pub(crate) const fn region(spec: &RegionSpec) -> MemRegion {
    MemRegion {
        guest_addr: spec.guest_addr,
        size: spec.size,
        user_addr: spec.user_addr,
        offset: spec.offset,
    }
}

pub(crate) fn mem_table<'f>(regions: &[(MemRegion, BorrowedFd<'f>)]) -> Msg<'f> {
    let all: Vec<_> = regions.iter().map(|(region, _)| *region).collect();
    let mut msg = Msg::new(Code::SetMemTable.id(), payload::encode_mem_table(&all));
    msg.fds = regions.iter().map(|(_, fd)| *fd).collect();
    msg
}

/// ADD_MEM_REG or REM_MEM_REG.
pub(crate) fn slot(code: Code, region: &MemRegion) -> Msg<'static> {
    let body = payload::SingleRegion { padding: 0, region: *region };
    Msg::new(code.id(), body.as_bytes().to_vec())
}
