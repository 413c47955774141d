//! What may be mapped, and what is refused before anything is (A25 to A29, A33, A34).
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use outboard_memory::{
    AccessError, GuestMemory, MapError, MapOptions, Region, RegionSpec, View, rounded,
};

fn file(len: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file.into()
}

fn spec(size: u64, offset: u64) -> RegionSpec {
    RegionSpec { guest_addr: 0x10_0000, user_addr: 0x7000_0000, size, offset }
}

fn map(spec: RegionSpec, file: OwnedFd) -> Result<Region, MapError> {
    Region::map(spec, file, MapOptions::default())
}

fn view(region: Region) -> View {
    View::new(Arc::new(GuestMemory::new(0, vec![Arc::new(region)]).unwrap()))
}

#[test]
fn a_region_shows_its_part_of_the_file() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x5000).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"here", 0x2000).unwrap();
    let view = view(map(spec(0x1000, 0x2000), file.try_clone().unwrap().into()).unwrap());
    let mut bytes = [0; 4];
    view.read(0x10_0000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"here");
    view.write(0x10_0ffc, b"last").unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0x2ffc).unwrap();
    assert_eq!(&bytes, b"last");
}

#[test]
fn a28_a_region_at_an_odd_offset_starts_exactly_there() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x4000).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"odd", 0x1234).unwrap();
    let view = view(map(spec(0x2001, 0x1234), file.into()).unwrap());
    let mut bytes = [0; 3];
    view.read(0x10_0000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"odd");
    view.read(0x10_0000 + 0x2000, &mut bytes[..1]).unwrap();
    let outside = AccessError::Outside { guest: 0x10_2001, len: 1 };
    assert_eq!(view.read(0x10_2001, &mut bytes[..1]), Err(outside));
}

#[test]
fn a25_an_empty_region_is_refused() {
    assert_eq!(
        map(spec(0, 0), file(0x1000)).unwrap_err(),
        MapError::Empty { guest_addr: 0x10_0000 }
    );
}

/// R3: every sum is checked.
#[test]
fn a26_a27_a_region_that_wraps_is_refused() {
    for size in [1 << 62, 1 << 63, u64::MAX] {
        assert!(map(spec(size, 0), file(0x1000)).is_err(), "{size:#x}");
    }
    let whole = spec(0x1000, 0);
    let cases = [
        ("guest address", RegionSpec { guest_addr: u64::MAX - 0xffe, ..whole }),
        ("user address", RegionSpec { user_addr: u64::MAX - 0xffe, ..whole }),
        ("file offset", RegionSpec { offset: u64::MAX - 0xffe, ..whole }),
        ("file offset", RegionSpec { offset: (1 << 63) - 0xfff, ..whole }),
    ];
    for (what, spec) in cases {
        let MapError::Wraps { what: named, .. } = map(spec, file(0x1000)).unwrap_err() else {
            panic!("{what}")
        };
        assert_eq!(named, what);
    }
}

/// R4: nothing is mapped unseen.
#[test]
fn a34_a_file_that_ends_before_the_region_is_refused_before_it_is_mapped() {
    for (len, size, offset) in
        [(0, 1, 0), (0xfff, 0x1000, 0), (0x1000, 0x1000, 1), (0x1000, 1, 0x1000)]
    {
        let refused = map(spec(size, offset), file(len)).unwrap_err();
        assert_eq!(refused, MapError::FileTooShort { size: len, needed: size + offset });
    }
    assert!(map(spec(0x1000, 0x1000), file(0x2000)).is_ok());
}

#[test]
fn a33_what_is_no_file_is_refused_by_name() {
    let (pipe, _other) = std::io::pipe().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let cases: [(&str, OwnedFd); 4] = [
        ("a pipe", pipe.into()),
        ("a socket", socket.into()),
        ("a directory", File::open("/").unwrap().into()),
        (
            "a character device",
            File::options().read(true).write(true).open("/dev/null").unwrap().into(),
        ),
    ];
    for (kind, descriptor) in cases {
        assert_eq!(map(spec(0x1000, 0), descriptor).unwrap_err(), MapError::NotAFile { kind });
    }
}

#[test]
fn a33_a_file_that_cannot_be_written_is_refused() {
    let writable = tempfile::NamedTempFile::new().unwrap();
    writable.as_file().set_len(0x1000).unwrap();
    let read_only = File::open(writable.path()).unwrap();
    let MapError::Host { call, errno } = map(spec(0x1000, 0), read_only.into()).unwrap_err() else {
        panic!()
    };
    assert_eq!((call, errno), ("mmap", libc::EACCES));
}

