//! Which checks each fault breaks: exactly these, of all checks of the groups that are played.
//!
//! For each check there is a fault that breaks it and no other: one that stands in the rows, or else one that has
//! the check's own name. What cannot break alone stands in [`IMPLIED`], with what breaks along with it.
//!
//! One of sixteen faults is played against all checks of its groups, the others against the checks that they are
//! to break; `OUTBOARD_FAULTS_ALL=groups` plays all against all checks of their groups, which takes half an hour, and
//! `OUTBOARD_FAULTS_ALL=checks` against all checks there are.
//! `OUTBOARD_FAULTS_ONLY=A,B` plays these faults; `OUTBOARD_FAULTS_SHOW=1` with `--nocapture` shows what each fault
//! breaks, to make new rows from.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use outboard_check::judge::{Group, Options, Report, Target, Verdict, checks, judge};
use outboard_memory::UserFault;

use super::rows::{HOSTILE, IMPLIED, PROTOCOL, RINGS, STATE};

/// A fault, and the checks that it breaks.
pub(super) type Row = (&'static str, &'static [&'static str]);

/// A check that breaks wherever others do, these others, and why that cannot be otherwise.
pub(super) type Implied = (&'static str, &'static [&'static str], &'static str);

/// Checks that find a fault by chance: what they find is not compared.
const BY_CHANCE: [&str; 2] = ["flipped", "storm-mutated"];

/// Faults that are played at a time: a check mostly waits.
const PLAYERS: usize = 3;

/// Judges the back-end with this fault.
fn judged(fault: &str, groups: &[&str]) -> Report {
    let program = std::env::current_exe().expect("our own path");
    // What is ignored here stays so in the program.
    let ears = if fault == "hears-no-sigterm" { "trap '' TERM; " } else { "" };
    let words = [
        OsString::from("sh"),
        "-c".into(),
        format!("{ears}exec \"$@\"").into(),
        "sh".into(),
        "env".into(),
        format!("OUTBOARD_FAULT={fault}").into(),
        "OUTBOARD_FAULTY_SOCKET={socket}".into(),
        program.into(),
        "--exact".into(),
        "the_back_end_that_is_judged".into(),
    ];
    let options = Options {
        limit: Duration::from_millis(1500),
        quick: true,
        only: groups.iter().map(|&group| group.to_owned()).collect(),
        ..Options::default()
    };
    judge(&Target::Command(words.to_vec()), &options, |_| {}).expect("a back-end to judge")
}

/// The checks that do not hold, with why.
fn bad(report: &Report) -> Vec<(&'static str, String)> {
    let lines = report
        .judgements
        .iter()
        .filter(|one| one.verdict.is_bad() || one.verdict == Verdict::NotJudged);
    lines.map(|one| (one.check.id, format!("{}: {}", one.verdict, one.why))).collect()
}

/// Whether this machine lets the back-end have what the checks are about.
fn can_be_played(checks: &[&str]) -> bool {
    let needs = checks.iter().any(|check| check.starts_with("postcopy"));
    if needs && !UserFault::is_available() {
        println!("no userfaultfd here: {checks:?} cannot be played");
        return false;
    }
    true
}

/// A fault that is to be played, and the checks that it breaks.
type Fault = (&'static str, Vec<&'static str>);

/// The faults of these rows.
fn told(rows: &[Row]) -> impl Iterator<Item = Fault> {
    rows.iter().map(|(fault, ids)| (*fault, ids.to_vec()))
}

/// The faults of these groups: those that stand in the rows, and for each check that none of them breaks alone the one
/// with its name.
fn faults(rows: &[Row], groups: &[Group]) -> Vec<Fault> {
    let alone: BTreeSet<_> = [PROTOCOL, STATE, RINGS, HOSTILE]
        .into_iter()
        .flatten()
        .filter_map(|(_, ids)| if let [one] = ids { Some(*one) } else { None })
        .collect();
    let own = checks().filter(|check| groups.contains(&check.group)).map(|check| check.id);
    let own = own.filter(|id| !alone.contains(id) && !IMPLIED.iter().any(|(one, ..)| one == id));
    told(rows).chain(own.map(|id| (id, vec![id]))).collect()
}

/// Plays all faults, a few at a time, and tells all that differ.
fn play(faults: &[Fault], groups: &[Group]) {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    let show = std::env::var_os("OUTBOARD_FAULTS_SHOW").is_some();
    let all = std::env::var("OUTBOARD_FAULTS_ALL").ok();
    let some = std::env::var("OUTBOARD_FAULTS_ONLY").unwrap_or_default();
    let wanted = |fault: &str| some.is_empty() || some.split(',').any(|one| one == fault);
    let names: Vec<_> = groups.iter().map(|group| group.name()).collect();
    let player = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some((fault, expected)) = faults.get(at) else { break };
            if !wanted(fault) || !can_be_played(expected) {
                continue;
            }
            let (played, compared_groups) = match all.as_deref() {
                Some("checks") => (&[][..], &Group::ALL[..]),
                Some(_) => (names.as_slice(), groups),
                None if at.is_multiple_of(16) => (names.as_slice(), groups),
                None => (expected.as_slice(), &Group::ALL[..]),
            };
            let compared = |id: &&str| !BY_CHANCE.contains(id) || expected.contains(id);
            let once = || {
                let found = bad(&judged(fault, played));
                let ids: BTreeSet<_> = found.iter().map(|(id, _)| *id).filter(compared).collect();
                (ids, found)
            };
            let within = |id: &&str| {
                checks().any(|one| one.id == *id && compared_groups.contains(&one.group))
            };
            let wanted_ids: BTreeSet<_> = expected.iter().copied().filter(within).collect();
            let (mut ids, mut found) = once();
            if ids != wanted_ids {
                // A machine that is busy elsewhere hides a fault, or makes a sound answer late.
                eprintln!("{fault} is played again: {found:?}");
                (ids, found) = once();
            }
            if show {
                println!("ROW {fault} {}", ids.iter().copied().collect::<Vec<_>>().join(","));
            }
            if ids != wanted_ids {
                wrong.lock().expect("no panic").push((*fault, wanted_ids, found));
            }
        }
    };
    std::thread::scope(|scope| {
        let players = || std::env::var("OUTBOARD_FAULTS_PLAYERS").ok()?.parse().ok();
        (0..players().unwrap_or(PLAYERS)).for_each(|_| drop(scope.spawn(player)));
    });
    let wrong = wrong.into_inner().expect("no panic");
    for (fault, expected, found) in &wrong {
        eprintln!("{fault} was to break {expected:?} and breaks:");
        found.iter().for_each(|(id, why)| eprintln!("    {id}: {why}"));
    }
    assert!(wrong.is_empty(), "{} of {} faults break other checks", wrong.len(), faults.len());
}

#[test]
fn every_check_has_a_fault_that_breaks_it_alone_or_a_reason_why_none_can() {
    let all: BTreeSet<_> = checks().map(|check| check.id).collect();
    let rows = [(PROTOCOL, PLAYED[0]), (RINGS, PLAYED[1]), (HOSTILE, PLAYED[2])];
    let faults = rows.into_iter().flat_map(|(rows, groups)| faults(rows, groups));
    let faults: Vec<_> = faults.chain(told(STATE)).collect();
    let broken: BTreeSet<_> = faults.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
    let unknown: Vec<_> = broken.difference(&all).collect();
    assert!(unknown.is_empty(), "there are no checks {unknown:?}");
    let names: BTreeSet<_> = faults.iter().map(|(fault, _)| *fault).collect();
    assert_eq!(names.len(), faults.len(), "a fault stands twice");
    let alone: BTreeSet<_> =
        faults.iter().filter(|(_, ids)| ids.len() == 1).flat_map(|(_, ids)| ids).collect();
    for (id, others, why) in IMPLIED {
        assert!(!alone.contains(id), "{id} breaks alone");
        assert!(!others.is_empty() && !why.is_empty(), "{id} has no reason");
        for (fault, ids) in faults.iter().filter(|(_, ids)| ids.contains(id)) {
            assert!(others.iter().all(|other| ids.contains(other)), "{fault} shows more of {id}");
        }
    }
    let implied: BTreeSet<_> = IMPLIED.iter().map(|(id, ..)| *id).collect();
    let without: Vec<_> =
        all.iter().filter(|id| !alone.contains(id) && !implied.contains(*id)).collect();
    assert!(without.is_empty(), "no fault breaks {without:?} alone");
    let (checks, faults) = (all.len(), faults.len());
    println!("{checks} checks, {faults} faults, {} alone, {} implied", alone.len(), implied.len());
}

#[test]
fn the_sound_back_end_holds_every_check() {
    play(&[("", Vec::new())], &Group::ALL);
}

/// Not a fault: many programs end with their front-end.
#[test]
fn a_back_end_that_serves_one_front_end_and_ends_holds_every_check() {
    play(&[("serves-once", Vec::new())], &Group::ALL);
}

/// The groups of the three files of rows.
const PLAYED: [&[Group]; 3] = [
    &[Group::Conformance, Group::Semantics],
    &[Group::Rings],
    &[Group::Leaks, Group::Hostile, Group::Storm],
];

#[test]
fn a_fault_of_the_protocol_breaks_its_checks_and_no_others() {
    play(&faults(PROTOCOL, PLAYED[0]), PLAYED[0]);
}

#[test]
fn a_fault_of_what_is_kept_or_translated_breaks_its_checks_and_no_others() {
    play(&told(STATE).collect::<Vec<_>>(), PLAYED[0]);
}

#[test]
fn a_fault_of_rings_or_requests_breaks_its_checks_and_no_others() {
    play(&faults(RINGS, PLAYED[1]), PLAYED[1]);
}

#[test]
fn a_fault_before_hostile_front_ends_breaks_its_checks_and_no_others() {
    play(&faults(HOSTILE, PLAYED[2]), PLAYED[2]);
}
