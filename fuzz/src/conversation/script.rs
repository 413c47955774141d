//! From the fuzzer's bytes to what a front-end and a driver do: mostly sense, sometimes not.

use outboard_protocol::ProtocolFeatures as P;
use outboard_protocol::table::{FdRule, PayloadKind, front_end_table};

use super::guest::{FILE, FILES, Guest, LOGS, NOTES, PAGE, Place, find, user_to_guest};
use super::log::{LOG_ALL, LogFile};
use super::model::{BIT_30, FEATURES, Given, MAX_SIZE, Model, Msg, PROTOCOL, QUEUES};
use crate::input::Input;

/// Eventfds that are given as call or err.
pub const CALLS: usize = 6;
/// Eventfds that are given as kick; their numbers follow those.
pub const KICKS: usize = 3;

const REGION: u64 = FILE as u64;
const USER: u64 = 0x7000_0000;
/// Where the parts of a ring lie in its region, and where its buffers do.
const PARTS: [u64; 3] = [0, 0x100, 0x140];
const BUFFERS: u64 = 0x400;

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A request with an acknowledgement asked for.
pub fn msg(id: u32, words: &[u64], fds: Vec<Given>) -> Msg {
    let payload = bytes(words);
    Msg { id, flags: 9, size: payload.len() as u32, payload, fds, misplaced: false }
}

/// A region of the table: guest address, size, user address, offset; and its file.
fn region(input: &mut Input<'_>) -> ([u64; 4], usize) {
    let slot = input.below(FILES);
    let mut region = [slot as u64 * REGION, REGION, USER + slot as u64 * 0x10_0000, 0];
    let mut file = slot;
    match input.byte() {
        0xf0.. => region[input.below(4)] = input.number(),
        0xe0.. => region[input.below(4)] ^= 1 << input.below(20),
        0xd0.. => file = input.below(FILES),
        0xc0.. => (region[1], region[3]) = (PAGE as u64, PAGE as u64),
        0xb0.. => region[1] = PAGE as u64,
        _ => {}
    }
    (region, file)
}

fn ring_addresses(input: &mut Input<'_>, model: &Model, ring: u64) -> [u64; 3] {
    let guest_only = model.protocol.contains(P::GPA_ADDRESSES);
    let start = if guest_only { ring * REGION } else { USER + ring * 0x10_0000 };
    let mut parts = PARTS.map(|part| start + part);
    match input.byte() {
        0xf8.. => parts[input.below(3)] = input.number(),
        0xe8.. => parts[input.below(3)] ^= 1 << input.below(16),
        0xd8.. => parts.iter_mut().for_each(|part| *part += REGION - 0x180),
        _ => {}
    }
    parts
}

fn index(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        0xfc => input.number(),
        0xfd => QUEUES as u64,
        0xfe => 0x1_0000,
        other => u64::from(other) % QUEUES as u64,
    }
}

fn features(input: &mut Input<'_>) -> u64 {
    let usual = FEATURES & !LOG_ALL;
    match input.below(8) {
        0 => usual & !BIT_30,
        1 => input.number(),
        2 => usual & !(3 << 28),
        3 => usual & !(1 << 29),
        4 => 1 << 32 | u64::from(input.byte()),
        5 => FEATURES,
        _ => usual,
    }
}

fn protocol(input: &mut Input<'_>) -> u64 {
    let gpa = P::GPA_ADDRESSES;
    let features = match input.below(8) {
        0 => PROTOCOL,
        1 => return u64::from(input.byte()) << input.below(17),
        2 => PROTOCOL - P::REPLY_ACK - P::INBAND_NOTIFICATIONS,
        3 => PROTOCOL - P::BACKEND_REQ - gpa,
        4..=5 => PROTOCOL - gpa,
        _ => PROTOCOL - P::INBAND_NOTIFICATIONS - gpa,
    };
    features.bits()
}

/// A message of the front-end.
pub fn message(input: &mut Input<'_>, model: &Model) -> Msg {
    let rows = front_end_table();
    // The messages that matter most, more often.
    const OFTEN: [u32; 16] = [5, 8, 9, 10, 11, 11, 12, 12, 13, 18, 18, 18, 37, 38, 35, 2];
    let id = match input.byte() {
        often @ ..0xa0 => OFTEN[usize::from(often) % OFTEN.len()],
        0xff => input.number() as u32,
        other => rows[usize::from(other - 0xa0) % rows.len()].id,
    };
    let mut msg = well_formed(input, model, id);
    if input.one_in(4) {
        msg.flags = 1;
    }
    match input.byte() {
        0xff => msg.flags = input.number() as u32,
        0xfe => msg.payload.push(0),
        0xfd => {
            msg.payload.pop();
        }
        0xfc => msg.fds = (0..input.below(4)).map(|_| Given::Junk).collect(),
        0xfb => msg.misplaced = !msg.fds.is_empty() && msg.payload.len() > 1,
        0xfa => msg.fds.iter_mut().for_each(|fd| *fd = Given::Junk),
        0xf9 => msg.payload.extend([0; 32]),
        _ => {}
    }
    msg.size = msg.payload.len() as u32;
    msg
}

