//! Which checks each fault breaks: exactly these, of all checks of the groups that are played.
//!
//! Every eighth fault is played against all checks of its groups, the others against the checks that they are
//! to break; `OUTBOARD_FAULTS_ALL=1` plays all against all, which takes minutes.
//! `OUTBOARD_FAULTS_ONLY=A,B` plays these faults; `OUTBOARD_FAULTS_SHOW=1` with `--nocapture` shows what each fault breaks, to make new rows from.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use outboard_check::judge::{Options, Report, Target, Verdict, checks, judge};
use outboard_memory::UserFault;

use super::rows::{HOSTILE, PROTOCOL, RINGS, STATE};

/// A fault, and the checks that it breaks.
pub(super) type Row = (&'static str, &'static [&'static str]);

/// Checks that find a fault by chance: what they find is not compared.
const BY_CHANCE: [&str; 2] = ["flipped", "storm-mutated"];

/// Faults that are played at a time: a check mostly waits.
const PLAYERS: usize = 3;

/// Checks that no fault breaks, with the reason.
const WITHOUT_FAULT: [(&str, &str); 0] = [];

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

/// Plays all rows, a few at a time, and tells all that differ.
fn play(rows: &[Row], groups: &[&str]) {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    let show = std::env::var_os("OUTBOARD_FAULTS_SHOW").is_some();
    let all = std::env::var_os("OUTBOARD_FAULTS_ALL").is_some();
    let some = std::env::var("OUTBOARD_FAULTS_ONLY").unwrap_or_default();
    let wanted = |fault: &str| some.is_empty() || some.split(',').any(|one| one == fault);
    std::thread::scope(|scope| {
        for _ in 0..PLAYERS {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some((fault, expected)) = rows.get(at) else { break };
                    if !wanted(fault) || !can_be_played(expected) {
                        continue;
                    }
                    let whole = all || at.is_multiple_of(8);
                    let played = if whole { groups } else { expected };
                    let found = bad(&judged(fault, played));
                    let compared = |id: &&str| !BY_CHANCE.contains(id) || expected.contains(id);
                    let ids: BTreeSet<_> =
                        found.iter().map(|(id, _)| *id).filter(compared).collect();
                    let expected: BTreeSet<_> = expected.iter().copied().collect();
                    if show {
                        println!(
                            "ROW {fault} {}",
                            ids.iter().copied().collect::<Vec<_>>().join(",")
                        );
                    }
                    // A part of a name may be the name of another check.
                    let as_told = ids == expected || (!whole && ids.is_superset(&expected));
                    if !as_told {
                        wrong.lock().expect("no panic").push((fault, expected, found));
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().expect("no panic");
    for (fault, expected, found) in &wrong {
        eprintln!("{fault} was to break {expected:?} and breaks:");
        found.iter().for_each(|(id, why)| eprintln!("    {id}: {why}"));
    }
    assert!(wrong.is_empty(), "{} of {} faults break other checks", wrong.len(), rows.len());
}

#[test]
fn every_check_has_a_fault_that_breaks_it() {
    let rows = || PROTOCOL.iter().chain(STATE).chain(RINGS).chain(HOSTILE);
    let broken: BTreeSet<_> = rows().flat_map(|(_, ids)| ids.iter().copied()).collect();
    let all: BTreeSet<_> = checks().map(|check| check.id).collect();
    let excused: BTreeSet<_> = WITHOUT_FAULT.iter().map(|(id, _)| *id).collect();
    let unbroken: Vec<_> = all.difference(&broken).filter(|id| !excused.contains(*id)).collect();
    assert!(unbroken.is_empty(), "no fault breaks {unbroken:?}");
    let unknown: Vec<_> = broken.union(&excused).filter(|id| !all.contains(*id)).collect();
    assert!(unknown.is_empty(), "there are no checks {unknown:?}");
    let alone = all.iter().filter(|id| rows().any(|(_, ids)| ids == &[**id])).count();
    println!(
        "{} checks, {} faults, {alone} checks with one that breaks it alone",
        all.len(),
        rows().count()
    );
}

#[test]
fn the_sound_back_end_holds_every_check() {
    play(&[("", &[])], &[]);
}

/// Not a fault: many programs end with their front-end.
#[test]
fn a_back_end_that_serves_one_front_end_and_ends_holds_every_check() {
    play(&[("serves-once", &[])], &[]);
}

#[test]
fn a_fault_of_the_protocol_breaks_its_checks_and_no_others() {
    play(PROTOCOL, &["conformance", "semantics"]);
}

#[test]
fn a_fault_of_what_is_kept_or_translated_breaks_its_checks_and_no_others() {
    play(STATE, &["conformance", "semantics"]);
}

#[test]
fn a_fault_of_rings_or_requests_breaks_its_checks_and_no_others() {
    play(RINGS, &["rings"]);
}

#[test]
fn a_fault_before_hostile_front_ends_breaks_its_checks_and_no_others() {
    play(HOSTILE, &["leaks", "hostile", "storm"]);
}
