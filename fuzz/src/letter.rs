//! The letters of a live upgrade on the control socket: what one process prints the other reads
//! back, and what is no letter is refused; no descriptor is lost.

use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::cover::{reached, wanted};
use crate::input::Input;

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let kinds =
            ["take-over", "go", "refused", "hand-over", "front-end", "path", "mapping", "raw"];
        let mut wants: Vec<String> = kinds.map(|kind| format!("letter {kind}")).into();
        wants.push("letter no letter".into());
        wants
    });
    raw(data);
    let mut head = b"outboard 1 hand-over\n".to_vec();
    head.extend(data);
    raw(&head);
    printed(&mut Input::new(data));
}

fn descriptors(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd")).collect()
}

fn open() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Whatever comes: no letter, or one that is printed so that it is read back and printed the same.
fn raw(bytes: &[u8]) {
    let before = open();
    match outboard::letter_again(bytes, descriptors(3)) {
        Ok(first) => {
            reached("letter raw".into());
            let text = first.bytes.clone();
            let numbers: Vec<_> = first.fds.iter().map(|fd| fd.as_raw_fd()).collect();
            let second = outboard::letter_again(&first.bytes, first.fds).expect("our own letter");
            assert_eq!(second.bytes, text, "printed twice");
            let again: Vec<_> = second.fds.iter().map(|fd| fd.as_raw_fd()).collect();
            assert_eq!(again, numbers, "its descriptors");
        }
        Err(why) => {
            reached("letter no letter".into());
            assert!(!why.is_empty(), "a reason");
        }
    }
    assert_eq!(open(), before, "descriptors at the end");
}

/// A letter in its usual form is printed as it came, with the same descriptors in the same order.
fn printed(input: &mut Input<'_>) {
    let line = |input: &mut Input<'_>| {
        let length = input.below(20);
        let mut bytes = input.take(length).to_vec();
        bytes.retain(|byte| *byte != b'\n');
        bytes
    };
    let mut text = b"outboard 1 ".to_vec();
    let mut names = Vec::new();
    match input.below(8) {
        0 => text.extend(b"take-over\n"),
        1 => text.extend(b"go\n"),
        2 => {
            text.extend(b"refused\n");
            text.extend(String::from_utf8_lossy(&line(input)).bytes());
            text.push(b'\n');
        }
        _ => {
            let given = input.byte();
            let groups: [(u8, &[&str]); 3] =
                [(1, &["listener"]), (2, &["control"]), (4, &["play", "front-end"])];
            for (bit, group) in groups {
                if given & bit != 0 {
                    names.extend(group);
                }
            }
            text.extend(b"hand-over\nfds");
            for name in &names {
                text.extend(format!(" {name}").bytes());
            }
            text.push(b'\n');
            for (bit, key) in [(8, "socket-file "), (16, "control-file ")] {
                if given & bit != 0 {
                    reached("letter path".into());
                    text.extend(key.bytes());
                    text.extend(line(input));
                    text.push(b'\n');
                }
            }
            text.extend(format!("stopped {}\n", input.number()).bytes());
            for _ in 0..input.below(4) {
                reached("letter mapping".into());
                let (region, offset, size) = (input.byte(), input.number(), input.number());
                text.extend(format!("mapping {region} {offset} {size}\n").bytes());
            }
        }
    }
    let fds = descriptors(names.len());
    let numbers: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let again = outboard::letter_again(&text, fds).expect("a letter");
    let kind = text[11..].split(|byte| *byte == b'\n').next().unwrap_or_default();
    reached(format!("letter {}", String::from_utf8_lossy(kind)));
    if names.contains(&"front-end") {
        reached("letter front-end".into());
    }
    assert_eq!(again.bytes, text, "printed as it came");
    let after: Vec<_> = again.fds.iter().map(|fd| fd.as_raw_fd()).collect();
    assert_eq!(after, numbers, "its descriptors");
}
