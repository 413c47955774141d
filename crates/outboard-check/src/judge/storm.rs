//! Storms: conversations that were right until something in them was changed, and reconnects by the
//! hundred (hostile case A94; rules R1 to R20 together).
//!
//! Invariant: everything comes from the seed, so that a finding names the number of its conversation and
//! can be played again.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::ProtocolFeatures as P;

use super::case::{Case, Traits};
use super::disk::{BASE, memory};
use super::finding::{Finding, Outcome};
use super::message::{self, Msg};
use super::ring::{Ring, eventfd};
use super::session::PLAIN;
use super::wire::{Came, Wire};

/// How long a back-end may take to say something or to close, after everything was said to it.
const FAREWELL: Duration = Duration::from_millis(250);

/// Numbers that look random and are the same for the same seed (xorshift64*).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end.max(1)).unwrap_or(1);
        usize::try_from((self.next() >> 11) % end).unwrap_or(0)
    }
}

/// A conversation that sets up a device from beginning to end.
struct Conversation {
    memory: outboard_frontend::SharedMemory,
    ring: Ring,
    spare: OwnedFd,
    protocol: u64,
    features: u64,
}

impl Conversation {
    fn new(traits: &Traits) -> Outcome<Self> {
        let memory = memory()?;
        let ring = Ring::new(&memory, 0, 16, BASE)?;
        let protocol = (traits.protocol - P::XEN_MMAP).bits();
        let features = traits.features & PLAIN;
        Ok(Self { memory, ring, spare: eventfd()?, protocol, features })
    }

    fn messages(&self) -> Vec<Msg<'_>> {
        let ring = &self.ring;
        let table: Vec<_> =
            self.memory.regions().map(|(spec, fd)| (message::region(&spec), fd)).collect();
        let slot = table.first().map_or_else(
            || Msg::new(0, Vec::new()),
            |(region, fd)| {
                let mut msg = message::slot(Code::AddMemReg, region);
                msg.fds.push(*fd);
                msg
            },
        );
        vec![
            Msg::bare(Code::SetOwner),
            message::get_features(),
            Msg::bare(Code::GetProtocolFeatures),
            Msg::u64(Code::SetProtocolFeatures, self.protocol),
            Msg::bare(Code::GetQueueNum),
            Msg::bare(Code::GetMaxMemSlots),
            message::get_config(0, 60),
            message::set_features(self.features),
            message::mem_table(&table),
            slot,
            message::vring_num(0, 16),
            message::vring_base(0, 0),
            message::vring_addr(&ring.addr()),
            message::notifier(Code::SetVringCall, 0, &ring.call),
            message::notifier(Code::SetVringErr, 0, &ring.err),
            message::notifier(Code::SetVringKick, 0, &ring.kick),
            message::enable(0, 1),
            message::set_features(self.features),
            message::mem_table(&table),
            message::enable(0, 0),
            message::get_base(0),
            Msg::bare(Code::ResetOwner),
        ]
    }

    /// Changes one thing, or a few.
    fn mutate<'a>(&'a self, messages: &mut Vec<Msg<'a>>, random: &mut Random) {
        for _ in 0..=random.below(3) {
            let at = random.below(messages.len());
            match random.below(9) {
                0 => {
                    messages.remove(at);
                }
                1 => {
                    let copy = messages.get(at).cloned();
                    let to = random.below(messages.len());
                    copy.into_iter().for_each(|msg| messages.insert(to, msg));
                }
                2 => {
                    let to = random.below(messages.len());
                    messages.swap(at, to);
                }
                3 => messages.truncate(at),
                other => {
                    if let Some(msg) = messages.get_mut(at) {
                        self.mutate_one(msg, other, random);
                    }
                }
            }
            if messages.is_empty() {
                return;
            }
        }
    }

    fn mutate_one<'a>(&'a self, msg: &mut Msg<'a>, how: usize, random: &mut Random) {
        match how {
            4 => {
                let at = random.below(msg.payload.len());
                let value = [0, 1, 0x7f, 0x80, 0xff, random.byte()];
                let value = value.get(random.below(6)).copied().unwrap_or(0);
                msg.payload.get_mut(at).into_iter().for_each(|byte| *byte = value);
            }
            5 => {
                let size = random.below(100);
                msg.payload.resize(size, random.byte());
            }
            6 => {
                let bits = [0x1, 0x9, 0x5, 0x0, 0x2, 0x11, 0xffff_fff1];
                msg.flags = bits.get(random.below(7)).copied().unwrap_or(1);
            }
            7 => match random.below(3) {
                0 => msg.fds.clear(),
                _ => msg.fds.extend(std::iter::repeat_n(self.spare.as_fd(), random.below(20))),
            },
            _ => {
                let id = u32::try_from(random.below(64)).unwrap_or(0);
                msg.id = id;
            }
        }
    }
}

/// How many conversations are played against one process.
const fn conversations(case: &Case<'_>) -> u64 {
    if case.quick { 100 } else { 2000 }
}

pub(crate) fn mutated(case: &mut Case<'_>) -> Outcome {
    let count = conversations(case);
    for number in 0..count {
        let one = one_conversation(case, number);
        let which = |finding: Finding| {
            let why = format!("conversation {number} of seed {}: {}", case.seed, finding.why);
            Finding::new(finding.verdict, why)
        };
        one.map_err(which)?;
    }
    Ok(())
}

fn one_conversation(case: &mut Case<'_>, number: u64) -> Outcome {
    let mut random = Random::new(case.seed.wrapping_mul(1_000_003).wrapping_add(number));
    let mut wire = case.wire()?;
    converse(&mut wire, &case.traits, &mut random)?;
    drop(wire);
    case.lives()
}

/// A mutated conversation over `wire`; how many messages were sent before the back-end was seen to have
/// closed it.
pub(crate) fn converse(wire: &mut Wire, traits: &Traits, random: &mut Random) -> Outcome<u64> {
    let conversation = Conversation::new(traits)?;
    let mut messages = conversation.messages();
    conversation.mutate(&mut messages, random);
    let mut sent = 0;
    for msg in &messages {
        wire.send(msg)?;
        sent += u64::from(!wire.closed());
    }
    conversation.ring.kick()?;
    // What it says to that is its own business. Once it closes it has read everything.
    wire.say_no_more();
    while let Came::Reply(_) = wire.receive(FAREWELL)? {}
    Ok(sent)
}

pub(crate) fn reconnects(case: &mut Case<'_>) -> Outcome {
    let count = if case.quick { 100 } else { 2000 };
    case.needs_another_turn()?;
    for _ in 0..count {
        let mut wire = case.wire()?;
        wire.ask(&message::get_features())?;
    }
    Ok(())
}

pub(crate) fn silent_connects(case: &mut Case<'_>) -> Outcome {
    case.needs_another_turn()?;
    for number in 0..200 {
        let mut wire = case.wire()?;
        if number % 2 == 0 {
            wire.bytes(&[1, 0, 0], &[])?;
        }
    }
    Ok(())
}

/// A backlog of front-ends that all want to talk at once.
pub(crate) fn crowd(case: &mut Case<'_>) -> Outcome {
    case.needs_another_turn()?;
    let mut wires = Vec::new();
    for _ in 0..50 {
        match case.wire() {
            Ok(mut wire) => {
                wire.send_some(&message::get_features().bytes());
                wires.push(wire);
            }
            // A full backlog is a legal answer.
            Err(_) => break,
        }
    }
    drop(wires);
    case.lives()
}
