//! Faults that show at one message in one situation: what came before it on the connection, and what it says.
//! Each has the name of the one check that it breaks.
//!
//! Invariant: a situation is told by what was received alone, never by time.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use outboard_protocol::Frame;
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::{MemRegion, decode_mem_table, read};
use outboard_protocol::table::{FdRule, Side, info};

use super::{Action, Message, number, say};
use crate::device::{Device, size_of};

const PAGE: u64 = 4096;

/// When it shows.
type When = fn(&Message, &Device) -> bool;

/// What it does.
#[derive(Clone, Copy)]
enum Then {
    Abort,
    Close,
    Swallow,
    /// Nothing is heard from now on.
    Deaf,
    /// No, to what is legal.
    Refuse,
    /// Yes, and nothing is done.
    Accept,
    /// Yes, whether that is asked for and agreed or not.
    Acknowledge,
    /// An answer to another question.
    Mistake,
    /// The descriptors stay open.
    Keep,
    /// The descriptors are closed, and the message is heard.
    Drop,
}

/// The faults: name of the check, situation, effect.
const ALONE: &[(&str, When, Then)] = &[
    // The stream and the start.
    ("ack-not-before-agreed", |m, d| set_base(m, 0) && m.asks() && !d.acks(), Then::Acknowledge),
    ("ack-only-when-asked", unasked_base, Then::Acknowledge),
    ("before-negotiation", |m, d| m.id == 8 && d.seen.is_empty(), Then::Abort),
    ("features-before-owner", |m, d| m.id == 1 && !d.owned() && d.came(&[1, 15]), Then::Close),
    ("features-replaced", drops_event_idx, Then::Refuse),
    ("in-order", |m, d| m.id == 1 && d.came(&[1, 15, 10]), Then::Mistake),
    ("owner-late", |m, d| m.id == 2 && bit_30(m) && d.came(&[16, 3]), Then::Close),
    ("noise", |m, _| info(Side::FrontEnd, m.id).is_none() && m.size > 4096, Then::Abort),
    // Rings.
    ("addr-accepted", |m, d| good_addr(m) && m.asks() && d.came(&[5, 8]), Then::Refuse),
    ("addr-again-while-running", |m, d| good_addr(m) && d.is_live(m.word(0)), Then::Refuse),
    ("any-order", |m, d| m.id == 12 && d.came(&[18, 14, 13, 10, 8, 5, 9]), Then::Refuse),
    ("enable-values", |m, d| enable(m, 0) && d.came(&[18, 18]), Then::Refuse),
    ("err-polled", |m, d| m.id == 12 && d.came(&[14]) && d.last_was_polled(), Then::Refuse),
    ("num-odd", |m, _| m.id == 8 && (1..0x1_0000).contains(&m.word(4)) && odd(m), Then::Accept),
    ("num-while-running", |m, d| m.id == 8 && d.is_live(m.word(0)), Then::Accept),
    ("order-cloud-hypervisor", |m, d| m.id == 32 && d.came(&[8, 31]), Then::Refuse),
    ("order-crosvm", |m, d| m.id == 12 && !m.asks() && d.came(&[5, 8, 9, 10, 13]), Then::Swallow),
    ("order-old-qemu", |m, d| m.id == 2 && !bit_30(m) && d.is_live(0), Then::Close),
    ("order-qemu", |m, d| m.id == 5 && d.came(&[2, 13, 2]), Then::Refuse),
    ("order-user-mode-linux", |m, d| m.id == 13 && d.came(&[9, 12]), Then::Refuse),
    ("order-virtio-user", |m, d| m.id == 12 && d.came(&[18, 13, 5, 8, 10, 9]), Then::Refuse),
    ("reset-owner-serves", |m, d| enable(m, 1) && d.came(&[4]), Then::Refuse),
    ("vring-call-without-fd", |m, d| m.id == 13 && polled(m) && bare(d), Then::Refuse),
    ("vring-err-without-fd", |m, d| m.id == 14 && polled(m) && bare(d), Then::Refuse),
    ("vring-kick-without-fd", |m, d| m.id == 12 && polled(m) && bare(d), Then::Refuse),
    ("kick-first", |m, d| m.id == 12 && d.seen.is_empty() && !m.fds.is_empty(), Then::Abort),
    ("ring-outside", ring_nowhere, Then::Abort),
    ("ring-over-end", |m, d| ring_at(m, |at| d.user_ends().any(|end| at == end - 16)), Then::Abort),
    ("ring-wraps", |m, _| ring_at(m, |at| at == u64::MAX - 15), Then::Abort),
    // Memory.
    ("memory-adjacent", |m, _| pair(m, |a, b| touch(a, b) && a.size == 8 * PAGE), Then::Refuse),
    ("memory-guest-overlap", |m, _| pair(m, overlap_in_guest), Then::Accept),
    ("memory-user-overlap", |m, _| pair(m, overlap_in_user), Then::Accept),
    ("memory-longer-body", |m, _| sole(m, 64) && m.payload.len() != 40, Then::Refuse),
    ("memory-one-region", |m, _| sole(m, 64) && m.payload.len() == 40, Then::Refuse),
    ("memory-replaced", |m, d| sole(m, 8) && d.has_one_of(8), Then::Refuse),
    ("memory-same-file", |m, _| pair(m, |a, b| !touch(a, b) && b.offset > 0), Then::Refuse),
    ("region-odd-offset", |m, _| region(m, |one| one.offset % PAGE != 0), Then::Abort),
    ("region-past-file", |m, _| region(m, |one| one.offset == 1 << 30), Then::Accept),
    ("region-wraps", |m, _| region(m, |one| one.guest_addr > u64::MAX - 2 * PAGE), Then::Accept),
    ("regions-1000", |m, _| m.id == 5 && m.word(0) == 1000, Then::Accept),
    ("regions-2-of-1", |m, _| m.id == 5 && m.word(0) == 2 && m.payload.len() == 40, Then::Accept),
    (
        "regions-4-gi",
        |m, _| m.id == 5 && m.word(0) == u32::MAX && m.payload.len() == 40,
        Then::Accept,
    ),
    ("regions-40", |m, _| m.id == 5 && m.word(0) == 40, Then::Abort),
    ("regions-253", |m, _| m.id == 5 && m.size == 8 + 253 * 32, Then::Abort),
    ("regions-none", no_regions, Then::Abort),
    ("slot-added-removed", second_slot, Then::Refuse),
    (
        "slot-unknown",
        |m, d| m.id == 38 && !m.knows(d) && d.has(P::CONFIGURE_MEM_SLOTS),
        Then::Accept,
    ),
    ("slots-under-load", |m, d| m.id == 37 && d.is_live(0) && d.times(37) > 9, Then::Refuse),
    ("table-again", |m, d| m.id == 5 && d.is_live(0) && d.times(5) > 9, Then::Refuse),
    // What has a feature of its own.
    ("config-read-only", |m, d| m.id == 25 && m.word(0) == 0 && d.has(P::CONFIG), Then::Accept),
    ("inflight-lies", |m, d| region_for(m, 60_000) && d.has(P::INFLIGHT_SHMFD), Then::Accept),
    ("inflight-too-small", |m, d| small_file(m) && d.has(P::INFLIGHT_SHMFD), Then::Accept),
    ("reset-device", |m, d| m.id == 34 && d.times(34) > 0, Then::Refuse),
    ("reset-busy", |m, d| matches!(m.id, 4 | 34) && d.avail_index() == Some(3), Then::Abort),
    ("state-slow", |m, d| m.id == 1 && d.came(&[42]) && d.loads(), Then::Swallow),
    // Messages that cannot be.
    ("all-ones", |m, _| m.id == 9 && m.payload.len() == 40 && all_ones(m), Then::Abort),
    ("bare-ids", |m, _| m.id == 8 && m.payload.is_empty() && !m.asks(), Then::Abort),
    ("features-absurd", |m, _| m.id == 2 && m.number() == 1 << 63, Then::Abort),
    ("foreign", |m, _| m.id == 23 && m.word(4) == 7, Then::Abort),
    ("size-empty", |m, _| m.id == 8 && m.payload.is_empty() && m.asks(), Then::Abort),
    ("size-longer", |m, _| m.id == 1 && m.payload.len() == 1, Then::Abort),
    ("size-much-longer", |m, _| m.id == 1 && m.payload.len() == 3000, Then::Abort),
    ("size-shorter", |m, _| m.id == 11 && m.payload.len() == 7, Then::Abort),
    ("size-1-mib", |m, _| m.size == 1 << 20, Then::Deaf),
    ("size-2-gib", |m, _| m.size == 0x7fff_ffff, Then::Deaf),
    ("size-4-gib", |m, _| m.size == u32::MAX, Then::Deaf),
    ("fd-stray", |m, _| stray(m, 1) && m.id != 1, Then::Keep),
    ("fd-stray-often", |m, d| stray(m, 1) && m.id == 1 && d.came(&[1]), Then::Keep),
    ("fd-stray-often", |m, _| stray(m, 1) && m.id == 1, Then::Drop),
    ("fds-9", |m, _| stray(m, 9), Then::Keep),
    ("fds-32", |m, _| stray(m, 32), Then::Keep),
    ("fds-253", |m, _| stray(m, 253), Then::Keep),
];

