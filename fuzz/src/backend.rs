//! The back-end's state machine: whole conversations, with a model of the enable flags and of who
//! is owed an answer.

use outboard_protocol::features::ProtocolFeatures;
use outboard_protocol::header::Header;
use outboard_protocol::table::{FdRule, PayloadKind};
use outboard_protocol::{
    Backend, Effect, Frame, MessageInfo, Offer, Refusal, RingEvent, RunState, Step, table,
};

use crate::cover::{reached, wanted};
use crate::input::Input;

const QUEUES: u16 = 3;

/// What has to hold beside the machine.
#[derive(Debug, Default)]
struct Model {
    enabled: [bool; QUEUES as usize],
    next_fd: u32,
}

impl Model {
    fn fd(&mut self) -> u32 {
        self.next_fd += 1;
        self.next_fd
    }
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let messages = table::front_end_table().iter().map(|row| format!("message {}", row.id));
        let states = RunState::ALL.iter().map(|state| format!("ring {state:?}"));
        messages.chain(states).collect()
    });
    let mut input = Input::new(data);
    let everything = input.one_in(2);
    let offer = Offer {
        features: if everything { !0 } else { 0x1_7000_0000 },
        protocol_features: if everything {
            ProtocolFeatures::all()
        } else {
            ProtocolFeatures::MQ
                | ProtocolFeatures::REPLY_ACK
                | ProtocolFeatures::CONFIG
                | ProtocolFeatures::RESET_DEVICE
                | ProtocolFeatures::CONFIGURE_MEM_SLOTS
        },
        queues: QUEUES,
        max_queue_size: 1024,
        mem_slots: 8,
        gpu_socket: everything,
    };
    let mut backend = Backend::<u32>::new(offer);
    let mut model = Model::default();
    while !input.is_empty() {
        if !turn(&mut input, &mut backend, &mut model) {
            return;
        }
        check(&backend, &model);
    }
}

/// One thing that the peer or the host does; false when the connection is over.
fn turn(input: &mut Input<'_>, backend: &mut Backend<u32>, model: &mut Model) -> bool {
    match input.below(8) {
        0..=4 => {
            let (bytes, fds) = message(input, model);
            let cut = if input.one_in(4) { input.below(bytes.len()) } else { bytes.len() };
            let (head, tail) = bytes.split_at(cut);
            if head.is_empty() {
                backend.receive(tail, fds);
            } else {
                backend.receive(head, fds);
                if !drain(input, backend, model) {
                    return false;
                }
                backend.receive(tail, Vec::new());
            }
        }
        5 => {
            let length = input.below(40);
            backend.receive(input.take(length), Vec::new());
        }
        6 => host(input, backend),
        _ if input.one_in(2) => negotiate(input, backend),
        _ => set_up(input, backend, model),
    }
    drain(input, backend, model)
}

fn send(backend: &mut Backend<u32>, id: u32, words: &[u64], fds: Vec<u32>) {
    let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let frame = Frame::request(id, true, &payload, fds);
    backend.receive(&frame.bytes, frame.fds);
}

/// The messages with which most conversations start.
fn negotiate(input: &mut Input<'_>, backend: &mut Backend<u32>) {
    let mut protocol = ProtocolFeatures::all() - ProtocolFeatures::XEN_MMAP;
    if input.one_in(2) {
        // With memory slots there is no postcopy.
        protocol -= ProtocolFeatures::CONFIGURE_MEM_SLOTS;
    }
    let features = [0x1_7000_0000, 0x3_4000_0000, 0x5_4400_0000, 0x1_0000_0000];
    send(backend, 16, &[protocol.bits()], Vec::new());
    send(backend, 2, &[features[input.below(4)]], Vec::new());
}

/// A ring from nothing to started.
fn set_up(input: &mut Input<'_>, backend: &mut Backend<u32>, model: &mut Model) {
    let index = input.below(usize::from(QUEUES)) as u64;
    send(backend, 8, &[index | 16 << 32], Vec::new());
    send(backend, 9, &[index, 4096, 8192, 12288, 0], Vec::new());
    send(backend, 10, &[index | (input.number() << 32)], Vec::new());
    let fd = model.fd();
    send(backend, 12, &[index], vec![fd]);
    drain(input, backend, model);
    let index = index as u16;
    if backend.ring(index).is_some_and(|ring| ring.run == RunState::Waiting && ring.is_configured())
    {
        backend.ring_event(index, RingEvent::Started);
    }
}

