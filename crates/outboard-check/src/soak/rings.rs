//! Rings changed under load: disabled and enabled, stopped and started, kicked through another descriptor
//! (vhost-user, "Ring states", SET_VRING_ENABLE, GET_VRING_BASE, SET_VRING_KICK).
//!
//! Invariant: a ring that is stopped has given back everything it took (its base is the used index); after
//! each change requests are finished again although the driver may have kicked nobody meanwhile.

use std::ffi::OsString;
use std::time::Duration;

use super::report::{Part, number};
use super::subject::{Site, Way, part};
use super::{Options, Progress, SoakError};
use crate::judge::ring::{eventfd, signal, signalled};

/// A part's name and what it does.
type Kind = (&'static str, fn(&mut Site<'_>) -> Result<(), SoakError>);

pub(super) fn parts(
    command: &[OsString],
    options: &Options,
    progress: &Progress<'_>,
) -> Result<Vec<Part>, SoakError> {
    let kinds: [Kind; 3] = [
        ("ring disabled and enabled", enabled),
        ("kick swaps", kicks),
        ("ring stopped and started", stops),
    ];
    let mut parts = Vec::new();
    for (what, work) in kinds {
        for way in [Way::asleep(1), Way::asleep(32)] {
            parts.push(part(what, way, command, options, &[], progress, work)?);
        }
    }
    Ok(parts)
}

fn enabled(site: &mut Site<'_>) -> Result<(), SoakError> {
    let ring = site.ring;
    let used = |packed| if packed { Ok(0) } else { ring.used_index() };
    let (mut moved, mut most) = (0u64, 0u16);
    while site.more() {
        site.connection().set_vring_enable(ring.index(), false)?;
        let before = used(site.packed)?;
        site.moment(200);
        let more = used(site.packed)?.wrapping_sub(before);
        moved += u64::from(more > 0);
        most = most.max(more);
        site.connection().set_vring_enable(ring.index(), true)?;
        site.done();
        site.live.progress(1)?;
        site.moment(100);
    }
    // Only what it had taken before may be finished now.
    site.part.figure("times that requests were finished while disabled", number(moved), "");
    site.part.figure("most of them", f64::from(most), "");
    Ok(())
}

fn kicks(site: &mut Site<'_>) -> Result<(), SoakError> {
    let ring = site.ring;
    let mut passed_on = 0u64;
    while site.more() {
        let kick = eventfd()?;
        let ours = kick.try_clone().map_err(|error| SoakError::Wrong(error.to_string()))?;
        site.connection().set_vring_kick(ring.index(), &kick)?;
        // The driver kicks the old one until here: what the back-end did not take is passed on.
        let old = ring.replace_kick(ours);
        if signalled(&old, Duration::ZERO) {
            passed_on += 1;
            signal(&kick)?;
        }
        site.done();
        site.live.progress(1)?;
        site.moment(100);
    }
    site.part.figure("kicks passed on", number(passed_on), "");
    Ok(())
}

fn stops(site: &mut Site<'_>) -> Result<(), SoakError> {
    let ring = site.ring;
    let mut differs = 0u64;
    while site.more() {
        let bases = site.device.sleep()?.unwrap_or_default();
        differs += u64::from(match bases.as_slice() {
            // Everything that was taken was given back.
            [(_, base)] if site.packed => base >> 16 != base & 0xffff,
            bases => bases != [(ring.index(), u32::from(ring.used_index()?))],
        });
        site.moment(100);
        site.device.wake()?;
        site.done();
        site.live.progress(1)?;
        site.moment(100);
    }
    site.part.bounded("bases that are not the used index", number(differs), "", 0.0);
    Ok(())
}
