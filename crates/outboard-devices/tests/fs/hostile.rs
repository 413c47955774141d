//! Hostile requests of FUSE (hostile cases B73 to B81).

use std::fs;
use std::os::unix::fs::symlink;

use crate::driver::{
    Driver, EINVAL, ENFILE, ENOSYS, ENOTCONN, ROOT, name, op, options, u32s, u64_at, u64s, words,
};

/// The device still serves.
fn lives(driver: &mut Driver) {
    driver.init();
    driver.ask(op::STATFS, ROOT, &[], 80).unwrap();
    assert!(driver.ask(op::GETATTR, ROOT, &u64s(&[0, 0]), 104).is_ok());
}

#[test]
fn b73_requests_that_are_no_requests_get_an_errno_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = Driver::start(options(folder.path()));
    assert_eq!(driver.ask(op::GETATTR, ROOT, &u64s(&[0, 0]), 104).unwrap_err(), ENOTCONN);
    const EPROTO: i32 = 71;
    for (version, said) in [([6, 99], Some(EPROTO)), ([7, 3], Some(EPROTO)), ([8, 0], None)] {
        let body = words(&[&u32s(&version), &u32s(&[0, 0])]);
        let answer = driver.ask(op::INIT, ROOT, &body, 64);
        assert_eq!(answer.as_ref().err().copied(), said, "{version:?}");
        assert_eq!(driver.ask(op::STATFS, ROOT, &[], 80).unwrap_err(), ENOTCONN, "{version:?}");
    }
    driver.init();
    for length in 0..40 {
        let mut short = driver.request(op::STATFS, ROOT, &[]);
        short.truncate(length);
        assert_eq!(driver.send(1, &short, 200), 0, "{length} bytes are no header");
    }
    for wrong in [0u32, 39, 41, 4096, u32::MAX] {
        let mut request = driver.request(op::STATFS, ROOT, &[]);
        request[..4].copy_from_slice(&wrong.to_le_bytes());
        let used = driver.send(1, &request, 200);
        assert_eq!(driver.reply(used).unwrap_err(), EINVAL, "it says {wrong} bytes");
    }
    for opcode in [0, 7, 19, 31, 40, 52, 4096, u32::MAX] {
        assert_eq!(driver.ask(opcode, ROOT, &[], 64).unwrap_err(), ENOSYS, "operation {opcode}");
    }
    // A body that is too short, for each operation that has one.
    for opcode in [3, 4, 8, 9, 12, 13, 14, 15, 16, 18, 20, 21, 22, 25, 26, 28, 35, 43, 44, 45, 47] {
        assert_eq!(driver.ask(opcode, ROOT, &[0; 3], 4096).unwrap_err(), EINVAL, "{opcode}");
    }
    // A second INIT starts anew.
    let (file, handle) = driver.create(ROOT, "f").unwrap();
    lives(&mut driver);
    const EBADF: i32 = 9;
    assert_eq!(driver.read(file, handle, 0, 16).unwrap_err(), EBADF);
    driver.rig.end();
}

#[test]
fn b74_a_reply_that_does_not_fit_is_not_written_and_nothing_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = Driver::mount(options(folder.path()));
    let body = words(&[&u32s(&[0o102, 0o644, 0, 0]), &name("f")]);
    for room in [0, 1, 15, 16, 159] {
        let request = driver.request(op::CREATE, ROOT, &body);
        assert_eq!(driver.send(1, &request, room), 0, "room of {room} bytes");
        assert!(!folder.path().join("f").exists(), "room of {room} bytes");
    }
    let request = driver.request(op::CREATE, ROOT, &body);
    assert_eq!(driver.send(1, &request, 160), 160);
    // Forgetting needs no room.
    let request = driver.request(op::FORGET, 77, &u64s(&[1]));
    assert_eq!(driver.send(0, &request, 0), 0);
    lives(&mut driver);
    driver.rig.end();
}

