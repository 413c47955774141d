//! Several pairs of queues and the offloads that a driver turns on and off (virtio 1.3 §5.1.6.5.5, §5.1.6.5.6), on an
//! interface of the host with a name of its own, which nobody sets up.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use outboard::memory::Tap;
use outboard_devices::net::{Net, NetOptions, Switch, Uplink, Wire, feature};

use crate::guest::{ALL, BOTH, Guest, HEADER, MAC, packet};
use crate::rig::PATIENCE;

/// Says that this test does not run, as `xtask` reads it; fails when nothing may be skipped.
fn skip(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("SKIPPED {test}: {why}");
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!ci && std::env::var_os("OUTBOARD_NO_SKIPS").is_none(), "{line}");
    eprintln!("{line}");
    if let Some(list) = std::env::var_os("OUTBOARD_SKIPS") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(list);
        writeln!(file.expect("the list of skipped tests"), "{line}").expect("room in it");
    }
}

/// A card with so many pairs; None where this process may not make interfaces.
fn card(pairs: usize) -> Option<Net> {
    named_card("", pairs).map(|(net, _)| net)
}

/// A name that no other test gives: of an interface that is made again after it was deleted.
fn own_name(prefix: &str) -> String {
    format!("{prefix}{}", std::process::id())
}

/// [`card`], and its interface's name.
fn named_card(name: &str, pairs: usize) -> Option<(Net, String)> {
    let first = match Tap::open(name, true) {
        Ok(first) => first,
        Err(error) => {
            skip(&format!("no interface can be made: {error}"));
            return None;
        }
    };
    let name = first.name().to_owned();
    let mut taps = vec![Arc::new(first)];
    for _ in 1..pairs {
        taps.push(Arc::new(Tap::open(&name, true).expect("one more queue")));
    }
    let mut options = NetOptions::new(Wire::Tap(taps));
    options.mac = Some(MAC);
    Some((Net::new(&options).expect("a card"), name))
}

/// With all of its queues running, commands on the last one.
fn guest(net: Net, pairs: u16, events: outboard::LoopKind) -> Guest {
    let mut guest = Guest::of(net, events, u64::MAX);
    let queues: Vec<u16> = (0..=2 * pairs).collect();
    guest.rig.activate(&queues, 64);
    guest.control = usize::from(2 * pairs);
    guest
}

/// B65: pairs that there are not, offloads that nobody agreed on.
#[test]
fn b65_pairs_and_offloads_that_there_are_not_are_errors_and_change_nothing() {
    for events in BOTH {
        let Some(net) = card(2) else { return };
        let mut guest = guest(net, 2, events);
        assert_eq!(guest.rig.vmm.read_config(8, 2).expect("read"), [2, 0]);
        for (command, ack) in [
            (&[4, 0, 0, 0][..], 1),
            (&[4, 0, 3, 0], 1),
            (&[4, 0, 0xff, 0xff], 1),
            (&[4, 0, 2], 1),
            (&[4, 1, 1, 0], 1),
            (&[4, 0, 2, 0], 0),
            (&[4, 0, 1, 0], 0),
        ] {
            assert_eq!(guest.command(command, 1), Some(ack), "{command:?}");
        }
        let agreed = guest.rig.vmm.features() & feature::GUEST;
        assert_ne!(agreed & feature::GUEST_TSO4, 0, "the kernel knows it");
        for (offloads, ack) in
            [(agreed, 0), (feature::GUEST_CSUM, 0), (0, 0), (agreed | 1 << 10, 1), (u64::MAX, 1)]
        {
            let command = [&[5, 0][..], &offloads.to_le_bytes()].concat();
            assert_eq!(guest.command(&command, 1), Some(ack), "{offloads:#x}");
        }
        assert_eq!(guest.command(&[5, 0, 0, 0], 1), Some(1), "short");
        guest.rig.end();
    }
}

#[test]
fn a_card_with_fewer_pairs_refuses_the_state_of_one_whose_driver_uses_more() {
    let [Some(two), Some(same), Some(one)] = [card(2), card(2), card(1)] else { return };
    let mut source = guest(two, 2, BOTH[0]);
    assert_eq!(source.command(&[4, 0, 2, 0], 1), Some(0));
    source.rig.vmm.sleep().expect("stops");
    let state = source.rig.vmm.connection().save_state().expect("saved");
    for (net, fits) in [(same, true), (one, false)] {
        let mut next = Guest::of(net, BOTH[0], u64::MAX);
        let features = next.rig.vmm.features();
        next.rig.vmm.connection().set_features(features).expect("taken");
        assert_eq!(next.rig.vmm.connection().load_state(&state).is_ok(), fits);
        next.rig.end();
    }
    source.rig.end();
}

/// C27: an interface that is down takes nothing: counted, and the driver's ring goes on.
#[test]
fn c27_packets_for_an_interface_that_is_down_are_dropped_and_counted() {
    for events in BOTH {
        let Some(net) = card(1) else { return };
        let counters = net.counters().remove(0);
        let mut guest = guest(net, 1, events);
        for sent in 1..=100 {
            guest.send(&packet(ALL, 1, 60));
            assert_eq!(counters.link_down.get(), sent);
        }
        // A packet to be cut, and one whose checksum lies outside of it.
        let header = [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0];
        guest.send_raw(&[&header[..], &packet(ALL, 1, 1000)].concat());
        assert_eq!(counters.link_down.get(), 101);
        let lies: [u8; HEADER] = [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0];
        guest.send_raw(&[&lies[..], &packet(ALL, 1, 1000)].concat());
        assert_eq!((counters.link_down.get(), counters.malformed.get()), (101, 1));
        guest.rig.end();
    }
}

