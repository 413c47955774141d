//! Transcripts: text files that say what goes in, and record what comes out.
//!
//! ```text
//! offer features=VERSION_1 protocol=REPLY_ACK|MQ queues=2     what the device offers
//! setup features=VERSION_1 protocol=REPLY_ACK                 negotiated beforehand, in silence
//! > SET_VRING_NUM need_reply u32:0 u32:256                    a request (fds=5,6: descriptors)
//! >+ SET_OWNER                                                the same, held for the next write
//! > raw u32:1 u32:9 u32:0                                     any bytes
//! split 1                                                     bytes per read from now on (0: all)
//! answer refuse | drop | base 7 | bytes 1,2 | fd 9 | hold     how the next effect is answered
//! release                                                     answers the effect held
//! event 0 Broken                                              the host reports about a ring
//! ? rings                                                     asks for the records
//! < ...   ! ...   x ...   = ...                               reply, effect, violation, record
//! ```

use std::collections::VecDeque;
use std::fmt::Write as _;

use outboard_protocol::features::ProtocolFeatures;
use outboard_protocol::table::Side;
use outboard_protocol::{Backend, Effect, Offer, RingEvent, Step};

use super::Fd;
use super::host::{Verdict, describe, settle};
use super::notation::{self, features, number, pairs, protocol};
use super::pair::Socket;

/// Runs the inputs of a transcript and returns it with the outputs of this run.
pub(crate) fn run(text: &str) -> String {
    let mut script = Script::default();
    for line in text.lines() {
        if matches!(line.chars().next(), Some('<' | '!' | 'x' | '=')) {
            continue;
        }
        script.out.push_str(line);
        script.out.push('\n');
        script.line(line.trim());
    }
    script.out
}

struct Script {
    offer: Offer,
    backend: Option<Backend<Fd>>,
    socket: Socket,
    write: Vec<u8>,
    write_fds: Vec<Fd>,
    split: usize,
    verdicts: VecDeque<Verdict>,
    hold: bool,
    held: Option<Effect<Fd>>,
    out: String,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            offer: Offer { protocol_features: ProtocolFeatures::empty(), ..super::full_offer() },
            backend: None,
            socket: Socket::default(),
            write: Vec::new(),
            write_fds: Vec::new(),
            split: usize::MAX,
            verdicts: VecDeque::new(),
            hold: false,
            held: None,
            out: String::new(),
        }
    }
}

