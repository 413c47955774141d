//! Back-ends that do everything wrong, each over a socket pair: every wrong message becomes an error with
//! its own name, in bounded time, and no descriptor stays open.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::scripted::{FEATURES, GET_FEATURES, PATIENCE, Peer, TIMEOUT, connect};
use outboard_frontend::{Connection, Error, SocketError};
use outboard_protocol::header::Header;
use outboard_protocol::{Frame, ProtocolFeatures, Violation};

/// Asks for the features of a back-end that answers by `script`, called with each request.
fn ask(script: impl FnMut(&mut Peer, Header) -> bool + Send + 'static) -> Error {
    ask_for(PATIENCE, script)
}

/// The same with a timeout.
fn ask_for(
    timeout: Duration,
    script: impl FnMut(&mut Peer, Header) -> bool + Send + 'static,
) -> Error {
    let (mut connection, peer) = connect(timeout, script);
    let error = connection.get_features().expect_err("the answer is wrong");
    let again = connection.get_features().expect_err("the connection is over");
    assert!(matches!(again, Error::GivenUp), "{again}");
    drop(connection);
    peer.join().expect("the peer ends");
    error
}

/// The violation of one wrong answer.
fn violation(frame: Frame<OwnedFd>) -> Violation {
    let error = ask(move |peer, _| {
        peer.send(&frame.bytes, &[]);
        true
    });
    match error {
        Error::Violation(violation) => violation,
        other => panic!("{other}"),
    }
}

fn raw(request: u32, flags: u32, size: u32, payload: &[u8]) -> Frame<OwnedFd> {
    Frame::raw(Header { request, flags, size }, payload, Vec::new())
}

#[test]
fn a_reply_to_something_else_is_a_violation() {
    let wrong = violation(raw(GET_FEATURES + 1, 5, 8, &[0; 8]));
    assert!(matches!(wrong, Violation::ReplyOrder { expected: 1, got: 2, .. }), "{wrong}");
}

#[test]
fn any_flags_but_version_and_reply_are_a_violation() {
    for flags in [0, 1, 4, 6, 7, 0xd, 0x15, 0x8000_0005] {
        let wrong = violation(raw(GET_FEATURES, flags, 8, &[0; 8]));
        let named = matches!(wrong, Violation::ReplyFlags { flags: got, .. } if got == flags)
            || matches!(wrong, Violation::Version { .. });
        assert!(named, "{flags:#x}: {wrong}");
    }
}

#[test]
fn a_huge_reply_is_refused_by_its_header() {
    let wrong = violation(raw(GET_FEATURES, 5, u32::MAX, &[]));
    assert!(matches!(wrong, Violation::TooLong { size: u32::MAX, .. }), "{wrong}");
}

#[test]
fn a_reply_one_byte_short_or_long_is_a_violation() {
    for size in [0, 7, 9] {
        let wrong = violation(raw(GET_FEATURES, 5, size, &vec![0; size as usize]));
        assert!(matches!(wrong, Violation::ReplyShape { .. }), "{size}: {wrong}");
    }
}

#[test]
fn an_answer_before_the_question_is_a_violation() {
    let (mut connection, peer) = connect(PATIENCE, |_, _| true);
    peer.unasked();
    std::thread::sleep(Duration::from_millis(50));
    let wrong = connection.get_features().expect_err("nobody had asked");
    assert!(matches!(wrong, Error::Violation(Violation::ReplyUnasked { request: 1 })), "{wrong}");
}

#[test]
fn silence_ends_with_the_deadline() {
    let start = Instant::now();
    let silent = ask_for(TIMEOUT, |_, _| false);
    assert!(matches!(silent, Error::Silent { request: "GET_FEATURES", .. }), "{silent}");
    assert!(start.elapsed() >= TIMEOUT);
}

#[test]
fn a_reply_byte_by_byte_does_not_stretch_the_deadline() {
    let silent = ask_for(TIMEOUT, |peer, _| {
        for byte in Frame::<()>::reply(GET_FEATURES, &[0; 8], Vec::new()).bytes {
            std::thread::sleep(TIMEOUT / 10);
            if !peer.try_send(&[byte], &[]) {
                break;
            }
        }
        true
    });
    // 20 pauses of a tenth: were it stretched by each byte, this would be an answer.
    assert!(matches!(silent, Error::Silent { .. }), "{silent}");
}

