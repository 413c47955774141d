//! The two sides of a conversation, moved step by step and compared after each.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::task::Poll;

use outboard::{ByHand, DeviceRequestHandler, Ended, HostError};
use rustix::event::{EventfdFlags, eventfd};

use super::device::Hands;
use super::guest::Guest;
use super::model::{Given, Model, Msg, QUEUES};
use super::ring::{KickWay, Notify, Taken};
use super::script::{self, CALLS, KICKS};
use super::wire::{check_region, frames, put, received};
use crate::cover::{played, reached};
use crate::input::Input;

/// Steps without an answer after which a message is said to be stuck.
const STUCK: usize = 400;

/// The eventfds of a front-end, and how often each is to have been called.
pub struct Bells {
    fds: Vec<OwnedFd>,
    expected: Vec<u64>,
    junk: OwnedFd,
    /// Calls that may have gone by message.
    messages: u64,
}

impl Default for Bells {
    fn default() -> Self {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let count = CALLS + KICKS;
        let junk = std::fs::File::open("/dev/null").expect("/dev/null");
        Self {
            fds: (0..count).map(|_| eventfd(0, flags).expect("an eventfd")).collect(),
            expected: vec![0; count],
            junk: junk.into(),
            messages: 0,
        }
    }
}

impl Bells {
    /// Nobody was called.
    pub fn reset(&mut self) {
        for bell in 0..self.fds.len() {
            self.count(bell);
        }
        self.expected.fill(0);
        self.messages = 0;
    }

    fn count(&self, bell: usize) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(&self.fds[bell], &mut bytes) {
            Ok(_) => u64::from_le_bytes(bytes),
            Err(_) => 0,
        }
    }

    fn expect(&mut self, signals: impl IntoIterator<Item = Notify>) {
        for signal in signals {
            match signal {
                Notify::Bell(bell) => {
                    reached("conversation called".into());
                    self.expected[bell] += 1;
                }
                Notify::Message => self.messages += 1,
                Notify::Junk => {}
            }
        }
    }

    fn check(&mut self) {
        for bell in 0..CALLS {
            let expected = std::mem::take(&mut self.expected[bell]);
            assert_eq!(self.count(bell), expected, "calls of eventfd {bell}");
        }
    }
}

/// See the module.
pub struct World<'a> {
    session: Option<ByHand<'a>>,
    hands: &'a Hands,
    guest: &'a mut Guest,
    bells: &'a mut Bells,
    model: Model,
    socket: Option<UnixStream>,
    channels: Vec<UnixStream>,
    ended: Option<Result<Ended, HostError>>,
    serial: u8,
    /// What was in memory when the process was killed.
    picture: Option<Vec<Vec<u8>>>,
}