fn well_formed(input: &mut Input<'_>, model: &Model, id: u32) -> Msg {
    let Some(row) = front_end_table().iter().find(|row| row.id == id) else {
        return msg(id, &[0], Vec::new());
    };
    let junk = |count: usize| vec![Given::Junk; count];
    match (id, row.payload) {
        (2, _) => msg(2, &[features(input)], Vec::new()),
        (16, _) => msg(16, &[protocol(input)], Vec::new()),
        (39, _) => msg(39, &[input.number() & 0x1cf], Vec::new()),
        (21, _) => msg(21, &[], vec![Given::Channel]),
        (6, _) => log_base(input),
        (7, _) => msg(7, &[], vec![Given::Bell(input.below(CALLS))]),
        (31 | 32, _) => region_of_notes(input, id),
        (_, PayloadKind::MemTable) => {
            let regions: Vec<_> = (0..input.below(5)).map(|_| region(input)).collect();
            let mut words = vec![regions.len() as u64];
            words.extend(regions.iter().flat_map(|(region, _)| *region));
            msg(id, &words, regions.iter().map(|(_, file)| Given::File(*file)).collect())
        }
        (_, PayloadKind::SingleRegion) => {
            let ([a, b, c, d], file) = region(input);
            let fds = if id == 37 { vec![Given::File(file)] } else { Vec::new() };
            msg(id, &[0, a, b, c, d], fds)
        }
        (_, PayloadKind::VringAddr) => {
            let ring = index(input);
            let [desc, avail, used] = ring_addresses(input, model, ring % 4);
            let flags = if input.one_in(32) { input.number() << 32 } else { 0 };
            let (flags, log) = if flags == 0 { noted(input, ring % 4) } else { (flags, 0) };
            msg(id, &[ring & 0xffff_ffff | flags, desc, used, avail, log], Vec::new())
        }
        (_, PayloadKind::VringFd) => {
            let poll = input.one_in(8);
            let bell = match id {
                12 => CALLS + input.below(KICKS),
                _ => input.below(CALLS),
            };
            let fds = if poll { Vec::new() } else { vec![Given::Bell(bell)] };
            msg(id, &[index(input) | u64::from(poll) << 8], fds)
        }
        (_, PayloadKind::VringState) => {
            let number = match id {
                8 => 1 << input.below(6),
                18 => u64::from(!input.one_in(3)),
                _ => u64::from(input.byte()),
            };
            let number = if input.one_in(32) { input.number() } else { number };
            msg(id, &[index(input) & 0xffff_ffff | number << 32], Vec::new())
        }
        (_, PayloadKind::Config) => {
            let (offset, length) = (input.below(24), input.below(24));
            let mut payload: Vec<u8> = [offset as u32, length as u32, u32::from(input.one_in(2))]
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect();
            payload.resize(12 + length, input.byte());
            Msg { payload, ..msg(id, &[], Vec::new()) }
        }
        (_, kind) => {
            let mut payload = vec![input.byte(); kind.sizes().smallest() as usize];
            let some = input.take(8).to_vec();
            let len = payload.len().min(some.len());
            payload[..len].copy_from_slice(&some[..len]);
            Msg { payload, ..msg(id, &[], junk(usize::from(row.fds == FdRule::One))) }
        }
    }
}

/// Whether writes to a used ring are noted, as flags of SET_VRING_ADDR, and where.
fn noted(input: &mut Input<'_>, ring: u64) -> (u64, u64) {
    let place = ring * REGION + PARTS[2];
    match input.byte() {
        0xf8.. => (1 << 32, input.number()),
        0x80.. => (1 << 32, place),
        _ => (0, place),
    }
}

/// SET_LOG_BASE.
fn log_base(input: &mut Input<'_>) -> Msg {
    let log = Given::Log(input.below(LOGS));
    let size = [8, 8, 1, 2, 64, PAGE as u64, 0, input.number()][input.below(8)];
    let offset = [0, 0, 8, 4, 16, 4088, 4096, input.number()][input.below(8)];
    msg(6, &[size, offset], vec![log])
}

