//! The back-end's machine as an object: what it offers, whose tickets it takes, how it ends.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_protocol::{
    Backend, Effect, Frame, Frontend, FrontendCode as Code, Offer, ProtocolFeatures, Refusal, Step,
    Ticket, Violation, ticket::Ack, virtio,
};
use zerocopy::IntoBytes;

use crate::common::host::{Seen, Verdict, ack_ticket, drain, exchange};
use crate::common::{FEATURES, Fd, all_protocol, full_offer, negotiated, valid};

fn enable(need_reply: bool) -> Frame<Fd> {
    valid::frame(Code::SetVringEnable, need_reply, 1u64.rotate_left(32).as_bytes(), 0)
}

/// The effect of SET_VRING_ENABLE, unanswered.
fn open_effect(backend: &mut Backend<Fd>) -> Effect<Fd> {
    let frame = enable(true);
    backend.receive(&frame.bytes, frame.fds);
    match backend.poll().expect("in step") {
        Some(Step::Effect(effect)) => effect,
        other => panic!("no effect: {other:?}"),
    }
}

fn backend() -> Backend<Fd> {
    negotiated(full_offer(), FEATURES, all_protocol())
}

#[test]
fn machines_and_tickets_may_cross_threads() {
    fn crosses<T: Send + Sync>() {}
    crosses::<Backend<OwnedFd>>();
    crosses::<Frontend<OwnedFd>>();
    crosses::<Effect<OwnedFd>>();
    crosses::<Ticket<Ack>>();
}

#[test]
fn bit_30_is_offered_exactly_with_protocol_features() {
    let none = Offer { features: 1, protocol_features: ProtocolFeatures::empty(), ..full_offer() };
    assert_eq!(Backend::<Fd>::new(none.clone()).offer().features, 1);
    let some = Offer { protocol_features: ProtocolFeatures::MQ, ..none };
    assert_eq!(Backend::<Fd>::new(some).offer().features, 1 | virtio::PROTOCOL_FEATURES);
}

#[test]
fn xen_regions_are_never_offered() {
    let offer = Offer { protocol_features: ProtocolFeatures::all(), ..full_offer() };
    let mut backend: Backend<Fd> = Backend::new(offer);
    let frame = valid::frame(Code::GetProtocolFeatures, false, &[], 0);
    let seen = exchange(&mut backend, &frame);
    assert_eq!(seen.replies, [Frame::reply(15, all_protocol().bits().as_bytes(), vec![])]);
}

#[test]
fn the_largest_number_of_rings_works() {
    let offer = Offer { queues: u16::MAX, max_queue_size: 32768, ..full_offer() };
    let mut backend = negotiated(offer, FEATURES, all_protocol());
    let frame = valid::frame(Code::SetVringNum, true, [0xfffe_u32, 32768].as_bytes(), 0);
    assert!(exchange(&mut backend, &frame).violations.is_empty());
    assert_eq!(backend.ring(0xfffe).expect("the last").size, Some(32768));
    let frame = valid::frame(Code::SetVringNum, true, [0xffff_u32, 256].as_bytes(), 0);
    assert_eq!(exchange(&mut backend, &frame).violations.len(), 1);
}

#[test]
fn a_ticket_of_another_machine_answers_nothing_and_refuses_its_own_request() {
    let (mut one, mut other) = (backend(), backend());
    let ticket = ack_ticket(open_effect(&mut one)).expect("an acknowledgement");
    let mine = ack_ticket(open_effect(&mut other)).expect("an acknowledgement");
    other.answer(ticket, Ok(()));
    assert!(other.transmit().is_none() && other.is_waiting_for_answer());
    other.answer(mine, Ok(()));
    assert_eq!(other.transmit(), Some(Frame::reply(18, &[0; 8], vec![])));
    assert!(other.ring(0).expect("ring 0").enabled);

    assert!(one.poll().expect("in step").is_none());
    assert_eq!(one.transmit(), Some(Frame::reply(18, 1u64.as_bytes(), vec![])));
    assert!(!one.ring(0).expect("ring 0").enabled);
}

#[test]
fn a_ticket_may_be_answered_from_another_thread() {
    let mut backend = backend();
    let effect = open_effect(&mut backend);
    let ticket = std::thread::spawn(move || ack_ticket(effect)).join().expect("no panic");
    assert!(backend.poll().expect("in step").is_none(), "it waits");
    backend.answer(ticket.expect("an acknowledgement"), Ok(()));
    assert!(backend.transmit().is_some());
}

#[test]
fn a_ticket_dropped_in_another_thread_is_noticed() {
    let mut backend = backend();
    let effect = open_effect(&mut backend);
    std::thread::spawn(move || drop(effect)).join().expect("no panic");
    assert_eq!(drain(&mut backend, &Verdict::Succeed).replies.len(), 1);
    assert!(!backend.is_waiting_for_answer());
}

#[test]
fn after_a_fatal_violation_nothing_moves() {
    let mut backend: Backend<Arc<()>> = Backend::new(full_offer());
    backend.receive(&[0; 12], vec![]);
    let fatal = backend.poll().expect_err("version 0");
    assert_eq!(fatal, Violation::Version { request: 0, version: 0 });
    let open = Arc::default();
    let good = Frame::request(1, false, &[], vec![Arc::clone(&open)]);
    backend.receive(&good.bytes, good.fds);
    assert_eq!(Arc::strong_count(&open), 1, "closed at once");
    assert_eq!(backend.poll().expect_err("over"), fatal);
    assert!(backend.transmit().is_none());
}

#[test]
fn replies_from_before_the_end_are_still_sent() {
    let mut backend = backend();
    let request = valid::frame(Code::GetFeatures, false, &[], 0);
    backend.receive(&request.bytes, vec![]);
    backend.receive(&[0; 12], vec![]);
    let Seen { replies, fatal, .. } = drain(&mut backend, &Verdict::Succeed);
    assert_eq!(replies.len(), 1);
    assert!(fatal.is_some());
}

#[test]
fn a_stop_that_cannot_be_answered_ends_the_connection_with_the_reason() {
    let mut backend = backend();
    let request = valid::frame(Code::GetVringBase, false, &[0; 8], 0);
    backend.receive(&request.bytes, vec![]);
    let Some(Step::Effect(Effect::GetVringBase { ticket, .. })) = backend.poll().expect("in step")
    else {
        panic!("no effect");
    };
    backend.answer(ticket, Err(Refusal::because("the disk hangs since 30 s")));
    let fatal = backend.poll().expect_err("no answer is made up");
    let text = "GET_VRING_BASE has no error reply: the disk hangs since 30 s";
    assert_eq!(fatal.to_string(), text);
    assert!(backend.transmit().is_none());
}
