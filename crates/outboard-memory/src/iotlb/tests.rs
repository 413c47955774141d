//! The table against a model of one permission and one place per byte, and its bounds.

use std::collections::BTreeMap;

use super::*;
use crate::error::AccessError;
use crate::view::View;

const PAGE: u64 = 4096;
const USER: u64 = 0x7000_0000;
const GUEST: u64 = 0x4000_0000;

/// Two regions of 64 pages, neighbours in front-end addresses.
fn memory() -> GuestMemory {
    let region = |at: u64| {
        let (region, file) = Region::memfd(GUEST + 4 * at, 64 * PAGE).expect("a memfd");
        let mut spec = *region.spec();
        drop(region);
        (spec.user_addr, spec.guest_addr) = (USER + at, GUEST + 4 * at);
        Arc::new(Region::map(spec, file, Default::default()).expect("mapped"))
    };
    GuestMemory::new(1, vec![region(0), region(64 * PAGE)]).expect("no overlap")
}

fn view(table: &Iotlb, memory: &GuestMemory) -> View {
    View::new(Arc::new(table.view(2, memory)))
}

fn host(view: &View, iova: u64, len: u64, access: Permission) -> Result<u64, AccessError> {
    view.find(iova, len, access).map(|host| crate::num::wide(host.addr()))
}

#[test]
fn what_was_put_in_is_found_and_nothing_beside_it() {
    let memory = memory();
    let mut table = Iotlb::new();
    assert_eq!(
        table.update(&memory, 0x10_0000, 2 * PAGE, USER + PAGE, Permission::BOTH),
        Ok(false)
    );
    let view = view(&table, &memory);
    let base = crate::num::wide(memory.regions()[0].host().addr());
    let both = Permission::BOTH;
    assert_eq!(host(&view, 0x10_0000, 2 * PAGE, both), Ok(base + PAGE));
    assert_eq!(host(&view, 0x10_1ffe, 2, both), Ok(base + 3 * PAGE - 2));
    let miss = |iova, len| Err(AccessError::Miss { iova, len, access: both });
    assert_eq!(host(&view, 0x10_1ffe, 4, both), miss(0x10_2000, 2));
    assert_eq!(host(&view, 0xf_fffe, 4, both), miss(0xf_fffe, 4));
    assert_eq!(host(&view, u64::MAX - 1, 4, both).ok(), None, "it wraps");
}

#[test]
fn a_permission_is_asked_for_and_not_exceeded() {
    let memory = memory();
    let mut table = Iotlb::new();
    table.update(&memory, 0, PAGE, USER, Permission::READ).expect("taken");
    table.update(&memory, PAGE, PAGE, USER + PAGE, Permission::WRITE).expect("taken");
    let view = view(&table, &memory);
    assert!(host(&view, 0, PAGE, Permission::READ).is_ok());
    let denied = |iova, access| Err(AccessError::Denied { iova, len: PAGE, access });
    assert_eq!(host(&view, 0, PAGE, Permission::WRITE), denied(0, Permission::WRITE));
    assert_eq!(host(&view, PAGE, PAGE, Permission::BOTH), denied(PAGE, Permission::BOTH));
    assert_eq!(
        view.write(0, &[1]),
        Err(AccessError::Denied { iova: 0, len: 1, access: Permission::WRITE })
    );
    assert!(view.write(PAGE, &[1]).is_ok());
    assert!(view.read(PAGE, &mut [0]).is_err());
}

#[test]
fn pages_that_are_neighbours_on_both_sides_are_one_entry_and_others_are_not() {
    let memory = memory();
    let mut table = Iotlb::new();
    for page in [3, 1, 2, 0] {
        table
            .update(&memory, page * PAGE, PAGE, USER + page * PAGE, Permission::BOTH)
            .expect("taken");
    }
    assert_eq!(table.len(), 1);
    // Neighbours in I/O addresses, but not below; and another permission.
    table.update(&memory, 4 * PAGE, PAGE, USER + 9 * PAGE, Permission::BOTH).expect("taken");
    table.update(&memory, 5 * PAGE, PAGE, USER + 10 * PAGE, Permission::READ).expect("taken");
    assert_eq!(table.len(), 3);
    let view = view(&table, &memory);
    assert!(host(&view, 0, 4 * PAGE, Permission::BOTH).is_ok());
    let scattered = Err(AccessError::Scattered { iova: 3 * PAGE, len: 2 * PAGE });
    assert_eq!(host(&view, 3 * PAGE, 2 * PAGE, Permission::BOTH), scattered);
    assert!(host(&view, 4 * PAGE, 2 * PAGE, Permission::READ).is_ok(), "two entries, one place");
}

