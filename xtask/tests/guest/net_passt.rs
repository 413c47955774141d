//! `outboard net --stream` on passt: a guest has a network that nobody needed rights for. passt gives it its address by
//! DHCP and carries its connections as sockets of the host.

use crate::lab::{Lab, sound};
use crate::net::{LONG, UP, lab, machine};
use anyhow::{Context as _, Result, ensure};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use xtask::backend::{self, Device};
use xtask::process::Running;

/// A network whose only interface goes nowhere: passt wants one to take its addresses from.
const NETWORK: &str = "
$0 tunctl -t away > /dev/null
$0 ip addr add 10.9.0.2/24 dev away
$0 ip link set away up
$0 ip link set lo up
$0 ip route add default via 10.9.0.1
cd $1
$0 httpd -p 127.0.0.1:8080 -h $1
shift
exec $*";

/// Takes an address as it is offered; what the router gives is the host's own.
const FETCH: &str = "
ip addr flush dev eth0
cat > /tmp/taken <<'END'
#!/bin/sh
[ \"$1\" = bound ] && ip addr add $ip/24 dev eth0 && ip route add default via $router && echo $ip $router
END
chmod +x /tmp/taken
udhcpc -i eth0 -n -q -s /tmp/taken
for at in 1 2 3 4 5; do wget -q -O /tmp/bulk http://10.9.0.1:8080/bulk && break; sleep 0.5; done
md5sum < /tmp/bulk";

/// passt and a server of files, in a network of their own.
fn passt(lab: &Lab) -> Result<Running> {
    let busybox = lab.root.path("bin/busybox");
    let program = lab.root.command("usr/bin/passt");
    let mut command = Command::new(&busybox);
    command.args(["unshare", "-n"]).arg(&busybox).args(["sh", "-euc", NETWORK]).arg(&busybox);
    command.arg(lab.path()).arg(program.get_program()).args(program.get_args());
    // Not as nobody, who has no way to the socket's folder.
    command.args(["-f", "--runas", "0", "--socket"]).arg(lab.path().join("passt.sock"));
    let log = std::fs::File::create(lab.path().join("passt.log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let running = Running(command.spawn()?);
    let end = Instant::now() + LONG;
    while !lab.path().join("passt.sock").exists() {
        let said = std::fs::read_to_string(lab.path().join("passt.log"))?;
        ensure!(Instant::now() < end, "passt does not listen: {said}");
        std::thread::sleep(Duration::from_millis(10)); // a socket's birth sends no event
    }
    Ok(running)
}

#[test]
fn a_guest_takes_its_address_from_passt_and_fetches_a_file_of_the_host() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let bytes: Vec<u8> =
        (0..1_u32 << 20).flat_map(|n| n.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
    std::fs::write(lab.path().join("bulk"), bytes)?;
    let sum = Command::new(lab.root.path("bin/busybox"))
        .arg("md5sum")
        .arg(lab.path().join("bulk"))
        .output()?;
    let sum = String::from_utf8(sum.stdout)?;
    let sum = sum.split(' ').next().context("no sum")?;
    let _passt = passt(&lab)?;
    let mut command = Command::new(backend::outboard()?);
    command.arg("net").arg("--stream").arg(lab.path().join("passt.sock"));
    command.arg("--socket-path").arg(backend::socket(lab.path(), "net"));
    let device = Device::start(&mut command, lab.path(), "net")?;
    let on = machine(&device.socket, 1, "");
    let mut guest = sound(on.boot(&lab.root, lab.path()), &device)?;
    sound(guest.run(UP, LONG), &device)?;
    let said = sound(guest.run(FETCH, LONG), &device)?;
    ensure!(said.contains("10.9.0.2 10.9.0.1"), "no address: {said}");
    ensure!(said.contains(sum), "not the file: {said}");
    sound(guest.power_off(), &device)?;
    device.terminate()
}
