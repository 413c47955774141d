//! The start of a connection: owner, features, protocol features, number of queues.

use std::time::{Duration, Instant};

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures, virtio};

use crate::judge::case::Case;
use crate::judge::finding::{Finding, Outcome, Verdict, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::peer::Life;
use crate::judge::session::{PLAIN, Session, USUAL};

pub(crate) fn features_answered(case: &mut Case<'_>) -> Outcome {
    let reply = case.wire()?.ask(&message::get_features())?;
    reply.number()?;
    ensure!(reply.fds.is_empty(), "{} descriptors came with GET_FEATURES", reply.fds.len());
    Ok(())
}

pub(crate) fn features_stable(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    session.alive()?;
    session.done(&message::set_features(session.features))?;
    session.alive()
}

pub(crate) fn features_before_owner(case: &mut Case<'_>) -> Outcome {
    let mut wire = case.wire()?;
    // Both, and more than once: nobody has said how often they may be asked.
    for _ in 0..2 {
        let offered = wire.ask(&message::get_features())?.number()?;
        if offered & virtio::PROTOCOL_FEATURES != 0 {
            wire.ask(&Msg::bare(Code::GetProtocolFeatures))?.number()?;
        }
    }
    Ok(())
}

pub(crate) fn owner_repeated(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session()?;
    session.done(&Msg::bare(Code::SetOwner))?;
    session.alive()
}

pub(crate) fn owner_late(case: &mut Case<'_>) -> Outcome {
    let mut wire = case.wire()?;
    let offered = wire.ask(&message::get_features())?.number()?;
    if offered & virtio::PROTOCOL_FEATURES == 0 {
        return Err(Finding::not_offered("it does not offer protocol features"));
    }
    let all = wire.ask(&Msg::bare(Code::GetProtocolFeatures))?.number()?;
    wire.send(&Msg::u64(Code::SetProtocolFeatures, all & USUAL.bits()))?;
    wire.send(&Msg::bare(Code::SetOwner))?;
    wire.send(&message::set_features(offered & PLAIN))?;
    wire.ask(&message::get_features())?;
    Ok(())
}

/// A bit that nobody assigned and that is not offered.
fn unoffered(offered: u64) -> Outcome<u64> {
    let candidates = [46, 47, 48, 45, 44, 25, 31];
    candidates
        .into_iter()
        .map(|bit| 1 << bit)
        .find(|bit| offered & bit == 0)
        .ok_or_else(|| Finding::not_offered("it offers every bit there is"))
}

pub(crate) fn features_unoffered(case: &mut Case<'_>) -> Outcome {
    let mut session = Session::hello(case.wire()?, USUAL)?;
    session.needs_acks()?;
    let bad = session.offered & PLAIN | unoffered(session.offered)?;
    match session.turned_down(&message::set_features(bad), "a feature bit that was not offered")? {
        true => session.done(&message::set_features(session.offered & PLAIN)),
        false => Ok(()),
    }
}

pub(crate) fn features_replaced(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_with(PLAIN | virtio::RING_EVENT_IDX, USUAL)?;
    session.done(&message::set_features(session.offered & PLAIN))?;
    session.done(&message::set_features(session.features))
}

pub(crate) fn protocol_features_answered(case: &mut Case<'_>) -> Outcome {
    let mut wire = case.wire()?;
    let offered = wire.ask(&message::get_features())?.number()?;
    if offered & virtio::PROTOCOL_FEATURES == 0 {
        return Err(Finding::not_offered("it does not offer protocol features"));
    }
    let bits = wire.ask(&Msg::bare(Code::GetProtocolFeatures))?.number()?;
    let known = ProtocolFeatures::all().bits();
    ensure!(
        bits & !known == 0,
        "it offers protocol feature bits {:#x} that nobody assigned",
        bits & !known
    );
    Ok(())
}

pub(crate) fn protocol_features_unoffered(case: &mut Case<'_>) -> Outcome {
    let mut session = Session::hello(case.wire()?, USUAL)?;
    session.needs_acks()?;
    let msg = Msg::u64(Code::SetProtocolFeatures, session.protocol.bits() | 1 << 60);
    session.refused(&msg, "a protocol feature that was not offered")?;
    Ok(())
}

pub(crate) fn queue_count(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(ProtocolFeatures::MQ, "MQ")?;
    let count = session.ask(&Msg::bare(Code::GetQueueNum))?.number()?;
    ensure!(count > 0, "it says it has 0 queues");
    Ok(())
}

/// SIGTERM ends a back-end program, soon and in an orderly way.
pub(crate) fn ends_at_sigterm(case: &mut Case<'_>) -> Outcome {
    let _session = case.session()?;
    if !case.peer.terminate() {
        return Err(Finding::not_offered("it was found running and is left so"));
    }
    case.ended = true;
    let until = Instant::now() + case.limit.max(Duration::from_secs(2));
    loop {
        match case.peer.life() {
            Life::Left => return Ok(()),
            // With whatever code: the specification names none.
            Life::Died(how) if how.starts_with("killed by SIGTERM") => return Ok(()),
            Life::Died(how) if how.starts_with("exit code") => return Ok(()),
            Life::Died(how) => {
                return Err(Finding::new(Verdict::Crashes, format!("at SIGTERM: {how}")));
            }
            Life::Alive if Instant::now() > until => {
                return Err(Finding::hangs("it does not end at SIGTERM"));
            }
            Life::Alive => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}
