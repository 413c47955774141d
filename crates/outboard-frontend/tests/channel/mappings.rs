//! Shared-memory regions: what is mapped can be read back, and nothing else can be mapped.

use std::os::fd::OwnedFd;

use outboard_frontend::channel::{GPU_HANDLE_SHM, Mapped, RegionError};
use outboard_frontend::{ChannelEvent, ChannelSetup, SharedRegions};
use outboard_protocol::ChannelRequest as Request;
use outboard_protocol::payload::{ExternalMap, GpuMap, ShmemConfig, ShmemMap};

use crate::peer::{all_protocol, channel, config, file, map, page, setup};

fn byte(regions: &SharedRegions, at: u64) -> Result<u8, RegionError> {
    let mut byte = [0];
    regions.read(1, at, &mut byte).map(|()| byte[0])
}

#[test]
fn what_the_back_end_maps_is_read_back_and_what_it_unmaps_is_gone() {
    let (mut channel, mut back) = channel(setup());
    let second = ShmemMap { fd_offset: 2 * page(), ..map(4, 1) };
    let (event, answer) = back.round(&mut channel, Request::ShmemMap(second, file(3)));
    assert!(answer.is_ok());
    let whole = page();
    assert!(matches!(
        event,
        ChannelEvent::Map { region: 1, offset, len, writable: true }
            if offset == 4 * whole && len == whole
    ));
    let regions = channel.regions().clone();
    assert_eq!(byte(&regions, 4 * page()), Ok(2), "page 2 of the file");
    let mapped = Mapped { offset: 4 * page(), len: page(), writable: true };
    assert_eq!(regions.mappings(1), [mapped]);
    for at in [0, 4 * page() - 1, 5 * page(), u64::MAX] {
        assert!(matches!(byte(&regions, at), Err(RegionError::NotMapped { .. })), "{at:#x}");
    }
    let (event, answer) = back.round(&mut channel, Request::ShmemUnmap(map(4, 1)));
    assert!(matches!(event, ChannelEvent::Unmap { region: 1, .. }) && answer.is_ok());
    assert!(byte(&regions, 4 * page()).is_err());
    assert!(regions.mappings(1).is_empty());
}

#[test]
fn both_sides_see_what_the_other_writes_unless_it_is_read_only() {
    let (mut channel, mut back) = channel(setup());
    let shared = file(2);
    let again = shared.try_clone().expect("a descriptor");
    let third = shared.try_clone().expect("a descriptor");
    let read_only = ShmemMap { flags: 0, ..map(2, 2) };
    for (map, file) in [(map(0, 2), shared), (read_only, again)] {
        assert!(back.round(&mut channel, Request::ShmemMap(map, file)).1.is_ok());
    }
    let regions = channel.regions();
    regions.write(1, page() - 2, b"seam").expect("two pages of one mapping");
    let mut bytes = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::from(third), &mut bytes, page() - 2)
        .expect("in the file");
    assert_eq!(&bytes, b"seam");
    // Adjacent mappings are read through, and writing stops at the one that is read-only.
    let mut across = vec![0; 4];
    regions.read(1, 2 * page() - 2, &mut across).expect("two mappings");
    assert_eq!(across, [1, 1, 0, 0]);
    regions.read(1, 3 * page() - 2, &mut bytes).expect("inside");
    assert_eq!(&bytes, b"seam");
    assert!(matches!(regions.write(1, 2 * page() - 2, b"over"), Err(RegionError::Window(_))));
    assert!(matches!(
        regions.read(1, 4 * page() - 2, &mut bytes),
        Err(RegionError::NotMapped { .. })
    ));
}

#[test]
fn a_mapping_that_does_not_fit_is_refused_and_changes_nothing() {
    let (mut channel, mut back) = channel(setup());
    assert!(back.round(&mut channel, Request::ShmemMap(map(4, 4), file(4))).1.is_ok());
    let before = channel.regions().mappings(1);
    let p = page();
    let wrong = [
        ShmemMap { shmid: 0, ..map(0, 1) },
        ShmemMap { shmid: 255, ..map(0, 1) },
        map(16, 1),
        map(15, 2),
        map(0, 17),
        ShmemMap { shmid: 7, ..map(3, 2) },
        map(4, 4),
        map(3, 2),
        map(7, 2),
        map(5, 1),
        map(0, 16),
        ShmemMap { shm_offset: 1, ..map(0, 1) },
        ShmemMap { len: p - 1, ..map(0, 1) },
        ShmemMap { fd_offset: 1, ..map(0, 1) },
        ShmemMap { fd_offset: 1 << 63, ..map(0, 1) },
        ShmemMap { shm_offset: u64::MAX - 2 * p + 1, ..map(0, 1) },
    ];
    for map in wrong {
        let reason = back.refused(&mut channel, Request::ShmemMap(map, file(4)));
        assert!(reason.starts_with("mapping into region"), "{map:?}: {reason}");
    }
    let (pipe, _writer) = std::io::pipe().expect("a pipe");
    back.refused(&mut channel, Request::ShmemMap(map(0, 1), pipe.into()));
    for unmap in [map(0, 1), map(4, 1), map(4, 5), map(5, 3), ShmemMap { shmid: 7, ..map(4, 4) }] {
        let reason = back.refused(&mut channel, Request::ShmemUnmap(unmap));
        assert!(reason.contains("no mapping of"), "{unmap:?}: {reason}");
    }
    assert_eq!(channel.regions().mappings(1), before);
    // Beside the one that is there, on both sides.
    for fits in [map(3, 1), map(8, 8)] {
        assert!(back.round(&mut channel, Request::ShmemMap(fits, file(8))).1.is_ok());
    }
}

