//! The decoder by itself: descriptors belong to the message they came with, nobody piles anything
//! up, and a transport that reads what is wanted never mixes messages.

use std::sync::Arc;

use outboard_protocol::decoder::{Decoder, Expects};
use outboard_protocol::header::{HEADER_SIZE, Header, MAX_PAYLOAD};
use outboard_protocol::{Backend, Frame, FrontendCode, Step, Violation};
use zerocopy::IntoBytes;

use crate::common::pair::Socket;
use crate::common::rows::named;
use crate::common::{FEATURES, all_protocol, full_offer, valid};

/// A descriptor whose open copies can be counted.
type Counted = Arc<()>;

fn call(index: u64, fd: u32) -> Frame<u32> {
    Frame::request(FrontendCode::SetVringCall.id(), false, index.as_bytes(), vec![fd])
}

#[test]
fn each_message_of_one_chunk_gets_its_own_descriptors() {
    let mut decoder = Decoder::new(Expects::Requests);
    // Two messages come one after the other before anybody looks.
    for fd in [7, 8] {
        let frame = call(0, fd);
        decoder.receive(&frame.bytes, frame.fds);
    }
    for fd in [7, 8] {
        let message = decoder.next_message().expect("in step").expect("whole");
        assert_eq!((message.fds, message.misplaced), (vec![fd], 0));
    }
    assert_eq!(decoder.buffered(), 0);
}

#[test]
fn descriptors_behind_the_first_byte_are_dropped_at_once() {
    let open = Counted::default();
    let frame = call(0, 0);
    let mut decoder = Decoder::new(Expects::Requests);
    for byte in &frame.bytes {
        decoder.receive(&[*byte], vec![open.clone(); 253]);
        assert!(Arc::strong_count(&open) <= 1 + 253, "they pile up");
    }
    let message = decoder.next_message().expect("in step").expect("whole");
    assert_eq!(message.misplaced, (frame.bytes.len() - 1) * 253);
    assert_eq!(message.fds.len(), 253);
    drop(message);
    assert_eq!(Arc::strong_count(&open), 1);
}

/// A17, A18, A24, A43: two hundred times each.
// R2: every descriptor is owned at once, and closed with its message.
#[test]
fn descriptors_of_messages_that_are_turned_down_are_closed() {
    let open = Counted::default();
    let mut backend: Backend<Counted> = Backend::new(full_offer());
    for row in outboard_protocol::table::front_end_table() {
        let (payload, _) = valid::parts(row);
        for _ in 0..200 {
            let fds = vec![open.clone(); 33];
            let frame = Frame::request(row.id, true, &payload, fds);
            backend.receive(&frame.bytes, frame.fds);
            match backend.poll() {
                Ok(Some(Step::Effect(effect))) => panic!("{} took {effect:?}", row.name),
                Ok(_) => {}
                Err(_) => backend = Backend::new(full_offer()),
            }
            assert_eq!(Arc::strong_count(&open), 1, "{}", row.name);
        }
    }
}

#[test]
fn descriptors_of_an_effect_that_is_dropped_are_closed() {
    let open = Counted::default();
    let mut backend: Backend<Counted> = Backend::new(full_offer());
    let frame = Frame::request(12, false, 0u64.as_bytes(), vec![open.clone()]);
    backend.receive(&frame.bytes, frame.fds);
    let step = backend.poll().expect("in step");
    assert_eq!(Arc::strong_count(&open), 2);
    drop(step);
    assert_eq!(Arc::strong_count(&open), 1, "the machine holds none");
    assert!(backend.poll().expect("in step").is_none());
    assert!(!backend.ring(0).expect("ring 0").kicked);
}

/// A1, A2: the header alone closes, before a byte of payload has come.
#[test]
fn a_header_that_is_out_of_step_is_refused_before_its_payload_comes() {
    let limit = MAX_PAYLOAD;
    for size in [limit + 1, 0x7fff_ffff, u32::MAX] {
        let mut decoder: Decoder<u32> = Decoder::new(Expects::Requests);
        decoder.receive(Header { request: 1, flags: 1, size }.as_bytes(), Vec::new());
        assert!(decoder.wanted() <= usize::try_from(limit).expect("small"), "no huge read");
        let refused = decoder.next_message().expect_err("too long");
        assert_eq!(refused, Violation::TooLong { request: 1, size, limit });
    }
}

