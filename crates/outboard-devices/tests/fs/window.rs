//! The DAX window (virtio 1.3 §5.11.6.4), with our front-end's shared-memory regions on the other side of SHMEM_MAP.

use std::fs;
use std::path::Path;
use std::time::Duration;

use outboard_devices::fs::FsOptions;
use outboard_frontend::channel::{Channel, Mapped, SharedObjects, SharedRegions};

use crate::driver::{Driver, EINVAL, ENFILE, ENOSYS, ROOT, op, options, u32_at, u32s, u64s, words};
use crate::rig::PATIENCE;

const UNIT: u64 = 2 << 20;
const PAGE: u64 = 4096;
const READ: u64 = 2;
const WRITE: u64 = 1;
/// Linux names no handle.
const NONE: u64 = u64::MAX;
const EBADF: i32 = 9;
const EACCES: i32 = 13;
const EIO: i32 = 5;

/// A share whose front-end maps.
struct Seen {
    driver: Driver,
    regions: SharedRegions,
}

fn with_window(folder: &Path, size: u64) -> FsOptions {
    FsOptions { dax_window: size, ..options(folder) }
}

/// A device whose front-end has opened its channel.
fn asleep(options: FsOptions) -> Seen {
    let mut driver = Driver::asleep(options);
    let channel = driver.rig.vmm.open_channel(SharedObjects::default()).unwrap();
    let regions = channel.regions().clone();
    serve(channel);
    Seen { driver, regions }
}

/// Serves a channel until the device leaves; whatever comes is well.
fn serve(mut channel: Channel) {
    std::thread::spawn(move || while channel.next_event(PATIENCE).is_ok() {});
}

fn mounted(options: FsOptions) -> Seen {
    let mut seen = asleep(options);
    seen.driver.rig.activate(&[0, 1], 64);
    seen.init();
    seen
}

impl Seen {
    fn init(&mut self) {
        assert_eq!(offered(&mut self.driver), Some(12), "whole pages");
    }

    fn map(&mut self, node: u64, mapping: Mapping) -> Result<(), i32> {
        let Mapping { handle, offset, length, flags, at } = mapping;
        let body = u64s(&[handle, offset, length, flags, at]);
        self.driver.ask(op::SETUPMAPPING, node, &body, 0).map(drop)
    }

    fn unmap(&mut self, ranges: &[(u64, u64)]) -> Result<(), i32> {
        let count = u32::try_from(ranges.len()).unwrap();
        let list: Vec<u64> = ranges.iter().flat_map(|&(at, length)| [at, length]).collect();
        let body = words(&[&u32s(&[count]), &u64s(&list)]);
        self.driver.ask(op::REMOVEMAPPING, ROOT, &body, 0).map(drop)
    }

    /// What the guest sees at a place of the window.
    fn look(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.regions.read(0, at, &mut bytes).unwrap();
        bytes
    }

    fn places(&self) -> Vec<(u64, u64)> {
        self.regions
            .mappings(0)
            .into_iter()
            .map(|Mapped { offset, len, .. }| (offset, len))
            .collect()
    }
}

/// Asks to map with INIT: log2 of the alignment, if there is a window.
fn offered(driver: &mut Driver) -> Option<u16> {
    const MAP_ALIGNMENT: u32 = 1 << 26;
    let said = driver.ask(op::INIT, ROOT, &u32s(&[7, 38, 65536, MAP_ALIGNMENT]), 64).unwrap();
    let alignment = u16::from_le_bytes([said[30], said[31]]);
    (u32_at(&said, 12) & MAP_ALIGNMENT != 0).then_some(alignment)
}

#[derive(Clone, Copy)]
struct Mapping {
    handle: u64,
    offset: u64,
    length: u64,
    flags: u64,
    at: u64,
}

/// As Linux maps.
fn unit(at: u64, flags: u64) -> Mapping {
    Mapping { handle: NONE, offset: 0, length: UNIT, flags, at }
}

