//! Headers that lie, messages that never end (hostile cases A1 to A15 and A86).

use std::time::{Duration, Instant};

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::table::{ReplyKind, Side, front_end_table, info};

use super::{answered_or_closed, closes, not_silent};
use crate::judge::case::Case;
use crate::judge::finding::{Finding, Outcome, Verdict, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::session::Session;
use crate::judge::wire::Came;

/// More memory than this for one message is a denial of service.
const MOST_GROWTH: u64 = 64 << 10;

/// A header that announces `size` bytes, of which none comes.
fn announced(case: &mut Case<'_>, size: u32) -> Outcome {
    let mut session = case.session()?;
    let before = case.peer.resident();
    session.wire.send(&message::set_features(0).says(size))?;
    session.wire.bytes(&[0; 4096], &[])?;
    // A busy machine lets it take its time.
    let closed = closes(&mut session.wire, case)?
        || matches!(session.wire.receive(case.limit)?, Came::Closed);
    if let (Some(before), Some(after)) = (before, case.peer.resident()) {
        let grown = after.saturating_sub(before);
        ensure!(grown < MOST_GROWTH, "it grew by {grown} KiB for a message of {size:#x} bytes");
    }
    case.rests("while a message that never comes is announced")?;
    ensure!(closed, "it waits for a message of {size:#x} bytes");
    Ok(())
}

pub(crate) fn size_of_4_gib(case: &mut Case<'_>) -> Outcome {
    announced(case, u32::MAX)
}

pub(crate) fn size_of_2_gib(case: &mut Case<'_>) -> Outcome {
    announced(case, 0x7fff_ffff)
}

pub(crate) fn size_of_1_mib(case: &mut Case<'_>) -> Outcome {
    announced(case, 1 << 20)
}

/// Messages that are legal at any time, need no feature and no descriptor, and can be acknowledged.
const PLAIN_MESSAGES: [Code; 7] = [
    Code::SetFeatures,
    Code::SetVringNum,
    Code::SetVringAddr,
    Code::SetVringBase,
    Code::SetVringEnable,
    Code::SetVringErr,
    Code::SetMemTable,
];

/// Every message with another size than its own: nothing worse than a refusal may come of it.
fn every_message(case: &mut Case<'_>, change: i64) -> Outcome {
    for row in front_end_table() {
        let own = i64::from(row.payload.sizes().smallest());
        let Ok(size) = usize::try_from(own + change) else { continue };
        let wrong = u32::try_from(size).is_ok_and(|size| !row.payload.sizes().allows(size));
        if !wrong {
            continue;
        }
        let mut session = case.session()?;
        let what = format!("{} of {size} bytes", row.name);
        answered_or_closed(&mut session, &Msg::new(row.id, vec![0; size]).need_reply(), &what)?;
        drop(session);
        case.lives().map_err(|finding| named(finding, &what))?;
    }
    Ok(())
}

fn named(finding: Finding, what: &str) -> Finding {
    Finding::new(finding.verdict, format!("{what}: {}", finding.why))
}

pub(crate) fn longer(case: &mut Case<'_>) -> Outcome {
    every_message(case, 1)
}

pub(crate) fn shorter(case: &mut Case<'_>) -> Outcome {
    every_message(case, -1)
}

pub(crate) fn much_longer(case: &mut Case<'_>) -> Outcome {
    every_message(case, 3000)
}

pub(crate) fn empty(case: &mut Case<'_>) -> Outcome {
    for row in front_end_table() {
        if row.payload.sizes().allows(0) {
            continue;
        }
        let mut session = case.session()?;
        let what = format!("an empty {}", row.name);
        answered_or_closed(&mut session, &Msg::new(row.id, Vec::new()).need_reply(), &what)?;
        drop(session);
        case.lives().map_err(|finding| named(finding, &what))?;
    }
    Ok(())
}

/// Messages of the wrong size are not performed.
pub(crate) fn wrong_size_refused(case: &mut Case<'_>) -> Outcome {
    for code in PLAIN_MESSAGES {
        let size = info(Side::FrontEnd, code.id()).map_or(8, |row| row.payload.sizes().smallest());
        let size = usize::try_from(size).unwrap_or(8);
        for size in [size - 1, size + 1] {
            let mut session = case.acking()?;
            let what = format!("{} of {size} bytes", message::name_of(code.id()));
            session.refused(&Msg::new(code.id(), vec![0; size]), &what)?;
        }
    }
    Ok(())
}

pub(crate) fn other_version(case: &mut Case<'_>) -> Outcome {
    for version in [0, 2, 3] {
        let mut session = case.session()?;
        session.wire.send(&message::vring_base(0, 55).flags(version))?;
        not_performed(&mut session, &format!("a message of version {version}"))?;
    }
    Ok(())
}

/// That the base of ring 0 is not 55, or is not to be had any more.
fn not_performed(session: &mut Session, what: &str) -> Outcome {
    let ask = message::get_base(0);
    session.wire.send(&ask)?;
    loop {
        match session.wire.receive(session.wire.limit)? {
            Came::Closed => return Ok(()),
            Came::Nothing => return Err(Finding::hangs(format!("it is silent after {what}"))),
            Came::Reply(reply) if reply.header.request == ask.id => {
                let base = reply.payload.get(4..8).and_then(|bytes| bytes.try_into().ok());
                let base = base.map_or(0, u32::from_ne_bytes);
                ensure!(base != 55, "{what} was performed");
                return Ok(());
            }
            Came::Reply(_) => {}
        }
    }
}

pub(crate) fn reply_bit(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    session.wire.send(&message::vring_base(0, 55).flags(0x5))?;
    not_performed(&mut session, "a message with the reply bit")
}

pub(crate) fn reserved_flags(case: &mut Case<'_>) -> Outcome {
    for bit in 4..32 {
        let mut session = case.session()?;
        session.wire.send(&message::vring_base(0, 5).flags(1 | 1 << bit))?;
        let what = format!("flag bit {bit}");
        session.wire.send(&message::get_features())?;
        match session.wire.receive(case.limit)? {
            Came::Closed => {}
            Came::Nothing => return Err(Finding::hangs(format!("it is silent after {what}"))),
            Came::Reply(reply) => {
                let id = reply.header.request;
                ensure!(id == 1, "{what} was taken for need_reply: message {id} was answered");
            }
        }
    }
    Ok(())
}

pub(crate) fn half_a_header(case: &mut Case<'_>) -> Outcome {
    for length in [1, 4, 11] {
        let mut session = case.session()?;
        let bytes = message::get_features().bytes();
        session.wire.bytes(bytes.get(..length).unwrap_or_default(), &[])?;
    }
    Ok(())
}

pub(crate) fn half_a_body(case: &mut Case<'_>) -> Outcome {
    for length in [13, 19] {
        let mut session = case.session()?;
        let bytes = message::vring_base(0, 1).bytes();
        session.wire.bytes(bytes.get(..length).unwrap_or_default(), &[])?;
    }
    Ok(())
}

pub(crate) fn stalled_in_a_body(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    let bytes = message::vring_base(0, 1).bytes();
    session.wire.bytes(bytes.get(..15).unwrap_or_default(), &[])?;
    case.rests("while a front-end stalls inside a message")
}

pub(crate) fn stalled_and_serving(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    let bytes = message::vring_base(0, 1).bytes();
    disk.session.wire.bytes(bytes.get(..15).unwrap_or_default(), &[])?;
    for _ in 0..5 {
        disk.serves("while the front-end stalls inside a message")?;
    }
    Ok(())
}

pub(crate) fn unread_replies(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    let before = case.peer.resident();
    let burst: Vec<u8> = (0..500).flat_map(|_| message::get_features().bytes()).collect();
    let count = if case.quick { 10 } else { 40 };
    for _ in 0..count {
        let mut rest = burst.as_slice();
        let until = Instant::now() + case.quiet * 4;
        while Instant::now() < until {
            let sent = session.wire.send_some(rest);
            rest = rest.get(sent..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if !rest.is_empty() {
            break;
        }
    }
    // Only when it has read all that it is going to read.
    case.rests("while nobody reads its replies")?;
    if let (Some(before), Some(after)) = (before, case.peer.resident()) {
        let grown = after.saturating_sub(before);
        ensure!(grown < 8 << 10, "it keeps {grown} KiB of replies that nobody reads");
    }
    Ok(())
}

pub(crate) fn noise(case: &mut Case<'_>) -> Outcome {
    let mut random = crate::judge::storm::Random::new(case.seed);
    for _ in 0..20 {
        let mut wire = case.wire()?;
        let bytes: Vec<u8> = (0..200).map(|_| random.byte()).collect();
        wire.bytes(&bytes, &[])?;
        closes(&mut wire, case)?;
        drop(wire);
        case.lives()?;
    }
    Ok(())
}

pub(crate) fn every_id_bare(case: &mut Case<'_>) -> Outcome {
    for id in 0..64 {
        let mut session = case.session()?;
        let what = format!("a bare {}", message::name_of(id));
        answered_or_closed(&mut session, &Msg::new(id, Vec::new()), &what)?;
        drop(session);
        case.lives().map_err(|finding| named(finding, &what))?;
    }
    Ok(())
}

/// Every message with a body of zeros, before anything was negotiated.
pub(crate) fn before_negotiation(case: &mut Case<'_>) -> Outcome {
    for row in front_end_table() {
        let size = usize::try_from(row.payload.sizes().smallest()).unwrap_or(0);
        let mut wire = case.wire()?;
        wire.send(&Msg::new(row.id, vec![0; size]).need_reply())?;
        let what = format!("{} before anything was negotiated", row.name);
        not_silent(&mut wire, &what)?;
        drop(wire);
        case.lives().map_err(|finding| named(finding, &what))?;
    }
    Ok(())
}

/// A request with a reply of its own must not lack it, whatever its contents.
pub(crate) fn ones(case: &mut Case<'_>) -> Outcome {
    for row in front_end_table() {
        let size = usize::try_from(row.payload.sizes().smallest()).unwrap_or(0);
        let mut session = case.session_with(u64::MAX >> 30 << 30, case.traits.protocol)?;
        let what = format!("{} full of ones", row.name);
        let msg = Msg::new(row.id, vec![0xff; size]);
        let msg = if row.reply == ReplyKind::Ack { msg.need_reply() } else { msg };
        answered_or_closed(&mut session, &msg, &what)?;
        drop(session);
        if let Err(finding) = case.lives() {
            return Err(Finding::new(Verdict::Crashes, format!("{what}: {}", finding.why)));
        }
    }
    Ok(())
}