/// B75, R16.
#[test]
fn b75_a_name_that_is_a_path_is_refused_by_every_operation() {
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("share");
    fs::create_dir(&folder).unwrap();
    fs::create_dir(folder.join("d")).unwrap();
    fs::write(outside.path().join("secret"), "s").unwrap();
    let mut driver = Driver::mount(options(&folder));
    let long = "x".repeat(5000);
    for bad in ["", ".", "..", "../secret", "d/../../secret", "/etc/passwd", "a/b", &long] {
        let word = name(bad);
        let tries: [(u32, Vec<u8>); 7] = [
            (op::LOOKUP, word.clone()),
            (op::UNLINK, word.clone()),
            (op::MKDIR, words(&[&u32s(&[0o755, 0]), &word])),
            (op::MKNOD, words(&[&u32s(&[0o100644, 0, 0, 0]), &word])),
            (op::CREATE, words(&[&u32s(&[0o102, 0o644, 0, 0]), &word])),
            (op::SYMLINK, words(&[&word, &name("target")])),
            (op::RENAME, words(&[&u64s(&[ROOT]), &name("d"), &word])),
        ];
        for (opcode, body) in tries {
            let error = driver.ask(opcode, ROOT, &body, 256).unwrap_err();
            const ENAMETOOLONG: i32 = 36;
            let wanted = if bad.len() > 255 { ENAMETOOLONG } else { EINVAL };
            assert_eq!(error, wanted, "operation {opcode} on {bad:?}");
        }
    }
    for bad in [&b"secret"[..], b"d\0\0", b"d\0junk"] {
        assert_eq!(driver.ask(op::LOOKUP, ROOT, bad, 128).unwrap_err(), EINVAL, "{bad:?}");
    }
    assert!(outside.path().join("secret").exists());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing was made");
    lives(&mut driver);
    driver.rig.end();
}

#[test]
fn b76_what_is_no_file_is_not_opened_and_a_link_is_not_followed() {
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("share");
    fs::create_dir(&folder).unwrap();
    fs::write(outside.path().join("secret"), "s").unwrap();
    fs::write(folder.join("file"), "f").unwrap();
    symlink("../secret", folder.join("link")).unwrap();
    let mut driver = Driver::mount(options(&folder));
    let fifo = words(&[&u32s(&[0o010644, 0, 0, 0]), &name("fifo")]);
    let fifo = u64_at(&driver.ask(op::MKNOD, ROOT, &fifo, 128).unwrap(), 0);
    // Opened for reading it would wait for ever.
    assert!(driver.open(fifo, 0).is_err());
    let link = driver.lookup(ROOT, "link").unwrap();
    assert!(driver.open(link, 0).is_err());
    assert!(driver.lookup(link, "x").is_err());
    // The host swaps a file for a link to the outside after it was looked up.
    let file = driver.lookup(ROOT, "file").unwrap();
    fs::remove_file(folder.join("file")).unwrap();
    symlink("../secret", folder.join("file")).unwrap();
    match driver.open(file, 0) {
        Ok(handle) => assert_eq!(driver.read(file, handle, 0, 9).unwrap(), b"f", "the old file"),
        Err(errno) => assert_ne!(errno, 0, "or none"),
    }
    lives(&mut driver);
    driver.rig.end();
}

