//! The device's state, saved and loaded; its silence when it is suspended; the IOTLB and crypto sessions
//! (vhost-user, "Migrating back-end state", "Suspended device state", IOTLB_MSG, CREATE_CRYPTO_SESSION;
//! hostile cases A79, A80, A87, A90).

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures as P, virtio};
use outboard_protocol::payload::{CryptoSession, Iotlb, read};
use zerocopy::IntoBytes as _;

use super::optional::{pair, transfer};
use crate::judge::case::Case;
use crate::judge::disk::{BASE, Disk, MEMORY, memory};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::session::{PLAIN, Session, USUAL};
use crate::judge::wire::{Came, wait};

/// A transfer under way: our end of the channel, whichever side has made it. None when it is refused.
fn begin(session: &mut Session, direction: u32) -> Outcome<Option<UnixStream>> {
    let (ours, theirs) = pair()?;
    let theirs: OwnedFd = theirs.into();
    let mut reply = session.ask(&transfer(direction, &theirs))?;
    let code = reply.number()?;
    match (code & 0xff, reply.fds.pop()) {
        (0, Some(channel)) => Ok(Some(channel.into())),
        (0, None) => Ok(Some(ours)),
        _ => Ok(None),
    }
}

fn check(session: &mut Session) -> Outcome<u64> {
    session.ask(&Msg::bare(Code::CheckDeviceState))?.number()
}

/// The state of the device as it is.
pub(crate) fn saved(case: &Case<'_>, session: &mut Session) -> Outcome<Vec<u8>> {
    let refused = || Finding::breaks("saving the state of a stopped device is refused");
    let mut channel = begin(session, 0)?.ok_or_else(refused)?;
    let own = |error| Finding::own("set a limit", error);
    channel.set_read_timeout(Some(case.limit)).map_err(own)?;
    let mut state = Vec::new();
    channel
        .read_to_end(&mut state)
        .map_err(|_| Finding::hangs("the saved state never ends: the descriptor stays open"))?;
    let code = check(session)?;
    ensure!(code == 0, "CHECK_DEVICE_STATE after a save says {code}");
    Ok(state)
}

/// Loads these bytes; whether they were taken.
pub(crate) fn loaded(session: &mut Session, state: &[u8]) -> Outcome<bool> {
    let Some(mut channel) = begin(session, 1)? else { return Ok(false) };
    // It may have read enough before the end.
    let _ = channel.write_all(state);
    drop(channel);
    Ok(check(session)? == 0)
}

/// What was saved is loaded, and the device is what it was.
pub(crate) fn state_loaded(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
    let state = saved(case, &mut session)?;
    drop(session);
    let mut session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
    ensure!(loaded(&mut session, &state)?, "it does not load the {} bytes it saved", state.len());
    session.alive()?;
    match case.traits.capacity {
        Some(capacity) => Disk::start(session, capacity)?.serves("after its state was loaded"),
        None => Ok(()),
    }
}

/// A part of a state is no state (A80).
pub(crate) fn state_cut(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
    let state = saved(case, &mut session)?;
    drop(session);
    if state.is_empty() {
        return Err(Finding::not_offered("its state is empty: nothing can be cut off"));
    }
    for end in [0, 1, state.len() / 2, state.len() - 1] {
        let part = state.get(..end).unwrap_or_default();
        let mut session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
        let taken = loaded(&mut session, part)?;
        ensure!(!taken, "it loads {end} of {} bytes of its state", state.len());
        session.alive()?;
    }
    Ok(())
}

/// A state that does not come: the connection is served meanwhile (A80).
pub(crate) fn state_slow(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
    let Some(mut channel) = begin(&mut session, 1)? else {
        return Err(Finding::breaks("loading a state into a stopped device is refused"));
    };
    let _ = channel.write_all(&[0x55]);
    for _ in 0..5 {
        session.alive()?;
    }
    case.rests("while a state does not come")?;
    drop(channel);
    let code = check(&mut session)?;
    ensure!(code != 0, "a state of one byte was loaded");
    session.alive()
}

/// Only a suspended device has a state to save (A79).
pub(crate) fn state_while_running(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let session = case.session_for(P::DEVICE_STATE, "DEVICE_STATE")?;
    let mut disk = Disk::start(session, capacity)?;
    disk.serves("before its state was asked for")?;
    let (_ours, theirs) = pair()?;
    let theirs: OwnedFd = theirs.into();
    disk.session.wire.send(&transfer(0, &theirs))?;
    match disk.session.wire.receive(case.limit)? {
        Came::Closed => return Ok(()),
        Came::Nothing => return Err(Finding::hangs("it is silent after SET_DEVICE_STATE_FD")),
        Came::Reply(reply) => {
            let code = reply.number()?;
            ensure!(code & 0xff != 0, "it saves its state while a ring runs");
        }
    }
    disk.serves("after its state was asked for in vain")
}

