//! `kill -9` under load, and a new process that goes on (vhost-user, "Inflight I/O tracking").
//!
//! ```text
//!  load ──▶ rings ──▶ process 1 ✗   process 2 ✗   process 3 …      same socket, same image,
//!  never stops          └── in-flight region, bases ──┴──▶          same in-flight region
//! ```
//! Invariants: the driver is told nothing, so that a request that is lost hangs it and a call that is lost
//! is an error; at the end the used index is the available index, so that nothing was finished twice; every
//! block is read back.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use outboard_frontend::Connection;
use outboard_protocol::features::ProtocolFeatures;

use super::report::{Part, number};
use super::subject::{START, Site, Way, part};
use super::{Options, Progress, SoakError};

/// Requests under way.
const DEPTH: u16 = 32;

pub(super) fn parts(
    command: &[OsString],
    options: &Options,
    progress: &Progress<'_>,
) -> Result<Vec<Part>, SoakError> {
    let mut way = Way::asleep(DEPTH);
    way.wanted = way.wanted.with_inflight();
    way.read_percent = 10;
    let limit = options.limit;
    let work = |site: &mut Site<'_>| kills(site, limit);
    Ok(vec![part("kill -9 and restart", way, command, options, &[], progress, work)?])
}

/// Microseconds of each restart.
struct Times {
    listening: Histogram<u64>,
    first: Histogram<u64>,
}

fn kills(site: &mut Site<'_>, limit: Duration) -> Result<(), SoakError> {
    if !site.device.vmm().protocol_features().contains(ProtocolFeatures::INFLIGHT_SHMFD) {
        return Err(SoakError::NoBackend("it offers no in-flight region".to_owned()));
    }
    let made = || {
        Histogram::new_with_bounds(1, 60_000_000, 3)
            .map_err(|error| SoakError::Wrong(error.to_string()))
    };
    let mut times = Times { listening: made()?, first: made()? };
    while site.more() {
        let some = u64::try_from(site.random.below(64)).unwrap_or(0);
        site.live.progress(1 + some)?;
        site.moment(500);
        site.peer.kill();
        let done = if site.packed { 0 } else { site.ring.used_index()? };
        restart(site, limit, done, &mut times)?;
        site.done();
    }
    let ms = |times: &Histogram<u64>, quantile| number(times.value_at_quantile(quantile)) / 1e3;
    site.part.figure("start to first completion p50", ms(&times.first, 0.5), "ms");
    site.part.figure("start to first completion p99", ms(&times.first, 0.99), "ms");
    site.part.figure("slowest", ms(&times.first, 1.0), "ms");
    site.part.figure("start to listening p50", ms(&times.listening, 0.5), "ms");
    Ok(())
}

/// A new process, until it has finished a request; `done` is the used index that the last one left.
fn restart(
    site: &mut Site<'_>,
    limit: Duration,
    done: u16,
    times: &mut Times,
) -> Result<(), SoakError> {
    let begun = Instant::now();
    site.peer.restart().map_err(SoakError::Wrong)?;
    let connection = loop {
        match Connection::connect(site.peer.socket(), limit) {
            Ok(connection) => break connection,
            Err(error) if begun.elapsed() > START => return Err(error.into()),
            // The dead one's socket is still there, or none.
            Err(_) => std::thread::sleep(Duration::from_micros(100)),
        }
    };
    note(&mut times.listening, begun);
    site.device.reconnect(connection)?;
    if site.packed {
        // No index is in memory: more than were under way is more than the dead one had shown.
        site.live.progress(u64::from(DEPTH) + 1)?;
    }
    while !site.packed && site.ring.used_index()? == done {
        if begun.elapsed() > START || site.live.failed() {
            let seconds = START.as_secs();
            return Err(SoakError::Wrong(format!("no request was finished in {seconds} s")));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    note(&mut times.first, begun);
    Ok(())
}

fn note(times: &mut Histogram<u64>, begun: Instant) {
    times.saturating_record(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
}