/// GET_INFLIGHT_FD or SET_INFLIGHT_FD: for all rings unless the input says otherwise.
fn region_of_notes(input: &mut Input<'_>, id: u32) -> Msg {
    let (mut rings, mut entries, mut file) = (QUEUES as u64, u64::from(MAX_SIZE), NOTES);
    let (mut size, mut offset) = (rings * (16 * entries + 64), 0);
    match input.byte() {
        0xf0.. => rings = input.number() & 0xffff,
        0xe0.. => entries = input.number() & 0xffff,
        0xd0.. => size = input.number(),
        0xc0.. => offset = input.number(),
        0xb0.. => (rings, entries, size) = (1 + u64::from(input.byte() & 1), 8, 384),
        0xa0.. => file = input.below(FILES),
        _ => {}
    }
    let fds = if id == 32 { vec![Given::File(file)] } else { Vec::new() };
    msg(id, &[size, offset, rings | entries << 16], fds)
}

/// A migration begins, as a front-end has it.
pub fn log_on(input: &mut Input<'_>, model: &Model) -> Vec<Msg> {
    let mut all = vec![msg(6, &[8, 0], vec![Given::Log(input.below(LOGS))])];
    if input.one_in(2) {
        all.push(msg(7, &[], vec![Given::Bell(input.below(CALLS))]));
    }
    all.push(msg(2, &[model.acked | LOG_ALL], Vec::new()));
    all.extend(again(model, 1 << 32));
    all
}

/// It is over.
pub fn log_off(model: &Model) -> Vec<Msg> {
    let mut all = vec![msg(2, &[model.acked & !LOG_ALL], Vec::new())];
    all.extend(again(model, 0));
    all
}

/// The addresses of every ring once more, with other flags.
fn again(model: &Model, flags: u64) -> impl Iterator<Item = Msg> {
    (0u64..).zip(&model.rings).filter_map(move |(ring, told)| {
        let [desc, avail, used] = told.addr?;
        let place = ring * REGION + PARTS[2];
        Some(msg(9, &[ring | flags, desc, used, avail, place], Vec::new()))
    })
}

/// The front-end does something to a log: mostly takes all marks away.
pub fn front_end(input: &mut Input<'_>, guest: &mut Guest) {
    let log: &mut LogFile = &mut guest.logs[input.below(LOGS)];
    if input.one_in(8) {
        let (at, length) = (input.below(32), input.below(8));
        log.scribble(at, input.take(length));
    } else {
        log.take();
    }
}

/// Somebody writes into the in-flight region.
pub fn scribble(input: &mut Input<'_>, guest: &mut Guest) {
    let area = input.below(QUEUES) * 320;
    let entry = 16 + 16 * input.below(MAX_SIZE as usize);
    let value = input.number().to_le_bytes();
    let (at, length) =
        [(8, 2), (10, 2), (12, 2), (14, 2), (entry, 1), (entry, 1), (entry + 6, 2), (entry + 8, 8)]
            [input.below(8)];
    guest.drive((NOTES, area + at), &value[..length]);
}

/// Everything that starts a ring, as front-ends send it.
pub fn set_up(input: &mut Input<'_>, model: &Model) -> Vec<Msg> {
    let ring = input.below(QUEUES) as u64;
    let mut all = Vec::new();
    if model.protocol.is_empty() {
        all.push(msg(16, &[protocol(input)], Vec::new()));
    }
    if model.acked == 0 || input.one_in(8) {
        all.push(msg(2, &[features(input)], Vec::new()));
    }
    if model.mem.is_empty() {
        let slot = |slot: u64| [slot * REGION, REGION, USER + slot * 0x10_0000, 0];
        let mut words = vec![FILES as u64];
        words.extend((0..FILES as u64).flat_map(slot));
        all.push(msg(5, &words, (0..FILES).map(Given::File).collect()));
    }
    if model.inflight.is_none() && input.one_in(2) {
        all.push(region_of_notes(&mut Input::new(&[]), 32));
    }
    let [desc, avail, used] = ring_addresses(input, model, ring);
    let (flags, log) = noted(input, ring);
    let bell = input.below(CALLS);
    all.push(msg(8, &[ring | (1 << (1 + input.below(4))) << 32], Vec::new()));
    all.push(msg(9, &[ring | flags, desc, used, avail, log], Vec::new()));
    all.push(msg(10, &[ring | u64::from(input.byte() & 7) << 32], Vec::new()));
    all.push(msg(13, &[ring], vec![Given::Bell(bell)]));
    all.push(msg(12, &[ring], vec![Given::Bell(CALLS + input.below(KICKS))]));
    if !input.one_in(4) {
        all.push(msg(18, &[ring | 1 << 32], Vec::new()));
    }
    if input.one_in(4) {
        // Kicked first.
        let last = all.len() - 2;
        all.swap(0, last);
    }
    all
}

