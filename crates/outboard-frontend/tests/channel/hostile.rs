//! Back-ends that do wrong on their channel: each is an error with a name, and nothing waits for ever.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use outboard_frontend::{Channel, ChannelEvent, ChannelSetup, Error, SocketError};
use outboard_protocol::header::Header;
use outboard_protocol::{ChannelRequest as Request, Frame, Violation};

use crate::peer::{BackEnd, MOMENT, PATIENCE, channel, file, map, setup, soon};

fn send(back: &BackEnd, frame: &Frame<OwnedFd>) {
    let fds: Vec<_> = frame.fds.iter().map(AsFd::as_fd).collect();
    back.socket.send(&frame.bytes, &fds, soon()).expect("room in the socket");
}

fn refused(channel: &mut Channel) -> String {
    match channel.next_event(PATIENCE) {
        Ok(Some(ChannelEvent::Refused { reason })) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn bytes_out_of_step_end_the_channel_for_good() {
    let wrong: Vec<Frame<OwnedFd>> = vec![
        Frame::reply(2, &[0; 8], Vec::new()),
        Frame::raw(Header { request: 2, flags: 0, size: 0 }, &[], Vec::new()),
        Frame::raw(Header { request: 2, flags: 3, size: 0 }, &[], Vec::new()),
        Frame::raw(Header { request: 9, flags: 1, size: u32::MAX }, &[], Vec::new()),
        Frame::raw(Header { request: 9, flags: 1, size: 4097 }, &[], Vec::new()),
    ];
    for frame in wrong {
        let (mut channel, back) = channel(setup());
        send(&back, &frame);
        let end = channel.next_event(PATIENCE);
        assert!(matches!(end, Err(Error::Violation(_))), "{end:?}");
        assert!(matches!(channel.next_event(MOMENT), Err(Error::GivenUp)));
    }
}

#[test]
fn wrong_messages_are_refused_and_the_channel_lives() {
    let (mut channel, mut back) = channel(setup());
    let wrong: Vec<Frame<OwnedFd>> = vec![
        Frame::request(11, true, &[0; 20], Vec::new()),
        Frame::request(0, true, &[], Vec::new()),
        Frame::request(u32::MAX, true, &[0; 4096], Vec::new()),
        Frame::request(2, true, &[0], Vec::new()),
        Frame::request(2, true, &[], vec![file(1)]),
        Frame::request(9, true, &[0; 40], Vec::new()),
        Frame::request(9, true, &[0; 39], vec![file(1)]),
        Frame::request(9, true, &[0; 40], vec![file(1), file(1)]),
        Frame::request(3, true, &[0; 24], Vec::new()),
        Frame::request(1, true, &[0; 32], Vec::new()),
    ];
    for frame in wrong {
        send(&back, &frame);
        let reason = refused(&mut channel);
        let mut answer = [0; 20];
        let got = back.socket.receive(&mut answer, soon()).expect("an answer");
        assert_eq!((got.bytes, answer[12]), (20, 1), "{reason}");
    }
    let (event, answer) = back.round(&mut channel, Request::ConfigChange);
    assert!(matches!(event, ChannelEvent::ConfigChanged) && answer.is_ok());
}

#[test]
fn descriptors_behind_the_first_byte_are_closed_and_named() {
    let (mut channel, mut back) = channel(setup());
    let frame: Frame<OwnedFd> = Request::ShmemMap(map(0, 1), file(1)).encode(false);
    let (head, tail) = frame.bytes.split_at(20);
    back.socket.send(head, &[], soon()).expect("room");
    let fds: Vec<_> = frame.fds.iter().map(AsFd::as_fd).collect();
    back.socket.send(tail, &fds, soon()).expect("room");
    let reason = refused(&mut channel);
    assert_eq!(reason, Violation::FdsMisplaced { request: 9, count: 1 }.to_string());
    assert!(back.round(&mut channel, Request::ConfigChange).1.is_ok());
}

#[test]
fn more_descriptors_than_any_message_has_end_the_channel() {
    let (mut channel, back) = channel(setup());
    let files: Vec<OwnedFd> = (0..20).map(|_| file(1)).collect();
    send(&back, &Frame::request(9, false, &[0; 40], files));
    let end = channel.next_event(PATIENCE);
    assert!(matches!(end, Err(Error::Socket(SocketError::DescriptorsLost))), "{end:?}");
}

#[test]
fn a_back_end_that_leaves_is_told_from_one_that_breaks_off() {
    let (mut left, back) = channel(setup());
    drop(back);
    assert!(matches!(left.next_event(PATIENCE), Err(Error::ChannelClosed { inside: false })));
    let (mut broke_off, back) = channel(setup());
    back.socket.send(&[2, 0, 0], &[], soon()).expect("room");
    drop(back);
    let end = broke_off.next_event(PATIENCE);
    assert!(matches!(end, Err(Error::ChannelClosed { inside: true })), "{end:?}");
}

#[test]
fn half_a_message_is_waited_for_as_long_as_the_caller_says() {
    let (mut channel, back) = channel(setup());
    back.socket.send(&[2, 0, 0], &[], soon()).expect("room");
    let before = Instant::now();
    assert!(channel.next_event(MOMENT).expect("in step").is_none());
    assert!(before.elapsed() >= MOMENT && before.elapsed() < PATIENCE);
}

#[test]
fn a_back_end_that_does_not_read_its_answers_is_given_up() {
    let patience = Duration::from_millis(100);
    let (mut channel, back) = channel(ChannelSetup { patience, ..setup() });
    let frame: Frame<OwnedFd> = Request::ConfigChange.encode(true);
    let end = loop {
        // As fast as we serve it, but it takes no answer.
        send(&back, &frame);
        match channel.next_event(PATIENCE) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(end, Error::Silent { after, .. } if after == patience), "{end:?}");
}