/// A file of so many pages, each full of its number.
fn numbered(folder: &Path, file: &str, pages: u8) {
    let bytes: Vec<u8> = (0..pages).flat_map(|number| [number; 4096]).collect();
    fs::write(folder.join(file), bytes).unwrap();
}

#[test]
fn what_is_written_through_the_window_is_in_the_file_and_the_other_way_round() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "what the host wrote").unwrap();
    let mut seen = mounted(with_window(folder.path(), 2 * UNIT));
    let node = seen.driver.lookup(ROOT, "f").unwrap();
    // Longer than the file: that is how Linux maps.
    seen.map(node, unit(UNIT, READ | WRITE)).unwrap();
    assert_eq!(seen.look(UNIT, 19), b"what the host wrote");
    seen.regions.write(0, UNIT + 9, b"guest").unwrap();
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"what the guestwrote");
    fs::write(folder.path().join("f"), "again").unwrap();
    assert_eq!(seen.look(UNIT, 5), b"again");
    // It grows into its mapping.
    let handle = seen.driver.open(node, 2).unwrap();
    assert!(seen.regions.read(0, UNIT + 0x8000, &mut [0; 4]).is_err(), "the file ends before");
    seen.driver.write(node, handle, 0x8000, b"far").unwrap();
    assert_eq!(seen.look(UNIT + 0x8000, 3), b"far");
    // What is seen through a handle is the same.
    seen.regions.write(0, UNIT + 0x8000, b"FAR").unwrap();
    assert_eq!(seen.driver.read(node, handle, 0x8000, 16).unwrap(), b"FAR");
    seen.unmap(&[(UNIT, UNIT)]).unwrap();
    assert!(seen.places().is_empty());
    seen.driver.rig.end();
}

#[test]
fn a_mapping_that_is_asked_for_again_to_be_written_was_never_gone() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "f", 2);
    let mut seen = mounted(with_window(folder.path(), UNIT));
    let node = seen.driver.lookup(ROOT, "f").unwrap();
    seen.map(node, unit(0, READ)).unwrap();
    let before = seen.regions.mappings(0);
    assert!(before[0].writable, "it cannot be replaced later without a gap");
    // Would anything be asked of the front-end, it would be mapped there again.
    seen.regions.clear();
    seen.map(node, unit(0, READ | WRITE)).unwrap();
    assert!(seen.places().is_empty(), "nothing was asked");
    seen.driver.rig.end();
}

#[test]
fn mappings_that_overlap_others_replace_them_whole_or_in_part() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "a", 8);
    fs::write(folder.path().join("b"), vec![b'b'; 8 << 12]).unwrap();
    let mut seen = mounted(with_window(folder.path(), UNIT));
    let (a, b) = (seen.driver.lookup(ROOT, "a").unwrap(), seen.driver.lookup(ROOT, "b").unwrap());
    let pages = |at: u64, count: u64, offset: u64| Mapping {
        handle: NONE,
        offset: offset * PAGE,
        length: count * PAGE,
        flags: READ,
        at: at * PAGE,
    };
    seen.map(a, pages(0, 8, 0)).unwrap();
    seen.map(b, pages(2, 3, 0)).unwrap();
    assert_eq!(seen.places(), [(0, 2 * PAGE), (2 * PAGE, 3 * PAGE), (5 * PAGE, 3 * PAGE)]);
    let first = |seen: &Seen| (0..8).map(|page| seen.look(page * PAGE, 1)[0]).collect::<Vec<_>>();
    assert_eq!(first(&seen), [0, 1, b'b', b'b', b'b', 5, 6, 7]);
    // Over the ends of two, then over all.
    seen.map(a, pages(4, 2, 0)).unwrap();
    assert_eq!(first(&seen), [0, 1, b'b', b'b', 0, 1, 6, 7]);
    seen.map(b, pages(0, 8, 0)).unwrap();
    assert_eq!(first(&seen), [b'b'; 8]);
    assert_eq!(seen.places(), [(0, 8 * PAGE)]);
    // Out of the middle; where nothing is there is nothing to do.
    seen.unmap(&[(3 * PAGE, PAGE), (100 * PAGE, PAGE), (3 * PAGE, PAGE)]).unwrap();
    assert_eq!(seen.places(), [(0, 3 * PAGE), (4 * PAGE, 4 * PAGE)]);
    seen.driver.rig.end();
}

