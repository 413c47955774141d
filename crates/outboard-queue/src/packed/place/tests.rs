//! The arithmetic of places against counters that never wrap.

use super::{DESC, DISABLE, ENABLE, Place, event_word, wants};

/// The place of the descriptor number `count` since the beginning of time.
fn place(count: u32, size: u16) -> Place {
    let (lap, at) = (count / u32::from(size), count % u32::from(size));
    Place { at: u16::try_from(at).unwrap(), wrap: lap.is_multiple_of(2) }
}

#[test]
fn a_place_moves_as_a_counter_does() {
    for size in [1, 2, 3, 5, 8, 13_u16] {
        for start in 0..4 * u32::from(size) {
            for step in 0..=size {
                let (from, to) = (place(start, size), place(start + u32::from(step), size));
                let mut moved = from;
                moved.advance(step, size);
                assert_eq!(moved, to, "size {size}, {start} + {step}");
                assert_eq!(to.back(step, size), from);
                // A whole ring ahead is another lap at the same index.
                assert_eq!(to.since(from, size), Some(step));
                assert_eq!(Place::from_bits(from.bits(), size), Some(from));
            }
        }
    }
}

#[test]
fn a_place_of_the_largest_ring_does_not_overflow() {
    let mut place = Place { at: 32_767, wrap: true };
    place.advance(32_768, 32_768);
    assert_eq!(place, Place { at: 32_767, wrap: false });
    assert_eq!(place.back(32_768, 32_768), Place { at: 32_767, wrap: true });
    assert_eq!(place.bits(), 0x7fff);
}

#[test]
fn what_is_behind_or_too_far_ahead_has_no_distance() {
    let at = |at, wrap| Place { at, wrap };
    assert_eq!(at(2, true).since(at(3, true), 8), None);
    assert_eq!(at(4, false).since(at(3, true), 8), None, "nine ahead in a ring of eight");
    assert_eq!(at(3, false).since(at(3, true), 8), Some(8));
    assert_eq!(Place::from_bits(8, 8), None);
    assert_eq!(Place::from_bits(0xffff, 0x7fff), None);
}

/// Every event that one side can mean, seen from every batch of the other side: the next event is at most one ring
/// ahead of where its writer is, which is at most one ring behind.
#[test]
fn b34_b45_an_event_is_due_exactly_when_it_is_passed() {
    for size in [1, 2, 3, 5, 8_u16] {
        let lap = u32::from(size);
        for old in lap..3 * lap {
            for count in 1..=size {
                let new = old + u32::from(count);
                for event in old..=old + lap {
                    let word = event_word(place(event, size).bits(), DESC);
                    let due = event < new;
                    let told = wants(word, true, place(new, size), count, size);
                    if due {
                        assert!(told, "size {size}: {old} to {new} passes {event}");
                    } else if event < old + lap {
                        assert!(!told, "size {size}: {old} to {new} does not pass {event}");
                    }
                }
                // Passed before: it was told then.
                for event in old - lap..old {
                    let word = event_word(place(event, size).bits(), DESC);
                    assert!(!wants(word, true, place(new, size), count, size));
                }
            }
        }
    }
}

#[test]
fn b45_reserved_flags_and_places_outside_count_as_a_wish() {
    let new = Place { at: 3, wrap: true };
    for (flags, events, due) in [
        (ENABLE, true, true),
        (ENABLE, false, true),
        (DISABLE, true, false),
        (DISABLE, false, false),
        (DESC, false, true),
        (3, true, true),
        (3, false, true),
        // Reserved bits above the two are ignored.
        (0xfc | ENABLE, true, true),
        (0xfc | DISABLE, true, false),
    ] {
        assert_eq!(wants(event_word(0x8007, flags), events, new, 1, 8), due, "{flags:#x} {events}");
    }
    assert!(wants(event_word(0x8008, DESC), true, new, 1, 8), "no place of the ring");
    assert!(!wants(event_word(0x8007, DESC), true, new, 1, 8));
    assert!(wants(event_word(0x8002, DESC) | 0xff00_0000, true, new, 1, 8));
    assert!(!wants(event_word(0x8003, DESC) | 0xff00_0000, true, new, 1, 8));
}
