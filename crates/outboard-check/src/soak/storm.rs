//! A storm on one device while another one of the same process serves verified load (hostile case A94).
//!
//! ```text
//!  the load alone ─ as long as the storm took ─▶ beside it: the same load, and on the other socket
//!                                                mutated conversations, then reconnects
//! ```
//! Invariant: a conversation is only counted when the device had answered on that connection, so that
//! what was sent met a device and not a closed door.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use outboard_frontend::Connection;
use outboard_frontend::block::{BlockDevice, BlockOptions};

use super::report::{Part, number};
use super::subject::{Loaded, START, Way, holdings, start};
use super::{Options, Progress, SoakError};
use crate::bench::{Disturbed, Driving, Live, Load};
use crate::judge::case::Traits;
use crate::judge::message;
use crate::judge::peer::Peer;
use crate::judge::runner::{self, explore};
use crate::judge::storm::{Random, converse};
use crate::judge::wire::{Came, Wire};

/// Messages for each reconnect, and conversations that are played before anything is measured.
const PER_RECONNECT: u64 = 100;
const FIRST: u64 = 1_000;
/// Requests under way on the loaded device.
const DEPTH: u16 = 8;

/// How the load is driven: as a guest would.
fn way() -> Way {
    Way { driving: Driving::Sleep, ..Way::asleep(DEPTH) }
}

/// What the storm did.
#[derive(Debug, Default)]
struct Done {
    messages: u64,
    conversations: u64,
    reconnects: u64,
    turned_away: u64,
}

/// The storm's side.
struct Storm<'a> {
    peer: &'a mut Peer,
    traits: Traits,
    random: Random,
    limit: Duration,
    done: Done,
}

pub(super) fn parts(
    command: &[OsString],
    options: &Options,
    progress: &Progress<'_>,
) -> Result<Vec<Part>, SoakError> {
    let name = format!("outboard-soak-{}-{}.sock", std::process::id(), options.seed);
    let socket = std::env::temp_dir().join(name);
    let text = socket.display().to_string();
    let filled: Vec<OsString> = command
        .iter()
        .map(|word| {
            word.to_str().map_or_else(|| word.clone(), |w| w.replace("{load}", &text).into())
        })
        .collect();
    let mut part = Part::new(format!(
        "mutated messages and a hundredth of reconnects; load on another device of the process \
         ({})",
        way()
    ));
    let mut peer = start(&filled)?;
    let begun = Instant::now();
    let end = stormed(&mut part, &mut peer, &socket, options, progress);
    drop(peer);
    // A killed process leaves its socket.
    let _ = std::fs::remove_file(&socket);
    Ok(vec![part.ended(begun.elapsed(), end)?])
}

fn stormed(
    part: &mut Part,
    peer: &mut Peer,
    socket: &Path,
    options: &Options,
    progress: &Progress<'_>,
) -> Result<(), SoakError> {
    let judged = runner::Options { limit: options.limit, ..runner::Options::default() };
    let traits = explore(peer, &judged).map_err(|error| SoakError::NoBackend(error.to_string()))?;
    let mut loaded = Loaded::open(socket, options, way())?;
    loaded.warm_up(Duration::from_millis(500))?;
    let random = Random::new(options.seed);
    let mut storm = Storm { peer, traits, random, limit: options.limit, done: Done::default() };
    let first = FIRST.min(options.count / 20);
    storm.rage(first, first / PER_RECONNECT, &|| Ok(()), &|_| {})?;
    storm.visit()?;
    storm.done = Done::default();
    let before = holdings(storm.peer, None)?;

    let (beside, took) = beside(&mut loaded, &mut storm, options, &part.what, progress)?;
    // The load's own front-end stays; those of the storm have gone.
    let after = holdings(storm.peer, Some(before))?;
    storm.visit()?;
    let quiet = Load { duration: took, ..loaded.load.clone() };
    let (alone, ()) = loaded.target.during(&quiet, &[], |_, live| rest(live, took))?;

    part.count = storm.done.messages;
    part.figure("conversations", number(storm.done.conversations), "");
    part.figure("reconnects", number(storm.done.reconnects), "");
    part.figure("connections turned away and tried again", number(storm.done.turned_away), "");
    part.figure("seconds of storm", took.as_secs_f64(), "s");
    figures(part, &beside, &alone);
    part.holdings(before, after);
    Ok(())
}