#[test]
fn b80_mappings_that_make_no_sense_are_refused_and_nothing_is_mapped() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "f", 2);
    let mut seen = mounted(with_window(folder.path(), UNIT));
    let node = seen.driver.lookup(ROOT, "f").unwrap();
    let good = Mapping { handle: NONE, offset: 0, length: PAGE, flags: READ, at: 0 };
    for bad in [
        Mapping { at: UNIT, ..good },
        Mapping { at: UNIT - PAGE, length: 2 * PAGE, ..good },
        Mapping { at: u64::MAX - PAGE + 1, ..good },
        Mapping { at: PAGE, length: u64::MAX - PAGE + 1, ..good },
        Mapping { at: 1, ..good },
        Mapping { length: 0, ..good },
        Mapping { length: PAGE + 1, ..good },
        Mapping { offset: 1, ..good },
        Mapping { offset: u64::MAX - PAGE + 1, ..good },
        Mapping { offset: 1 << 63, ..good },
        Mapping { flags: 0, ..good },
        Mapping { flags: 4, ..good },
    ] {
        let Mapping { offset, length, flags, at, .. } = bad;
        let said = seen.map(node, bad).unwrap_err();
        assert_eq!(said, EINVAL, "{length:#x} at {at:#x} of {offset:#x}, {flags}");
    }
    assert_eq!(seen.map(node, Mapping { handle: 77, ..good }).unwrap_err(), EBADF);
    assert_eq!(seen.map(999, good).unwrap_err(), EBADF);
    assert!(seen.map(ROOT, good).is_err(), "a directory");
    assert!(seen.places().is_empty());
    seen.map(node, good).unwrap();
    for bad in [(UNIT, PAGE), (0, 2 * UNIT), (1, PAGE), (0, 0), (PAGE, u64::MAX - PAGE + 1)] {
        assert_eq!(seen.unmap(&[(0, PAGE), bad]).unwrap_err(), EINVAL, "{bad:?}");
    }
    assert_eq!(seen.unmap(&[]).unwrap_err(), EINVAL);
    for count in [0, 2, u32::MAX] {
        let body = words(&[&u32s(&[count]), &u64s(&[0, PAGE])]);
        let said = seen.driver.ask(op::REMOVEMAPPING, ROOT, &body, 0).unwrap_err();
        assert_eq!(said, EINVAL, "{count} of one");
    }
    let body = words(&[&u32s(&[1]), &u64s(&[0, PAGE, PAGE, PAGE])]);
    let said = seen.driver.ask(op::REMOVEMAPPING, ROOT, &body, 0).unwrap_err();
    assert_eq!(said, EINVAL, "one of two");
    assert_eq!(seen.places(), [(0, PAGE)], "nothing was taken away");
    seen.driver.rig.end();
}

#[test]
fn b80_what_was_opened_for_reading_is_not_mapped_to_be_written() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "f", 2);
    let mut seen = mounted(with_window(folder.path(), UNIT));
    let node = seen.driver.lookup(ROOT, "f").unwrap();
    for (mode, flags, said) in [
        (0, READ, Ok(())),
        (0, WRITE, Err(EACCES)),
        (0, READ | WRITE, Err(EACCES)),
        (1, READ, Err(EACCES)),
        (1, WRITE, Err(EACCES)),
        (2, READ | WRITE, Ok(())),
    ] {
        let handle = seen.driver.open(node, mode).unwrap();
        let mapping = Mapping { handle, ..unit(0, flags) };
        assert_eq!(seen.map(node, mapping), said, "mode {mode}, flags {flags}");
        if said.is_ok() {
            assert_eq!(seen.regions.mappings(0)[0].writable, mode == 2);
        }
        seen.driver.release(node, handle).unwrap();
        seen.unmap(&[(0, UNIT)]).unwrap();
    }
    seen.driver.rig.end();
}