/// A message that is mostly well-formed.
fn message(input: &mut Input<'_>, model: &mut Model) -> (Vec<u8>, Vec<u32>) {
    let rows = table::front_end_table();
    let row = &rows[input.below(rows.len())];
    let (mut payload, mut count) = payload(input, row);
    if input.one_in(16) {
        payload.push(0);
    }
    if input.one_in(16) {
        count = input.below(4);
    }
    let fds = (0..count).map(|_| model.fd()).collect::<Vec<_>>();
    let id = if input.one_in(64) { input.number() as u32 } else { row.id };
    let size = u32::try_from(payload.len()).unwrap_or(0);
    let mut header = Header { request: id, flags: 1, size };
    if input.one_in(2) {
        header.flags |= 8;
    }
    if input.one_in(128) {
        header.flags = input.number() as u32;
    }
    (Frame::raw(header, &payload, fds.clone()).bytes, fds)
}

/// A payload of a legal size and the number of descriptors that belongs to it.
fn payload(input: &mut Input<'_>, row: &MessageInfo) -> (Vec<u8>, usize) {
    let mut words = Vec::new();
    let mut count = usize::from(!matches!(row.fds, FdRule::None | FdRule::OneIgnored));
    match row.payload {
        PayloadKind::MemTable => {
            count = input.below(4);
            words.push(count as u64);
            (0..count).for_each(|_| words.extend(region(input)));
        }
        PayloadKind::SingleRegion => {
            words.push(0);
            words.extend(region(input));
        }
        PayloadKind::VringAddr => {
            words.push(input.below(4) as u64);
            words.extend((0..4).map(|_| input.number() & !0xf));
        }
        PayloadKind::VringFd => {
            let poll = input.one_in(4);
            count = usize::from(!poll);
            words.push(input.below(4) as u64 | u64::from(poll) << 8);
        }
        PayloadKind::VringState => {
            let index = input.below(4) as u64;
            words.push(index | input.number() << 32);
        }
        PayloadKind::Config => {
            let length = input.below(24) as u64;
            let (offset, migration) = (input.number() & 0xff, input.one_in(2));
            let head = [offset as u32, length as u32, u32::from(migration)];
            let mut bytes: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.resize(12 + length as usize, input.byte());
            return (bytes, 0);
        }
        PayloadKind::Inflight => {
            count = usize::from(row.fds == FdRule::One);
            let shape = (1 + input.below(4) as u64) | (1 << (4 + input.below(4))) << 16;
            words.extend([input.number() << 8, input.number(), shape]);
        }
        PayloadKind::Iotlb => {
            words.extend([input.number(), input.number(), input.number()]);
            words.push(input.below(4) as u64 | (input.below(6) as u64) << 8);
        }
        kind => {
            let sizes = kind.sizes();
            let most = if input.one_in(2) { sizes.largest() } else { sizes.smallest() };
            words.extend((0..most.div_ceil(8)).map(|_| input.number()));
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.truncate(most as usize);
            return (bytes, count);
        }
    }
    (words.iter().flat_map(|word| word.to_le_bytes()).collect(), count)
}

/// A memory region, one of a few, sometimes with anything in it.
fn region(input: &mut Input<'_>) -> [u64; 4] {
    let number = 1 + input.below(6) as u64;
    let mut region = [number << 20, 1 << 20, number << 40, 0];
    if input.one_in(16) {
        region[input.below(4)] = input.number();
    }
    region
}

