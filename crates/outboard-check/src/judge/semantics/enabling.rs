//! Starting and enabling rings (vhost-user, "Ring states").

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures, virtio};

use crate::judge::case::Case;
use crate::judge::disk::{DATA, Disk, HEADER, IN, STATUS};
use crate::judge::finding::{Finding, Outcome, ensure};
use crate::judge::message::{self, Msg};
use crate::judge::ring::WRITE;
use crate::judge::session::{PLAIN, USUAL};

/// What the data area holds before a read.
const MARK: [u8; 512] = [0x5a; 512];

/// Puts a read of sector 0 into the ring without a kick; its data area is marked.
pub(crate) fn queue_read(disk: &mut Disk) -> Outcome {
    disk.header(IN, 0)?;
    disk.ring.write(DATA, &MARK)?;
    disk.ring.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)])?;
    disk.ring.list(0)?;
    disk.ring.publish()
}

/// That the read that was queued comes back, served.
pub(crate) fn expect_read(disk: &mut Disk, when: &str) -> Outcome {
    let done = disk.finish(0)?.ok_or_else(|| {
        Finding::hangs(format!("a request is never served that was in the ring {when}"))
    })?;
    ensure!(done.status == 0, "a request {when} failed with {}", done.status);
    Ok(())
}

pub(crate) fn served(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    for _ in 0..40 {
        disk.serves("on a ring that runs")?;
    }
    Ok(())
}

pub(crate) fn used_length(case: &mut Case<'_>) -> Outcome {
    let done = case.disk()?.read(0, 1024)?;
    ensure!(
        done.len == 1025,
        "a read of 1024 bytes was finished with length {}, not 1025",
        done.len
    );
    Ok(())
}

pub(crate) fn enable_gates(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.session.needs_bit(virtio::PROTOCOL_FEATURES, "PROTOCOL_FEATURES")?;
    disk.ring.configure(&mut disk.session)?;
    queue_read(&mut disk)?;
    disk.ring.start(&mut disk.session)?;
    disk.ring.kick()?;
    case.digests();
    std::thread::sleep(case.quiet);
    ensure!(disk.data(512)? == MARK, "it performed a request on a ring that was never enabled");
    ensure!(disk.status()? != 0, "it reported success on a ring that was never enabled");
    Ok(())
}

pub(crate) fn disable_gates(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    disk.ring.enable(&mut disk.session, false)?;
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    case.digests();
    std::thread::sleep(case.quiet);
    ensure!(disk.data(512)? == MARK, "it performed a request on a ring that was disabled");
    Ok(())
}

pub(crate) fn kick_before_enable(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.ring.configure(&mut disk.session)?;
    disk.ring.start(&mut disk.session)?;
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    std::thread::sleep(case.quiet / 4);
    disk.ring.enable(&mut disk.session, true)?;
    // Served now, or taken and dropped while the ring was disabled: but it must come back.
    let done = disk.finish(0)?;
    let lost = || Finding::hangs("a request kicked before the ring was enabled never comes back");
    done.ok_or_else(lost)?;
    disk.serves("after a kick before the ring was enabled")
}

pub(crate) fn enable_before_kick(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.ring.configure(&mut disk.session)?;
    disk.ring.enable(&mut disk.session, true)?;
    disk.ring.start(&mut disk.session)?;
    disk.serves("that was enabled before it was started")
}

pub(crate) fn start_looks(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.ring.configure(&mut disk.session)?;
    disk.ring.enable(&mut disk.session, true)?;
    queue_read(&mut disk)?;
    disk.ring.start(&mut disk.session)?;
    expect_read(&mut disk, "before it was started")
}

pub(crate) fn enable_looks(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.ring.configure(&mut disk.session)?;
    disk.ring.start(&mut disk.session)?;
    queue_read(&mut disk)?;
    disk.ring.enable(&mut disk.session, true)?;
    expect_read(&mut disk, "before it was enabled")
}

pub(crate) fn without_bit_30(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let session = case.session_with(virtio::VERSION_1, USUAL)?;
    let mut disk = Disk::start(session, capacity)?;
    disk.serves("although PROTOCOL_FEATURES was not acknowledged and so no ring needs an ENABLE")
}

pub(crate) fn bit_30_keeps_enabled(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    disk.session.done(&message::set_features(disk.session.features))?;
    disk.serves("after SET_FEATURES came again")
}

pub(crate) fn bit_30_keeps_disabled(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.session.needs_bit(virtio::PROTOCOL_FEATURES, "PROTOCOL_FEATURES")?;
    disk.ring.configure(&mut disk.session)?;
    disk.ring.start(&mut disk.session)?;
    disk.session.done(&message::set_features(disk.session.features))?;
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    case.digests();
    std::thread::sleep(case.quiet);
    ensure!(disk.data(512)? == MARK, "SET_FEATURES with PROTOCOL_FEATURES enabled a ring");
    Ok(())
}

pub(crate) fn early_kick(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.still_disk()?;
    disk.ring.start(&mut disk.session)?;
    disk.ring.configure(&mut disk.session)?;
    disk.ring.enable(&mut disk.session, true)?;
    disk.serves("whose SET_VRING_KICK came before its size and addresses")
}

pub(crate) fn late_memory(case: &mut Case<'_>) -> Outcome {
    let capacity = case.capacity()?;
    let session = case.session()?;
    let mut disk = Disk::prepare(session, capacity)?;
    // Another connection, on which memory comes last.
    let (memory, ring) = (disk.memory.clone(), disk.ring);
    drop(disk.session);
    let mut session = case.session()?;
    ring.run(&mut session)?;
    session.share(memory.regions())?;
    let limit = session.wire.limit;
    disk = Disk { session, memory, ring, limit, capacity };
    disk.serves("whose memory came last")
}

pub(crate) fn reset_owner(case: &mut Case<'_>) -> Outcome {
    let mut disk = case.disk()?;
    disk.serves("on a ring that runs")?;
    disk.session.done(&Msg::bare(Code::ResetOwner))?;
    disk.ring.enable(&mut disk.session, true)?;
    disk.serves("after RESET_OWNER and ENABLE")
}

pub(crate) fn reset_device(case: &mut Case<'_>) -> Outcome {
    case.capacity()?;
    let mut disk = case.disk_with(0, ProtocolFeatures::RESET_DEVICE)?;
    disk.session.needs(ProtocolFeatures::RESET_DEVICE, "RESET_DEVICE")?;
    disk.serves("on a ring that runs")?;
    disk.session.done(&Msg::bare(Code::ResetDevice))?;
    queue_read(&mut disk)?;
    disk.ring.kick()?;
    case.digests();
    std::thread::sleep(case.quiet);
    ensure!(disk.data(512)? == MARK, "a ring still runs after RESET_DEVICE");
    disk.ring.clear()?;
    disk.session.done(&message::set_features(disk.session.offered & PLAIN))?;
    disk.ring.run(&mut disk.session)?;
    disk.serves("after RESET_DEVICE and a new set-up, memory kept")
}
