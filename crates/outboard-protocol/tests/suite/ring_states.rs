//! The transition table of the run states, against a table typed by hand (protocol facts d.1).

use outboard_protocol::{Backend, Given, RingEvent, RunState};

use crate::common::{FEATURES, Fd, all_protocol, full_offer, negotiated};

/// One line per state; columns in the order of [`RingEvent::ALL`]. `-`: cannot happen.
const TRANSITIONS: &str = "
state    Kicked  Started Parked  Resumed Broken  Stopped
Stopped  Waiting Running -       -       -       Stopped
Waiting  Waiting Running Waiting Waiting Broken  Stopped
Running  Running Running Parked  Running Broken  Stopped
Parked   Parked  Running Parked  Running Broken  Stopped
Broken   Broken  -       Broken  Broken  Broken  Stopped";

#[test]
fn every_state_and_every_event_have_the_outcome_of_the_table() {
    let mut lines = TRANSITIONS.trim().lines().map(str::split_whitespace);
    let heads: Vec<_> = lines.next().expect("a head").skip(1).collect();
    assert_eq!(heads, RingEvent::ALL.map(|event| format!("{event:?}")));
    for (state, mut line) in RunState::ALL.into_iter().zip(lines.by_ref()) {
        assert_eq!(line.next(), Some(format!("{state:?}").as_str()));
        for (event, expected) in RingEvent::ALL.into_iter().zip(line) {
            let after = state.after(event).map_or("-".to_owned(), |state| format!("{state:?}"));
            assert_eq!(after, expected, "{state:?} + {event:?}");
        }
    }
    assert_eq!(lines.next().map(Iterator::count), None, "no line is left over");
}

#[test]
fn every_state_can_be_reached_and_left_for_stopped() {
    let mut reached = vec![RunState::Stopped];
    let mut next = 0;
    while let Some(state) = reached.get(next).copied() {
        next += 1;
        for after in RingEvent::ALL.into_iter().filter_map(|event| state.after(event)) {
            if !reached.contains(&after) {
                reached.push(after);
            }
        }
        assert_eq!(state.after(RingEvent::Stopped), Some(RunState::Stopped));
    }
    assert_eq!(reached.len(), RunState::ALL.len());
}

#[test]
fn a_ring_is_live_exactly_while_a_worker_holds_its_queue() {
    for state in RunState::ALL {
        let held = [RunState::Running, RunState::Parked, RunState::Broken].contains(&state);
        assert_eq!(state.is_live(), held);
        assert_eq!(state.is_started(), held || state == RunState::Waiting);
    }
}

fn backend() -> Backend<Fd> {
    negotiated(full_offer(), FEATURES, all_protocol())
}

#[test]
fn an_event_that_cannot_happen_changes_nothing() {
    let mut backend = backend();
    let before = backend.rings().to_vec();
    for event in [RingEvent::Parked, RingEvent::Resumed, RingEvent::Broken] {
        assert!(!backend.ring_event(0, event));
    }
    assert!(!backend.ring_event(4, RingEvent::Started), "there are four rings");
    assert!(!backend.ring_event(u16::MAX, RingEvent::Stopped));
    assert_eq!(backend.rings(), before);
}

#[test]
fn a_stop_forgets_the_kick_and_nothing_else() {
    let mut backend = backend();
    assert!(backend.ring_event(1, RingEvent::Kicked));
    assert!(backend.ring(1).expect("ring 1").kicked);
    assert!(backend.ring_event(1, RingEvent::Started));
    let running = *backend.ring(1).expect("ring 1");
    assert!(backend.ring_event(1, RingEvent::Stopped));
    let stopped = *backend.ring(1).expect("ring 1");
    assert!(!stopped.kicked && stopped.kick == Given::Nothing);
    let kept = outboard_protocol::Ring { kicked: true, run: RunState::Running, ..stopped };
    assert_eq!(kept, running);
}