/// What an honest handler tells the machine.
fn host(input: &mut Input<'_>, backend: &mut Backend<u32>) {
    let index = input.below(usize::from(QUEUES)) as u16;
    let Some(ring) = backend.ring(index).copied() else { return };
    let event = match (ring.run, input.below(3)) {
        (RunState::Waiting, _) if ring.is_configured() => RingEvent::Started,
        (RunState::Running, 0) => RingEvent::Parked,
        (RunState::Running, 1) => RingEvent::Broken,
        (RunState::Parked, _) => RingEvent::Resumed,
        _ => return,
    };
    assert!(backend.ring_event(index, event), "{event:?} on {:?}", ring.run);
}

/// Carries out all there is; false when the connection is over.
fn drain(input: &mut Input<'_>, backend: &mut Backend<u32>, model: &mut Model) -> bool {
    loop {
        let step = match backend.poll() {
            Ok(Some(step)) => step,
            Ok(None) => break,
            Err(violation) => {
                let text = format!("{violation:?}");
                reached(format!("close {}", text.split([' ', '{']).next().unwrap_or_default()));
                return false;
            }
        };
        match step {
            Step::Effect(effect) => {
                for ring in backend.rings() {
                    reached(format!("ring {:?}", ring.run));
                    reached(format!("effect {} {:?}", effect.name(), ring.run));
                }
                answer(input, backend, model, effect);
            }
            Step::Violation(_) => {}
        }
    }
    while let Some(frame) = backend.transmit() {
        let word = |at| u32::from_le_bytes([0usize, 1, 2, 3].map(|byte| frame.bytes[at + byte]));
        assert_eq!(word(4), 5, "a reply's flags are exactly 5");
        reached(format!("message {}", word(0)));
    }
    true
}

/// Answers an effect: with success, with a refusal, or not at all.
fn answer(
    input: &mut Input<'_>,
    backend: &mut Backend<u32>,
    model: &mut Model,
    effect: Effect<u32>,
) {
    let refuse = input.one_in(8);
    if input.one_in(16) {
        // Dropped: the machine refuses it by itself.
        return;
    }
    if !refuse {
        expect(model, &effect);
    }
    macro_rules! answers {
        ($($name:ident => $value:expr),* $(,)?) => {
            match effect {
                $(Effect::$name { ticket, .. } => {
                    let value = if refuse { Err(Refusal::Unsupported) } else { Ok($value) };
                    backend.answer(ticket, value);
                })*
                _ => {}
            }
        };
    }
    answers! {
        SetFeatures => (), SetProtocolFeatures => (), ResetOwner => (), ResetDevice => (),
        SetMemTable => (), AddMemRegion => (), RemMemRegion => (), RingConfigured => (),
        SetVringKick => (), SetVringCall => (), SetVringErr => (), SetVringEnable => (),
        GetVringBase => 7, ReadConfig => vec![1, 2, 3], WriteConfig => (),
        SetBackendReqFd => (), SetLogBase => (), SetLogFd => (), GetInflightFd => None,
        SetInflightFd => (), SetDeviceStateFd => None, CheckDeviceState => (), Iotlb => (),
        SetStatus => (), GetStatus => 3, SendRarp => (), NetSetMtu => (), SetVringEndian => (),
        CreateCryptoSession => 1, CloseCryptoSession => (), PostcopyAdvise => 99,
        PostcopyListen => (), PostcopyEnd => (), GpuSetSocket => (), VringKick => (),
        GetSharedObject => None,
    }
}

/// What an accepted effect makes of the enable flags.
fn expect(model: &mut Model, effect: &Effect<u32>) {
    match effect {
        Effect::SetFeatures { enable_all: true, .. } => model.enabled = [true; 3],
        Effect::ResetOwner { .. } | Effect::ResetDevice { .. } => model.enabled = [false; 3],
        Effect::SetVringEnable { index, enabled, .. } => {
            model.enabled[usize::from(*index)] = *enabled;
        }
        _ => {}
    }
}

fn check(backend: &Backend<u32>, model: &Model) {
    for (ring, enabled) in backend.rings().iter().zip(model.enabled) {
        assert_eq!(ring.enabled, enabled, "enable flag");
        assert!(!ring.run.is_live() || ring.is_configured(), "a live ring is configured");
        assert!(ring.run.is_started() || !ring.kicked, "a kick is remembered while started");
    }
}