/// The load with the storm beside it.
fn beside(
    loaded: &mut Loaded,
    storm: &mut Storm<'_>,
    options: &Options,
    what: &str,
    progress: &Progress<'_>,
) -> Result<(Disturbed, Duration), SoakError> {
    let load = loaded.load.clone();
    let (disturbed, took) = loaded.target.during(&load, &[], |_, live| {
        let start = Instant::now();
        let lives = || match live.failed() {
            true => Err(SoakError::Wrong("the load has ended".to_owned())),
            false => Ok(()),
        };
        let told = |messages| progress(what, messages, options.count);
        storm.rage(options.count, options.count / PER_RECONNECT, &lives, &told)?;
        Ok::<_, SoakError>(start.elapsed())
    })?;
    Ok((disturbed, took))
}

fn rest(live: &Live, time: Duration) -> Result<(), SoakError> {
    let until = Instant::now() + time;
    while Instant::now() < until && !live.failed() {
        std::thread::sleep(Duration::from_millis(5).min(time));
    }
    Ok(())
}

fn figures(part: &mut Part, beside: &Disturbed, alone: &Disturbed) {
    part.load(beside);
    let ms = |us: f64| us / 1e3;
    part.figure("p99.9 beside the storm", ms(beside.round.latency.p999_us), "ms");
    part.figure("longest stall of the load alone", alone.stall_ms, "ms");
    part.figure("slowest request alone", ms(alone.round.latency.max_us), "ms");
    part.figure("p99.9 alone", ms(alone.round.latency.p999_us), "ms");
    part.figure("requests/s alone", alone.round.iops, "");
}

impl Storm<'_> {
    /// So many messages and reconnects.
    fn rage(
        &mut self,
        messages: u64,
        reconnects: u64,
        lives: &dyn Fn() -> Result<(), SoakError>,
        told: &dyn Fn(u64),
    ) -> Result<(), SoakError> {
        while self.done.messages < messages {
            let mut wire = self.greeted()?;
            self.done.messages += converse(&mut wire, &self.traits, &mut self.random)?;
            self.done.conversations += 1;
            lives()?;
            told(self.done.messages);
        }
        while self.done.reconnects < reconnects {
            drop(self.greeted()?);
            self.done.reconnects += 1;
            lives()?;
        }
        Ok(())
    }

    /// A connection on which the device has answered. Until the last session is over it may turn a
    /// front-end away.
    fn greeted(&mut self) -> Result<Wire, SoakError> {
        let until = Instant::now() + START;
        loop {
            let mut wire = self.peer.connect(self.limit)?;
            wire.send(&message::get_features())?;
            if let Came::Reply(_) = wire.receive(self.limit)? {
                return Ok(wire);
            }
            self.done.turned_away += 1;
            if Instant::now() > until {
                let text = "the stormed device serves no front-end any more";
                return Err(SoakError::Wrong(text.to_owned()));
            }
        }
    }

    /// That the stormed device reads and writes as it must: a write, a read, the same bytes.
    fn visit(&mut self) -> Result<(), SoakError> {
        let until = Instant::now() + START;
        let options = BlockOptions { timeout: self.limit, ..BlockOptions::default() };
        let mut disk = loop {
            let connection = Connection::connect(self.peer.socket(), self.limit)?;
            match BlockDevice::open(connection, options) {
                Ok(disk) => break disk,
                Err(error) if Instant::now() > until => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let text = self.random.next().to_le_bytes().repeat(512);
        disk.write(8, &text)?;
        disk.flush()?;
        let mut back = vec![0; text.len()];
        disk.read(8, &mut back)?;
        if back == text {
            return Ok(());
        }
        Err(SoakError::Wrong("the stormed device reads other bytes than were written".to_owned()))
    }
}
