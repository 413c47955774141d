//! `outboard vsock` is killed under a guest that sends all the time, and started again. QEMU 10 neither connects to sockets
//! again (`reconnect-ms` is for other devices) nor migrates a guest that has them ("non-migratable"): the card is
//! exchanged for a new one, as an operator would, and the guest goes on with new connections.

use crate::lab::{Lab, sound};
use anyhow::{Result, ensure};
use serde_json::json;
use std::io::Read as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use xtask::backend::{self, Device};
use xtask::guest::Guest;
use xtask::guest::qemu::Machine;
use xtask::guest::qmp::Monitor;

const LONG: Duration = Duration::from_secs(120);
/// What the host has read before anything happens.
const WARM: usize = 1 << 20;

/// Sends until the connection fails, which is the one thing it says; then makes a new one.
const LOAD: &str = "
socat -u -b 65536 OPEN:/dev/zero VSOCK-CONNECT:2:80 2> /tmp/said || true
cat /tmp/said
until echo a word | socat -u - VSOCK-CONNECT:2:81 2> /tmp/why; do sleep 0.1; done
";

/// A device, and where the host's servers are.
struct Side {
    path: PathBuf,
    device: Device,
}

impl Side {
    fn new(lab: &Lab, name: &str) -> Result<Self> {
        let path = lab.path().join(format!("{name}.vm"));
        let mut command = Command::new(backend::outboard()?);
        command.args(["vsock", "--guest-cid", "42", "--uds-path"]).arg(&path);
        command.arg("--socket-path").arg(backend::socket(lab.path(), name));
        Ok(Self { path, device: Device::start(&mut command, lab.path(), name)? })
    }

    fn listen(&self, port: u32) -> Result<UnixListener> {
        Ok(UnixListener::bind(format!("{}_{port}", self.path.display()))?)
    }
}

/// A guest whose sockets are in a slot, to be pulled and plugged in.
fn machine(device: &Device) -> Machine {
    let chardev = format!("socket,id=sockets0,path={}", device.socket.display());
    let machine = Machine {
        modules: vec!["vsock", "vmw_vsock_virtio_transport"],
        programs: vec!["usr/bin/socat"],
        ..Machine::default()
    };
    let machine = machine.with(&["-device", "pcie-root-port,id=port1,chassis=1"]);
    let device = "vhost-user-vsock-pci,id=card0,bus=port1,chardev=sockets0";
    machine.with(&["-chardev", &chardev, "-device", device])
}

/// The guest sends to a server of the host, which goes on reading to the end.
fn busy(guest: &mut Guest, side: &Side) -> Result<()> {
    let listener = side.listen(80)?;
    guest.start(LOAD)?;
    let mut stream = listener.accept()?.0;
    stream.set_read_timeout(Some(LONG))?;
    stream.read_exact(&mut vec![0; WARM])?;
    std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
    Ok(())
}

/// The guest's connection has ended with an error, and a new one reaches the host.
fn begins_anew(guest: &mut Guest, side: &Side, listener: &UnixListener) -> Result<()> {
    // It says so when it has made the new one, or has failed.
    let said = sound(guest.finish(LONG), &side.device)?;
    ensure!(said.contains(" E write("), "{said}");
    let mut word = String::new();
    let mut stream = listener.accept()?.0;
    stream.set_read_timeout(Some(LONG))?;
    stream.read_to_string(&mut word)?;
    ensure!(word == "a word\n", "{word:?}");
    Ok(())
}

/// QEMU does not connect to sockets again: who looks after the guest pulls the card and plugs a new one in.
fn exchange_card(monitor: &mut Monitor, device: &Device) -> Result<()> {
    monitor.execute("device_del", &json!({ "id": "card0" }))?;
    let address = json!({ "type": "unix", "data": { "path": device.socket } });
    let socket = json!({ "addr": address, "server": false });
    let chardev = json!({ "id": "sockets1", "backend": { "type": "socket", "data": socket } });
    monitor.execute("chardev-add", &chardev)?;
    let card = json!({
        "driver": "vhost-user-vsock-pci", "id": "card1", "bus": "port1", "chardev": "sockets1",
    });
    let end = Instant::now() + LONG;
    // The slot is free when the guest has let go of the old one, after some seconds.
    while let Err(error) = monitor.execute("device_add", &card) {
        ensure!(Instant::now() < end, "{error:#}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[test]
fn sockets_that_were_killed_under_load_begin_anew_in_a_new_card() -> Result<()> {
    let Some(lab) = Lab::open(|| backend::outboard().map(drop))? else { return Ok(()) };
    let mut side = Side::new(&lab, "here")?;
    let guest = machine(&side.device).boot(&lab.root, lab.path());
    let mut guest = sound(guest, &side.device)?;
    sound(busy(&mut guest, &side), &side.device)?;
    let listener = side.listen(81)?;
    drop(side);
    side = Side::new(&lab, "here")?;
    sound(exchange_card(&mut guest.monitor()?, &side.device), &side.device)?;
    begins_anew(&mut guest, &side, &listener)?;
    drop(guest);
    side.device.terminate()
}
