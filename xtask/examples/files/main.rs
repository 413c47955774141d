//! What the guest tests do with files that a shell cannot: rules of POSIX looked at one by one, a file against its
//! model, many files held open while the device under them is replaced.
//!
//! ```text
//! files rules DIR              every rule of POSIX, a line for each that does not hold
//! files model DIR SECONDS SEED random operations on files, compared with what they ought to have
//! files hold DIR COUNT         so many open files, read and written until /tmp/word is there
//! files watch DIR NAME         what inotify tells of DIR, until it tells of NAME
//! files lock FILE              0: a record lock on FILE was had, 1: somebody has it
//! files flock FILE             locks FILE, says "locked" and keeps it until a line comes, or the input ends
//! ```
#![expect(clippy::indexing_slicing, reason = "a testing program knows its sizes")]

mod data;
mod hold;
mod locks;
mod model;
mod names;
mod owners;
mod rule;
mod watch;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};

fn main() -> Result<ExitCode> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["rules", dir] => rule::all(dir.as_ref()),
        ["model", dir, seconds, seed] => {
            model::run(dir.as_ref(), seconds.parse()?, seed.parse()?).map(|()| ExitCode::SUCCESS)
        }
        ["hold", dir, count] => hold::run(dir.as_ref(), count.parse()?).map(|()| ExitCode::SUCCESS),
        ["watch", dir, name] => watch::run(dir.as_ref(), name).map(|()| ExitCode::SUCCESS),
        ["flock", file] => locks::keep(Path::new(file)).map(|()| ExitCode::SUCCESS),
        ["lock", file] => locks::probe(Path::new(file)),
        _ => bail!("files rules|model|hold|watch|lock|flock …"),
    }
}
