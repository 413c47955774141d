//! A share that moves to another process with its files open.

use std::fs;
use std::path::Path;

use outboard::{Model, Saved};
use outboard_devices::fs::{Fs, STATE_VERSION};

use crate::driver::{Driver, ROOT, op, options};

#[path = "../../../outboard-frontend/tests/common/skip.rs"]
mod skip;

/// Files that are open when the guest moves.
const FILES: u64 = 1000;

/// A mounted share with `files` files of `folder` open: nodes and handles.
fn opened(folder: &Path, files: u64) -> (Driver, Vec<(u64, u64)>) {
    let mut driver = Driver::mount(options(folder));
    let open = |number| {
        let (node, handle) = driver.create(ROOT, &format!("file-{number}")).unwrap();
        driver.write(node, handle, 0, format!("number {number}").as_bytes()).unwrap();
        (node, handle)
    };
    let handles = (0..files).map(open).collect();
    (driver, handles)
}

/// The same guest on another process of the device, which has taken the state.
fn moved(mut driver: Driver, folder: &Path) -> Driver {
    driver.rig.vmm.sleep().unwrap();
    let state = driver.rig.vmm.connection().save_state().unwrap();
    let mut other = Driver::asleep(options(folder));
    let features = other.rig.vmm.features();
    other.rig.vmm.connection().set_features(features).unwrap();
    other.rig.vmm.connection().load_state(&state).unwrap();
    other.rig.activate(&[0, 1], 64);
    driver.rig.end();
    other
}

#[test]
fn a_thousand_open_files_move_to_another_process() {
    let folder = tempfile::tempdir().unwrap();
    let (driver, handles) = opened(folder.path(), FILES);
    let mut other = moved(driver, folder.path());
    for (number, (node, handle)) in (0..FILES).zip(handles) {
        let said = other.read(node, handle, 0, 64).unwrap();
        assert_eq!(said, format!("number {number}").as_bytes());
        other.write(node, handle, 0, b"NUMBER").unwrap();
    }
    assert_eq!(fs::read(folder.path().join("file-7")).unwrap(), b"NUMBER 7");
    assert!(other.lookup(ROOT, "file-9").is_ok());
    other.ask(op::STATFS, ROOT, &[], 80).unwrap();
    other.rig.end();
}

/// Whether this process may open files by their handles, on the file system of `folder`.
fn opens_by_handle(folder: &Path) -> bool {
    const KNOW_HANDLES: [u32; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994];
    let kind = rustix::fs::statfs(folder).unwrap().f_type;
    rustix::process::geteuid().is_root()
        && KNOW_HANDLES.iter().any(|known| i64::from(*known) == kind)
}

#[test]
fn a_file_that_was_removed_while_it_was_open_moves_as_well() {
    let folders = [tempfile::tempdir(), tempfile::tempdir_in("/dev/shm")];
    let mut folders = folders.into_iter().flatten();
    let Some(folder) = folders.find(|folder| opens_by_handle(folder.path())) else {
        return skip::skip("nobody opens files by their handles here");
    };
    let (driver, handles) = opened(folder.path(), 3);
    let (node, handle) = handles[1];
    fs::remove_file(folder.path().join("file-1")).unwrap();
    let mut other = moved(driver, folder.path());
    other.write(node, handle, 0, b"NUMBER").unwrap();
    assert_eq!(other.read(node, handle, 0, 64).unwrap(), b"NUMBER 1");
    let (node, handle) = handles[2];
    assert_eq!(other.read(node, handle, 0, 64).unwrap(), b"number 2");
    other.release(node, handle).unwrap();
    other.rig.end();
}

#[test]
fn what_was_removed_and_is_not_forgotten_yet_holds_up_no_move() {
    let folder = tempfile::tempdir().unwrap();
    let (mut driver, handles) = opened(folder.path(), 3);
    let (node, handle) = handles[1];
    driver.release(node, handle).unwrap();
    fs::remove_file(folder.path().join("file-1")).unwrap();
    let mut other = moved(driver, folder.path());
    assert!(other.open(node, 0).is_err());
    let (node, handle) = handles[2];
    assert_eq!(other.read(node, handle, 0, 64).unwrap(), b"number 2");
    other.rig.end();
}

#[test]
fn a_state_that_is_none_is_refused_and_the_share_can_be_mounted() {
    let folder = tempfile::tempdir().unwrap();
    let (mut driver, _) = opened(folder.path(), 5);
    driver.rig.vmm.sleep().unwrap();
    driver.rig.end();
    let mut good = Fs::new(options(folder.path())).unwrap();
    let (version, empty) = good.snapshot().unwrap().into_bytes().unwrap();
    good.restore(Saved::new(version, &empty, None)).unwrap();
    let mounted = [&(1u64 << 63).to_le_bytes()[..], b"rubbish that is no state"].concat();
    for (version, bytes) in
        [(STATE_VERSION + 1, &empty[..]), (STATE_VERSION, &[1, 2, 3]), (STATE_VERSION, &mounted)]
    {
        assert!(good.restore(Saved::new(version, bytes, None)).is_err(), "{bytes:?}");
    }
    good.restore(Saved::new(version, &empty, None)).unwrap();
}
