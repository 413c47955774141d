//! Rings and requests of block devices: what a guest can put there (virtio 1.3 §2.7 and §5.2; hostile
//! cases B).
//!
//! Invariant: no request writes to the disk but those of `requests::written`, which puts the old bytes
//! back, and those that the device must refuse.

pub(super) mod chains;
pub(super) mod indirect;
pub(super) mod layouts;
pub(super) mod packed;
pub(super) mod packed_kept;
pub(super) mod requests;

use super::case::Case;
use super::disk::Disk;
use super::finding::{Outcome, ensure};

/// Plays a ring that breaks a rule. The request may fail or the ring may be given up; it must not
/// succeed, and the device must serve again, on this connection or at least on the next.
fn broken(case: &mut Case<'_>, spoil: impl FnOnce(&mut Disk) -> Outcome) -> Outcome {
    broken_with(case, 0, spoil)
}

/// The same with more features acknowledged.
fn broken_with(
    case: &mut Case<'_>,
    features: u64,
    spoil: impl FnOnce(&mut Disk) -> Outcome,
) -> Outcome {
    let mut disk = start(case, features)?;
    disk.header(super::disk::IN, 0)?;
    spoil(&mut disk)?;
    // What is performed comes back; a busy machine may take its time.
    disk.ring.next_used(case.quiet * 2)?;
    case.digests();
    ensure!(disk.status()? != 0, "it reported success for a request that broke a rule");
    recover(case, disk)
}

/// Plays something that may be served or not, as the device likes.
fn survived(
    case: &mut Case<'_>,
    features: u64,
    spoil: impl FnOnce(&mut Disk) -> Outcome,
) -> Outcome {
    let mut disk = start(case, features)?;
    disk.header(super::disk::IN, 0)?;
    spoil(&mut disk)?;
    std::thread::sleep(case.quiet / 4);
    case.digests();
    recover(case, disk)
}

fn start(case: &mut Case<'_>, features: u64) -> Outcome<Disk> {
    let mut disk = case.disk_with(features, outboard_protocol::ProtocolFeatures::empty())?;
    disk.session.needs_bit(features, "the ring feature")?;
    disk.serves("before anything was broken")?;
    Ok(disk)
}

/// After a broken ring: no spinning, and a good request is served.
fn recover(case: &mut Case<'_>, mut disk: Disk) -> Outcome {
    case.lives()?;
    case.rests("after a broken ring")?;
    if disk.revive().is_ok() {
        return Ok(());
    }
    drop(disk);
    case.lives()?;
    case.disk()?.serves("on a new connection after a broken ring")
}
