//! What a guest does with files, one request at a time.

use std::fs;

use outboard::LoopKind;
use outboard_devices::fs::Fs;

use crate::driver::{Driver, ENOENT, ROOT, name, op, options, u32_at, u32s, u64_at, u64s, words};
use crate::rig::Rig;

#[test]
fn the_configuration_space_has_the_tag_and_the_number_of_request_queues() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.request_queues = 3;
    let mut rig = Rig::asleep(Fs::new(options).unwrap(), LoopKind::Epoll, u64::MAX);
    let config = rig.vmm.read_config(0, 40).unwrap();
    assert_eq!(&config[..6], b"share\0");
    assert_eq!(config[36..], 3u32.to_le_bytes());
    rig.end();
}

#[test]
fn what_is_written_is_in_the_file_and_what_is_in_the_file_is_read() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("there"), "from the host").unwrap();
    let mut driver = Driver::mount(options(folder.path()));
    let there = driver.lookup(ROOT, "there").unwrap();
    let handle = driver.open(there, 2).unwrap();
    assert_eq!(driver.read(there, handle, 5, 4096).unwrap(), b"the host");
    assert_eq!(driver.read(there, handle, 5, 3).unwrap(), b"the", "more room than it asks for");
    assert_eq!(driver.read(there, handle, 99, 4096).unwrap(), b"", "behind the end");
    assert_eq!(driver.write(there, handle, 9, b"guest").unwrap(), 5);
    assert_eq!(fs::read(folder.path().join("there")).unwrap(), b"from the guest");
    driver.release(there, handle).unwrap();
    assert_eq!(driver.lookup(ROOT, "missing").unwrap_err(), ENOENT);
    let (made, handle) = driver.create(ROOT, "made").unwrap();
    let long: Vec<u8> = (0..300_000u32).map(|at| (at % 251) as u8).collect();
    assert_eq!(driver.write(made, handle, 0, &long).unwrap(), 300_000);
    assert_eq!(driver.read(made, handle, 0, 300_000).unwrap(), long);
    assert!(!driver.rig.is_back(0), "nothing was asked on the other queue");
    driver.rig.end();
}

#[test]
fn a_reply_finds_its_place_however_the_driver_cuts_the_room() {
    let folder = tempfile::tempdir().unwrap();
    let long: Vec<u8> = (0..9000u32).map(|at| (at % 251) as u8).collect();
    fs::write(folder.path().join("there"), &long).unwrap();
    let mut driver = Driver::mount(options(folder.path()));
    let there = driver.lookup(ROOT, "there").unwrap();
    let handle = driver.open(there, 0).unwrap();
    let head = words(&[&u64s(&[handle, 100]), &u32s(&[8192, 0]), &u64s(&[0]), &u32s(&[0, 0])]);
    let request = driver.request(op::READ, there, &head);
    let start = driver.rig.at(0);
    driver.rig.store(start, &request);
    for cuts in [&[16, 4096, 4096][..], &[7, 20, 1, 8180], &[16, 8192, 500], &[8000, 208, 1, 1]] {
        // Pieces one behind the other, so that the reply can be read in one go.
        let mut at = driver.rig.at(1 << 20);
        let mut room = Vec::new();
        for cut in cuts {
            room.push((at, *cut));
            at += u64::from(*cut);
        }
        driver.rig.offer(1, &[(start, 30), (start + 30, 50)], &room, 9);
        assert_eq!(driver.rig.back(1), (9, 16 + 8192), "{cuts:?}");
        let bytes = driver.rig.load(driver.rig.at(1 << 20), 16 + 8192);
        assert_eq!(u32_at(&bytes, 0), 16 + 8192, "{cuts:?}");
        assert!(bytes[16..] == long[100..100 + 8192], "{cuts:?}");
    }
    driver.rig.end();
}

#[test]
fn entries_are_made_moved_linked_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = Driver::mount(options(folder.path()));
    let made = driver.ask(op::MKDIR, ROOT, &words(&[&u32s(&[0o755, 0]), &name("d")]), 128);
    let inside = u64_at(&made.unwrap(), 0);
    let (file, handle) = driver.create(inside, "f").unwrap();
    driver.write(file, handle, 0, b"x").unwrap();
    driver.ask(op::LINK, ROOT, &words(&[&u64s(&[file]), &name("hard")]), 128).unwrap();
    let link = driver.ask(op::SYMLINK, ROOT, &words(&[&name("soft"), &name("../../x")]), 128);
    let link = u64_at(&link.unwrap(), 0);
    assert_eq!(driver.ask(op::READLINK, link, &[], 4096).unwrap(), b"../../x");
    let body = words(&[&u64s(&[ROOT]), &name("f"), &name("g")]);
    driver.ask(op::RENAME, inside, &body, 0).unwrap();
    driver.ask(op::UNLINK, ROOT, &name("hard"), 0).unwrap();
    let mut left: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["d", "g", "soft"]);
    driver.rig.end();
}

