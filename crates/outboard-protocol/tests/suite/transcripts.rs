//! Runs every transcript in `tests/transcripts` and compares what comes out with what is recorded.
//! `BLESS=1` records anew. The grammar is in `common/script.rs`, and that of the back-end channel in
//! `common/channel_script.rs`.

use std::path::{Path, PathBuf};

fn transcripts() -> Vec<PathBuf> {
    folder("tests/transcripts")
}

fn folder(name: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let mut paths: Vec<_> = std::fs::read_dir(directory)
        .expect("the transcripts are there")
        .map(|entry| entry.expect("a readable directory").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    paths.sort();
    paths
}

#[test]
fn every_transcript_comes_out_as_recorded() {
    let paths = transcripts();
    assert!(paths.len() >= 10, "the transcripts are gone");
    compare(paths, crate::common::script::run);
}

#[test]
fn every_transcript_of_the_channel_comes_out_as_recorded() {
    let paths = folder("tests/transcripts/channel");
    assert!(paths.len() >= 3, "the transcripts are gone");
    compare(paths, crate::common::channel_script::run);
}

fn compare(paths: Vec<PathBuf>, run: fn(&str) -> String) {
    let bless = std::env::var_os("BLESS").is_some();
    let mut wrong = Vec::new();
    for path in paths {
        let recorded = std::fs::read_to_string(&path).expect("a readable transcript");
        let now = run(&recorded);
        if bless {
            std::fs::write(&path, &now).expect("a writable transcript");
        } else if now != recorded {
            wrong.push(format!("--- {}\n{}", path.display(), difference(&recorded, &now)));
        }
    }
    assert!(wrong.is_empty(), "transcripts differ (BLESS=1 records anew):\n{}", wrong.join("\n"));
}

/// The first lines that differ.
fn difference(recorded: &str, now: &str) -> String {
    let pairs = recorded.lines().zip(now.lines());
    match pairs.enumerate().find(|(_, (old, new))| old != new) {
        Some((at, (old, new))) => format!("line {}:\n- {old}\n+ {new}", at + 1),
        None => "one is longer than the other".to_owned(),
    }
}

/// What QEMU and User-mode Linux really send is never a violation, whatever is blessed.
#[test]
fn recorded_front_ends_break_no_rule() {
    let mut recorded = 0;
    for path in transcripts() {
        let text = std::fs::read_to_string(&path).expect("a readable transcript");
        if text.starts_with("# Recorded from ") {
            recorded += 1;
            let now = crate::common::script::run(&text);
            assert!(!now.lines().any(|line| line.starts_with('x')), "{}", path.display());
            assert!(now.contains("= ring 0: Running"), "{}: ring 0 ran", path.display());
        }
    }
    assert_eq!(recorded, 3);
}

/// The transcript runner itself can fail: a wrong record is noticed.
#[test]
fn a_transcript_with_a_wrong_record_differs() {
    let text = "offer features=VERSION_1\n> GET_FEATURES\n< GET_FEATURES u64:0x2\n";
    assert_ne!(crate::common::script::run(text), text);
    let right = text.replace("u64:0x2", "u64:0x100000000");
    assert_eq!(crate::common::script::run(&right), right);
}
