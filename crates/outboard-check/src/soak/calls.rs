//! Call descriptors swapped under load (vhost-user, SET_VRING_CALL): a front-end that masks interrupts.
//!
//! As a VMM does when its guest masks a vector: the call goes to a descriptor that nobody waits for, then
//! back to the guest's, with what came meanwhile passed on. Invariant: when a swap is acknowledged, no call
//! goes to the descriptor before it any more; together with the driver that watches each call
//! ([`Driving::Called`](crate::bench::Driving)) no interrupt can be lost unseen:
//! a lost one ends the load with an error and has no figure.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::report::{Part, number};
use super::subject::{Site, Way, part};
use super::{Options, Progress, SoakError};
use crate::judge::ring::{eventfd, signal, signalled};

pub(super) fn parts(
    command: &[OsString],
    options: &Options,
    progress: &Progress<'_>,
) -> Result<Vec<Part>, SoakError> {
    let asleep = [Way::asleep(1), Way::asleep(32), Way::asleep(1).by_flags()];
    let mut parts = Vec::new();
    for way in asleep {
        parts.push(part("call swaps", way, command, options, &[], progress, masked)?);
    }
    let way = Way::polling(32);
    parts.push(part("call given and taken", way, command, options, &[], progress, polled)?);
    Ok(parts)
}

/// Masks and unmasks.
fn masked(site: &mut Site<'_>) -> Result<(), SoakError> {
    let ring = site.ring;
    let index = ring.index();
    let (mut passed_on, mut late) = (0u64, 0u64);
    let mut last: Option<OwnedFd> = None;
    while site.more() {
        let mask = eventfd()?;
        site.connection().set_vring_call(index, &mask)?;
        site.done();
        late += u64::from(last.is_some_and(|last| signalled(&last, Duration::ZERO)));
        site.moment(100);
        site.connection().set_vring_call(index, ring.call())?;
        site.done();
        if signalled(&mask, Duration::ZERO) {
            passed_on += 1;
            signal(&ring.call())?;
        }
        last = Some(mask);
        site.live.progress(1)?;
        site.moment(100);
    }
    late += u64::from(last.is_some_and(|last| signalled(&last, Duration::from_millis(10))));
    site.part.bounded("calls after the swap's acknowledgement", number(late), "", 0.0);
    site.part.figure("calls that came while masked", number(passed_on), "");
    Ok(())
}

/// A driver that never sleeps: its call descriptor is taken away and given back.
fn polled(site: &mut Site<'_>) -> Result<(), SoakError> {
    let ring = site.ring;
    while site.more() {
        site.connection().set_vring_call_polled(ring.index())?;
        site.done();
        site.live.progress(1)?;
        let call = eventfd()?;
        site.connection().set_vring_call(ring.index(), &call)?;
        site.done();
        site.live.progress(1)?;
    }
    site.connection().set_vring_call(ring.index(), ring.call())?;
    Ok(())
}
