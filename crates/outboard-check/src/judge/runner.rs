//! Plays the checks: one back-end for each case, and a look at what the case left behind.
//!
//! Invariant: whatever a check found, the back-end is looked at afterwards; a process that died makes
//! the verdict *crashes*, and only a check that held can become *hangs*, *spins* or *leaks* by the
//! second look.

use std::time::{Duration, Instant};

use outboard_protocol::FrontendCode as Code;
use outboard_protocol::features::{ProtocolFeatures, virtio};

use super::case::{Case, Traits};
use super::expected::Expected;
use super::finding::{Finding, Outcome, Verdict};
use super::message::{self, Msg};
use super::peer::{Life, Peer, Target};
use super::report::{Judgement, Report};
use super::table::{Check, Group, checks};
use super::wire::Wire;
use crate::probe::DeviceType;

/// How the judge works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Longest wait for one answer of the back-end.
    pub limit: Duration,
    /// Shorter listening to silence, smaller counts.
    pub quick: bool,
    /// Only checks whose id, group or section holds one of these; all when empty.
    pub only: Vec<String>,
    /// Failures that are known, with their reasons.
    pub expected: Expected,
    /// Where the storm's mutations start.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limit: Duration::from_secs(3),
            quick: false,
            only: Vec::new(),
            expected: Expected::default(),
            seed: 1,
        }
    }
}

impl Options {
    /// Whether a check is to be played. The name of a group means that group and nothing else.
    #[must_use]
    pub fn wants(&self, check: &Check) -> bool {
        let is_group = |word: &str| Group::ALL.iter().any(|group| group.name() == word);
        let fits = |word: &String| match is_group(word) {
            true => check.group.name() == word,
            false => check.id.contains(word.as_str()) || check.section.contains(word.as_str()),
        };
        self.only.is_empty() || self.only.iter().any(fits)
    }
}

/// Why nothing could be judged at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JudgeError {
    /// The command could not be started, or nobody listens.
    #[error("no back-end to judge: {0}")]
    NoBackend(String),
    /// It answers nothing.
    #[error("the back-end does not answer the first message: {0}")]
    Deaf(String),
    /// No check has such a name.
    #[error("no check is called anything like {0}; --list shows them all")]
    NoSuchCheck(String),
}

/// How long a command may take until it listens.
const START: Duration = Duration::from_secs(10);

/// Judges a back-end; `progress` hears of each check when it is done.
///
/// # Errors
/// A [`JudgeError`] when there is nothing to judge.
pub fn judge(
    target: &Target,
    options: &Options,
    mut progress: impl FnMut(&Judgement),
) -> Result<Report, JudgeError> {
    let mut wanted: Vec<_> = checks().filter(|check| options.wants(check)).collect();
    if wanted.is_empty() {
        return Err(JudgeError::NoSuchCheck(options.only.join(", ")));
    }
    let mut peer = Peer::start(target, START).map_err(JudgeError::NoBackend)?;
    let traits = explore(&mut peer, options)?;
    let mut kept = match target {
        Target::Socket(_) => Some(peer),
        Target::Command(_) => {
            drop(peer);
            None
        }
    };
    if kept.is_some() {
        wanted.sort_by_key(|check| kills(check));
    }
    let mut report = Report::default();
    for check in wanted {
        let start = Instant::now();
        let outcome = match &mut kept {
            Some(peer) => match peer.life() {
                Life::Alive => play(check, peer, traits, options),
                Life::Left | Life::Died(_) => Err(gone()),
            },
            None => match Peer::start(target, START) {
                Ok(mut peer) => play(check, &mut peer, traits, options),
                Err(why) => Err(Finding::new(Verdict::NotJudged, why)),
            },
        };
        let judgement = Judgement::new(check, outcome, start.elapsed(), &options.expected);
        progress(&judgement);
        report.judgements.push(judgement);
    }
    Ok(report)
}

/// Checks that end the process of one known back-end or another: last, where there is one process.
fn kills(check: &Check) -> bool {
    const KILL: [&str; 7] =
        ["index-", "memory-short", "memory-cut", "log-", "regions-", "all-ones", "storm-"];
    KILL.iter().any(|start| check.id.starts_with(start))
}

/// Why nothing more can be said of a back-end that was found running.
fn gone() -> Finding {
    Finding::new(Verdict::NotJudged, "an earlier check ended the process")
}

/// Finds out what the checks must know beforehand.
pub(crate) fn explore(peer: &mut Peer, options: &Options) -> Result<Traits, JudgeError> {
    let first = peer.connect(START).map_err(|finding| JudgeError::NoBackend(finding.why))?;
    let deaf = |finding: Finding| JudgeError::Deaf(finding.why);
    // What is not found out here is not offered for good: a busy machine is given time.
    let mut traits = ask_traits(first, options.limit * 4).map_err(deaf)?;
    traits.serves_again = answers(peer, options.limit).is_ok();
    // Again and again: what it does at its start is no polling.
    traits.never_sleeps = matches!(peer.settles(&[20, 60, 300, 300], 0.5), Some(Err(_)));
    Ok(traits)
}