#[test]
fn b80_a_read_only_share_is_mapped_to_be_read() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "f", 2);
    let mut options = with_window(folder.path(), UNIT);
    options.readonly = true;
    let mut seen = mounted(options);
    let node = seen.driver.lookup(ROOT, "f").unwrap();
    const EROFS: i32 = 30;
    assert_eq!(seen.map(node, unit(0, READ | WRITE)).unwrap_err(), EROFS);
    assert!(seen.places().is_empty());
    seen.map(node, unit(0, READ)).unwrap();
    assert!(!seen.regions.mappings(0)[0].writable);
    assert_eq!(seen.look(PAGE, 1), [1]);
    seen.driver.rig.end();
}

#[test]
fn b80_a_guest_that_maps_page_by_page_gets_enfile() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "f", 1);
    let mut seen = mounted(with_window(folder.path(), 2 * UNIT));
    let node = seen.driver.lookup(ROOT, "f").unwrap();
    let page = |at: u64| Mapping { length: PAGE, ..unit(at * PAGE, READ) };
    let full = (0..1024).find_map(|at| seen.map(node, page(at)).err().map(|error| (at, error)));
    let (count, error) = full.unwrap();
    assert_eq!(error, ENFILE);
    assert!((400..600).contains(&count), "{count} pieces");
    seen.unmap(&[(0, UNIT)]).unwrap();
    seen.map(node, page(0)).unwrap();
    seen.driver.rig.end();
}

#[test]
fn b80_there_is_no_window_where_the_front_end_maps_nothing() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "f", 1);
    // It has opened no channel.
    let mut driver = Driver::start(with_window(folder.path(), UNIT));
    assert_eq!(offered(&mut driver), None);
    let node = driver.lookup(ROOT, "f").unwrap();
    let body = u64s(&[NONE, 0, UNIT, READ, 0]);
    assert_eq!(driver.ask(op::SETUPMAPPING, node, &body, 0).unwrap_err(), ENOSYS);
    driver.rig.end();
    // A guest that did not ask.
    let mut seen = asleep(with_window(folder.path(), UNIT));
    seen.driver.rig.activate(&[0, 1], 64);
    seen.driver.init();
    let node = seen.driver.lookup(ROOT, "f").unwrap();
    assert_eq!(seen.map(node, unit(0, READ)).unwrap_err(), ENOSYS);
    seen.driver.rig.end();
}

#[test]
fn the_window_is_given_back_when_the_guest_begins_anew_or_is_reset() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "f", 2);
    let mut seen = mounted(with_window(folder.path(), UNIT));
    let map = |seen: &mut Seen| {
        let node = seen.driver.lookup(ROOT, "f").unwrap();
        seen.map(node, unit(0, READ)).unwrap();
        assert_eq!(seen.look(PAGE, 1), [1]);
    };
    map(&mut seen);
    seen.init();
    assert!(seen.places().is_empty(), "another INIT");
    map(&mut seen);
    let request = seen.driver.request(38, ROOT, &[]);
    assert_eq!(seen.driver.send(1, &request, 0), 0);
    assert!(seen.places().is_empty(), "DESTROY");
    seen.init();
    map(&mut seen);
    // The front-end drops all and says so.
    let queues = std::mem::take(&mut seen.driver.rig.queues);
    seen.driver.rig.vmm.reset(queues).unwrap();
    seen.driver.rig.vmm.connection().reset_device().unwrap();
    seen.driver.rig.activate(&[0, 1], 64);
    seen.init();
    map(&mut seen);
    // It drops all and says nothing.
    seen.regions.clear();
    let other = seen.driver.create(ROOT, "g").unwrap().0;
    seen.map(other, unit(0, READ)).unwrap();
    assert_eq!(seen.places(), [(0, UNIT)]);
    seen.driver.rig.end();
}