#[test]
fn a_reply_in_pieces_is_put_together() {
    let (mut connection, _peer) = connect(PATIENCE, |peer, _| {
        for byte in Frame::<()>::reply(GET_FEATURES, &FEATURES.to_ne_bytes(), Vec::new()).bytes {
            peer.send(&[byte], &[]);
        }
        true
    });
    assert_eq!(connection.get_features().expect("it is all there"), FEATURES);
}

#[test]
fn a_socket_closed_between_or_inside_replies_is_named_with_the_question() {
    for sent in [0, 5, 12, 15] {
        let closed = ask(move |peer, _| {
            let reply = Frame::<()>::reply(GET_FEATURES, &[0; 8], Vec::new()).bytes;
            peer.send(&reply[..sent], &[]);
            peer.close();
            false
        });
        assert!(matches!(closed, Error::Closed { request: "GET_FEATURES" }), "{sent}: {closed}");
    }
}

#[test]
fn a_flood_of_descriptors_is_refused_and_none_stays_open() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("sent");
    for count in [1, 2, 8, 16, 250] {
        let path = path.clone();
        let flood = ask(move |peer, _| {
            let file = std::fs::File::create(&path).expect("a descriptor");
            let fds = vec![file.as_fd(); count];
            let reply = Frame::<()>::reply(GET_FEATURES, &[0; 8], Vec::new()).bytes;
            peer.send(&reply, &fds);
            true
        });
        match flood {
            Error::Violation(Violation::ReplyShape { fds, .. }) if count <= 8 => {
                assert_eq!(fds, count);
            }
            Error::Socket(SocketError::DescriptorsLost) if count > 8 => {}
            other => panic!("{count}: {other}"),
        }
    }
    let ours = std::fs::read_dir("/proc/self/fd").expect("our descriptors").flatten();
    let open = ours.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == path)).count();
    assert_eq!(open, 0);
}

#[test]
fn a_peer_that_never_reads_is_an_error_once_the_socket_is_full() {
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let mut connection = Connection::from_fd(ours.into(), TIMEOUT).expect("a socket");
    let stuck =
        (0..1_000_000).find_map(|_| connection.set_owner().err()).expect("it is full some day");
    assert!(matches!(stuck, Error::Silent { request: "SET_OWNER", .. }), "{stuck}");
}

#[test]
fn a_refusal_is_an_error_with_its_number_and_the_connection_goes_on() {
    let (mut connection, _peer) = connect(PATIENCE, |peer, header| {
        let value = if header.request == 8 { 22 } else { peer.sane(header) };
        peer.reply(header, value)
    });
    connection.get_features().expect("an answer");
    connection.get_protocol_features().expect("an answer");
    connection.set_protocol_features(ProtocolFeatures::REPLY_ACK).expect("sent");
    let refused = connection.set_vring_num(0, 256).expect_err("refused");
    assert!(matches!(refused, Error::Refused { request: "SET_VRING_NUM", code: 22 }), "{refused}");
    connection.set_vring_base(0, 0).expect("it goes on");
}

#[test]
fn what_was_not_offered_is_not_sent() {
    let (mut connection, _peer) = connect(PATIENCE, |peer, header| {
        let value = peer.sane(header);
        peer.reply(header, value)
    });
    assert!(matches!(connection.get_config(0, 8), Err(Error::Unsendable(_))));
    connection.get_features().expect("an answer");
    assert!(matches!(connection.set_features(u64::MAX), Err(Error::Unsendable(_))));
    connection.get_features().expect("nothing wrong was sent");
}

#[test]
fn only_a_connected_unix_stream_socket_is_taken_over() {
    let file = std::fs::File::open("/dev/null").expect("a file");
    let tcp = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().expect("a pair");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s");
    let listening = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    for fd in [OwnedFd::from(file), tcp.into(), datagram.into(), listening.into()] {
        let refused = Connection::from_fd(fd, TIMEOUT).expect_err("no connected stream");
        assert!(matches!(refused, Error::Socket(SocketError::NotASocket(_))), "{refused}");
    }
    let refused = Connection::connect(&path, TIMEOUT).expect_err("nobody listens any more");
    assert!(matches!(refused, Error::Socket(SocketError::Connect { .. })), "{refused}");
    let long = folder.path().join("x".repeat(108));
    let refused = Connection::connect(&long, TIMEOUT).expect_err("too long");
    assert!(matches!(refused, Error::Socket(SocketError::PathTooLong { .. })), "{refused}");
}