/// Where a ring's part lies in the files; where it would usually lie, when there is no such ring.
fn place(model: &Model, ring: usize, part: usize) -> Place {
    let said = model.rings[ring].addr.and_then(|addr| {
        let guest = user_to_guest(&model.mem, addr[part], 1)?;
        find(&model.mem, guest, 1)
    });
    said.unwrap_or((ring, PARTS[part] as usize))
}

/// The driver does something to its rings or to its memory.
pub fn drive(input: &mut Input<'_>, model: &Model, guest: &mut Guest) {
    let ring = input.below(QUEUES);
    let size = model.rings[ring].size.unwrap_or(MAX_SIZE as u16);
    let near = |(file, at): Place, more: usize| (file, (at + more).min(FILE - 2));
    match input.below(8) {
        0..=3 => offer(input, model, guest, ring),
        4 => {
            let at = place(model, ring, 0);
            let entry = descriptor(input, ring, input_flags);
            guest.drive(near(at, 16 * input.below(usize::from(size))), &entry);
        }
        5 => {
            let at = place(model, ring, 1);
            let value = input.number() as u16;
            let field = [0, 2, 4 + 2 * usize::from(size)][input.below(3)];
            guest.drive(near(at, field), &value.to_le_bytes());
        }
        6 => {
            let at = place(model, ring, 1 + input.below(2));
            let length = input.below(24);
            guest.drive(near(at, input.below(64)), input.take(length));
        }
        _ => {
            let at = (input.below(FILES + 1), input.number() as usize % FILE);
            let length = input.below(48);
            guest.drive(at, input.take(length));
        }
    }
}

fn input_flags(input: &mut Input<'_>) -> u16 {
    u16::from(input.byte() & 7)
}

fn descriptor(
    input: &mut Input<'_>,
    ring: usize,
    flags: impl FnOnce(&mut Input<'_>) -> u16,
) -> Vec<u8> {
    let start = ring as u64 * REGION;
    let addr = match input.byte() {
        0xf0.. => input.number(),
        0xe0.. => start + REGION - 8,
        other => start + BUFFERS + 16 * u64::from(other),
    };
    let len = match input.byte() {
        0xf0.. => input.number() as u32,
        other => u32::from(other),
    };
    let mut entry = addr.to_le_bytes().to_vec();
    entry.extend(len.to_le_bytes());
    entry.extend(flags(input).to_le_bytes());
    let next = input.byte();
    entry.extend(u16::from(if next < 0xf0 { next % 16 } else { next }).to_le_bytes());
    entry
}

/// A chain, offered as a driver does it.
pub fn offer(input: &mut Input<'_>, model: &Model, guest: &mut Guest, ring: usize) {
    let size = model.rings[ring].size.unwrap_or(MAX_SIZE as u16);
    let (table, avail) = (place(model, ring, 0), place(model, ring, 1));
    let count = usize::from(size);
    let (head, length, turn) = (input.below(count), 1 + input.below(3), input.below(4));
    let indirect = input.one_in(8);
    let table_at = (table.0, (table.1 + 0x200 + 64 * input.below(4)).min(FILE - 64));
    for step in 0..length {
        let last = step + 1 == length;
        let flags = u16::from(!last) | if step >= turn { 2 } else { 0 };
        let mut entry = descriptor(input, ring, |_| flags);
        let at = if indirect { step } else { (head + step) % count };
        let next = if indirect { step + 1 } else { (head + step + 1) % count };
        if !last && !input.one_in(32) {
            entry[14..].copy_from_slice(&(next as u16).to_le_bytes());
        }
        let base = if indirect { table_at } else { table };
        if base.1 + 16 * at + 16 <= FILE {
            guest.drive((base.0, base.1 + 16 * at), &entry);
        }
    }
    if indirect && table.1 + 16 * head + 16 <= FILE {
        let mut entry = (ring as u64 * REGION + table_at.1 as u64).to_le_bytes().to_vec();
        entry.extend((16 * length as u32).to_le_bytes());
        entry.extend([4, 0, 0, 0]);
        guest.drive((table.0, table.1 + 16 * head), &entry);
    }
    let room = avail.1 + 4 + 2 * count + 2 <= FILE;
    if room {
        let index = guest.u16((avail.0, avail.1 + 2));
        let slot = avail.1 + 4 + 2 * usize::from(index % size);
        guest.drive((avail.0, slot), &(head as u16).to_le_bytes());
        guest.drive((avail.0, avail.1 + 2), &index.wrapping_add(1).to_le_bytes());
    }
}
