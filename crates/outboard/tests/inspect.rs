//! What a device shows of itself while it is served (design.md, decision 11).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{PATIENCE, Rig, rang};
use outboard::{Fact, HandlerOptions, Inspect, LoopKind};

fn fact(inspect: &Inspect, name: &str) -> Option<Fact> {
    inspect.facts().into_iter().find(|(found, _)| found == name).map(|(_, fact)| fact)
}

fn shown() -> (Rig, Inspect) {
    let options = HandlerOptions::default();
    let inspect = options.inspect.clone();
    let mut rig = Rig::bare(LoopKind::Auto, options);
    rig.negotiate(common::FEATURES);
    rig.front.set_mem_table(rig.memory.regions()).unwrap();
    (rig, inspect)
}

#[test]
fn a_session_shows_its_front_end_its_memory_and_its_rings() {
    let (mut rig, inspect) = shown();
    assert_eq!(fact(&inspect, "front-end/connected"), Some(Fact::Flag(true)));
    assert_eq!(fact(&inspect, "front-end/rings"), Some(Fact::from("split")));
    assert_eq!(fact(&inspect, "memory/regions"), Some(Fact::Number(1)));
    assert_eq!(fact(&inspect, "memory/bytes"), Some(Fact::Number(1 << 20)));
    assert_eq!(fact(&inspect, "rings/0/name"), Some(Fact::from("a")));
    assert_eq!(fact(&inspect, "rings/0/state"), Some(Fact::from("stopped")));

    let mut ring = rig.started(0);
    assert_eq!(fact(&inspect, "rings/0/state"), Some(Fact::from("running")));
    assert_eq!(fact(&inspect, "rings/0/enabled"), Some(Fact::Flag(true)));
    assert_eq!(fact(&inspect, "rings/0/size"), Some(Fact::Number(common::SIZE.into())));
    assert_eq!(fact(&inspect, "rings/1/state"), Some(Fact::from("stopped")));
    for _ in 0..5 {
        ring.round(b"counted");
    }
    rig.front.get_vring_base(0).unwrap();
    assert_eq!(fact(&inspect, "rings/0/state"), Some(Fact::from("stopped")));
    assert_eq!(fact(&inspect, "rings/0/finished"), Some(Fact::Number(5)));
    assert!(matches!(fact(&inspect, "rings/0/calls"), Some(Fact::Number(1..=6))));
}

#[test]
fn a_session_that_is_over_leaves_only_what_it_counted() {
    let (mut rig, inspect) = shown();
    rig.started(0).round(b"counted");
    rig.leave().0.unwrap();
    assert_eq!(fact(&inspect, "front-end/connected"), Some(Fact::Flag(false)));
    assert_eq!(fact(&inspect, "front-end/sessions"), Some(Fact::Number(1)));
    assert_eq!(fact(&inspect, "rings/0/finished"), Some(Fact::Number(1)));
    for gone in ["front-end/features", "memory/regions", "rings/0/state", "rings/0/name"] {
        assert_eq!(fact(&inspect, gone), None, "{gone}");
    }
}

#[test]
fn a_ring_that_its_driver_broke_shows_why_until_it_is_set_up_anew() {
    let (mut rig, inspect) = shown();
    let ring = rig.started(0);
    // The available index runs far ahead (virtio 1.3 §2.7.13.3).
    let available = usize::try_from(ring.layout.avail - ring.area.guest() + 2).unwrap();
    ring.area.write(available, &0x4000u16.to_le_bytes()).unwrap();
    ring.kick();
    assert!(rang(&ring.err, PATIENCE), "the ring is retired, and says so");
    let why = fact(&inspect, "rings/0/broken");
    assert!(matches!(&why, Some(Fact::Text(why)) if why.contains("index")), "{why:?}");
    assert_eq!(
        fact(&inspect, "rings/0/state"),
        Some(Fact::from("broken")),
        "nothing else was asked"
    );
    rig.front.get_features().unwrap();
    rig.front.set_vring_enable(0, true).unwrap();
    assert_eq!(fact(&inspect, "rings/0/state"), Some(Fact::from("broken")), "and stays so");
    rig.front.get_vring_base(0).unwrap();
    rig.started(0).round(b"again");
    assert_eq!(fact(&inspect, "rings/0/broken"), None);
    assert_eq!(fact(&inspect, "rings/0/state"), Some(Fact::from("running")));
}
