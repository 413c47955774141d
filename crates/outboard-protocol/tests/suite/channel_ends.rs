//! Both ends of the back-end channel, joined: every message, every wrong shape, answers out of step.

use outboard_protocol::channel::{ChannelRequest as Request, MAX_OUTSTANDING};
use outboard_protocol::features::virtio;
use outboard_protocol::payload::{Iotlb, ShmemMap, Uuid, VringArea, VringFd, VringState};
use outboard_protocol::table::{ReplyKind, back_end_table};
use outboard_protocol::{
    BackendCode, ChannelAnswer, ChannelBackend, ChannelEffect, ChannelFrontend, ChannelStep, Frame,
    ProtocolFeatures, Refusal, RequestId, Violation,
};

use crate::channel::one_of_each;
use crate::common::pair::Socket;
use crate::common::{Fd, all_protocol};

const IOMMU: u64 = virtio::ACCESS_PLATFORM;

/// Both ends and the socket between them.
struct Channel {
    back: ChannelBackend<Fd>,
    front: ChannelFrontend<Fd>,
    to_front: Socket,
    to_back: Socket,
    chunk: usize,
    effects: Vec<ChannelEffect<Fd>>,
    violations: Vec<Violation>,
    answers: Vec<ChannelAnswer<Fd>>,
}

impl Channel {
    fn new(protocol: ProtocolFeatures) -> Self {
        Self {
            back: ChannelBackend::new(protocol, IOMMU),
            front: ChannelFrontend::new(protocol, IOMMU),
            to_front: Socket::default(),
            to_back: Socket::default(),
            chunk: usize::MAX,
            effects: Vec::new(),
            violations: Vec::new(),
            answers: Vec::new(),
        }
    }

    /// Moves bytes until nothing moves.
    fn drive(&mut self) {
        while self.step_front() | self.step_back() {}
    }

    fn step_front(&mut self) -> bool {
        while let Some(Frame { bytes, fds }) = self.back.transmit() {
            self.to_front.send(&bytes, fds);
        }
        let (bytes, fds) = self.to_front.recv(self.front.wanted().min(self.chunk));
        self.front.receive(&bytes, fds);
        let mut moved = !bytes.is_empty();
        while let Some(step) = self.front.poll().expect("in step") {
            moved = true;
            match step {
                ChannelStep::Effect(effect) => self.effects.push(effect),
                ChannelStep::Violation(violation) => self.violations.push(violation),
            }
        }
        moved
    }

    fn step_back(&mut self) -> bool {
        while let Some(Frame { bytes, fds }) = self.front.transmit() {
            self.to_back.send(&bytes, fds);
        }
        let (bytes, fds) = self.to_back.recv(self.back.wanted().min(self.chunk));
        self.back.receive(&bytes, fds);
        while let Some(answer) = self.back.poll().expect("in step") {
            self.answers.push(answer);
        }
        !bytes.is_empty()
    }

    fn send(&mut self, request: Request<Fd>) -> RequestId {
        self.back.send(request).expect("legal").id
    }

    /// Answers the effect at `at`, with success or not.
    fn settle(&mut self, at: usize, success: bool) {
        let refusal = Refusal::Unsupported;
        match self.effects.remove(at) {
            ChannelEffect::Request { ticket, .. } => {
                self.front.answer(ticket, if success { Ok(()) } else { Err(refusal) });
            }
            ChannelEffect::Lookup { ticket, .. } => {
                self.front.answer(ticket, Ok(success.then_some(77)));
            }
        }
    }

    fn results(&mut self) -> Vec<(RequestId, Result<Option<Fd>, u64>)> {
        self.drive();
        self.answers.drain(..).map(|answer| (answer.id, answer.result)).collect()
    }
}

/// What an effect asks for.
fn asked(effect: &ChannelEffect<Fd>) -> Request<Fd> {
    match effect {
        ChannelEffect::Request { request, .. } => request.clone(),
        ChannelEffect::Lookup { uuid, .. } => Request::SharedObjectLookup(*uuid),
    }
}

#[test]
fn every_message_arrives_and_is_answered_with_success_and_with_failure() {
    for reply_ack in [true, false] {
        let mut protocol = all_protocol();
        protocol.set(ProtocolFeatures::REPLY_ACK, reply_ack);
        for request in one_of_each() {
            for success in [true, false] {
                for chunk in [1, usize::MAX] {
                    let mut channel = Channel { chunk, ..Channel::new(protocol) };
                    let row = row_of(&request);
                    let sent = channel.back.send(request.clone()).expect("legal");
                    assert_eq!(sent.answer, reply_ack || row.reply.is_own(), "{}", row.name);
                    channel.drive();
                    assert_eq!(asked(&channel.effects[0]), request);
                    assert_eq!(channel.effects.len(), 1);
                    channel.settle(0, success);
                    let expected = match (success, row.reply) {
                        (false, _) => Err(1),
                        (true, ReplyKind::StatusAndFd) => Ok(Some(77)),
                        (true, _) => Ok(None),
                    };
                    let answers = channel.results();
                    if sent.answer {
                        assert_eq!(answers, [(sent.id, expected)], "{}", row.name);
                    } else {
                        assert!(answers.is_empty(), "{}: {answers:?}", row.name);
                    }
                    assert_eq!((channel.back.owed(), channel.front.outstanding()), (0, 0));
                    assert!(channel.violations.is_empty());
                }
            }
        }
    }
}

fn row_of(request: &Request<Fd>) -> &'static outboard_protocol::MessageInfo {
    let id = request.code().id();
    back_end_table().iter().find(|row| row.id == id).expect("a row for each code")
}
