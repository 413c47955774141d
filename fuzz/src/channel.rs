//! Both ends of the back-end channel: requests in any number, answered in any order, refused,
//! forgotten or never; streams cut anywhere; and a peer that lies.
//!
//! Held: each answer belongs to the oldest request of its message that waits, with the value that
//! was given to it; nothing is answered twice; what is owed stays bounded; descriptors are not
//! copied; an end that is over stays over.

use std::collections::{BTreeMap, VecDeque};

use outboard_protocol::header::Header;
use outboard_protocol::payload::{
    ExternalMap, GpuMap, Iotlb, ShmemMap, Uuid, VringArea, VringState,
};
use outboard_protocol::table::{Side, back_end_table, info};
use outboard_protocol::ticket::{Ack, SharedObject};
use outboard_protocol::{
    ChannelBackend, ChannelEffect, ChannelFrontend, ChannelRequest, ChannelStep, Frame,
    ProtocolFeatures, Refusal, RequestId, Ticket, virtio,
};

use crate::cover::{reached, wanted};
use crate::input::Input;

enum Held {
    Ack(Ticket<Ack>),
    Lookup(Ticket<SharedObject>),
}

/// A request under way: its number, whether an answer comes, and whether it was given up.
struct Asked {
    id: RequestId,
    forgotten: bool,
}

/// The two ends, the wire between them, and what has to hold.
struct World {
    back: ChannelBackend<u32>,
    front: ChannelFrontend<u32>,
    /// By message: requests whose answer has not come.
    asked: BTreeMap<u32, VecDeque<Asked>>,
    /// By message: what the front-end's host has said, in the order of the requests.
    held: VecDeque<(u32, Option<Held>)>,
    /// By message: answers in the order in which requests arrived; None: not given yet.
    given: BTreeMap<u32, VecDeque<Option<bool>>>,
    next_fd: u32,
    seen: Vec<u32>,
    /// Somebody lied: only the bounds hold from then on.
    lied: bool,
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let rows = back_end_table().iter();
        let mut wants: Vec<_> = rows.map(|row| format!("channel {} answered", row.id)).collect();
        let others = ["closed", "forgotten", "unsent", "refused by the front-end", "full"];
        wants.extend(others.map(|what| format!("channel {what}")));
        wants
    });
    let mut input = Input::new(data);
    let protocol = match input.below(4) {
        0 => ProtocolFeatures::from_bits_truncate(input.number()),
        1 => ProtocolFeatures::all() - ProtocolFeatures::REPLY_ACK,
        _ => ProtocolFeatures::all(),
    };
    let features = virtio::ACCESS_PLATFORM;
    let mut world = World {
        back: ChannelBackend::new(protocol, features),
        front: ChannelFrontend::new(protocol, features),
        asked: BTreeMap::new(),
        held: VecDeque::new(),
        given: BTreeMap::new(),
        next_fd: 0,
        seen: Vec::new(),
        lied: false,
    };
    while !input.is_empty() && world.step(&mut input) {
        assert!(world.back.outstanding() <= world.back.owed());
        assert!(world.front.outstanding() <= outboard_protocol::channel::MAX_OUTSTANDING);
    }
}

impl World {
    fn fd(&mut self) -> u32 {
        self.next_fd += 1;
        self.next_fd
    }