/// What the fault makes of a message; `Pass` when it does not show.
pub(super) fn before(fault: &str, m: &mut Message, device: &Device) -> Action {
    let shows = |row: &&(&str, When, Then)| row.0 == fault && (row.1)(m, device);
    let Some((_, _, then)) = ALONE.iter().find(shows) else { return Action::Pass };
    match then {
        Then::Abort => Action::Abort,
        Then::Close => Action::Close,
        Then::Swallow => Action::Swallow,
        Then::Deaf => Action::Deaf,
        Then::Refuse => say(m, device, 1),
        Then::Accept => say(m, device, 0),
        Then::Acknowledge => Action::Answer(number(m.id, 0)),
        Then::Mistake => Action::Answer(number(15, 0)),
        Then::Drop => {
            m.fds.clear();
            Action::Pass
        }
        Then::Keep => {
            std::mem::take(&mut m.fds).into_iter().for_each(std::mem::forget);
            Action::Pass
        }
    }
}

/// Rings whose base was set by anybody: what a fault about fresh ones must know.
static BASES: AtomicBool = AtomicBool::new(false);

/// Changes an answer.
pub(super) fn after(fault: &str, frame: &mut Frame<OwnedFd>, m: &Message, d: &Device) {
    let configured = |ring: u16| d.state().ring(ring).is_some_and(|ring| ring.is_configured());
    BASES.fetch_or(m.id == 10, Ordering::Relaxed);
    let told = frame.bytes.get(16..).and_then(read::<u32>).unwrap_or(0);
    let (at, value) = match (fault, m.id) {
        ("base-fresh", 11) if d.came(&[2, 11]) && !BASES.load(Ordering::Relaxed) => (16, 7),
        ("base-returned", 11) if told >= 0x1000 && !configured(0) => (16, 0),
        ("many-rings", 11) if m.word(0) == 1 && !configured(1) => (16, told + 1),
        ("reset-owner", 11) if d.came(&[4, 1, 11]) => (16, 0),
        ("stop-twice", 11) if d.came(&[11, 11]) && configured(0) => (16, told + 1),
        ("features-stable", 1) if d.came(&[2, 1, 2, 1]) => (12, 0),
        ("queue-count", 17) if d.state().features_set() => (12, 0),
        _ => return,
    };
    if let Some(place) = frame.bytes.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
}

