//! DPDK's own virtio driver (testpmd, virtio-user) sends through the switch of `outboard serve`, as fast as it can: what it
//! sent is what it received and what the switch counts as thrown away.

use crate::lab::{Lab, sound};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use xtask::backend::{self, Device};
use xtask::packages::Root;
use xtask::process::{self, Running};

const PATIENCE: Duration = Duration::from_secs(120);
/// Packets that each port is to get before the driver is stopped.
const ENOUGH: u64 = 20_000;
/// What may be in both rings of a port as they stop.
const RINGS: u64 = 2 * 256;

fn serve(lab: &Lab) -> Result<Device> {
    let mut text = "control = 'c'\n[[switch]]\nname = 'lan'\n".to_owned();
    for name in ["two", "one"] {
        text += &format!(
            "[[device]]\nname = '{name}'\ntype = 'net'\nswitch = 'lan'\nsocket-path = '{}'\n",
            backend::socket(lab.path(), name).display()
        );
    }
    std::fs::write(lab.path().join("lan.toml"), text)?;
    let mut command = Command::new(backend::outboard()?);
    command.current_dir(lab.path()).args(["serve", "lan.toml"]);
    Device::start(&mut command, lab.path(), "one")
}

/// A driver with a port on each card; each sends to the other one what nobody has asked for.
fn driver(lab: &Lab, ring: &str, log: &Path) -> Result<Running> {
    let mut command = Command::new(Root::peers()?.wrappers().join("dpdk-testpmd"));
    command.args(["--lcores=0,1", "--no-huge", "-m", "512", "--no-pci", "--no-telemetry"]);
    command.arg("--no-shconf");
    for (at, name) in ["one", "two"].iter().enumerate() {
        let path = backend::socket(lab.path(), name);
        let path = path.display();
        command
            .arg(format!("--vdev=net_virtio_user{at},path={path},queues=1,queue_size=256{ring}"));
    }
    command.args(["--", "--auto-start", "--stats-period=3600", "--total-num-mbufs=16384"]);
    command.args(["--nb-cores=1", "--forward-mode=flowgen"]);
    let file = File::create(log)?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    Ok(Running(command.spawn().context(process::shown(&command))?))
}

fn stats(lab: &Lab) -> Result<Value> {
    let mut command = Command::new(backend::outboard()?);
    command.current_dir(lab.path()).args(["ctl", "c", "--json", "stats"]);
    Ok(serde_json::from_str(&process::output(&mut command)?)?)
}

/// What is counted under a name, in all places but where a card shows what its switch counts.
fn sum(value: &Value, wanted: &str) -> u64 {
    let Some(inner) = value.as_object() else { return 0 };
    let of_one = |(name, value): (&String, &Value)| match value.as_u64() {
        Some(count) if name == wanted => count,
        _ if name == "switch" => 0,
        _ => sum(value, wanted),
    };
    inner.iter().map(of_one).sum()
}

/// The last `NAME: COUNT` of the driver's log: what all of its ports counted.
fn total(said: &str, name: &str) -> Result<u64> {
    let (_, after) = said.rsplit_once(&format!("{name}: ")).context("no totals")?;
    Ok(after.split_whitespace().next().context("no count")?.parse()?)
}

#[test]
fn what_dpdk_sends_through_the_switch_is_what_it_receives_and_what_is_counted() -> Result<()> {
    let Some(lab) = Lab::open(|| Root::peers().and(backend::outboard()).map(drop))? else {
        return Ok(());
    };
    for ring in ["", ",packed_vq=1", ",in_order=0"] {
        let (device, log) = (serve(&lab)?, lab.path().join("driver.log"));
        let mut driver = driver(&lab, ring, &log)?;
        let end = Instant::now() + PATIENCE;
        while ["one", "two"].iter().any(|name| {
            stats(&lab).map_or(0, |all| sum(&all["stats"][name], "received-packets")) < ENOUGH
        }) {
            let said = || xtask::guest::tail(&log, 20);
            ensure!(driver.0.try_wait()?.is_none(), "the driver ended: {}", said());
            ensure!(Instant::now() < end, "few packets: {:#}\n{}", stats(&lab)?, said());
        }
        driver.terminate()?;
        ensure!(driver.0.wait()?.success(), "{}", xtask::guest::tail(&log, 20));
        sound(adds_up(&lab, &std::fs::read_to_string(&log)?), &device)?;
        device.terminate()?;
    }
    Ok(())
}

fn adds_up(lab: &Lab, said: &str) -> Result<()> {
    let (transmitted, received) = (total(said, "TX-packets")?, total(said, "RX-packets")?);
    let end = Instant::now() + PATIENCE;
    loop {
        let all = stats(lab)?;
        let of = |name| sum(&all["stats"], name);
        // Each card, and the switch between them.
        let sent = of("sent-packets");
        let taken = sent + of("dropped-refused") + of("dropped-link-down") + of("malformed");
        let given = of("received-packets");
        let between = given + of("filtered") + of("too-large");
        let lost = of("dropped-passed-over") + of("dropped-stopped");
        let rings = (taken..=taken + RINGS).contains(&transmitted)
            && (received..=received + RINGS).contains(&given);
        if rings && sent + of("flooded-copies") - of("flooded") == between + lost {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{transmitted} sent, {received} received: {all:#}");
    }
}
