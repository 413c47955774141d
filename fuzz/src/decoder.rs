//! The decoder: however a stream is cut, the same messages come out, and nothing is kept for
//! bytes that have not come.

use outboard_protocol::decoder::{Decoder, Expects, Message};

use crate::cover::{reached, wanted};
use crate::input::Input;

/// Everything that a stream yields, and how it ended.
fn drain(decoder: &mut Decoder<u32>, into: &mut Vec<Message<u32>>) -> bool {
    loop {
        match decoder.next_message() {
            Ok(Some(message)) => into.push(message),
            Ok(None) => return true,
            Err(violation) => {
                let text = format!("{violation:?}");
                reached(format!("decoder {}", text.split([' ', '(']).next().unwrap_or_default()));
                return false;
            }
        }
    }
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        ["Version", "ReplyFlags", "ReplyInRequest", "TooLong", "descriptors"]
            .map(|what| format!("decoder {what}"))
            .into()
    });
    let mut input = Input::new(data);
    let expects = if input.one_in(2) { Expects::Replies } else { Expects::Requests };
    let pieces = input.byte();
    let stream = input.take(usize::MAX);

    let (mut whole, mut at_once) = (Decoder::<u32>::new(expects), Vec::new());
    whole.receive(stream, Vec::new());
    let in_step = drain(&mut whole, &mut at_once);

    let (mut cut, mut in_pieces) = (Decoder::<u32>::new(expects), Vec::new());
    let mut still = true;
    for piece in stream.chunks(usize::from(pieces).max(1)) {
        cut.receive(piece, Vec::new());
        still = drain(&mut cut, &mut in_pieces);
        if !still {
            break;
        }
    }
    assert_eq!(at_once, in_pieces, "the same messages");
    assert_eq!(in_step, still, "the same end");
    if in_step {
        assert_eq!(whole.buffered(), cut.buffered());
        assert!(whole.wanted() > 0);
    }
    for message in &at_once {
        assert_eq!(message.header.size as usize, message.payload.len());
    }
    with_descriptors(expects, stream, pieces);
}

/// Descriptors that come with a message's first byte are its own, all others are dropped.
fn with_descriptors(expects: Expects, stream: &[u8], pieces: u8) {
    let mut decoder = Decoder::<u32>::new(expects);
    let (mut sent, mut seen) = (0, Vec::new());
    for piece in stream.chunks(usize::from(pieces).max(1)) {
        let fds = vec![sent, sent + 1];
        sent += 2;
        decoder.receive(piece, fds);
        if !drain(&mut decoder, &mut seen) {
            break;
        }
    }
    let mut last = None;
    for message in &seen {
        for fd in &message.fds {
            assert!(last < Some(*fd), "descriptors in order, each once");
            last = Some(*fd);
        }
        if !message.fds.is_empty() {
            reached("decoder descriptors".to_owned());
        }
    }
}
