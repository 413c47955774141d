//! Checks that read the source files.

use crate::{paths, process};
use anyhow::{Result, bail};
use std::process::Command;

/// Lines that a file may have: it tells one idea.
const LONGEST: usize = 600;

/// Lines that a function may have, from `fn` to its closing brace: about 60, a few for one `match`.
const LONGEST_FUNCTION: usize = 70;

/// Where unsafe code may stand: the memory crate, the `io_uring` loop, and what rustix lacks.
const UNSAFE_ALLOWED: &[&str] = &[
    "crates/outboard-memory/",
    "crates/outboard/src/events/uring.rs",
    "crates/outboard/src/sys.rs",
    "crates/outboard/src/sys/",
    // An allocator that counts for each thread.
    "crates/outboard-queue/tests/allocations.rs",
    // The interface of the blkio crate, somebody else's front end.
    "crates/outboard-devices/tests/blkio.rs",
];

/// What follows the word where it makes code unsafe, and not in a lint's name or a sentence.
const UNSAFE_FORMS: &[&str] = &[
    "unsafe {",
    "unsafe fn",
    "unsafe impl",
    "unsafe trait",
    "unsafe extern",
    "unsafe(",
    "unsafe{",
];

struct Source {
    path: String,
    text: String,
}

/// The checks by name, each with a note or what it found.
#[must_use]
pub fn checks() -> Vec<(&'static str, Result<String>)> {
    let sources = match sources() {
        Ok(sources) => sources,
        Err(error) => return vec![("reading the sources", Err(error))],
    };
    vec![
        ("files of at most 600 lines", all(&sources, too_long)),
        ("files that open with //!", all(&sources, silent)),
        ("functions of at most 70 lines", all(&sources, long_function)),
        ("unsafe code only where it may be", all(&sources, unsafe_code)),
    ]
}

/// Every Rust file of the tree, tracked or new, but none that git ignores.
fn sources() -> Result<Vec<Source>> {
    let root = paths::workspace();
    let mut list = Command::new("git");
    list.args(["ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "*.rs"]);
    let listed = process::output(list.current_dir(&root))?;
    let mut sources = Vec::new();
    for path in listed.lines() {
        // A file that was just removed is still listed.
        if let Ok(text) = std::fs::read_to_string(root.join(path)) {
            sources.push(Source { path: path.to_owned(), text });
        }
    }
    anyhow::ensure!(!sources.is_empty(), "no Rust file found");
    Ok(sources)
}

fn all(sources: &[Source], finds: impl Fn(&Source) -> Option<String>) -> Result<String> {
    let found: Vec<_> = sources.iter().filter_map(finds).collect();
    if !found.is_empty() {
        bail!("{}", found.join("\n"));
    }
    Ok(format!("ok ({} files)", sources.len()))
}

fn too_long(source: &Source) -> Option<String> {
    let lines = source.text.lines().count();
    (lines > LONGEST).then(|| format!("{}: {lines} lines, at most {LONGEST}", source.path))
}

fn silent(source: &Source) -> Option<String> {
    let opens = source.text.starts_with("//!");
    (!opens).then(|| format!("{}: does not open with //!", source.path))
}

/// rustfmt puts a function's closing brace under its first word: no parser is needed.
fn long_function(source: &Source) -> Option<String> {
    let lines: Vec<_> = source.text.lines().collect();
    for (begin, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let words = code.split(['(', '<']).next().unwrap_or_default();
        if !words.split(' ').any(|word| word == "fn") || code.starts_with("//") {
            continue;
        }
        let end = format!("{}}}", " ".repeat(line.len() - code.len()));
        let mut heads = lines.iter().skip(begin);
        let head = heads.find(|line| line.ends_with(['{', '}', ';'])).unwrap_or(line);
        if !head.ends_with('{') {
            continue; // on one line, or without a body
        }
        let more = lines.iter().skip(begin).position(|line| *line == end);
        if let Some(count) = more.filter(|count| count + 1 > LONGEST_FUNCTION) {
            let (path, count) = (&source.path, count + 1);
            return Some(format!(
                "{path}:{}: {count} lines, at most {LONGEST_FUNCTION}",
                begin + 1
            ));
        }
    }
    None
}

fn unsafe_code(source: &Source) -> Option<String> {
    if UNSAFE_ALLOWED.iter().any(|place| source.path.starts_with(place)) {
        return None;
    }
    let at = source.text.lines().position(is_unsafe)?;
    Some(format!("{}:{}: unsafe code outside its places", source.path, at + 1))
}

fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let stands_alone = |at: usize| {
        // Not the end of a longer name, nor the beginning of a string.
        let before = code.get(..at).and_then(|text| text.chars().next_back());
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != '"')
    };
    UNSAFE_FORMS.iter().any(|form| code.match_indices(form).any(|(at, _)| stands_alone(at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn unsafe_code_is_found_outside_the_memory_crate_and_words_are_not() {
        let code = ["//! x\nlet x = unsafe", "{ y };\n"].join(" ");
        let code = code.as_str();
        let found = unsafe_code(&source("crates/outboard-queue/src/a.rs", code)).unwrap();
        assert!(found.starts_with("crates/outboard-queue/src/a.rs:2:"), "{found}");
        assert!(unsafe_code(&source("crates/outboard-memory/src/a.rs", code)).is_none());
        let words =
            "//! no unsafe { here }\n#![forbid(unsafe_code)]\n// unsafe fn\nfn is_unsafe(x)\n";
        assert!(unsafe_code(&source("crates/outboard-queue/src/a.rs", words)).is_none());
    }

    #[test]
    fn a_function_of_71_lines_is_found() {
        let function = |lines: usize| {
            let body = "        x();\n".repeat(lines - 2);
            source("a.rs", &format!("    pub const fn a<T>(x: u8) {{\n{body}    }}\n    }}\n"))
        };
        assert!(long_function(&function(70)).is_none());
        let found = long_function(&function(71));
        assert_eq!(found.as_deref(), Some("a.rs:1: 71 lines, at most 70"));
    }

    #[test]
    fn a_file_of_601_lines_or_without_a_head_is_found() {
        assert!(too_long(&source("a.rs", &"x\n".repeat(600))).is_none());
        assert!(too_long(&source("a.rs", &"x\n".repeat(601))).is_some());
        assert!(silent(&source("a.rs", "//! x\n")).is_none());
        assert!(silent(&source("a.rs", "// x\n")).is_some());
    }
}