#[test]
fn a_file_opened_for_reading_is_mapped_for_reading_only() {
    let (mut channel, mut back) = channel(setup());
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("f");
    std::fs::write(&path, vec![5; 4 * 65536]).expect("room");
    let open = || OwnedFd::from(std::fs::File::open(&path).expect("a file"));
    back.refused(&mut channel, Request::ShmemMap(map(0, 1), open()));
    let read_only = ShmemMap { flags: 0, ..map(0, 1) };
    let (event, answer) = back.round(&mut channel, Request::ShmemMap(read_only, open()));
    assert!(matches!(event, ChannelEvent::Map { writable: false, .. }) && answer.is_ok());
    assert_eq!(byte(channel.regions(), 0), Ok(5));
}

#[test]
fn what_lies_behind_the_end_of_a_file_is_not_there_until_it_grows() {
    let (mut channel, mut back) = channel(setup());
    let file = std::fs::File::from(file(4));
    let theirs = file.try_clone().expect("a descriptor");
    assert!(back.round(&mut channel, Request::ShmemMap(map(0, 4), theirs.into())).1.is_ok());
    file.set_len(0).expect("cut");
    assert!(matches!(byte(channel.regions(), page()), Err(RegionError::NotMapped { .. })));
    file.set_len(page() + 1).expect("grown");
    assert_eq!(byte(channel.regions(), page()), Ok(0));
    assert!(matches!(byte(channel.regions(), 2 * page()), Err(RegionError::NotMapped { .. })));
    assert!(back.round(&mut channel, Request::ShmemUnmap(map(0, 4))).1.is_ok());
}

#[test]
fn regions_that_contradict_themselves_are_refused() {
    assert_eq!(
        SharedRegions::new(&config()).expect("fine").sizes(),
        [(1, 16 * page()), (7, 4 * page())]
    );
    assert!(SharedRegions::new(&ShmemConfig::default()).expect("none is fine").sizes().is_empty());
    for count in [0, 1, 3, u32::MAX] {
        let refused = SharedRegions::new(&ShmemConfig { count, ..config() });
        assert_eq!(refused.err(), Some(RegionError::Count { count, listed: 2 }));
    }
    let mut odd = config();
    odd.sizes[7] += 1;
    assert!(matches!(SharedRegions::new(&odd), Err(RegionError::Unaligned { .. })));
    let mut huge = config();
    huge.sizes[7] = u64::MAX - page() + 1;
    assert!(SharedRegions::new(&huge).is_ok(), "nothing is allocated for a size");
}

#[test]
fn a_gpu_allocation_is_mapped_when_it_is_plain_shared_memory() {
    let (mut channel, mut back) = channel(setup());
    let gpu = |handle_type| GpuMap {
        shmid: 1,
        shm_offset: page(),
        len: page(),
        handle_type,
        ..GpuMap::default()
    };
    for handle_type in [1, 2, 3, 99] {
        let reason = back.refused(&mut channel, Request::GpuMap(gpu(handle_type), file(1)));
        assert!(reason.contains("cannot be mapped here"), "{reason}");
    }
    let source = file(2);
    let (event, answer) = back.round(&mut channel, Request::GpuMap(gpu(GPU_HANDLE_SHM), source));
    assert!(matches!(event, ChannelEvent::Map { region: 1, .. }) && answer.is_ok());
    assert_eq!(byte(channel.regions(), page()), Ok(0));
    channel.regions().write(1, page(), &[9]).expect("writable");
    assert_eq!(byte(channel.regions(), page()), Ok(9));
    let unmap = map(1, 1);
    assert!(back.round(&mut channel, Request::ShmemUnmap(unmap)).1.is_ok());
}

#[test]
fn host_addresses_are_taken_from_this_process_only() {
    let memory = vec![0x5a_u8; 4 * usize::try_from(page()).expect("small")];
    let ptr = u64::try_from(memory.as_ptr().addr()).expect("64 bits");
    let external = ExternalMap { shmid: 1, len: page(), ptr, ..ExternalMap::default() };
    let (mut foreign, mut back) = channel(setup());
    let reason = back.refused(&mut foreign, Request::ExternalMap(external));
    assert!(reason.contains("another process"), "{reason}");
    assert!(foreign.regions().mappings(1).is_empty());

    let (mut own, mut back) = channel(ChannelSetup { same_process: true, ..setup() });
    for ptr in [1, page(), u64::MAX - page()] {
        let nowhere = ExternalMap { ptr, ..external };
        let reason = back.refused(&mut own, Request::ExternalMap(nowhere));
        assert!(reason.contains("cannot be used"), "{reason}");
    }
    assert!(back.round(&mut own, Request::ExternalMap(external)).1.is_ok());
    assert_eq!(byte(own.regions(), page() - 1), Ok(0x5a));
    assert_eq!(own.regions().write(1, 0, &[0]), Err(RegionError::Host { ptr }));
    drop(memory);
}

#[test]
fn mappings_that_came_are_known_by_their_features() {
    let without = ChannelSetup {
        protocol: all_protocol() - outboard_protocol::ProtocolFeatures::SHMEM,
        ..setup()
    };
    let (mut channel, mut back) = channel(without);
    back.machine.negotiate(all_protocol(), 0);
    let reason = back.refused(&mut channel, Request::ShmemMap(map(0, 1), file(1)));
    assert_eq!(reason, "SHMEM_MAP came without its feature");
}