    /// False when an end is over.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        match input.below(12) {
            0..=3 => {
                if input.one_in(64) {
                    return self.flood(input);
                }
                self.ask(input);
            }
            4..=5 => {
                let most = 1 + input.below(8);
                self.carry_requests(input, most);
            }
            6..=7 => {
                let most = 1 + input.below(8);
                return self.receive_requests(most);
            }
            8..=9 => self.answer(input),
            10 => return self.carry_answers(input),
            _ => match input.below(6) {
                0 => return self.lie_to_back(input),
                1 => return self.lie_to_front(input),
                _ => self.forget(input),
            },
        }
        true
    }

    /// More of one message than may be outstanding.
    fn flood(&mut self, input: &mut Input<'_>) -> bool {
        let code = input.byte();
        for _ in 0..150 {
            self.ask(&mut Input::new(&[0, 0, 0, 0, 0, 0, 0, code]));
        }
        self.carry_requests(input, 150);
        self.receive_requests(150)
    }

    fn request(&mut self, input: &mut Input<'_>) -> ChannelRequest<u32> {
        let state = VringState { index: u32::from(input.byte()), num: 0 };
        let uuid = Uuid { bytes: [input.byte(); 16] };
        let wild = input.one_in(8);
        let number =
            |input: &mut Input<'_>| if wild { input.number() } else { input.byte().into() };
        let (a, b, c) = (number(input), number(input), number(input));
        let shmem = ShmemMap {
            fd_offset: a,
            shm_offset: b,
            len: c,
            flags: u64::from(input.one_in(2)),
            ..ShmemMap::default()
        };
        match input.below(12) {
            0 => ChannelRequest::Iotlb(Iotlb {
                iova: a,
                size: b,
                perm: 1 + input.byte() % 3,
                kind: if wild { input.byte() } else { 1 },
                ..Iotlb::default()
            }),
            1 => ChannelRequest::ConfigChange,
            2 => {
                let poll = input.one_in(2);
                let fd = (!poll).then(|| self.fd());
                let vring = (a & 0xff) | u64::from(poll) << 8;
                ChannelRequest::HostNotifier(VringArea { vring, size: b, offset: c }, fd)
            }
            3 => ChannelRequest::VringCall(state),
            4 => ChannelRequest::VringErr(state),
            5 => ChannelRequest::SharedObjectAdd(uuid),
            6 => ChannelRequest::SharedObjectRemove(uuid),
            7 => ChannelRequest::SharedObjectLookup(uuid),
            8 => ChannelRequest::ShmemMap(shmem, self.fd()),
            9 => ChannelRequest::ShmemUnmap(ShmemMap { flags: 0, ..shmem }),
            10 => {
                let map = GpuMap { shm_offset: a, len: b, ..GpuMap::default() };
                ChannelRequest::GpuMap(map, self.fd())
            }
            _ => {
                let map = ExternalMap { shm_offset: a, len: b, ptr: c, ..ExternalMap::default() };
                ChannelRequest::ExternalMap(map)
            }
        }
    }

    fn ask(&mut self, input: &mut Input<'_>) {
        let request = self.request(input);
        let code = request.code().id();
        if let Ok(sent) = self.back.send(request)
            && sent.answer
        {
            let asked = Asked { id: sent.id, forgotten: false };
            self.asked.entry(code).or_default().push_back(asked);
        }
    }

    /// Moves frames to the front-end, cut anywhere.
    fn carry_requests(&mut self, input: &mut Input<'_>, most: usize) {
        for _ in 0..most {
            let Some(Frame { bytes, fds }) = self.back.transmit() else { return };
            let (head, tail) = bytes.split_at(input.below(bytes.len() + 1).min(bytes.len()));
            if head.is_empty() {
                self.front.receive(tail, fds);
            } else {
                self.front.receive(head, fds);
                self.front.receive(tail, Vec::new());
            }
        }
    }

    fn receive_requests(&mut self, most: usize) -> bool {
        for _ in 0..most {
            let step = match self.front.poll() {
                Ok(Some(step)) => step,
                Ok(None) => {
                    if self.front.wanted() == 0 {
                        reached("channel full".into());
                    }
                    return true;
                }
                Err(_) => {
                    assert!(self.lied, "an honest back-end keeps the front-end's rules");
                    assert!(self.front.poll().is_err(), "what is over stays over");
                    return false;
                }
            };
            match step {
                ChannelStep::Effect(ChannelEffect::Request { request, ticket }) => {
                    let id = request.code().id();
                    self.given.entry(id).or_default().push_back(None);
                    self.held.push_back((id, Some(Held::Ack(ticket))));
                    self.see(&request);
                }
                ChannelStep::Effect(ChannelEffect::Lookup { ticket, .. }) => {
                    self.given.entry(8).or_default().push_back(None);
                    self.held.push_back((8, Some(Held::Lookup(ticket))));
                }
                ChannelStep::Violation(_) => {
                    reached("channel refused by the front-end".into());
                    assert!(self.lied, "an honest back-end breaks no rule");
                }
            }
        }
        true
    }

    fn see(&mut self, request: &ChannelRequest<u32>) {
        if let ChannelRequest::ShmemMap(_, fd)
        | ChannelRequest::GpuMap(_, fd)
        | ChannelRequest::HostNotifier(_, Some(fd)) = request
        {
            assert!(!self.seen.contains(fd), "a descriptor comes once");
            self.seen.push(*fd);
        }
    }

    /// The front-end's host answers one of the requests, whichever.
    fn answer(&mut self, input: &mut Input<'_>) {
        if self.held.is_empty() {
            return;
        }
        let which = input.below(self.held.len());
        let (id, Some(held)) = (self.held[which].0, self.held[which].1.take()) else { return };
        let refuse = input.one_in(4);
        let good = match held {
            Held::Ack(ticket) => {
                if input.one_in(8) {
                    drop(ticket);
                    false
                } else {
                    let value = if refuse { Err(Refusal::Unsupported) } else { Ok(()) };
                    self.front.answer(ticket, value);
                    !refuse
                }
            }
            Held::Lookup(ticket) => {
                let fd = (!refuse).then(|| self.fd());
                self.front.answer(ticket, Ok(fd));
                !refuse
            }
        };
        // Which of this message's requests it was.
        let earlier = self.held.iter().take(which).filter(|(other, _)| *other == id).count();
        if let Some(place) = self.given.get_mut(&id).and_then(|all| all.get_mut(earlier)) {
            *place = Some(good);
        }
    }

    fn carry_answers(&mut self, input: &mut Input<'_>) -> bool {
        while let Some(Frame { bytes, fds }) = self.front.transmit() {
            let cut = 1 + input.below(bytes.len() - 1);
            self.back.receive(&bytes[..cut], fds);
            self.back.receive(&bytes[cut..], Vec::new());
        }
        self.take_answers()
    }

    fn take_answers(&mut self) -> bool {
        loop {
            let answer = match self.back.poll() {
                Ok(Some(answer)) => answer,
                Ok(None) => return true,
                Err(_) => {
                    reached("channel closed".into());
                    assert!(self.lied, "an honest front-end keeps the back-end's rules");
                    assert!(self.back.poll().is_err(), "what is over stays over");
                    return false;
                }
            };
            let id = answer.request.id();
            reached(format!("channel {id} answered"));
            let waiting = self.asked.get_mut(&id).expect("somebody asked");
            loop {
                let oldest = waiting.pop_front().expect("an answer that nobody waits for");
                let given = self.given.get_mut(&id).and_then(VecDeque::pop_front);
                if let Some(at) = self.held.iter().position(|(other, _)| *other == id) {
                    self.held.remove(at);
                }
                if oldest.forgotten {
                    continue;
                }
                assert_eq!(oldest.id, answer.id, "the oldest of its message");
                if !self.lied {
                    let given = given.flatten().expect("it was answered over there");
                    assert_eq!(answer.result.is_ok(), given, "the value that was given");
                }
                break;
            }
        }
    }

    fn forget(&mut self, input: &mut Input<'_>) {
        let messages: Vec<u32> = self.asked.keys().copied().collect();
        if messages.is_empty() {
            return;
        }
        let id = messages[input.below(messages.len())];
        let Some(waiting) = self.asked.get_mut(&id) else { return };
        if waiting.is_empty() {
            return;
        }
        let which = input.below(waiting.len());
        if waiting[which].forgotten {
            return;
        }
        if self.back.forget(waiting[which].id) {
            reached("channel unsent".into());
            waiting.remove(which);
        } else {
            reached("channel forgotten".into());
            waiting[which].forgotten = true;
        }
    }

    /// A reply that is anything.
    fn lie_to_back(&mut self, input: &mut Input<'_>) -> bool {
        self.lied = true;
        let rows = back_end_table();
        let request = rows[input.below(rows.len())].id;
        let request = if input.one_in(8) { input.number() as u32 } else { request };
        let size = if input.one_in(4) { input.number() as u32 } else { 8 };
        let flags = if input.one_in(4) { input.number() as u32 } else { 5 };
        let payload = input.number().to_le_bytes();
        let fds = (0..input.below(3)).map(|_| self.fd()).collect();
        let frame = Frame::raw(Header { request, flags, size }, &payload, fds);
        self.back.receive(&frame.bytes, frame.fds);
        self.take_answers()
    }

    /// A request that is anything.
    fn lie_to_front(&mut self, input: &mut Input<'_>) -> bool {
        self.lied = true;
        let rows = back_end_table();
        let row = &rows[input.below(rows.len())];
        let request = if input.one_in(8) { input.number() as u32 } else { row.id };
        let length = match info(Side::BackEnd, request) {
            Some(row) if !input.one_in(4) => row.payload.sizes().smallest() as usize,
            _ => input.below(80),
        };
        let mut payload = input.take(length).to_vec();
        payload.resize(length, 0);
        let fds = (0..input.below(3)).map(|_| self.fd()).collect();
        let mut header = Header::request(request, input.one_in(2), length as u32);
        if input.one_in(16) {
            header.flags = input.number() as u32;
        }
        let frame = Frame::raw(header, &payload, fds);
        self.front.receive(&frame.bytes, frame.fds);
        self.receive_requests(1)
    }
}