#[test]
fn b78_sizes_beyond_the_buffers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.semantics.xattr = true;
    let mut driver = Driver::mount(options);
    let (file, handle) = driver.create(ROOT, "f").unwrap();
    let opened = driver.ask(op::OPENDIR, ROOT, &u32s(&[0, 0]), 16).unwrap();
    let shape = |handle: u64, size: u32| {
        words(&[&u64s(&[handle, 0]), &u32s(&[size, 0]), &u64s(&[0]), &u32s(&[0, 0])])
    };
    for size in [257, 4096, 2 << 20, u32::MAX] {
        let read = shape(handle, size);
        assert_eq!(driver.ask(op::READ, file, &read, 256).unwrap_err(), EINVAL, "{size}");
        let list = shape(u64_at(&opened, 0), size);
        assert_eq!(driver.ask(op::READDIR, ROOT, &list, 256).unwrap_err(), EINVAL, "{size}");
        assert_eq!(driver.ask(op::READDIRPLUS, ROOT, &list, 256).unwrap_err(), EINVAL, "{size}");
        let write = words(&[&shape(handle, size), b"12345"]);
        assert_eq!(driver.ask(op::WRITE, file, &write, 8).unwrap_err(), EINVAL, "{size}");
        let value = words(&[&u32s(&[size, 0]), &name("user.a"), b"12345"]);
        assert_eq!(driver.ask(op::SETXATTR, file, &value, 0).unwrap_err(), EINVAL, "{size}");
        let get = words(&[&u32s(&[size, 0]), &name("user.a")]);
        assert_eq!(driver.ask(op::GETXATTR, file, &get, 256).unwrap_err(), EINVAL, "{size}");
        let list = u32s(&[size, 0]);
        assert_eq!(driver.ask(op::LISTXATTR, file, &list, 256).unwrap_err(), EINVAL, "{size}");
        let forget = words(&[&u32s(&[size, 0]), &u64s(&[ROOT, 1])]);
        let request = driver.request(op::BATCH_FORGET, 0, &forget);
        assert_eq!(driver.send(0, &request, 0), 0, "{size}");
    }
    let many = vec![b'x'; 100 << 10];
    const E2BIG: i32 = 7;
    assert_eq!(driver.ask(op::LOOKUP, ROOT, &many, 128).unwrap_err(), E2BIG);
    lives(&mut driver);
    driver.rig.end();
}

#[test]
fn b80_mappings_are_refused_where_there_is_no_window() {
    let folder = tempfile::tempdir().unwrap();
    let mut driver = Driver::mount(options(folder.path()));
    let (file, handle) = driver.create(ROOT, "f").unwrap();
    for range in [[0, 4096], [u64::MAX - 4095, 8192], [0, u64::MAX]] {
        let body = u64s(&[handle, range[0], range[1], 3, range[0]]);
        assert_eq!(driver.ask(op::SETUPMAPPING, file, &body, 0).unwrap_err(), ENOSYS);
    }
    let body = words(&[&u32s(&[u32::MAX]), &u64s(&[0, 4096])]);
    assert_eq!(driver.ask(op::REMOVEMAPPING, file, &body, 0).unwrap_err(), ENOSYS);
    lives(&mut driver);
    driver.rig.end();
}

#[test]
fn b81_a_guest_that_opens_all_it_can_gets_enfile_and_leaves_descriptors_for_others() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "x").unwrap();
    let mut options = options(folder.path());
    options.semantics.guest_fd_limit = 50;
    let mut driver = Driver::mount(options);
    let file = driver.lookup(ROOT, "f").unwrap();
    let mut handles = Vec::new();
    let error = loop {
        match driver.open(file, 0) {
            Ok(handle) => handles.push(handle),
            Err(error) => break error,
        }
        assert!(handles.len() <= 50, "more than its share");
    };
    assert_eq!(error, ENFILE);
    assert!(handles.len() > 40, "{} files", handles.len());
    // What is open is served; what is closed can be opened again.
    assert_eq!(driver.read(file, handles[0], 0, 16).unwrap(), b"x");
    driver.release(file, handles.pop().unwrap()).unwrap();
    driver.open(file, 0).unwrap();
    driver.rig.end();
}

#[test]
fn c29_entries_that_the_host_removes_or_renames_are_an_error_of_that_request() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    fs::write(folder.path().join("d/f"), "x").unwrap();
    let mut driver = Driver::mount(options(folder.path()));
    let inside = driver.lookup(ROOT, "d").unwrap();
    let file = driver.lookup(inside, "f").unwrap();
    let handle = driver.open(file, 2).unwrap();
    fs::rename(folder.path().join("d/f"), folder.path().join("g")).unwrap();
    fs::remove_dir(folder.path().join("d")).unwrap();
    assert_eq!(driver.read(file, handle, 0, 16).unwrap(), b"x", "what is open stays open");
    assert!(driver.create(inside, "new").is_err(), "nothing is made in a directory that is gone");
    fs::remove_file(folder.path().join("g")).unwrap();
    assert_eq!(driver.read(file, handle, 0, 16).unwrap(), b"x");
    driver.release(file, handle).unwrap();
    lives(&mut driver);
    driver.rig.end();
}