fn set_base(m: &Message, base: u32) -> bool {
    m.id == 10 && m.word(4) == base
}

fn unasked_base(m: &Message, d: &Device) -> bool {
    set_base(m, 0) && !m.asks() && d.acks() && bare(d)
}

fn enable(m: &Message, on: u32) -> bool {
    m.id == 18 && m.word(4) == on
}

fn bit_30(m: &Message) -> bool {
    m.number() & virtio::PROTOCOL_FEATURES != 0
}

fn drops_event_idx(m: &Message, d: &Device) -> bool {
    m.id == 2 && d.state().acked_features() & !m.number() & virtio::RING_EVENT_IDX != 0
}

fn odd(m: &Message) -> bool {
    !m.word(4).is_power_of_two()
}

/// A notifier that says that no descriptor comes.
fn polled(m: &Message) -> bool {
    m.number() & 0x100 != 0
}

/// Without memory.
fn bare(d: &Device) -> bool {
    d.state().regions().is_empty()
}

/// SET_VRING_ADDR with aligned addresses and no flags.
fn good_addr(m: &Message) -> bool {
    let aligned = |(at, to): (usize, u32)| m.word(at).is_multiple_of(to);
    m.id == 9 && m.word(4) == 0 && [(8, 16), (16, 4), (24, 2)].into_iter().all(aligned)
}

