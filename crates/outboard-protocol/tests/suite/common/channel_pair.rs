//! Both ends of a back-end channel joined in one thread, as `pair` joins those of the main socket.

use outboard_protocol::channel::ChannelRequest as Request;
use outboard_protocol::features::virtio;
use outboard_protocol::{
    ChannelAnswer, ChannelBackend, ChannelEffect, ChannelFrontend, ChannelStep, Frame,
    ProtocolFeatures, Refusal, RequestId, Violation,
};

use super::Fd;
use super::pair::Socket;

/// The feature bit that IOTLB messages need.
pub(crate) const IOMMU: u64 = virtio::ACCESS_PLATFORM;

/// Both ends and the socket between them.
pub(crate) struct Channel {
    pub(crate) back: ChannelBackend<Fd>,
    pub(crate) front: ChannelFrontend<Fd>,
    pub(crate) to_front: Socket,
    pub(crate) to_back: Socket,
    /// Most bytes one `recv` returns, whatever it asks for.
    pub(crate) chunk: usize,
    /// What the front-end has not answered.
    pub(crate) effects: Vec<ChannelEffect<Fd>>,
    pub(crate) violations: Vec<Violation>,
    pub(crate) answers: Vec<ChannelAnswer<Fd>>,
}

impl Channel {
    pub(crate) fn new(protocol: ProtocolFeatures) -> Self {
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
    pub(crate) fn drive(&mut self) {
        while self.step_front() | self.step_back() {}
    }

    pub(crate) fn step_front(&mut self) -> bool {
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

    pub(crate) fn send(&mut self, request: Request<Fd>) -> RequestId {
        self.back.send(request).expect("legal").id
    }

    /// Answers the effect at `at`, with success or not.
    pub(crate) fn settle(&mut self, at: usize, success: bool) {
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

    /// What has been answered since the last time.
    pub(crate) fn results(&mut self) -> Vec<(RequestId, Result<Option<Fd>, u64>)> {
        self.drive();
        self.answers.drain(..).map(|answer| (answer.id, answer.result)).collect()
    }
}
