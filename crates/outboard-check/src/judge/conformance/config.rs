//! The configuration space (vhost-user, GET_CONFIG, SET_CONFIG; hostile cases A68 and A69).

use outboard_protocol::features::ProtocolFeatures;
use outboard_protocol::payload::{ConfigHead, read};

use crate::judge::case::Case;
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message;
use crate::judge::session::Session;
use crate::judge::wire::Came;

/// Bytes of configuration of every block device.
const BLOCK: u32 = 36;

fn config(case: &mut Case<'_>) -> Outcome<Session> {
    case.session_for(ProtocolFeatures::CONFIG, "CONFIG")
}

/// Length of configuration that the device surely has.
fn length(case: &Case<'_>) -> u32 {
    if case.traits.capacity.is_some() { BLOCK } else { 4 }
}

/// What it says lies there, as far as it says it.
fn get(session: &mut Session, offset: u32, size: u32) -> Outcome<Vec<u8>> {
    let reply = session.ask(&message::get_config(offset, size))?;
    Ok(reply.payload.get(12..).unwrap_or_default().to_vec())
}

pub(crate) fn answered(case: &mut Case<'_>) -> Outcome {
    let size = length(case);
    let len = config(case)?.ask(&message::get_config(0, size))?.payload.len();
    let wanted = 12 + usize::try_from(size).unwrap_or(0);
    ensure!(
        len == wanted,
        "GET_CONFIG of {size} bytes was answered with {len} bytes, not {wanted}"
    );
    Ok(())
}

pub(crate) fn head_repeated(case: &mut Case<'_>) -> Outcome {
    let length = length(case);
    let reply = config(case)?.ask(&message::get_config(0, length))?;
    let head = read::<ConfigHead>(&reply.payload).unwrap_or_default();
    ensure!(
        (head.offset, head.size) == (0, length),
        "GET_CONFIG of {length} bytes at 0 was answered for {} bytes at {}",
        head.size,
        head.offset
    );
    Ok(())
}

pub(crate) fn offset_honoured(case: &mut Case<'_>) -> Outcome {
    case.capacity()?;
    let mut session = config(case)?;
    let whole = get(&mut session, 0, BLOCK)?;
    for (offset, size) in [(4, 4), (8, 8), (20, 16)] {
        let part = get(&mut session, offset, size)?;
        // How much comes is another check's question.
        let there = whole.get(usize::try_from(offset).unwrap_or(0)..).unwrap_or_default();
        let same = part.iter().zip(there).all(|(one, other)| one == other);
        ensure!(
            same && !part.is_empty(),
            "GET_CONFIG at offset {offset} does not return what lies there"
        );
    }
    Ok(())
}

pub(crate) fn before_features(case: &mut Case<'_>) -> Outcome {
    let length = length(case);
    let wire = case.wire()?;
    let mut session = Session::hello(wire, crate::judge::session::USUAL)?;
    session.needs(ProtocolFeatures::CONFIG, "CONFIG")?;
    let there = get(&mut session, 0, length)?;
    ensure!(!there.is_empty(), "the configuration is not to be had before SET_FEATURES");
    Ok(())
}

/// Past the end there are zeros, or there is an error: never other bytes of the process.
pub(crate) fn past_the_end(case: &mut Case<'_>) -> Outcome {
    let mut session = config(case)?;
    session.wire.send(&message::get_config(0, 256))?;
    let Came::Reply(reply) = session.wire.receive(case.limit)? else { return Ok(()) };
    let Some(tail) = reply.payload.get(12 + 128..) else { return Ok(()) };
    // No virtio device type has as much as 128 bytes of configuration.
    ensure!(tail.iter().all(|&byte| byte == 0), "bytes past the configuration are not zero");
    session.alive()
}

/// More than a message may carry, or a length that contradicts itself: an error in whatever form.
pub(crate) fn impossible(case: &mut Case<'_>) -> Outcome {
    let mut lying = message::get_config(0, 8);
    lying.payload = outboard_protocol::payload::encode_config(0, 0, &[0; 8]);
    lying.payload.truncate(16);
    let cases = [
        ("of 4000 bytes", message::get_config(0, 4000)),
        ("at offset 2^32-4", message::get_config(0xffff_fffc, 8)),
        ("of 0 bytes", message::get_config(0, 0)),
        ("of 8 bytes with 4 bytes of room", lying),
    ];
    for (what, msg) in cases {
        let mut session = config(case)?;
        session.wire.send(&msg)?;
        match session.wire.receive(case.limit)? {
            Came::Closed => {}
            Came::Nothing => {
                return Err(Finding::hangs(format!("GET_CONFIG {what} is never answered")));
            }
            Came::Reply(reply) => {
                let len = reply.payload.len();
                ensure!(
                    len <= 12 + 256 || len == msg.payload.len(),
                    "GET_CONFIG {what}: {len} bytes"
                );
                session.alive()?;
            }
        }
        case.lives()?;
    }
    Ok(())
}

pub(crate) fn read_only_fields(case: &mut Case<'_>) -> Outcome {
    case.capacity()?;
    let mut session = config(case)?;
    session.needs_acks()?;
    let before = get(&mut session, 0, BLOCK)?;
    session.refused(&message::set_config(0, 0, &[0x55; 8]), "a guest's write to the capacity")?;
    drop(session);
    let mut session = config(case)?;
    let after = get(&mut session, 0, BLOCK)?;
    ensure!(before == after, "a guest's write to read-only fields changed them");
    Ok(())
}

pub(crate) fn far_write(case: &mut Case<'_>) -> Outcome {
    for offset in [250, 0x1000, 0xffff_ff00] {
        let mut session = config(case)?;
        session.needs_acks()?;
        let what = format!("a write at offset {offset:#x} of the configuration");
        session.refused(&message::set_config(offset, 0, &[0; 16]), &what)?;
        case.lives()?;
    }
    Ok(())
}