#[test]
fn a_directory_is_read_to_its_end_however_little_room_there_is() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..100 {
        fs::write(folder.path().join(format!("file-{number}")), "").unwrap();
    }
    let mut driver = Driver::mount(options(folder.path()));
    for (opcode, before) in [(op::READDIR, 0), (op::READDIRPLUS, 128)] {
        let opened = driver.ask(op::OPENDIR, ROOT, &u32s(&[0, 0]), 16).unwrap();
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let head = [u64_at(&opened, 0), offset];
            let body = words(&[&u64s(&head), &u32s(&[700, 0]), &u64s(&[0]), &u32s(&[0, 0])]);
            let said = driver.ask(opcode, ROOT, &body, 700).unwrap();
            if said.is_empty() {
                break;
            }
            let mut at = 0;
            while at < said.len() {
                let entry = at + before;
                offset = u64_at(&said, entry + 8);
                let length = u32_at(&said, entry + 16) as usize;
                let text = &said[entry + 24..entry + 24 + length];
                names.push(String::from_utf8(text.to_vec()).unwrap());
                at = entry + (24 + length).next_multiple_of(8);
            }
        }
        names.retain(|name| name.starts_with("file-"));
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 100, "{names:?}");
    }
    driver.rig.end();
}

#[test]
fn a_share_that_is_read_only_is_only_read() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("there"), "x").unwrap();
    let mut options = options(folder.path());
    options.readonly = true;
    let mut driver = Driver::mount(options);
    let there = driver.lookup(ROOT, "there").unwrap();
    let handle = driver.open(there, 0).unwrap();
    assert_eq!(driver.read(there, handle, 0, 16).unwrap(), b"x");
    const EROFS: i32 = 30;
    assert_eq!(driver.create(ROOT, "new").unwrap_err(), EROFS);
    assert_eq!(driver.ask(op::UNLINK, ROOT, &name("there"), 0).unwrap_err(), EROFS);
    assert_eq!(driver.open(there, 1).unwrap_err(), EROFS);
    assert_eq!(driver.write(there, handle, 0, b"y").unwrap_err(), EROFS);
    driver.rig.end();
}

#[test]
fn extended_attributes_are_mapped_as_the_operator_says() {
    let folder = tempfile::tempdir_in(".").unwrap();
    fs::write(folder.path().join("there"), "").unwrap();
    let mut options = options(folder.path());
    options.semantics.xattr = true;
    options.semantics.xattrmap = Some(":map::user.guest.:".try_into().unwrap());
    let mut driver = Driver::mount(options);
    let there = driver.lookup(ROOT, "there").unwrap();
    let body = words(&[&u32s(&[5, 0]), &name("user.colour"), b"green"]);
    match driver.ask(op::SETXATTR, there, &body, 0) {
        // The file system below has none: nothing to see here.
        Err(95) => {}
        done => {
            done.unwrap();
            let body = words(&[&u32s(&[64, 0]), &name("user.colour")]);
            assert_eq!(driver.ask(op::GETXATTR, there, &body, 64).unwrap(), b"green");
            let body = words(&[&u32s(&[3, 0]), &name("user.colour")]);
            const ERANGE: i32 = 34;
            assert_eq!(driver.ask(op::GETXATTR, there, &body, 64).unwrap_err(), ERANGE);
            let mut value = [0; 64];
            let path = folder.path().join("there");
            let got = rustix::fs::getxattr(path, "user.guest.user.colour", &mut value).unwrap();
            assert_eq!(&value[..got], b"green");
        }
    }
    driver.rig.end();
}

#[test]
fn a_pool_serves_what_the_queues_are_asked_and_ends_with_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.pool = 3;
    let mut driver = Driver::mount(options);
    let (file, handle) = driver.create(ROOT, "f").unwrap();
    for number in 0..200u32 {
        driver.write(file, handle, u64::from(number) * 4, &number.to_le_bytes()).unwrap();
    }
    let all = fs::read(folder.path().join("f")).unwrap();
    assert!(all.chunks(4).zip(0u32..200).all(|(four, number)| four == number.to_le_bytes()));
    driver.rig.end();
}