/// SET_VRING_ADDR with an address like this.
fn ring_at(m: &Message, fits: impl Fn(u64) -> bool) -> bool {
    m.id == 9 && m.payload.len() == 40 && [8, 16, 24].into_iter().any(|at| fits(m.long(at)))
}

fn ring_nowhere(m: &Message, d: &Device) -> bool {
    let nowhere = m.id == 9 && [8, 16, 24].into_iter().all(|at| m.long(at) == 0);
    nowhere && m.payload.len() == 40 && !bare(d)
}

fn regions(m: &Message) -> Vec<MemRegion> {
    let table = (m.id == 5).then(|| decode_mem_table(&m.payload)).flatten();
    table.unwrap_or_default()
}

/// A table of one region like this.
fn region(m: &Message, fits: fn(&MemRegion) -> bool) -> bool {
    matches!(regions(m).as_slice(), [one] if fits(one))
}

fn sole(m: &Message, pages: u64) -> bool {
    matches!(regions(m).as_slice(), [one] if one.size == pages * PAGE)
}

/// A table of two regions like these.
fn pair(m: &Message, fits: fn(&MemRegion, &MemRegion) -> bool) -> bool {
    matches!(regions(m).as_slice(), [one, other] if fits(one, other))
}

const fn touch(one: &MemRegion, other: &MemRegion) -> bool {
    one.guest_addr + one.size == other.guest_addr
}

const fn overlap(one: u64, other: u64, size: u64) -> bool {
    one.abs_diff(other) < size
}

fn overlap_in_guest(one: &MemRegion, other: &MemRegion) -> bool {
    overlap(one.guest_addr, other.guest_addr, one.size)
}

fn overlap_in_user(one: &MemRegion, other: &MemRegion) -> bool {
    overlap(one.user_addr, other.user_addr, one.size)
}

fn no_regions(m: &Message, d: &Device) -> bool {
    let none = m.id == 5 && m.payload.len() == 8 && m.word(0) == 0;
    none && m.fds.is_empty() && !m.asks() && d.state().features_set()
}

/// A region of eight pages beside another, as a slot.
fn second_slot(m: &Message, d: &Device) -> bool {
    let size = m.payload.get(8..).map_or(0, |_| m.long(16));
    let apart = |old: &MemRegion| !overlap(old.guest_addr, m.long(8), size);
    m.id == 37 && size == 8 * PAGE && d.has_one_of(8) && d.state().regions().iter().all(apart)
}

/// SET_INFLIGHT_FD for so many rings.
fn region_for(m: &Message, rings: u32) -> bool {
    m.id == 32 && m.word(16) & 0xffff == rings
}

fn small_file(m: &Message) -> bool {
    m.id == 32 && m.fds.iter().any(|fd: &OwnedFd| size_of(fd) == 64)
}

fn all_ones(m: &Message) -> bool {
    m.payload.iter().all(|byte| *byte == 0xff)
}

/// So many descriptors with a message that takes none.
fn stray(m: &Message, count: usize) -> bool {
    let none = info(Side::FrontEnd, m.id).is_none_or(|row| row.fds == FdRule::None);
    none && m.fds.len() == count
}