#[test]
fn a_window_moves_to_another_process() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "f", 3);
    let mut seen = mounted(with_window(folder.path(), 2 * UNIT));
    let node = seen.driver.lookup(ROOT, "f").unwrap();
    seen.map(node, unit(0, READ | WRITE)).unwrap();
    seen.map(node, Mapping { offset: PAGE, length: PAGE, ..unit(UNIT, READ) }).unwrap();
    seen.driver.rig.vmm.sleep().unwrap();
    let state = seen.driver.rig.vmm.connection().save_state().unwrap();
    let features = seen.driver.rig.vmm.features();
    let places = seen.places();
    seen.driver.rig.end();
    // A process without a window, or with a smaller one, does not take it.
    for size in [0, UNIT] {
        let mut other = asleep(with_window(folder.path(), size));
        other.driver.rig.vmm.connection().set_features(features).unwrap();
        assert!(other.driver.rig.vmm.connection().load_state(&state).is_err(), "{size:#x}");
        other.driver.rig.end();
    }
    let mut other = asleep(with_window(folder.path(), 2 * UNIT));
    other.driver.rig.vmm.connection().set_features(features).unwrap();
    other.driver.rig.vmm.connection().load_state(&state).unwrap();
    other.driver.rig.activate(&[0, 1], 64);
    // A request that needs the window's turn comes after what was restored.
    let until = std::time::Instant::now() + PATIENCE;
    while other.places() != places {
        assert!(std::time::Instant::now() < until, "{:?}", other.places());
        std::thread::yield_now();
    }
    assert_eq!(other.look(2 * PAGE, 1), [2]);
    assert_eq!(other.look(UNIT, 1), [1]);
    other.regions.write(0, 0, b"moved").unwrap();
    assert_eq!(&fs::read(folder.path().join("f")).unwrap()[..5], b"moved");
    other.unmap(&[(0, 2 * UNIT)]).unwrap();
    assert!(other.places().is_empty());
    other.driver.rig.end();
}

#[test]
fn a_front_end_that_does_not_answer_is_asked_once() {
    let folder = tempfile::tempdir().unwrap();
    numbered(folder.path(), "f", 2);
    let mut driver = Driver::asleep(with_window(folder.path(), 2 * UNIT));
    let mut channel = driver.rig.vmm.open_channel(SharedObjects::default()).unwrap();
    driver.rig.activate(&[0, 1], 64);
    assert_eq!(offered(&mut driver), Some(12));
    let node = driver.lookup(ROOT, "f").unwrap();
    for at in [0, UNIT] {
        let body = u64s(&[NONE, 0, UNIT, READ, at]);
        assert_eq!(driver.ask(op::SETUPMAPPING, node, &body, 0).unwrap_err(), EIO, "{at:#x}");
    }
    // Now it does: the one that it was asked for is mapped, and the device goes on.
    assert!(channel.next_event(PATIENCE).unwrap().is_some());
    assert!(channel.next_event(Duration::ZERO).unwrap().is_none(), "it was asked once");
    let regions = channel.regions().clone();
    serve(channel);
    let until = std::time::Instant::now() + PATIENCE;
    let body = u64s(&[NONE, 0, UNIT, READ, 0]);
    // Until the late answer has arrived there is none.
    while driver.ask(op::SETUPMAPPING, node, &body, 0).is_err() {
        assert!(std::time::Instant::now() < until, "{:?}", regions.mappings(0));
    }
    assert_eq!(regions.mappings(0).len(), 1);
    driver.rig.end();
}
