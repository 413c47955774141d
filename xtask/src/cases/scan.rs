//! Who names a case: tests in Rust sources, comments in transcripts, rows of the judge's tables.
//!
//! A source is read as rustfmt leaves it, line by line; nothing is compiled. Invariant: a comment
//! counts for the test that it stands directly above or inside, never for a whole file, so that a
//! heading such as "cases A1 to A15" holds nothing.

use std::collections::BTreeSet;

/// What kind of thing names a case, in the order in which they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A test function or a fuzz target.
    Test,
    /// A recorded conversation that a test replays.
    Transcript,
    /// A check that the judge plays against any back-end.
    Judge,
}

/// One thing that names a case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// What it is.
    pub kind: Kind,
    /// `file::name`, or the file alone where parts have no names.
    pub place: String,
}

/// The files that are looked at, by their path in the workspace.
#[must_use]
pub fn is_source(path: &str) -> bool {
    let inside = ["crates/", "fuzz/", "xtask/tests/"].iter().any(|root| path.starts_with(root));
    inside && (path.ends_with(".rs") || is_transcript(path))
}

/// Every id of `known` that the file names, with what names it there.
#[must_use]
pub fn file(path: &str, text: &str, known: &BTreeSet<String>) -> Vec<(String, Holder)> {
    let shown = path.strip_prefix("crates/").unwrap_or(path);
    let mut found = Vec::new();
    let mut add = |kind, place: &str, words: BTreeSet<String>| {
        let named = words.into_iter().filter(|word| known.contains(word));
        found.extend(named.map(|id| (id, Holder { kind, place: place.to_owned() })));
    };
    if is_transcript(path) {
        let remarks = text.lines().filter(|line| line.starts_with('#'));
        add(Kind::Transcript, shown, remarks.flat_map(words).collect());
        return found;
    }
    for test in tests(text) {
        add(Kind::Test, &format!("{shown}::{}", test.name), test.words);
    }
    if path.contains("/judge/table/") {
        for (name, words) in text.lines().filter_map(row) {
            add(Kind::Judge, &format!("{shown}::{name}"), words);
        }
    }
    found
}

fn is_transcript(path: &str) -> bool {
    path.contains("/transcripts/") && path.ends_with(".txt")
}

/// The words of a line as they are written: an id in a comment has a capital letter.
fn words(line: &str) -> impl Iterator<Item = String> {
    let split = line.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    split.filter(|word| !word.is_empty()).map(str::to_owned)
}

/// A test and the words that may be ids: of its name, of the comments above and inside it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Test {
    name: String,
    words: BTreeSet<String>,
}

/// The test functions and fuzz targets of a source.
fn tests(text: &str) -> Vec<Test> {
    let mut found: Vec<Test> = Vec::new();
    // The closing line of the test that is being read.
    let mut end: Option<String> = None;
    let mut comments = Vec::new();
    let (mut is_test, mut is_ignored, mut in_attribute) = (false, false, false);
    for line in text.lines() {
        let trimmed = line.trim_start();
        if let (Some(closing), Some(test)) = (&end, found.last_mut()) {
            if trimmed.starts_with("//") {
                test.words.extend(words(trimmed));
            }
            if line == closing {
                end = None;
            }
            continue;
        }
        if trimmed.starts_with("//") && !trimmed.starts_with("//!") {
            comments.push(trimmed);
            continue;
        }
        if trimmed.starts_with("#[") || in_attribute {
            is_test |= trimmed.starts_with("#[test]") || trimmed.contains("::test");
            is_ignored |= trimmed.starts_with("#[ignore");
            in_attribute = !trimmed.ends_with(']');
            continue;
        }
        if let Some(name) = named(trimmed, is_test && !is_ignored) {
            let mut words: BTreeSet<_> = comments.iter().flat_map(|line| words(line)).collect();
            words.extend(name.split('_').map(str::to_ascii_uppercase));
            found.push(Test { name: name.to_owned(), words });
            let indent = line.len() - trimmed.len();
            let opens = !trimmed.ends_with('}') && !trimmed.ends_with(';');
            end = opens.then(|| format!("{}}}", " ".repeat(indent)));
        }
        comments.clear();
        (is_test, is_ignored) = (false, false);
    }
    found
}

/// The name of what a line declares, when that is a test or a fuzz target.
fn named(line: &str, is_test: bool) -> Option<&str> {
    if line.contains("fuzz_target!(") {
        return Some("fuzz_target");
    }
    let (_, rest) = line.split_once("fn ").filter(|_| is_test)?;
    let end = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    rest.get(..end?)
}

