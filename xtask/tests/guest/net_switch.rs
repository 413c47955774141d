//! `outboard switch` between two Debian guests and an interface of the host: every packet arrives.
//!
//! pktgen, the kernel's generator, sends to a port where nobody listens, and the other guest's kernel counts what comes
//! there: `OUTBOARD_ROUNDS` packets, 10,000 without.

use crate::lab::{Lab, sound};
use crate::net::lab;
use anyhow::{Context as _, Result};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use xtask::backend::{self, Device};
use xtask::guest::Guest;
use xtask::guest::qemu::Machine;
use xtask::process;

const LONG: Duration = Duration::from_secs(600);

/// A guest on a port of the switch; `at` is the end of its addresses.
fn guest(lab: &Lab, socket: &Path, at: u8) -> Result<Guest> {
    let dir = lab.path().join(format!("guest{at}"));
    std::fs::create_dir(&dir)?;
    let chardev = format!("socket,id=net,path={}", socket.display());
    let device = format!("virtio-net-pci,netdev=n,romfile=,mac=52:54:00:00:07:{at:02x}");
    let modules = vec!["virtio_net", "pktgen"];
    let machine = Machine { modules, programs: vec!["usr/bin/iperf3"], ..Machine::default() };
    let net = ["-chardev", &chardev, "-netdev", "vhost-user,id=n,chardev=net", "-device", &device];
    let mut guest = machine.with(&net).boot(&lab.root, &dir)?;
    let up = format!(
        "for at in $(seq 50); do [ -e /sys/class/net/eth0 ] && break; sleep 0.1; done
         ip link set lo up; ip link set eth0 up; ip addr add 10.7.0.{at}/24 dev eth0"
    );
    guest.run(&up, LONG)?;
    Ok(guest)
}

/// The switch with two ports, and an interface of a network of its own.
fn switch(lab: &Lab) -> Result<Device> {
    let mut command = Command::new(lab.root.path("bin/busybox"));
    command.args(["unshare", "-n"]).arg(backend::outboard()?).args(["switch", "--tap", "up0"]);
    for port in ["two", "one"] {
        command.arg("--port").arg(backend::socket(lab.path(), port));
    }
    let device = Device::start(&mut command, lab.path(), "one")?;
    for words in ["ip addr add 10.7.0.1/24 dev up0", "ip link set up0 up"] {
        inside(lab, &device, words)?;
    }
    Ok(device)
}

/// Runs a command of busybox in the switch's network.
fn inside(lab: &Lab, device: &Device, words: &str) -> Result<String> {
    let busybox = lab.root.path("bin/busybox");
    let mut command = Command::new(&busybox);
    command.args(["nsenter", "-t", &device.pid().to_string(), "-n"]).arg(&busybox);
    process::output(command.args(words.split(' ')))
}

/// UDP packets that came for a port where nobody listens.
fn unheard(guest: &mut Guest) -> Result<u64> {
    let said = guest.run("grep Udp: /proc/net/snmp", LONG)?;
    let mut rows = said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let (names, counts) = (rows.next().context("no names")?, rows.next().context("no counts")?);
    let at = names.iter().position(|name| *name == "NoPorts").context("no NoPorts")?;
    Ok(counts.get(at).context("no count")?.parse()?)
}

#[test]
fn every_packet_of_a_guest_reaches_the_other_one_through_the_switch() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let count: u64 = std::env::var("OUTBOARD_ROUNDS").map_or(Ok(10_000), |text| text.parse())?;
    let device = switch(&lab)?;
    let mut one = sound(guest(&lab, &backend::socket(lab.path(), "one"), 2), &device)?;
    let mut two = sound(guest(&lab, &backend::socket(lab.path(), "two"), 3), &device)?;
    let talk = "ping -c 3 10.7.0.3; ping -c 3 10.7.0.1";
    let said = sound(one.run(talk, LONG), &device)?;
    assert_eq!(said.matches("3 packets received").count(), 2, "{said}");
    let said = inside(&lab, &device, "ping -c 3 10.7.0.3")?;
    assert!(said.contains("3 packets received"), "{said}");

    sound(two.start("iperf3 -s -1 > /dev/null"), &device)?;
    let load = "for at in $(seq 100); do iperf3 -c 10.7.0.3 -t 1 -f m > /tmp/said && break; sleep 0.1; done; cat /tmp/said";
    let said = sound(one.run(load, LONG), &device)?;
    println!("{}", said.lines().find(|line| line.contains("receiver")).unwrap_or_default());
    sound(two.finish(LONG), &device)?;

    let before = sound(unheard(&mut two), &device)?;
    let send = format!(
        "echo add_device eth0 > /proc/net/pktgen/kpktgend_0
         for word in 'count {count}' 'pkt_size 60' 'delay 0' 'dst 10.7.0.3' 'dst_mac 52:54:00:00:07:03' \
             'src_min 10.7.0.2' 'src_max 10.7.0.2' 'udp_dst_min 9' 'udp_dst_max 9'; do
             echo \"$word\" > /proc/net/pktgen/eth0
         done
         echo start > /proc/net/pktgen/pgctrl
         grep -A 1 Result: /proc/net/pktgen/eth0"
    );
    let said = sound(one.run(&send, LONG), &device)?;
    println!("{said}");
    assert_eq!(sound(unheard(&mut two), &device)? - before, count, "{said}");
    sound(one.power_off(), &device)?;
    sound(two.power_off(), &device)?;
    device.terminate()
}
