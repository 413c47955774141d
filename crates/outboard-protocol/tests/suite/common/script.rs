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

use outboard_protocol::features::{ProtocolFeatures, virtio};
use outboard_protocol::header::{FLAG_NEED_REPLY, Header, REPLY_FLAGS, VERSION};
use outboard_protocol::table::{FrontendCode, PayloadKind, Side, front_end_table, info};
use outboard_protocol::{Backend, Effect, Frame, Offer, RingEvent, Step};
use zerocopy::FromBytes;

use super::Fd;
use super::host::{Verdict, describe, settle};
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
        let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let (mut payload, mut fds, mut flags) = (Vec::new(), Vec::new(), VERSION);
        let mut size = None;
        for word in rest.split_whitespace() {
            match word.split_once(['=', ':']) {
                None if word == "need_reply" => flags |= FLAG_NEED_REPLY,
                Some(("fds", list)) => fds.extend(list.split(',').map(number::<Fd>)),
                Some(("flags", value)) => flags = number(value),
                Some(("size", value)) => size = Some(number(value)),
                Some(("u64", value)) => payload.extend(number::<u64>(value).to_ne_bytes()),
                Some(("u32", value)) => payload.extend(number::<u32>(value).to_ne_bytes()),
                Some(("u16", value)) => payload.extend(number::<u16>(value).to_ne_bytes()),
                Some(("u8", value)) => payload.push(number(value)),
                Some(("zero", value)) => payload.resize(payload.len() + number::<usize>(value), 0),
                _ => panic!("what is {word:?}?"),
            }
        }
        let header = Header {
            request: id(name),
            flags,
            size: size.unwrap_or_else(|| payload.len().try_into().expect("short")),
        };
        let frame = match name {
            "raw" => Frame { bytes: payload, fds },
            _ => Frame::raw(header, &payload, fds),
        };
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
            self.out.push_str(&reply_line(&frame));
        }
    }
}

/// One reply as a line.
fn reply_line(frame: &Frame<Fd>) -> String {
    let (header, payload) = Header::read_from_prefix(&frame.bytes).expect("a header");
    assert_eq!(payload.len(), usize::try_from(header.size).expect("small"), "an honest size");
    assert_eq!(header.flags, REPLY_FLAGS, "every reply has flags 5");
    let row = info(Side::FrontEnd, header.request);
    let mut line = match row {
        Some(row) => format!("< {}", row.name),
        None => format!("< #{}", header.request),
    };
    let states =
        row.is_some_and(|row| row.payload == PayloadKind::VringState && row.reply.is_own());
    let words: Vec<_> =
        payload.chunks_exact(4).map(|word| u32::read_from_bytes(word).expect("4")).collect();
    match payload.len() {
        0 => line.push_str(" empty"),
        8 if states => {
            let _ = write!(line, " u32:{} u32:{:#x}", words[0], words[1]);
        }
        8 => {
            let _ = write!(line, " u64:{:#x}", u64::read_from_bytes(payload).expect("8"));
        }
        len if payload.iter().all(|byte| *byte == 0) => {
            let _ = write!(line, " zero:{len}");
        }
        len @ ..=64 => {
            let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
            let _ = write!(line, " {len} bytes {hex}");
        }
        len => {
            let _ = write!(line, " {len} bytes");
        }
    }
    for fd in &frame.fds {
        let _ = write!(line, " fd {fd}");
    }
    line.push('\n');
    line
}

fn id(name: &str) -> u32 {
    match name.strip_prefix('#') {
        Some(id) => number(id),
        None if name == "raw" => 0,
        None => {
            let row = front_end_table().iter().find(|row| row.name == name);
            let row = row.unwrap_or_else(|| panic!("no message {name}"));
            FrontendCode::from_id(row.id).expect("a code for each row").id()
        }
    }
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split_whitespace().map(|word| word.split_once('=').expect("key=value"))
}

/// A number, decimal or with `0x`.
pub(crate) fn number<T: TryFrom<u64>>(text: &str) -> T {
    let value = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    let value = value.unwrap_or_else(|_| panic!("{text:?} is no number"));
    T::try_from(value).ok().unwrap_or_else(|| panic!("{text} does not fit"))
}

fn features(text: &str) -> u64 {
    let named = |name| match name {
        "VERSION_1" => virtio::VERSION_1,
        "EVENT_IDX" => virtio::RING_EVENT_IDX,
        "PACKED" => virtio::RING_PACKED,
        "IOMMU" => virtio::ACCESS_PLATFORM,
        "LOG_ALL" => virtio::LOG_ALL,
        "NET_MTU" => virtio::NET_MTU,
        "PROTOCOL_FEATURES" => virtio::PROTOCOL_FEATURES,
        other => number(other),
    };
    text.split('|').map(named).fold(0, |all, bit| all | bit)
}

fn protocol(text: &str) -> ProtocolFeatures {
    if text == "all" {
        return super::all_protocol();
    }
    if text.starts_with("0x") {
        return ProtocolFeatures::from_bits(number(text)).expect("known bits");
    }
    let named = |name| ProtocolFeatures::from_name(name).unwrap_or_else(|| panic!("no {name}"));
    text.split('|').map(named).fold(ProtocolFeatures::empty(), |all, bit| all | bit)
}