#[test]
fn refusals_read_as_one_clause_with_the_numbers() {
    let text = MapError::FileTooShort { size: 0x1000, needed: 0x2000 }.to_string();
    assert_eq!(text, "region ends at file offset 0x2000, the file at 0x1000");
    let text = MapError::Host { call: "mmap", errno: libc::ENOMEM }.to_string();
    assert!(text.starts_with("mmap of a guest memory region: Cannot allocate memory"), "{text}");
}

#[test]
fn a29_offsets_are_rounded_to_the_page_of_the_file() {
    const SMALL: u64 = 4096;
    const HUGE: u64 = 2 << 20;
    for (offset, size, page, expected) in [
        (0, 0x1000, SMALL, Some((0, 0x1000, 0))),
        (0x1234, 1, SMALL, Some((0x1000, 0x1000, 0x234))),
        (0x1fff, 2, SMALL, Some((0x1000, 0x2000, 0xfff))),
        (0x1000, 0x1000, HUGE, Some((0, HUGE, 0x1000))),
        (HUGE - 0x1000, 0x2000, HUGE, Some((0, 2 * HUGE, HUGE - 0x1000))),
        (3 * HUGE, HUGE, HUGE, Some((3 * HUGE, HUGE, 0))),
        (1 << 30, 1, 1 << 30, Some((1 << 30, 1 << 30, 0))),
        (u64::MAX - 0xfff, 0x1000, SMALL, None),
        (0, u64::MAX, HUGE, None),
        (0xfff, u64::MAX - 0xffe, SMALL, None),
    ] {
        assert_eq!(rounded(offset, size, page), expected, "{offset:#x} + {size:#x} by {page:#x}");
    }
}

#[test]
fn a32_regions_of_one_file_are_mapped_apart() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x4000).unwrap();
    let part = |guest_addr, offset| {
        let spec = RegionSpec { guest_addr, user_addr: guest_addr, size: 0x1000, offset };
        Arc::new(map(spec, file.try_clone().unwrap().into()).unwrap())
    };
    let memory = GuestMemory::new(0, vec![part(0x8000, 0x1000), part(0, 0x3000)]).unwrap();
    let view = View::new(Arc::new(memory));
    view.write(0, b"zero").unwrap();
    view.write(0x8000, b"eight").unwrap();
    let mut bytes = [0; 5];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0x1000).unwrap();
    assert_eq!(&bytes, b"eight");
}

#[test]
fn our_own_memory_is_shared_by_its_descriptor() {
    let (region, descriptor) = Region::memfd(0x4000, 0x2000).unwrap();
    assert_eq!(region.spec().user_addr, region.host().addr() as u64);
    let spec = *region.spec();
    let here = view(region);
    here.write(0x5ffc, b"seen").unwrap();
    let there = view(map(spec, descriptor).unwrap());
    let mut bytes = [0; 4];
    there.read(0x5ffc, &mut bytes).unwrap();
    assert_eq!(&bytes, b"seen");
}

/// The flags of the mapping at `address`, as the kernel names them.
fn flags_at(address: usize, smaps: &str) -> Option<String> {
    let mut lines = smaps.lines();
    let start = format!("{address:x}-");
    lines.find(|line| line.starts_with(&start))?;
    lines.find(|line| line.starts_with("VmFlags:")).map(str::to_owned)
}

#[test]
fn no_region_is_part_of_a_core_dump_and_children_get_it_only_when_they_may() {
    for dont_fork in [false, true] {
        let region = Region::map(
            spec(0x1000, 0),
            file(0x1000),
            MapOptions { dont_fork, ..MapOptions::default() },
        )
        .unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let flags = flags_at(region.host().addr(), &smaps).unwrap();
        assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
        assert_eq!(flags.split(' ').any(|flag| flag == "dc"), dont_fork, "{flags}");
        assert!(flags.split(' ').any(|flag| flag == "nr"), "no swap is reserved: {flags}");
    }
}

#[test]
fn the_mapping_goes_with_the_last_who_holds_it() {
    let region = map(spec(0x3000, 0), file(0x3000)).unwrap();
    let address = region.host().addr();
    let memory = Arc::new(GuestMemory::new(0, vec![Arc::new(region)]).unwrap());
    let view = View::new(Arc::clone(&memory));
    let cells = view.cells(0x10_0000, 16).unwrap();
    let cell = cells.u16_at(0).unwrap();
    let mapped =
        || flags_at(address, &std::fs::read_to_string("/proc/self/smaps").unwrap()).is_some();
    drop((memory, view, cells));
    assert!(mapped(), "a cell holds it");
    drop(cell);
    assert!(!mapped());
}