#[test]
fn only_a_change_that_takes_something_away_has_to_be_waited_for() {
    let memory = memory();
    let mut table = Iotlb::new();
    let put = |table: &mut Iotlb, iova, size, user, permission| {
        table.update(&memory, iova, size, user, permission).expect("taken")
    };
    assert!(!put(&mut table, 0, 4 * PAGE, USER, Permission::READ));
    assert!(!put(&mut table, 0, 4 * PAGE, USER, Permission::READ), "the same again");
    assert!(!put(&mut table, PAGE, PAGE, USER + PAGE, Permission::BOTH), "more is permitted");
    assert!(put(&mut table, PAGE, PAGE, USER + PAGE, Permission::READ), "less is permitted");
    assert!(put(&mut table, PAGE, PAGE, USER + 2 * PAGE, Permission::READ), "elsewhere");
    assert!(!table.invalidate(4 * PAGE, u64::MAX - 4 * PAGE), "nothing is there");
    assert!(table.invalidate(4 * PAGE - 1, 1));
    assert!(!table.invalidate(4 * PAGE - 1, 1));
    assert!(table.clear());
    assert!(!table.clear());
}

/// Case A87: what makes no sense changes nothing.
#[test]
fn a_range_that_wraps_is_empty_or_leads_nowhere_is_refused() {
    let memory = memory();
    let mut table = Iotlb::new();
    let both = Permission::BOTH;
    for (iova, size) in [(0, 0), (u64::MAX, 2), (1, u64::MAX), (u64::MAX - PAGE, 2 * PAGE)] {
        let refused = Err(IotlbError::Range { iova, size });
        assert_eq!(table.update(&memory, iova, size, USER, both), refused);
    }
    for (user, size) in [(USER - 1, 2), (USER + 127 * PAGE, 2 * PAGE), (u64::MAX, 1), (0, PAGE)] {
        let refused = Err(IotlbError::Outside { user, size });
        assert_eq!(table.update(&memory, 0, size, user, both), refused);
    }
    assert!(table.is_empty());
    assert_eq!(Permission::from_bits(0), None);
    assert_eq!(Permission::from_bits(4), None);
}

#[test]
fn the_table_does_not_grow_without_bound_and_the_oldest_go() {
    let memory = memory();
    let mut table = Iotlb::new();
    let mut drained = 0;
    for entry in 0..100_000 {
        let user = USER + (entry % 2) * 8;
        let drain = table.update(&memory, entry * 16, 8, user, Permission::BOTH).expect("taken");
        drained += u32::from(drain);
        assert!(table.len() <= IOTLB_ENTRIES);
    }
    assert!((1..=100_000 / 512 + 1).contains(&drained), "{drained} waits");
    let view = view(&table, &memory);
    assert!(host(&view, 99_999 * 16, 8, Permission::BOTH).is_ok(), "the newest is there");
    assert!(host(&view, 0, 8, Permission::BOTH).is_err(), "the oldest is not");
    // One entry cut into pieces by invalidations: all of one age.
    table.clear();
    table.update(&memory, 0, 64 * PAGE, USER, Permission::BOTH).expect("taken");
    for hole in 0..10_000 {
        table.invalidate(hole * 16, 8);
        assert!(table.len() <= IOTLB_ENTRIES);
    }
}

#[test]
fn the_table_says_what_a_byte_by_byte_model_says() {
    let memory = memory();
    let mut table = Iotlb::new();
    let mut model: BTreeMap<u64, (u64, Permission)> = BTreeMap::new();
    let mut random = 0x9e37_79b9_u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for _ in 0..3000 {
        let (iova, size) = (next(96), 1 + next(24));
        if next(3) == 0 {
            let had = model.range(iova..iova + size).next().is_some();
            assert_eq!(table.invalidate(iova, size), had);
            model.retain(|at, _| !(iova..iova + size).contains(at));
        } else {
            let user = USER + next(64);
            let permission =
                Permission::from_bits(1 + u8::try_from(next(3)).expect("small")).expect("1 to 3");
            let lost = model
                .range(iova..iova + size)
                .any(|(at, (place, old))| *place != user + (at - iova) || !permission.allows(*old));
            let drain = table.update(&memory, iova, size, user, permission).expect("inside");
            assert!(drain >= lost, "a loss is told");
            for at in iova..iova + size {
                model.insert(at, (user + (at - iova), permission));
            }
        }
        let view = view(&table, &memory);
        let base = crate::num::wide(memory.regions()[0].host().addr());
        for at in 0..128 {
            let found = host(&view, at, 1, Permission::READ).ok();
            let place = model.get(&at).filter(|(_, have)| have.allows(Permission::READ));
            assert_eq!(found, place.map(|(user, _)| base + (user - USER)), "at {at}");
        }
    }
}