/// The kernel glues plain bytes before bytes with descriptors. Whoever reads what is wanted, no
/// more, gets the descriptors with their message; whoever reads more does not.
#[test]
fn reading_what_is_wanted_keeps_descriptors_with_their_message() {
    let plain = valid::frame(FrontendCode::SetOwner, false, &[], 0);
    let with_fd = call(0, 9);
    let sockets = || {
        let mut socket = Socket::default();
        socket.send(&plain.bytes, Vec::new());
        socket.send(&with_fd.bytes, with_fd.fds.clone());
        socket
    };
    let mut socket = sockets();
    let mut decoder = Decoder::new(Expects::Requests);
    let mut messages = Vec::new();
    while !socket.is_empty() {
        let (bytes, fds) = socket.recv(decoder.wanted());
        decoder.receive(&bytes, fds);
        messages.extend(decoder.next_message().expect("in step"));
    }
    let fds: Vec<_> = messages.iter().map(|message| message.fds.clone()).collect();
    assert_eq!(fds, [vec![], vec![9]]);

    let (bytes, fds) = sockets().recv(4096);
    let mut decoder = Decoder::new(Expects::Requests);
    decoder.receive(&bytes, fds);
    let first = decoder.next_message().expect("in step").expect("whole");
    assert_eq!((first.header.request, first.fds), (3, vec![9]), "this is why");
}

#[test]
fn wanted_counts_down_to_the_end_of_each_message() {
    let frame = call(0, 1);
    let mut decoder = Decoder::new(Expects::Requests);
    assert_eq!(decoder.wanted(), HEADER_SIZE);
    for (at, byte) in frame.bytes.iter().enumerate() {
        let end = if at < HEADER_SIZE { HEADER_SIZE } else { frame.bytes.len() };
        assert_eq!(decoder.wanted(), end - at);
        decoder.receive(&[*byte], if at == 0 { frame.fds.clone() } else { Vec::new() });
    }
    assert_eq!(decoder.wanted(), 0, "a whole message waits to be taken");
    assert!(decoder.next_message().expect("in step").is_some());
    assert_eq!(decoder.wanted(), HEADER_SIZE);
}

#[test]
fn random_messages_get_at_most_one_reply_each_and_never_panic() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut closed = 0;
    let mut backend = crate::common::negotiated(full_offer(), FEATURES, all_protocol());
    for _ in 0..60_000 {
        let id = u32::try_from(random() % 48).expect("small");
        let known = outboard_protocol::table::info(outboard_protocol::table::Side::FrontEnd, id);
        let (mut payload, mut fds) = known.map_or((vec![0; 8], 1), valid::parts);
        for _ in 0..random() % 3 {
            let at = usize::try_from(random()).expect("64 bits") % payload.len().max(1);
            if let Some(byte) = payload.get_mut(at) {
                *byte = random().to_le_bytes()[0];
            }
        }
        if random().is_multiple_of(8) {
            fds = usize::try_from(random() % 4).expect("small");
            payload.truncate(usize::try_from(random() % 41).expect("small"));
        }
        let frame = Frame::request(id, random().is_multiple_of(2), &payload, vec![5; fds]);
        let seen = crate::common::host::exchange(&mut backend, &frame);
        assert!(seen.replies.len() <= 1 && seen.effects.len() <= 1, "{id}: {seen:?}");
        assert!(seen.violations.len() + seen.effects.len() <= 1, "{id}: {seen:?}");
        if seen.fatal.is_some() {
            closed += 1;
            backend = crate::common::negotiated(full_offer(), FEATURES, all_protocol());
        }
    }
    assert!(closed > 0, "in-band features alone, or a base nobody can refuse");
    assert_eq!(named("GET_FEATURES").id, 1);
}
