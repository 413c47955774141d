//! What inotify tells of a directory.

use std::mem::MaybeUninit;
use std::path::Path;

use anyhow::Result;
use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};

/// Says "watching", then the name of every entry that inotify tells of, until it is `last`.
pub(crate) fn run(dir: &Path, last: &str) -> Result<()> {
    let inotify = init(CreateFlags::CLOEXEC)?;
    add_watch(&inotify, dir, WatchFlags::CREATE)?;
    println!("watching");
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(&inotify, &mut buffer);
    loop {
        let event = reader.next()?;
        let name = event.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        println!("told of {name}");
        if name == last {
            return Ok(());
        }
    }
}