/// A row of the judge, `"name" "section (ids)" "sentence" function;`: its name and the words of its section.
fn row(line: &str) -> Option<(&str, BTreeSet<String>)> {
    let rest = line.trim_start().strip_prefix('"')?;
    let mut parts = rest.split('"');
    let (name, _, section) = (parts.next()?, parts.next()?, parts.next()?);
    Some((name, words(section).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a file names, as `id place`.
    fn scan(path: &str, text: &str) -> Vec<String> {
        let known = ["A1", "A34", "A47", "A48", "B4", "R20"].map(str::to_owned).into();
        let found = file(path, text, &known);
        found.iter().map(|(id, holder)| format!("{id} {}", holder.place)).collect()
    }

    #[test]
    fn ids_are_found_at_any_place_of_a_test_s_name() {
        let text = "#[test]\nfn a47_a48_a_ring_and_b4_too() {\n}\n#[test]\nfn a344_a_b_4() {}\n";
        let name = "x/tests/y.rs::a47_a48_a_ring_and_b4_too";
        let wanted = ["A47", "A48", "B4"].map(|id| format!("{id} {name}"));
        assert_eq!(scan("crates/x/tests/y.rs", text), wanted);
    }

    #[test]
    fn functions_that_are_no_tests_hold_nothing() {
        let text = "/// A1\nfn a34_helper() {\n}\n#[test]\nfn plain() {\n}\n/// B4\nstruct A;\n";
        assert!(scan("crates/x/src/y.rs", text).is_empty());
    }

    #[test]
    fn tests_that_are_ignored_hold_nothing() {
        let text = "#[test]\n#[ignore = \"slow\"]\nfn a1_one() {\n}\n#[test]\nfn b4_two() {\n}\n";
        assert_eq!(scan("crates/x/src/y.rs", text), ["B4 x/src/y.rs::b4_two"]);
    }

    #[test]
    fn comments_count_above_and_inside_a_test_and_not_at_the_head_of_a_file() {
        let text = "//! Cases A1 and A34.\n\n/// A47, A48: why\n#[test]\n#[expect(\n    lint,\n    \
                    reason = \"r\"\n)]\nfn one() {\n    // B4\n}\n// R20\n\n#[test]\nfn two() {}\n";
        let wanted = ["A47", "A48", "B4"].map(|id| format!("{id} x/tests/y.rs::one"));
        assert_eq!(scan("crates/x/tests/y.rs", text), wanted);
    }

    #[test]
    fn a_test_inside_a_module_or_a_macro_ends_where_its_indentation_does() {
        let text = "mod tests {\n    #[test]\n    fn b4_one() {\n        if x {\n        }\n    }\n    \
                    // R20\n    #[test]\n    fn two() {}\n}\n";
        let wanted = ["B4 x/src/y.rs::b4_one", "R20 x/src/y.rs::two"];
        assert_eq!(scan("crates/x/src/y.rs", text), wanted);
    }

    #[test]
    fn small_letters_in_comments_are_no_ids() {
        assert!(scan("crates/x/tests/y.rs", "// a1 r20 A1x\n#[test]\nfn one() {}\n").is_empty());
    }

    #[test]
    fn comments_of_transcripts_count_for_the_file() {
        let path = "crates/x/tests/transcripts/07.txt";
        let text = "# A34: one; A47 (B4)\n> R20 A1\n# A34\n";
        let wanted = ["A34", "A47", "B4"].map(|id| format!("{id} x/tests/transcripts/07.txt"));
        assert_eq!(scan(path, text), wanted);
        assert!(is_source(path) && !is_source("xtask/counts.txt"));
    }

    #[test]
    fn rows_of_the_judge_count_by_their_section() {
        let path = "crates/check/src/judge/table/y.rs";
        let text = "rows! { Hostile\n    \"size\" \"Header (A1, A34)\" \"B4\" h::size;\n    \
                    \"idle\" \"Rule R20\" \"nothing\" h::idle;\n}\n";
        let wanted = ["A1 size", "A34 size", "R20 idle"].map(|row| {
            let (id, name) = row.split_once(' ').unwrap();
            format!("{id} check/src/judge/table/y.rs::{name}")
        });
        assert_eq!(scan(path, text), wanted);
    }

    #[test]
    fn a_fuzz_target_is_held_by_the_comment_above_it() {
        let text = "//! Of A1.\n#![no_main]\n\n// B4\nlibfuzzer_sys::fuzz_target!(|x| run(x));\n";
        assert_eq!(scan("fuzz/src/bin/y.rs", text), ["B4 fuzz/src/bin/y.rs::fuzz_target"]);
    }
}
