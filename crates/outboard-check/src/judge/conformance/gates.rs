//! What must be refused although it is well formed: features that were not negotiated, rings that do
//! not exist (vhost-user, "Protocol features"; hostile cases A46 and A67).

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::ProtocolFeatures;
use outboard_protocol::payload::{Log, VringAddr};
use outboard_protocol::table::{FdRule, Side, info};
use zerocopy::IntoBytes as _;

use crate::judge::case::Case;
use crate::judge::finding::{Finding, Outcome};
use crate::judge::message::{self, Msg};
use crate::judge::ring::eventfd;
use crate::judge::session::PLAIN;

/// A request whose protocol feature was not acknowledged is refused.
pub(crate) fn gate(case: &mut Case<'_>, code: Code) -> Outcome {
    let mut session = case.session_with(PLAIN, ProtocolFeatures::REPLY_ACK)?;
    session.needs_acks()?;
    let row = info(Side::FrontEnd, code.id())
        .ok_or_else(|| Finding::own("look up a message", code.id()))?;
    let length = usize::try_from(row.payload.sizes().smallest()).unwrap_or(0);
    let mut msg = Msg::new(code.id(), vec![0; length]);
    if code == Code::SetConfig {
        msg.payload = message::set_config(0, 0, &[0; 8]).payload;
    }
    if code == Code::SetLogBase {
        msg.payload = Log { mmap_size: 4096, mmap_offset: 0 }.as_bytes().to_vec();
    }
    let file = eventfd()?;
    if row.fds == FdRule::One {
        msg = msg.fd(&file);
    }
    session.turned_down(&msg, &format!("{} without its feature", row.name)).map(drop)
}

/// ENABLE needs bit 30 acknowledged in SET_FEATURES.
pub(crate) fn enable_gate(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_with(
        outboard_protocol::features::virtio::VERSION_1,
        ProtocolFeatures::REPLY_ACK,
    )?;
    session.needs_acks()?;
    let what = "SET_VRING_ENABLE without PROTOCOL_FEATURES acknowledged";
    session.turned_down(&message::enable(0, 1), what).map(drop)
}

/// Ring numbers that no back-end has, at wire width.
const NO_RINGS: [u32; 3] = [u32::MAX, 0x1_0000, 1000];

/// A ring that does not exist is refused.
pub(crate) fn index(case: &mut Case<'_>, code: Code) -> Outcome {
    let mut session = case.acking()?;
    for ring in NO_RINGS {
        let what = format!("{} for ring {ring}", message::name_of(code.id()));
        let msg = match code {
            Code::SetVringNum => message::vring_num(ring, 16),
            Code::SetVringAddr => message::vring_addr(&VringAddr {
                index: ring,
                desc: 0x1000,
                used: 0x3000,
                avail: 0x2000,
                ..VringAddr::default()
            }),
            other => Msg::state(other, ring, 0),
        };
        if !session.turned_down(&msg, &what)? {
            session = case.acking()?;
        }
    }
    Ok(())
}

/// GET_VRING_BASE has no refusal of its own: a close or anything that is no base is as good.
pub(crate) fn index_of_base(case: &mut Case<'_>) -> Outcome {
    for ring in NO_RINGS {
        let mut session = case.acking()?;
        session.wire.send(&message::get_base(ring).need_reply())?;
        match session.wire.receive(case.limit)? {
            crate::judge::wire::Came::Closed => {}
            crate::judge::wire::Came::Nothing => {
                return Err(Finding::hangs(format!("it is silent after the base of ring {ring}")));
            }
            crate::judge::wire::Came::Reply(_) => session.alive()?,
        }
        case.lives()?;
    }
    Ok(())
}

/// KICK, CALL and ERR have eight bits for the ring: one past the last is refused.
pub(crate) fn index_of_notifier(case: &mut Case<'_>, code: Code) -> Outcome {
    let rings = case.most_rings();
    let Ok(ring) = u8::try_from(rings) else {
        return Err(Finding::not_offered("it may have 256 rings or more: every number is one"));
    };
    let fd = eventfd()?;
    for ring in [ring, 255] {
        let mut session = case.acking()?;
        let what = format!("{} for ring {ring}", message::name_of(code.id()));
        session.turned_down(&message::notifier(code, ring, &fd), &what)?;
    }
    Ok(())
}