/// An interface that a test makes anew: it goes with the test, whatever becomes of that.
struct Made<'a>(&'a str);

impl Drop for Made<'_> {
    fn drop(&mut self) {
        let delete = ["link", "delete", self.0];
        let _ = Command::new("ip").args(delete).stderr(Stdio::null()).status();
    }
}

fn ip(args: &[&str]) {
    let done = Command::new("ip").args(args).status();
    assert!(done.expect("ip is here").success(), "{args:?}");
}

/// Waits until the driver reads this in `status`.
fn until_status(guest: &mut Guest, wanted: u8) {
    let end = Instant::now() + PATIENCE;
    while guest.rig.vmm.read_config(6, 1).expect("read")[0] != wanted {
        assert!(Instant::now() < end, "the driver is told: {wanted}");
        std::thread::yield_now();
    }
}

/// C27: an interface that somebody deletes under the card is a link that goes down: the driver is told without having
/// sent anything, its packets are dropped and counted, and commands are still answered. Made again by somebody, it is
/// a link that is up, and packets go through it.
#[test]
fn c27_an_interface_deleted_under_the_card_is_a_link_that_is_down_until_it_is_made_again() {
    for events in BOTH {
        let Some((net, name)) = named_card(&own_name("obc"), 1) else { return };
        let _made = Made(&name);
        let counters = net.counters().remove(0);
        let mut guest = guest(net, 1, events);
        until_status(&mut guest, 1);
        ip(&["link", "delete", &name]);
        until_status(&mut guest, 0);
        for sent in 1..=100 {
            guest.send(&packet(ALL, 1, 60));
            assert_eq!(counters.link_down.get(), sent);
        }
        assert_eq!(guest.command(&[0, 0, 1], 1), Some(0), "promiscuous");
        until_status(&mut guest, 0);
        ip(&["tuntap", "add", &name, "mode", "tap", "multi_queue", "vnet_hdr"]);
        until_status(&mut guest, 1);
        ip(&["link", "set", &name, "up"]);
        let end = Instant::now() + PATIENCE;
        while counters.sent.get() == 0 {
            assert!(Instant::now() < end, "packets go through");
            guest.send(&packet(ALL, 1, 60));
        }
        ip(&["link", "delete", &name]);
        until_status(&mut guest, 0);
        // As most people make one: with one queue.
        ip(&["tuntap", "add", &name, "mode", "tap", "vnet_hdr"]);
        until_status(&mut guest, 1);
        ip(&["link", "delete", &name]);
        until_status(&mut guest, 0);
        guest.rig.end();
    }
}

/// The same with several pairs: the card is up when the interface is, and each pair gets a queue of it again.
#[test]
fn c27_all_pairs_of_a_card_go_on_with_an_interface_that_was_made_again() {
    for events in BOTH {
        let Some((net, name)) = named_card(&own_name("obp"), 2) else { return };
        let _made = Made(&name);
        let counters = net.counters();
        let mut guest = guest(net, 2, events);
        assert_eq!(guest.command(&[4, 0, 2, 0], 1), Some(0), "both pairs");
        until_status(&mut guest, 1);
        ip(&["link", "delete", &name]);
        until_status(&mut guest, 0);
        ip(&["tuntap", "add", &name, "mode", "tap", "multi_queue", "vnet_hdr"]);
        until_status(&mut guest, 1);
        ip(&["link", "set", &name, "up"]);
        let at = guest.rig.at(1 << 20);
        guest.rig.store(at, &[&[0; HEADER][..], &packet(ALL, 1, 60)].concat());
        let end = Instant::now() + PATIENCE;
        while counters.iter().any(|pair| pair.sent.get() == 0) {
            assert!(Instant::now() < end, "packets go through each pair");
            for queue in [1, 3] {
                guest.rig.offer(queue, &[(at, 72)], &[], 1);
                guest.rig.back(queue);
            }
        }
        ip(&["link", "delete", &name]);
        guest.rig.end();
    }
}

/// The same under a switch's uplink: what is for the host is dropped and counted until the interface is there again.
#[test]
fn c27_an_interface_deleted_under_an_uplink_costs_packets_that_are_counted_until_it_is_made_again()
{
    let tap = match Tap::open(&own_name("obu"), false) {
        Ok(tap) => Arc::new(tap),
        Err(error) => return skip(&format!("no interface can be made: {error}")),
    };
    let name = tap.name().to_owned();
    let _made = Made(&name);
    let switch = Switch::new(2, 1500).expect("a switch");
    let up = Uplink::new(switch.plug("up").expect("a place"), &Wire::Tap(vec![tap]));
    let mut options = NetOptions::new(Wire::Port(switch.plug("card").expect("a place")));
    options.mac = Some(MAC);
    let mut guest = guest(Net::new(&options).expect("a card"), 1, BOTH[0]);
    let counted = |name: &str| switch.inspect().branch("ports").branch("up").counter(name).get();
    let mut until = |what: &str, more: &dyn Fn() -> bool| {
        let end = Instant::now() + PATIENCE;
        while !more() {
            assert!(Instant::now() < end, "{what}");
            guest.send(&packet(ALL, 1, 60));
        }
    };
    ip(&["link", "set", &name, "up"]);
    until("packets go through", &|| counted("received-packets") > 0);
    ip(&["link", "delete", &name]);
    until("packets are dropped", &|| counted("dropped-link-down") > 100);
    let before = counted("received-packets");
    ip(&["tuntap", "add", &name, "mode", "tap", "multi_queue", "vnet_hdr"]);
    ip(&["link", "set", &name, "up"]);
    until("packets go through again", &|| counted("received-packets") > before);
    ip(&["link", "delete", &name]);
    guest.rig.end();
    drop(up);
}