/// A suspended device sends nothing to the front-end, kicked or not.
pub(crate) fn suspended_channel(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let session = case.session_for(P::BACKEND_REQ, "BACKEND_REQ")?;
    let (ours, theirs) = pair()?;
    let mut disk = Disk::start(session, capacity)?;
    disk.session.done(&Msg::bare(Code::SetBackendReqFd).fd(&theirs))?;
    disk.serves("on a ring that runs")?;
    disk.stop()?;
    disk.ring.kick()?;
    let fd: OwnedFd = ours.into();
    let said = wait(std::os::fd::AsFd::as_fd(&fd), rustix::event::PollFlags::IN, case.quiet);
    ensure!(!said, "it sends a message to the front-end while it is suspended");
    disk.session.alive()
}

fn iotlb(entry: &Iotlb) -> Msg<'static> {
    Msg::new(Code::IotlbMsg.id(), entry.as_bytes().to_vec()).need_reply()
}

/// A session of a device behind an IOMMU, and the other end of its channel: some offer the feature only where
/// misses can be told.
fn behind_iommu(case: &mut Case<'_>) -> Outcome<(Session, UnixStream)> {
    let (ours, theirs) = pair()?;
    let mut session = Session::hello(case.wire()?, USUAL | P::BACKEND_REQ)?;
    if session.protocol.contains(P::BACKEND_REQ) {
        session.done(&Msg::bare(Code::SetBackendReqFd).fd(&theirs))?;
        session.offered = session.ask(&message::get_features())?.number()?;
    }
    session.needs_bit(virtio::ACCESS_PLATFORM, "ACCESS_PLATFORM")?;
    session.features = session.offered & (PLAIN | virtio::ACCESS_PLATFORM);
    session.done(&message::set_features(session.features))?;
    Ok((session, ours))
}

/// The judge's memory, as it is.
fn entry(kind: u8) -> Iotlb {
    let uaddr = BASE + outboard_frontend::USER_OFFSET;
    Iotlb { iova: BASE, size: MEMORY, uaddr, perm: 3, kind, padding: [0; 6] }
}

/// Updates and invalidations are answered with 0.
pub(crate) fn iotlb_answered(case: &mut Case<'_>) -> Outcome {
    let (mut session, _channel) = behind_iommu(case)?;
    let memory = memory()?;
    session.share(memory.regions())?;
    for (what, kind) in [("an update", 2), ("an invalidation", 3), ("an update again", 2)] {
        let code = session.ask(&iotlb(&entry(kind)))?.number()?;
        ensure!(code == 0, "{what} of the IOTLB is answered with {code}");
    }
    session.alive()
}

/// Entries that cannot be (A87).
pub(crate) fn iotlb_impossible(case: &mut Case<'_>) -> Outcome {
    let wraps = Iotlb { size: u64::MAX, ..entry(2) };
    let wrong = [
        ("an IOTLB entry that wraps", wraps),
        ("an IOTLB entry whose user addresses wrap", Iotlb { uaddr: u64::MAX - 4095, ..entry(2) }),
        ("an IOTLB message of type 9", entry(9)),
        ("an IOTLB entry with permissions 9", Iotlb { perm: 9, ..entry(2) }),
    ];
    for (what, entry) in wrong {
        let (mut session, _channel) = behind_iommu(case)?;
        let memory = memory()?;
        session.share(memory.regions())?;
        session.wire.send(&iotlb(&entry))?;
        match session.wire.receive(case.limit)? {
            Came::Closed => {}
            Came::Nothing => return Err(Finding::hangs(format!("it is silent after {what}"))),
            Came::Reply(reply) => ensure!(reply.number()? != 0, "it said yes to {what}"),
        }
        drop(session);
        case.lives()?;
    }
    Ok(())
}

/// A session whose keys are longer than their fields has a negative id (A90).
pub(crate) fn crypto_session(case: &mut Case<'_>) -> Outcome {
    let mut session = case.session_for(P::CRYPTO_SESSION, "CRYPTO_SESSION")?;
    let mut wrong = CryptoSession::default();
    // Every length at once.
    wrong.body.fill(0xff);
    session.wire.send(&Msg::new(Code::CreateCryptoSession.id(), wrong.as_bytes().to_vec()))?;
    let reply = match session.wire.receive(case.limit)? {
        Came::Reply(reply) => reply,
        Came::Closed => return case.lives(),
        Came::Nothing => return Err(Finding::hangs("it is silent after CREATE_CRYPTO_SESSION")),
    };
    let size = reply.payload.len();
    let answer = read::<CryptoSession>(&reply.payload).ok_or_else(|| {
        Finding::breaks(format!("the answer to CREATE_CRYPTO_SESSION has {size} bytes, not 1072"))
    })?;
    let id = answer.session_id;
    ensure!(id < 0, "a session with keys of 2^32-1 bytes was opened as {id}");
    let number = u64::from_ne_bytes(7i64.to_ne_bytes());
    session.turned_down(&Msg::u64(Code::CloseCryptoSession, number), "the end of no session")?;
    session.wire.send(&message::get_features())
}
