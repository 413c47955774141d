//! The wall clock jumps: no code of a device may look at it.

use std::path::Path;

/// What reads or waits on a clock that somebody can set.
const WALL: [&str; 5] =
    ["SystemTime", "UNIX_EPOCH", "ClockId::Realtime", "CLOCK_REALTIME", "TimerfdClockId::Realtime"];

/// What a device is made of.
const CRATES: [&str; 7] = [
    "outboard",
    "outboard-cli",
    "outboard-devices",
    "outboard-frontend",
    "outboard-memory",
    "outboard-protocol",
    "outboard-queue",
];

fn look(folder: &Path, seen: &mut usize) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            look(&path, seen);
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a source");
        *seen += 1;
        for (line, code) in (1..).zip(text.lines()) {
            let found = WALL.iter().find(|name| code.contains(**name));
            assert!(found.is_none(), "{}:{line}: {found:?}", path.display());
        }
    }
}

// C24: deadlines, pauses and rates stand on the monotonic clock alone, which no jump touches. A machine's
// clock cannot be set in a test; that nobody looks at it can be seen.
#[test]
fn c24_no_source_of_a_device_looks_at_the_wall_clock() {
    let mut seen = 0;
    for name in CRATES {
        look(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).join("src"), &mut seen);
    }
    assert!(seen > 100, "{seen} sources are not all of them");
}
