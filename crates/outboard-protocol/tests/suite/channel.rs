//! The codec of the back-end channel: every message there and back, and every wrong shape.

use outboard_protocol::channel::ChannelRequest as Request;
use outboard_protocol::decoder::{Decoder, Expects, Message};
use outboard_protocol::payload::{
    ExternalMap, GpuMap, Iotlb, ShmemMap, Uuid, VringArea, VringFd, VringState,
};
use outboard_protocol::table::{FdRule, back_end_table};
use outboard_protocol::{BackendCode, Frame, Violation};

use crate::common::Fd;

fn decode(frame: Frame<Fd>) -> Result<Request<Fd>, Violation> {
    let mut decoder = Decoder::new(Expects::Requests);
    decoder.receive(&frame.bytes, frame.fds);
    let message: Message<Fd> = decoder.next_message().expect("in step").expect("whole");
    Request::decode(message)
}

pub(crate) fn one_of_each() -> Vec<Request<Fd>> {
    let area = |has_fd| VringArea { vring: VringFd::new(3, has_fd).0, size: 4096, offset: 8192 };
    let map = ShmemMap { shmid: 2, shm_offset: 4096, len: 8192, flags: 1, ..ShmemMap::default() };
    let gpu = GpuMap { shmid: 1, len: 4096, device_uuid: [9; 16], ..GpuMap::default() };
    let external = ExternalMap::default();
    vec![
        Request::Iotlb(Iotlb { iova: 1 << 40, perm: 2, kind: 1, ..Iotlb::default() }),
        Request::ConfigChange,
        Request::HostNotifier(area(true), Some(5)),
        Request::HostNotifier(area(false), None),
        Request::VringCall(VringState { index: 1, num: 0 }),
        Request::VringErr(VringState { index: 2, num: 0 }),
        Request::SharedObjectAdd(Uuid { bytes: [1; 16] }),
        Request::SharedObjectRemove(Uuid { bytes: [2; 16] }),
        Request::SharedObjectLookup(Uuid { bytes: [3; 16] }),
        Request::ShmemMap(map, 6),
        Request::ShmemUnmap(map),
        Request::GpuMap(gpu, 7),
        Request::ExternalMap(ExternalMap { shmid: 1, ptr: 0xdead_0000, len: 9, ..external }),
    ]
}

#[test]
fn every_message_of_the_channel_comes_back_as_it_went() {
    let mut codes: Vec<_> = one_of_each().iter().map(|request| request.code().id()).collect();
    codes.dedup();
    assert_eq!(codes, BackendCode::ALL.iter().map(|code| code.id()).collect::<Vec<_>>());
    for request in one_of_each() {
        for need_reply in [false, true] {
            let frame = request.clone().encode(need_reply);
            assert_eq!(frame.bytes[4], if need_reply { 9 } else { 1 });
            assert_eq!(decode(frame), Ok(request.clone()));
        }
    }
}

#[test]
fn every_message_of_the_channel_with_a_byte_or_a_descriptor_too_many_is_a_violation() {
    for request in one_of_each() {
        let frame = request.encode(false);
        let id = u32::from_ne_bytes(frame.bytes[..4].try_into().expect("4"));
        let payload = &frame.bytes[12..];
        let row = back_end_table().iter().find(|row| row.id == id).expect("a row");
        let resized = |len: usize| {
            let mut body = payload.to_vec();
            body.resize(len, 0);
            decode(Frame::request(id, false, &body, frame.fds.clone()))
        };
        let size = |len| Err(Violation::Size { message: row.name, size: len });
        assert_eq!(resized(payload.len() + 1), size(payload.len() + 1));
        if let Some(less) = payload.len().checked_sub(1) {
            assert_eq!(resized(less), size(less));
        }
        for got in [0, 1, 2, 9] {
            let answer = decode(Frame::request(id, false, payload, vec![1; got]));
            if got == frame.fds.len() {
                assert!(answer.is_ok());
            } else {
                assert_eq!(answer, Err(Violation::FdCount { message: row.name, got }));
            }
        }
        assert_ne!(row.fds, FdRule::PerRegion);
    }
}

#[test]
fn unknown_messages_of_the_channel_are_named() {
    for request in [0, 11, 12, 1002, 1005, 1008, u32::MAX] {
        let answer = decode(Frame::request(request, false, &[], vec![]));
        assert_eq!(answer, Err(Violation::UnknownRequest { request }));
    }
}
