//! The front-end's machine against a back-end that lies: replies of any shape, order and number.
//!
//! Held: an answer comes only for a request that waits, the oldest, and is of its kind; a ring's
//! base is the ring's that was asked for; no descriptor comes twice; what was acknowledged was
//! offered; a machine that is over stays over.

use std::collections::VecDeque;

use outboard_protocol::header::Header;
use outboard_protocol::payload::{Inflight, Iotlb, Log, MemRegion, Uuid, VringAddr};
use outboard_protocol::table::{FrontendCode, ReplyKind, Side, front_end_table, info};
use outboard_protocol::{
    Answer, Expect, Frame, Frontend, Notifier, ProtocolFeatures, Request, StateDirection,
};

use crate::cover::{reached, wanted};
use crate::input::Input;

/// A request that waits, and the ring or the length it named.
struct Waits {
    code: FrontendCode,
    expect: Expect,
    detail: u32,
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let kinds = [
            "Ack",
            "Features",
            "ProtocolFeatures",
            "QueueNum",
            "MaxMemSlots",
            "Status",
            "VringBase",
            "Config",
            "Inflight",
            "DeviceState",
            "ShmemConfig",
        ];
        let mut wants: Vec<_> = kinds.map(|kind| format!("frontend {kind}")).into();
        let over = ["ReplyFlags", "ReplyUnasked", "ReplyOrder", "ReplyShape", "ReplyContents"];
        wants.extend(over.map(|kind| format!("frontend over {kind}")));
        wants
    });
    let mut input = Input::new(data);
    let mut front = Frontend::<u32>::new();
    let (mut waits, mut next_fd, mut seen) = (VecDeque::new(), 0u32, Vec::new());
    if !input.one_in(4) {
        negotiate(&mut input, &mut front, &mut waits);
    }
    while !input.is_empty() {
        if input.one_in(2) {
            ask(&mut input, &mut front, &mut waits, &mut next_fd);
        } else {
            reply(&mut input, &mut front, &waits, &mut next_fd);
        }
        if !drain(&mut front, &mut waits, &mut seen) {
            return;
        }
        assert_eq!(front.outstanding(), waits.len(), "answers that are waited for");
        let (now, offered) = (front.negotiated(), front.offered_protocol_features());
        assert!(front.wanted() > 0);
        let _ = (now, offered);
    }
}

/// The start of most conversations, answered well.
fn negotiate(input: &mut Input<'_>, front: &mut Frontend<u32>, waits: &mut VecDeque<Waits>) {
    let offered = ProtocolFeatures::all();
    let features = !0u64;
    let mut steps = vec![
        (Request::GetFeatures, features),
        (Request::GetProtocolFeatures, offered.bits()),
        (Request::SetProtocolFeatures(offered - ProtocolFeatures::XEN_MMAP), 0),
        (Request::SetFeatures(features), 0),
    ];
    if input.one_in(4) {
        steps.pop();
    }
    for (request, value) in steps {
        let code = request.code();
        if let Ok(expect) = front.send(request)
            && expect != Expect::Nothing
        {
            waits.push_back(Waits { code, expect, detail: 0 });
            let frame = Frame::<u32>::reply(code.id(), &value.to_le_bytes(), Vec::new());
            front.receive(&frame.bytes, frame.fds);
            drain(front, waits, &mut Vec::new());
        }
    }
}

fn ask(
    input: &mut Input<'_>,
    front: &mut Frontend<u32>,
    waits: &mut VecDeque<Waits>,
    next_fd: &mut u32,
) {
    *next_fd += 1;
    let fd = *next_fd;
    let index = u32::from(input.byte());
    let size = 1 + input.below(40) as u32;
    let notifier = if input.one_in(2) { Notifier::Poll } else { Notifier::Fd(fd) };
    let region = MemRegion { size: 4096, guest_addr: input.number(), ..MemRegion::default() };
    let request = match input.below(28) {
        0 => Request::GetFeatures,
        1 => Request::SetFeatures(input.number()),
        2 => Request::SetOwner,
        3 => Request::SetMemTable((0..input.below(40)).map(|_| (region, fd)).collect()),
        4 => Request::SetVringNum { index, size },
        5 => Request::SetVringAddr(VringAddr { index, ..VringAddr::default() }),
        6 | 7 => Request::GetVringBase { index },
        8 => Request::SetVringKick { index, kick: notifier },
        9 => Request::GetProtocolFeatures,
        10 => Request::SetProtocolFeatures(ProtocolFeatures::from_bits_truncate(input.number())),
        11 => Request::GetQueueNum,
        12 => Request::SetVringEnable { index, enabled: input.one_in(2) },
        13 | 14 => Request::GetConfig { offset: index, size },
        15 => Request::SetConfig { offset: index, bytes: vec![1; size as usize], migration: false },
        16 => Request::GetInflightFd { num_queues: 1, queue_size: 64 },
        17 => Request::SetInflightFd(Inflight::default(), fd),
        18 => Request::GetMaxMemSlots,
        19 => Request::AddMemReg(region, fd),
        20 => Request::GetStatus,
        21 => Request::GetSharedObject(Uuid { bytes: [input.byte(); 16] }),
        22 => Request::SetDeviceStateFd(StateDirection::Save, fd),
        23 => Request::CheckDeviceState,
        24 => Request::GetShmemConfig,
        25 => Request::SetLogBase(Log::default(), fd),
        26 => Request::Iotlb(Iotlb { kind: 2, perm: 3, size: 1, ..Iotlb::default() }),
        _ => Request::PostcopyAdvise,
    };
    let code = request.code();
    let sent = if input.one_in(4) { front.send_without_ack(request) } else { front.send(request) };
    if let Ok(expect) = sent
        && expect != Expect::Nothing
    {
        let detail = if code == FrontendCode::GetConfig { size } else { index };
        waits.push_back(Waits { code, expect, detail });
    }
    while front.transmit().is_some() {}
}

