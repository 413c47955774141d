//! Transcripts of the back-end channel as the front-end sees it, in the notation of `script.rs`.
//!
//! ```text
//! channel features=IOMMU protocol=SHMEM|REPLY_ACK      a new channel
//! negotiate features=… protocol=…                      what was negotiated changes
//! > CONFIG_CHANGE_MSG need_reply                       a request of the back-end
//! ok 1 | refuse 1 | drop 1 | fd 1 77                   the first outstanding ticket is answered
//! ! 2 …   < …   x …                                    effect and its ticket, reply, violation
//! ```

use std::fmt::Write as _;

use outboard_protocol::channel::{ChannelEffect, ChannelFrontend, ChannelStep};
use outboard_protocol::features::ProtocolFeatures;
use outboard_protocol::table::Side;
use outboard_protocol::ticket::SharedObject;
use outboard_protocol::{Refusal, Ticket, ticket};

use super::Fd;
use super::notation::{self, features, number, pairs, protocol};

/// A ticket of either kind.
enum Held {
    Ack(Ticket<ticket::Ack>),
    Lookup(Ticket<SharedObject>),
}

struct Script {
    front: ChannelFrontend<Fd>,
    held: Vec<Option<Held>>,
    out: String,
}

/// Runs the inputs of a transcript and returns it with the outputs of this run.
pub(crate) fn run(text: &str) -> String {
    let front = ChannelFrontend::new(ProtocolFeatures::empty(), 0);
    let mut script = Script { front, held: Vec::new(), out: String::new() };
    for line in text.lines() {
        if matches!(line.chars().next(), Some('<' | '!' | 'x')) {
            continue;
        }
        script.out.push_str(line);
        script.out.push('\n');
        script.line(line.trim());
    }
    script.out
}

impl Script {
    fn line(&mut self, line: &str) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "" | "#" => return,
            "channel" | "negotiate" => {
                let (mut acked, mut agreed) = (0, ProtocolFeatures::empty());
                for (key, value) in pairs(rest) {
                    match key {
                        "features" => acked = features(value),
                        "protocol" => agreed = protocol(value),
                        other => panic!("what is {other:?}?"),
                    }
                }
                if word == "negotiate" {
                    self.front.negotiate(agreed, acked);
                } else {
                    self.front = ChannelFrontend::new(agreed, acked);
                    self.held.clear();
                }
            }
            ">" => {
                let frame = notation::frame(Side::BackEnd, rest);
                self.front.receive(&frame.bytes, frame.fds);
            }
            verdict => self.answer(verdict, rest),
        }
        self.poll();
    }

    fn answer(&mut self, verdict: &str, rest: &str) {
        let (at, fd) = rest.split_once(' ').unwrap_or((rest, "0"));
        let held = self.held[number::<usize>(at) - 1].take().expect("outstanding");
        match (verdict, held) {
            ("drop", held) => drop(held),
            ("ok", Held::Ack(ticket)) => self.front.answer(ticket, Ok(())),
            ("refuse", Held::Ack(ticket)) => self.front.answer(ticket, Err(Refusal::Unsupported)),
            ("fd", Held::Lookup(ticket)) => self.front.answer(ticket, Ok(Some(number(fd)))),
            ("refuse", Held::Lookup(ticket)) => self.front.answer(ticket, Ok(None)),
            (other, _) => panic!("what is {other:?}?"),
        }
    }

    fn poll(&mut self) {
        loop {
            let step = self.front.poll();
            while let Some(frame) = self.front.transmit() {
                self.out.push_str(&notation::reply_line(Side::BackEnd, &frame));
            }
            match step {
                Ok(None) => return,
                Ok(Some(ChannelStep::Effect(effect))) => self.hold(effect),
                Ok(Some(ChannelStep::Violation(violation))) => {
                    writeln!(self.out, "x {violation}").expect("memory");
                }
                Err(fatal) => {
                    writeln!(self.out, "x CLOSE: {fatal}").expect("memory");
                    return;
                }
            }
        }
    }

    fn hold(&mut self, effect: ChannelEffect<Fd>) {
        let (what, held) = match effect {
            ChannelEffect::Request { request, ticket } => {
                (format!("{request:x?}"), Held::Ack(ticket))
            }
            ChannelEffect::Lookup { uuid, ticket } => {
                (format!("Lookup({uuid:x?})"), Held::Lookup(ticket))
            }
        };
        self.held.push(Some(held));
        writeln!(self.out, "! {} {what}", self.held.len()).expect("memory");
    }
}
