//! What idle chains keep is bounded, and what is kept is used again.

use std::sync::Arc;

use outboard_memory::{GuestMemory, Region, View};

use super::Chains;
use crate::budget::{FEW_PIECES, MOST_GROWN};
use crate::chain::Parts;
use crate::error::RingError;

fn view() -> View {
    let region = Region::memfd(0, 0x1000).unwrap().0;
    View::new(Arc::new(GuestMemory::new(1, vec![Arc::new(region)]).unwrap()))
}

fn taken(chains: &mut Chains, view: &View, head: u16) -> Result<Box<Parts>, RingError> {
    chains.take(head).map_or_else(|| chains.take_aside(head, view), Ok)
}

fn put(chains: &mut Chains, head: u16, parts: Box<Parts>) -> bool {
    assert_eq!(parts.head, head);
    chains.put_back(parts)
}

/// Takes the chain of `head`, fills it with `pieces` and puts it back. Returns what it held from before.
fn use_once(chains: &mut Chains, view: &View, head: u16, pieces: usize) -> usize {
    let table = view.cells(0, 16).unwrap().descriptors(0, 1).unwrap();
    let mut parts = taken(chains, view, head).unwrap();
    let before = parts.buffers.pieces();
    let mut gather = view.gather(&table, &mut parts.buffers);
    for _ in 0..pieces {
        gather.push(0, 1).unwrap();
    }
    let (_, pieces) = gather.finish(false);
    chains.charge(&mut parts, pieces).unwrap();
    assert!(put(chains, head, parts));
    before
}

#[test]
fn only_so_many_idle_chains_keep_a_long_list() {
    let (view, long) = (view(), usize::from(FEW_PIECES) + 1);
    let mut chains = Chains::new(256);
    for _ in 0..3 {
        for head in 0..256 {
            use_once(&mut chains, &view, head, long);
        }
    }
    assert_eq!((chains.budget.grown, chains.budget.charged), (MOST_GROWN, 0));
    let kept = (0..256).filter(|&head| use_once(&mut chains, &view, head, 1) > 0).count();
    assert_eq!(kept, MOST_GROWN);
}

#[test]
fn every_idle_chain_keeps_a_short_list() {
    let view = view();
    let mut chains = Chains::new(256);
    for head in 0..256 {
        assert_eq!(use_once(&mut chains, &view, head, usize::from(FEW_PIECES)), 0);
    }
    for head in 0..256 {
        assert_eq!(use_once(&mut chains, &view, head, 1), usize::from(FEW_PIECES));
    }
}

#[test]
fn a_chain_is_in_one_place_only() {
    let view = view();
    let mut chains = Chains::new(4);
    let parts = taken(&mut chains, &view, 2).unwrap();
    assert_eq!(taken(&mut chains, &view, 2).err(), Some(RingError::HeadInFlight { head: 2 }));
    assert_eq!(taken(&mut chains, &view, 4).err(), Some(RingError::Head { head: 4, size: 4 }));
    assert!(put(&mut chains, 2, parts));
    let mut other = Chains::new(4);
    let foreign = taken(&mut other, &view, 2).unwrap();
    assert!(!put(&mut chains, 2, foreign), "ours is idle: this is one of another queue");
}