impl<'a> World<'a> {
    pub fn new(
        handler: &'a mut DeviceRequestHandler<Hands>,
        hands: &'a Hands,
        guest: &'a mut Guest,
        bells: &'a mut Bells,
        model: Model,
    ) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        ours.set_nonblocking(true).expect("a socket");
        hands.lock().next_front_end();
        Self {
            session: Some(handler.by_hand(theirs)),
            hands,
            guest,
            bells,
            model,
            socket: Some(ours),
            channels: Vec::new(),
            ended: None,
            serial: 0,
            picture: None,
        }
    }

    /// Plays until the script or the conversation is over; what the device was left with.
    pub fn play(mut self, input: &mut Input<'_>) -> Model {
        let inside = input.one_in(2);
        self.settle(input);
        while !input.is_empty() && !self.model.closed {
            if !self.step(input) {
                return self.abandon();
            }
            if !self.model.closed {
                self.check("after a step");
            }
        }
        if self.model.closed { self.closed() } else { self.leave(inside) }
    }

    /// One thing that somebody does; false when the conversation is to be given up.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        let ring = input.below(QUEUES);
        let what = input.below(16);
        told(|| format!("step {what}, ring {ring}"));
        match what {
            0..=3 => {
                let msg = script::message(input, &self.model);
                let cut = if input.one_in(8) { input.below(40) } else { 0 };
                self.send(msg, cut);
            }
            4 => {
                for msg in script::set_up(input, &self.model) {
                    self.send(msg, 0);
                }
                // Requests, that something is in flight when the next message comes.
                if input.one_in(2) && self.settle(input) && !self.model.closed {
                    for ring in self.model.live() {
                        script::offer(input, &self.model, self.guest, ring);
                        self.serve(input, ring);
                    }
                }
            }
            5..=8 => script::drive(input, &self.model, self.guest),
            9..=11 => self.serve(input, ring),
            12 => self.finish(input, ring),
            13 => self.arm(ring),
            14 => match input.below(8) {
                0..=2 => self.refuse_next(input),
                3 => self.send_all(script::log_on(input, &self.model)),
                4 => self.send_all(script::log_off(&self.model)),
                5 => script::front_end(input, self.guest),
                6 => script::scribble(input, self.guest),
                _ => {
                    self.kill(input.one_in(2));
                    return false;
                }
            },
            _ => match input.byte() {
                0xff => {
                    // The session is dropped with a message under way.
                    let msg = script::message(input, &self.model);
                    self.send(msg, 0);
                    self.turn();
                    return false;
                }
                0x80.. => self.answer_channel(input),
                _ => {
                    for _ in 0..2 {
                        let msg = script::message(input, &self.model);
                        self.send(msg, 0);
                    }
                }
            },
        }
        self.settle(input)
    }

    fn send_all(&mut self, all: Vec<Msg>) {
        for msg in all {
            self.send(msg, 0);
        }
    }

    /// The process is killed here: whatever the queues do from now on is undone in memory. Or it
    /// was killed a moment ago, in the middle of showing answers.
    fn kill(&mut self, torn: bool) {
        let torn = self.guest.torn_picture().filter(|_| torn);
        if let Some(torn) = torn.clone() {
            self.guest.put_back(torn);
        }
        if let Some(region) = self.model.inflight {
            for ring in self.model.live() {
                if let Some(live) = &self.model.rings[ring].live {
                    live.check_killed(region, ring, torn.is_some(), self.guest);
                }
            }
        }
        self.picture = Some(self.guest.picture());
    }

    fn refuse_next(&mut self, input: &mut Input<'_>) {
        let mut shared = self.hands.lock();
        match input.below(3) {
            0 => (shared.refuse_start, self.model.refuse_start) = (true, true),
            1 => (shared.refuse_ack, self.model.refuse_ack) = (true, true),
            _ => (shared.refuse_config, self.model.refuse_config) = (true, true),
        }
    }

    /// Sends a message, in two pieces when `cut` is inside it.
    fn send(&mut self, msg: Msg, cut: usize) {
        let Some(socket) = &self.socket else { return };
        told(|| format!("{msg:x?}, cut at {cut}"));
        let mut bytes = Vec::with_capacity(12 + msg.payload.len());
        for word in [msg.id, msg.flags, msg.size] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&msg.payload);
        let channel = msg.fds.contains(&Given::Channel).then(|| {
            let (ours, theirs) = UnixStream::pair().expect("a socket");
            ours.set_nonblocking(true).expect("a socket");
            (ours, theirs)
        });
        let fds: Vec<BorrowedFd<'_>> = msg
            .fds
            .iter()
            .map(|given| match (given, &channel) {
                (Given::Bell(bell), _) => self.bells.fds[*bell].as_fd(),
                (Given::File(file), _) => self.guest.fd(*file).as_fd(),
                (Given::Log(log), _) => self.guest.logs[*log].fd().as_fd(),
                (Given::Channel, Some((_, theirs))) => theirs.as_fd(),
                _ => self.bells.junk.as_fd(),
            })
            .collect();
        // The kernel gives descriptors to the read that reaches them: the header is one of its own.
        let cut = if msg.misplaced { cut.clamp(12, bytes.len() - 1) } else { cut };
        let (head, tail) = bytes.split_at(if cut < bytes.len() { cut } else { 0 });
        let (first, second) = if msg.misplaced { (&[][..], &fds[..]) } else { (&fds[..], &[][..]) };
        if head.is_empty() {
            put(socket, tail, first);
        } else {
            put(socket, head, first);
            if !self.model.is_busy() {
                turn(&mut self.session, &mut self.ended);
            }
            if let Some(socket) = &self.socket {
                put(socket, tail, second);
            }
        }
        self.channels.extend(channel.map(|(ours, _)| ours));
        self.model.inbox.push_back(msg);
        played(1);
    }

    /// Both sides go as far as they can; the same answers have to come.
    fn turn(&mut self) {
        turn(&mut self.session, &mut self.ended);
        self.model.advance(self.guest);
        self.bells.expect(self.model.signals.drain(..));
        let (got, files) = self.socket.as_ref().map(received).unwrap_or_default();
        let sizes: Vec<u64> = files.iter().map(check_region).collect();
        assert_eq!(sizes, std::mem::take(&mut self.model.files), "files that came with answers");
        let wanted = std::mem::take(&mut self.model.out);
        told(|| format!("  answers {}, busy with {:?}", frames(&got), self.model.busy_with()));
        assert!(got == wanted, "answers: {}, wanted: {}", frames(&got), frames(&wanted));
        if !self.model.closed {
            assert!(self.ended.is_none(), "the connection ended: {:?}", self.ended);
        }
    }

    /// Until every message is answered; false when that cannot be.
    fn settle(&mut self, input: &mut Input<'_>) -> bool {
        let mut before = None;
        for _ in 0..STUCK {
            self.turn();
            if self.model.closed || !self.model.is_busy() {
                return true;
            }
            self.mail();
            self.turn();
            if self.model.closed {
                return true;
            }
            self.check("while a message waits");
            if !self.model.is_busy() {
                return true;
            }
            if std::mem::replace(&mut before, self.model.busy_with()) != self.model.busy_with() {
                // It may do without what is in flight.
                continue;
            }
            for ring in 0..QUEUES {
                if self.model.busy_with() == Some(35) {
                    self.serve(input, ring);
                }
                self.finish(input, ring);
            }
        }
        // A ring whose used index is its available index never runs out of requests.
        assert_eq!(self.model.busy_with(), Some(35), "a message is never answered");
        false
    }

    /// All queues look into their mailboxes.
    fn mail(&mut self) {
        let mut shared = self.hands.lock();
        for (at, queue) in shared.queues.iter_mut().enumerate() {
            let (Some(queue), Some(live)) = (queue, &mut self.model.rings[at].live) else {
                continue;
            };
            let parked = live.is_parked();
            queue.drain_control();
            queue.poll_control();
            queue.processed();
            live.poll_control(self.guest);
            live.processed(self.guest);
            self.bells.expect(live.signals.drain(..));
            if live.is_parked() {
                reached("conversation ring parked".into());
            } else if parked {
                reached("conversation ring came back".into());
            }
        }
    }

    /// The device looks at one ring.
    fn serve(&mut self, input: &mut Input<'_>, at: usize) {
        {
            let shared = &mut *self.hands.lock();
            let (Some(queue), Some(live)) =
                (&mut shared.queues[at], &mut self.model.rings[at].live)
            else {
                return;
            };
            if let KickWay::Bell(bell) = live.setup.kick {
                let _ = rustix::io::write(&self.bells.fds[bell], &1u64.to_ne_bytes());
                queue.drain_kick();
                assert_eq!(self.bells.count(bell), 0, "the doorbell is the one last given");
            }
            assert_eq!(queue.is_polled(), live.setup.kick == KickWay::Poll);
            for _ in 0..1 + input.below(4) {
                let before = live.base();
                let wanted = live.pop(self.guest);
                let request = queue.pop();
                assert_eq!(request.is_some(), wanted.is_some(), "a request on ring {at}");
                let (Some(mut request), Some(mut taken)) = (request, wanted) else {
                    if live.base() != before {
                        reached("conversation request dropped while disabled".into());
                    }
                    break;
                };
                let (readable, writable) =
                    (Taken::bytes(&taken.readable), Taken::bytes(&taken.writable));
                assert_eq!(request.readable().len(), readable, "readable bytes");
                assert_eq!(request.writable().len(), writable, "writable bytes");
                let mut bytes = vec![0; readable.min(48) as usize];
                request.readable().read_exact(&mut bytes).expect("they are there");
                assert_eq!(bytes, taken.read(self.guest, bytes.len()), "the request's bytes");
                let fill = writable.min(u64::from(input.byte())) as usize;
                self.serial = self.serial.wrapping_add(1);
                request.writable().write_all(&vec![self.serial; fill]).expect("there is room");
                taken.fill(self.guest, self.serial, fill);
                match input.below(4) {
                    0 => {
                        let written = input.number() as u32;
                        live.put_used(self.guest, &taken, written);
                        let _ = request.done(written);
                    }
                    1 => {
                        live.put_used(self.guest, &taken, 0);
                        drop(request);
                    }
                    _ => {
                        reached("conversation request deferred".into());
                        live.held.push(taken);
                        shared.held[at].push(request.defer());
                    }
                }
            }
            if !input.one_in(4) {
                queue.publish();
                live.publish(self.guest);
            }
            if live.broken {
                reached("conversation ring broken".into());
            }
            self.bells.expect(live.signals.drain(..));
        }
        self.mail();
    }

    /// The device finishes a request that it had put aside.
    fn finish(&mut self, input: &mut Input<'_>, at: usize) {
        {
            let shared = &mut *self.hands.lock();
            let Some(live) = &mut self.model.rings[at].live else { return };
            if live.held.is_empty() {
                return;
            }
            let which = input.below(live.held.len());
            let (mut request, mut taken) =
                (shared.held[at].swap_remove(which), live.held.swap_remove(which));
            let fill = request.writable().len().min(16) as usize;
            if fill > 0 && input.one_in(2) {
                // Behind what was written before.
                request.writable().write_all(&vec![!self.serial; fill]).expect("there is room");
                taken.fill(self.guest, !self.serial, fill);
                drop(request);
                live.put_used(self.guest, &taken, 0);
            } else {
                let written = u32::from(input.byte());
                live.put_used(self.guest, &taken, written);
                request.done(written);
            }
            live.publish(self.guest);
        }
        self.mail();
    }

    fn arm(&mut self, at: usize) {
        let shared = &mut *self.hands.lock();
        let (Some(queue), Some(live)) = (&mut shared.queues[at], &mut self.model.rings[at].live)
        else {
            return;
        };
        assert_eq!(queue.arm(), live.arm(self.guest), "work after all on ring {at}");
        queue.disarm();
        live.disarm(self.guest);
    }

    /// The front-end says something on the back-end channel, which harms nobody.
    fn answer_channel(&mut self, input: &mut Input<'_>) {
        let Some(channel) = self.channels.last() else { return };
        let mut bytes = Vec::new();
        for word in [input.below(12) as u32, 5, 8, u32::from(input.byte() & 1), 0] {
            bytes.extend(word.to_le_bytes());
        }
        match input.below(4) {
            0 => drop(self.channels.pop()),
            1 => put(channel, &bytes[..input.below(20).max(1)], &[]),
            2 => put(channel, &bytes, &[self.bells.junk.as_fd()]),
            _ => put(channel, &bytes, &[]),
        }
    }

    fn check_channels(&mut self) {
        let mut buffer = [0; 1024];
        for channel in &mut self.channels {
            while let Ok(count @ 1..) = channel.read(&mut buffer) {
                for message in buffer[..count].chunks(20) {
                    let id = message.first().copied().unwrap_or_default();
                    assert!(matches!(id, 4 | 5), "message {id} on the back-end channel");
                    reached("conversation called by message".into());
                    let left = self.bells.messages.checked_sub(1);
                    self.bells.messages = left.expect("a call by message that nobody owed");
                }
            }
        }
    }

    /// Everything that has to be the same, is.
    fn check(&mut self, when: &str) {
        self.guest.check(when);
        self.bells.check();
        self.check_channels();
        let shared = self.hands.lock();
        told(|| {
            let live = self.model.live();
            let refuse = (shared.refuse_start, shared.refuse_ack, shared.refuse_config);
            let waits = self.model.rings.each_ref().map(|ring| ring.waits);
            format!("  {when}: running {live:?}, waiting {waits:?}, refused next {refuse:?}")
        });
        for (at, (queue, ring)) in shared.queues.iter().zip(&self.model.rings).enumerate() {
            assert_eq!(queue.is_some(), ring.live.is_some(), "{when}: ring {at} runs");
            let (Some(queue), Some(live)) = (queue, &ring.live) else { continue };
            assert_eq!(queue.is_parked(), live.is_parked(), "{when}: ring {at} is parked");
            assert_eq!(queue.is_broken(), live.broken, "{when}: ring {at} is broken");
            assert_eq!(queue.base(), u32::from(live.base()), "{when}: base of ring {at}");
            let held = live.held.len();
            assert_eq!(usize::from(queue.in_flight()), held, "{when}: ring {at} in flight");
        }
        assert_eq!(shared.acked, self.model.own_acked, "{when}: the device's features");
        assert_eq!(shared.config, self.model.config, "{when}: the configuration");
        assert_eq!(shared.resets, self.model.resets, "{when}: resets");
        assert_eq!(shared.refuse_start, self.model.refuse_start, "{when}: starts refused");
        assert_eq!(shared.suspended, self.model.is_suspended(), "{when}: suspended");
    }

    /// The session is given up: queues are stopped on the spot.
    fn give_up(&mut self) {
        self.hands.lock().abandon = true;
        self.model.abandon(self.guest);
        self.bells.expect(self.model.signals.drain(..));
    }

    fn abandon(mut self) -> Model {
        reached("conversation dropped session".into());
        self.give_up();
        self.session = None;
        self.over()
    }

    /// The back-end has ended the connection.
    fn closed(mut self) -> Model {
        self.give_up();
        turn(&mut self.session, &mut self.ended);
        assert!(matches!(self.ended, Some(Err(_))), "the connection ends: {:?}", self.ended);
        self.over()
    }

    /// The front-end leaves, between two messages or inside one.
    fn leave(mut self, inside: bool) -> Model {
        if let Some(socket) = self.socket.take()
            && inside
        {
            put(&socket, &[1, 0, 0, 0, 9], &[self.bells.junk.as_fd()]);
        }
        self.give_up();
        turn(&mut self.session, &mut self.ended);
        match &self.ended {
            Some(Ok(Ended::Left)) => assert!(!inside),
            Some(Err(HostError::PartialMessage)) => {
                assert!(inside);
                reached("conversation left inside a message".into());
            }
            other => panic!("the front-end left: {other:?}"),
        }
        self.over()
    }

    fn over(mut self) -> Model {
        self.check("at the end");
        assert!(self.hands.lock().held.iter().all(Vec::is_empty));
        if let Some(picture) = self.picture.take() {
            self.guest.put_back(picture);
        }
        self.model
    }
}

/// The handler goes as far as it can.
fn turn(session: &mut Option<ByHand<'_>>, ended: &mut Option<Result<Ended, HostError>>) {
    if let Some(Poll::Ready(how)) = session.as_mut().map(ByHand::turn) {
        *ended = Some(how);
        *session = None;
    }
}

/// With FUZZ_TRACE set, says what happens: for one input at a time.
fn told(what: impl FnOnce() -> String) {
    static TRACE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    if *TRACE.get_or_init(|| std::env::var_os("FUZZ_TRACE").is_some()) {
        eprintln!("{}", what());
    }
}
