//! `Pair`: a front-end and a back-end joined in one thread, through sockets that behave as the
//! kernel's do. Deterministic: no clock, no thread, no I/O.

use std::collections::VecDeque;

use outboard_protocol::{
    Answer, Backend, Expect, Frame, Frontend, Offer, Refusal, Request, Step, Violation,
};

use super::Fd;
use super::host::{Verdict, describe, settle};

/// One direction of an `AF_UNIX` stream socket.
///
/// As in the kernel, one `recv` runs over several plain writes, takes the descriptors of the first
/// write that has some, and stops behind that write: the descriptors need not belong to the first
/// byte it returns, unless it asks for no more than the message it is in.
#[derive(Debug, Default)]
pub(crate) struct Socket {
    writes: VecDeque<(Vec<u8>, Vec<Fd>)>,
}

impl Socket {
    pub(crate) fn send(&mut self, bytes: &[u8], fds: Vec<Fd>) {
        if !bytes.is_empty() {
            self.writes.push_back((bytes.to_vec(), fds));
        }
    }

    pub(crate) fn recv(&mut self, most: usize) -> (Vec<u8>, Vec<Fd>) {
        let mut got = Vec::new();
        while let Some((bytes, fds)) = self.writes.front_mut() {
            let taken = bytes.len().min(most - got.len());
            if taken == 0 {
                break;
            }
            got.extend(bytes.drain(..taken));
            let fds = std::mem::take(fds);
            if bytes.is_empty() {
                self.writes.pop_front();
            }
            if !fds.is_empty() {
                return (got, fds);
            }
        }
        (got, Vec::new())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }
}

/// Both ends and what is between them.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) front: Frontend<Fd>,
    pub(crate) back: Backend<Fd>,
    pub(crate) to_back: Socket,
    pub(crate) to_front: Socket,
    /// Most bytes one `recv` returns, whatever it asks for.
    pub(crate) chunk: usize,
    /// How effects are answered, in turn; success when empty.
    pub(crate) verdicts: VecDeque<Verdict>,
    pub(crate) effects: Vec<String>,
    pub(crate) violations: Vec<Violation>,
    pub(crate) answers: Vec<Answer<Fd>>,
}

impl Pair {
    pub(crate) fn new(offer: Offer) -> Self {
        Self {
            front: Frontend::new(),
            back: Backend::new(offer),
            to_back: Socket::default(),
            to_front: Socket::default(),
            chunk: usize::MAX,
            verdicts: VecDeque::new(),
            effects: Vec::new(),
            violations: Vec::new(),
            answers: Vec::new(),
        }
    }

    /// Sends a request and drives both ends until nothing moves; the answer, if one was due.
    pub(crate) fn ask(&mut self, request: Request<Fd>) -> Result<Option<Answer<Fd>>, Refusal> {
        let before = self.answers.len();
        let expect = self.front.send(request)?;
        self.drive().expect("neither end breaks a rule");
        let answers = self.answers.len() - before;
        assert_eq!(answers, usize::from(expect != Expect::Nothing), "one answer, or none");
        Ok(self.answers.get(before).cloned())
    }

    /// As [`ask`](Self::ask), for requests that must succeed.
    pub(crate) fn succeed(&mut self, request: Request<Fd>) -> Option<Answer<Fd>> {
        let answer = self.ask(request.clone()).unwrap_or_else(|e| panic!("{request:?}: {e}"));
        if let Some(answer) = &answer {
            assert!(answer.is_success(), "{request:?} was answered {answer:?}");
        }
        answer
    }

    /// Moves bytes until nothing moves.
    pub(crate) fn drive(&mut self) -> Result<(), Violation> {
        loop {
            let moved = self.step_back()? | self.step_front()?;
            if !moved {
                return Ok(());
            }
        }
    }

    fn step_back(&mut self) -> Result<bool, Violation> {
        while let Some(Frame { bytes, fds }) = self.front.transmit() {
            self.to_back.send(&bytes, fds);
        }
        let (bytes, fds) = self.to_back.recv(self.back.wanted().min(self.chunk));
        let moved = !bytes.is_empty();
        self.back.receive(&bytes, fds);
        while let Some(step) = self.back.poll()? {
            match step {
                Step::Effect(effect) => {
                    self.effects.push(describe(&effect));
                    let verdict = self.verdicts.pop_front().unwrap_or(Verdict::Succeed);
                    settle(&mut self.back, effect, &verdict);
                }
                Step::Violation(violation) => self.violations.push(violation),
            }
        }
        Ok(moved)
    }

    fn step_front(&mut self) -> Result<bool, Violation> {
        while let Some(Frame { bytes, fds }) = self.back.transmit() {
            self.to_front.send(&bytes, fds);
        }
        let (bytes, fds) = self.to_front.recv(self.front.wanted().min(self.chunk));
        let moved = !bytes.is_empty();
        self.front.receive(&bytes, fds);
        while let Some(answer) = self.front.poll()? {
            self.answers.push(answer);
        }
        Ok(moved)
    }
}
