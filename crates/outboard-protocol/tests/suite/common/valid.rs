//! One valid request for each row of the table.

use outboard_protocol::features::ProtocolFeatures;
use outboard_protocol::payload::{
    CryptoSession, Inflight, Iotlb, Log, SingleRegion, VringState, encode_config, encode_mem_table,
};
use outboard_protocol::table::{MessageInfo, PayloadKind};
use outboard_protocol::{Frame, FrontendCode, MemRegion, VringAddr};
use zerocopy::IntoBytes;

use super::Fd;

/// A region at guest address 1 MiB.
pub(crate) const REGION: MemRegion =
    MemRegion { guest_addr: 0x10_0000, size: 0x10_0000, user_addr: 0x7000_0000, offset: 0 };

/// Addresses of a ring inside [`REGION`].
pub(crate) const ADDR: VringAddr = VringAddr {
    index: 0,
    flags: 0,
    desc: 0x7000_0000,
    used: 0x7000_2004,
    avail: 0x7000_1002 & !3,
    log_guest_addr: 0,
};

pub(crate) fn set_features(features: u64) -> Frame<Fd> {
    frame(FrontendCode::SetFeatures, false, features.as_bytes(), 0)
}

pub(crate) fn set_protocol_features(features: ProtocolFeatures) -> Frame<Fd> {
    frame(FrontendCode::SetProtocolFeatures, false, features.bits().as_bytes(), 0)
}

/// A request with `fds` made-up descriptors.
pub(crate) fn frame(code: FrontendCode, need_reply: bool, payload: &[u8], fds: usize) -> Frame<Fd> {
    Frame::request(code.id(), need_reply, payload, (100..).take(fds).collect())
}

/// The request's payload and number of descriptors, aimed at ring 0 where it names one.
pub(crate) fn parts(row: &MessageInfo) -> (Vec<u8>, usize) {
    let fds = match row.name {
        "SET_MEM_TABLE"
        | "SET_LOG_BASE"
        | "SET_LOG_FD"
        | "SET_VRING_KICK"
        | "SET_VRING_CALL"
        | "SET_VRING_ERR"
        | "SET_BACKEND_REQ_FD"
        | "SET_INFLIGHT_FD"
        | "GPU_SET_SOCKET"
        | "ADD_MEM_REG"
        | "SET_DEVICE_STATE_FD"
        | "SHMEM_MAP"
        | "GPU_MAP"
        | "VRING_HOST_NOTIFIER_MSG" => 1,
        _ => 0,
    };
    (payload(row), fds)
}

fn payload(row: &MessageInfo) -> Vec<u8> {
    match row.payload {
        PayloadKind::U64 => u64_for(row.name).as_bytes().to_vec(),
        PayloadKind::VringState => {
            let num = if row.name == "SET_VRING_NUM" { 256 } else { 0 };
            VringState { index: 0, num }.as_bytes().to_vec()
        }
        PayloadKind::VringAddr => ADDR.as_bytes().to_vec(),
        PayloadKind::MemTable => encode_mem_table(&[REGION]),
        PayloadKind::SingleRegion => {
            SingleRegion { padding: 0, region: REGION }.as_bytes().to_vec()
        }
        PayloadKind::Log => Log { mmap_size: 0x1000, mmap_offset: 0 }.as_bytes().to_vec(),
        PayloadKind::Iotlb => {
            let entry = Iotlb { size: 0x1000, perm: 3, kind: 2, ..Iotlb::default() };
            entry.as_bytes().to_vec()
        }
        PayloadKind::Config => encode_config(0, 0, &[0; 8]),
        PayloadKind::CryptoSession => CryptoSession::default().as_bytes().to_vec(),
        PayloadKind::Inflight => {
            Inflight { mmap_size: 0x10_0000, num_queues: 4, queue_size: 256, ..Inflight::default() }
                .as_bytes()
                .to_vec()
        }
        other => vec![0; usize::try_from(other.sizes().largest()).expect("small")],
    }
}

fn u64_for(name: &str) -> u64 {
    match name {
        "SET_FEATURES" => super::FEATURES,
        "SET_PROTOCOL_FEATURES" => super::all_protocol().bits(),
        "NET_SET_MTU" => 1500,
        _ => 0,
    }
}