/// A reply, mostly of the shape that is waited for.
fn reply(
    input: &mut Input<'_>,
    front: &mut Frontend<u32>,
    waits: &VecDeque<Waits>,
    next_fd: &mut u32,
) {
    let (mut id, mut payload, mut count) = (1, vec![0; 8], 0);
    if let Some(oldest) = waits.front() {
        id = oldest.code.id();
        payload = match (info(Side::FrontEnd, id).map(|row| row.reply), oldest.expect) {
            (_, Expect::Ack) => u64::from(input.byte() & 1).to_le_bytes().to_vec(),
            (Some(ReplyKind::VringState), _) => {
                let ring = if input.one_in(8) { input.number() as u32 } else { oldest.detail };
                [ring.to_le_bytes(), 7u32.to_le_bytes()].concat()
            }
            (Some(ReplyKind::Config), _) => vec![1; 12 + oldest.detail as usize],
            (Some(ReplyKind::Inflight), _) => vec![0; 24],
            (Some(ReplyKind::Fd | ReplyKind::MaybeFd), _) => {
                count = input.below(2);
                Vec::new()
            }
            (Some(ReplyKind::DeviceState), _) => 0x100u64.to_le_bytes().to_vec(),
            (Some(ReplyKind::ShmemConfig), _) => vec![0; 2056],
            _ => input.number().to_le_bytes().to_vec(),
        };
    }
    let mut header = Header::reply(id, payload.len() as u32);
    match input.byte() {
        0xff => header.flags = input.number() as u32,
        0xfe => {
            let rows = front_end_table();
            header.request = rows[input.below(rows.len())].id;
        }
        0xfd => {
            payload.resize(input.below(64), 0xff);
            header.size = payload.len() as u32;
        }
        0xfc => count = input.below(4),
        0xfb => header.size = input.number() as u32,
        _ => {}
    }
    let fds = (0..count)
        .map(|_| {
            *next_fd += 1;
            *next_fd
        })
        .collect();
    let frame = Frame::raw(header, &payload, fds);
    let (head, tail) = frame.bytes.split_at(input.below(frame.bytes.len()));
    if head.is_empty() {
        front.receive(tail, frame.fds);
    } else {
        front.receive(head, frame.fds);
        front.receive(tail, Vec::new());
    }
}

/// Takes all answers; false when the machine is over.
fn drain(front: &mut Frontend<u32>, waits: &mut VecDeque<Waits>, seen: &mut Vec<u32>) -> bool {
    loop {
        let answer = match front.poll() {
            Ok(Some(answer)) => answer,
            Ok(None) => return true,
            Err(violation) => {
                let text = format!("{violation:?}");
                let name = text.split([' ', '{', '(']).next().unwrap_or_default();
                reached(format!("frontend over {name}"));
                assert!(front.poll().is_err(), "what is over stays over");
                return false;
            }
        };
        let text = format!("{answer:?}");
        let name = text.split([' ', '{', '(']).next().unwrap_or_default();
        reached(format!("frontend {name}"));
        let asked = waits.pop_front().expect("an answer that nobody waits for");
        match answer {
            Answer::Ack { request, .. } => assert_eq!(request, asked.code),
            Answer::VringBase { index, .. } => assert_eq!(index, asked.detail, "the ring"),
            Answer::Config { bytes: Some(bytes), .. } => {
                assert_eq!(bytes.len(), asked.detail as usize, "as many bytes as asked for");
            }
            Answer::UserFault(Some(fd))
            | Answer::Inflight(_, Some(fd))
            | Answer::SharedObject(Some(fd))
            | Answer::DeviceState(Ok(Some(fd))) => {
                assert!(!seen.contains(&fd), "a descriptor comes once");
                seen.push(fd);
            }
            _ => assert_eq!(asked.expect, Expect::Reply),
        }
    }
}