fn ask_traits(mut wire: Wire, limit: Duration) -> Outcome<Traits> {
    wire.limit = limit;
    wire.send(&Msg::bare(Code::SetOwner))?;
    let features = wire.ask(&message::get_features())?.number()?;
    let mut traits = Traits {
        features,
        protocol: ProtocolFeatures::empty(),
        queues: 1,
        capacity: None,
        serves_again: false,
        never_sleeps: false,
    };
    if features & virtio::PROTOCOL_FEATURES == 0 {
        return Ok(traits);
    }
    let bits = wire.ask(&Msg::bare(Code::GetProtocolFeatures))?.number()?;
    traits.protocol = ProtocolFeatures::from_bits_retain(bits);
    let asked = traits.protocol & super::session::USUAL;
    wire.send(&Msg::u64(Code::SetProtocolFeatures, asked.bits()))?;
    if asked.contains(ProtocolFeatures::MQ) {
        traits.queues = wire.ask(&Msg::bare(Code::GetQueueNum))?.number()?;
    }
    if asked.contains(ProtocolFeatures::CONFIG) {
        traits.capacity = block_capacity(&mut wire, features).unwrap_or(None);
    }
    Ok(traits)
}

/// The capacity, if its configuration looks like that of a block device.
fn block_capacity(wire: &mut Wire, features: u64) -> Outcome<Option<u64>> {
    let reply = wire.ask(&message::get_config(0, 60))?;
    let config = reply.payload.get(12..).unwrap_or_default();
    if DeviceType::guess(features, Some(config)) != Some(DeviceType::Block) {
        return Ok(None);
    }
    Ok(config.get(..8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes))
}

/// That a new connection is answered.
fn answers(peer: &mut Peer, limit: Duration) -> Outcome {
    let mut wire = peer.connect(limit)?;
    wire.send(&Msg::bare(Code::SetOwner))?;
    wire.ask(&message::get_features())?;
    Ok(())
}

fn play(check: &Check, peer: &mut Peer, traits: Traits, options: &Options) -> Outcome {
    let counts = traits.serves_again;
    let quiet = Duration::from_millis(if options.quick { 25 } else { 100 });
    let before = match counts && answers(peer, options.limit).is_ok() {
        true => {
            // That this front-end has left must have been seen.
            if !traits.never_sleeps {
                peer.digests(quiet * 8);
            }
            settled_fds(peer, None)
        }
        false => None,
    };
    let log = peer.log_size();
    let mut case = Case {
        peer,
        traits,
        limit: options.limit,
        quiet,
        seed: options.seed,
        quick: options.quick,
        ended: false,
    };
    let outcome = (check.run)(&mut case);
    if case.ended {
        return outcome;
    }
    match aftermath(&mut case, check, before, log) {
        Err(finding) if finding.verdict == Verdict::Crashes => Err(finding),
        later => outcome.and(later),
    }
}

/// What the case left behind.
fn aftermath(case: &mut Case<'_>, check: &Check, before: Option<usize>, log: u64) -> Outcome {
    if case.traits.serves_again {
        let served = answers(case.peer, case.limit);
        dead(case)?;
        served.map_err(|finding| {
            Finding::hangs(format!("it serves no front-end any more: {}", finding.why))
        })?;
    }
    dead(case)?;
    if check.group >= Group::Rings {
        case.rests("after the connection was closed")?;
        let grown = case.peer.log_size().saturating_sub(log);
        if grown > MOST_LOG {
            let why = format!("it wrote {grown} bytes of log in one case");
            return Err(Finding::new(Verdict::Spins, why));
        }
    }
    if let Some(before) = before
        && let Some(after) = settled_fds(case.peer, Some(before))
        && after > before
    {
        let why = format!("{} descriptors stay open ({before} before)", after - before);
        return Err(Finding::new(Verdict::Leaks, why));
    }
    Ok(())
}

/// More log than this for one case is a flood (C41).
const MOST_LOG: u64 = 4 << 20;

/// A process that died, also when it only takes a moment to be seen.
fn dead(case: &mut Case<'_>) -> Outcome {
    match case.peer.life() {
        Life::Died(how) => Err(Finding::new(Verdict::Crashes, how)),
        Life::Left if case.traits.serves_again => {
            Err(Finding::new(Verdict::Crashes, "it ended by itself"))
        }
        Life::Left | Life::Alive => Ok(()),
    }
}

/// Open descriptors, once they stand still, or are no more than `wanted`.
fn settled_fds(peer: &Peer, wanted: Option<usize>) -> Option<usize> {
    let mut last = peer.open_fds()?;
    let mut same = 0;
    for round in 0..10_000 {
        // One that waits for a processor cannot close anything.
        if round > 1000 && !peer.ready_to_run() {
            break;
        }
        if wanted.is_some_and(|wanted| last <= wanted) || (wanted.is_none() && same >= 3) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
        let now = peer.open_fds()?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    Some(last)
}