impl Script {
    fn line(&mut self, line: &str) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "" | "#" => {}
            "offer" => self.set_offer(rest),
            "setup" => self.setup(rest),
            "split" => {
                let size = number::<usize>(rest);
                self.split = if size == 0 { usize::MAX } else { size };
            }
            "answer" => self.plan(rest),
            "release" => {
                let effect = self.held.take().expect("an effect is held");
                settle(self.back(), effect, &Verdict::Succeed);
                self.pump();
            }
            "event" => self.event(rest),
            "?" => self.show_rings(),
            ">" => {
                self.request(rest);
                self.flush();
            }
            ">+" => self.request(rest),
            other => panic!("what is {other:?}?"),
        }
    }

    fn back(&mut self) -> &mut Backend<Fd> {
        self.backend.get_or_insert_with(|| Backend::new(self.offer.clone()))
    }

    fn set_offer(&mut self, rest: &str) {
        for (key, value) in pairs(rest) {
            match key {
                "features" => self.offer.features = features(value),
                "protocol" => self.offer.protocol_features = protocol(value),
                "queues" => self.offer.queues = number(value),
                "max" => self.offer.max_queue_size = number(value),
                "slots" => self.offer.mem_slots = number(value),
                "gpu" => self.offer.gpu_socket = value == "yes",
                other => panic!("what is {other:?}?"),
            }
        }
        self.backend = None;
    }

    fn setup(&mut self, rest: &str) {
        let (mut acked, mut agreed) = (0, ProtocolFeatures::empty());
        for (key, value) in pairs(rest) {
            match key {
                "features" => acked = features(value),
                "protocol" => agreed = protocol(value),
                other => panic!("what is {other:?}?"),
            }
        }
        self.backend = Some(super::negotiated(self.offer.clone(), acked, agreed));
    }

    fn plan(&mut self, rest: &str) {
        let (word, value) = rest.split_once(' ').unwrap_or((rest, ""));
        let verdict = match word {
            "refuse" => Verdict::Refuse,
            "drop" => Verdict::Drop,
            "base" => Verdict::Base(number(value)),
            "bytes" => Verdict::Bytes(value.split(',').map(number).collect()),
            "fd" => Verdict::WithFd(number(value)),
            "hold" => {
                self.hold = true;
                return;
            }
            other => panic!("what is {other:?}?"),
        };
        self.verdicts.push_back(verdict);
    }

    fn event(&mut self, rest: &str) {
        let (index, name) = rest.split_once(' ').expect("a ring and an event");
        let event = RingEvent::ALL.into_iter().find(|event| format!("{event:?}") == name);
        let done = self.back().ring_event(number(index), event.expect("a known event"));
        writeln!(self.out, "= {}", if done { "done" } else { "cannot happen" }).expect("memory");
    }

    fn show_rings(&mut self) {
        let mut text = String::new();
        for (index, ring) in self.back().rings().iter().enumerate() {
            let enabled = if ring.enabled { "enabled" } else { "disabled" };
            let size = ring.size.map_or("-".to_owned(), |size| size.to_string());
            let addresses = if ring.addresses.is_some() { "set" } else { "-" };
            writeln!(
                text,
                "= ring {index}: {:?} {enabled} size {size} addresses {addresses} base {:#x} \
                 kick {:?} call {:?} err {:?}",
                ring.run, ring.base, ring.kick, ring.call, ring.err
            )
            .expect("memory");
        }
        self.out.push_str(&text);
    }

    /// Adds one request to the write that is being put together.
    fn request(&mut self, rest: &str) {
        let frame = notation::frame(Side::FrontEnd, rest);
        // A write has one set of descriptors, at its first byte.
        if !frame.fds.is_empty() && !self.write.is_empty() {
            self.end_write();
        }
        self.write.extend(frame.bytes);
        self.write_fds.extend(frame.fds);
    }

    fn end_write(&mut self) {
        let bytes = std::mem::take(&mut self.write);
        self.socket.send(&bytes, std::mem::take(&mut self.write_fds));
    }

    fn flush(&mut self) {
        self.end_write();
        self.pump();
    }

    /// Reads as a transport does: never more than is wanted.
    fn pump(&mut self) {
        loop {
            if !self.poll_out() {
                return;
            }
            let most = self.back().wanted().min(self.split);
            let (bytes, fds) = self.socket.recv(most);
            if bytes.is_empty() {
                return;
            }
            self.back().receive(&bytes, fds);
        }
    }

    /// Prints what comes out; `false` when the connection is over.
    fn poll_out(&mut self) -> bool {
        loop {
            let step = self.back().poll();
            let more = match step {
                Ok(None) => false,
                Ok(Some(Step::Violation(violation))) => {
                    writeln!(self.out, "x {violation}").expect("memory");
                    true
                }
                Ok(Some(Step::Effect(effect))) => {
                    writeln!(self.out, "! {}", describe(&effect)).expect("memory");
                    if std::mem::take(&mut self.hold) {
                        self.held = Some(effect);
                    } else {
                        let verdict = self.verdicts.pop_front().unwrap_or(Verdict::Succeed);
                        settle(self.back(), effect, &verdict);
                    }
                    true
                }
                Err(fatal) => {
                    self.print_replies();
                    writeln!(self.out, "x CLOSE: {fatal}").expect("memory");
                    self.socket = Socket::default();
                    return false;
                }
            };
            self.print_replies();
            if !more {
                return true;
            }
        }
    }

    fn print_replies(&mut self) {
        while let Some(frame) = self.back().transmit() {
            self.out.push_str(&notation::reply_line(Side::FrontEnd, &frame));
        }
    }
}
