//! Sockets between two Debian guests of one `outboard serve`, which is replaced in the middle of a stream.

use crate::lab::{Lab, sound};
use anyhow::{Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use xtask::backend::{self, Device};
use xtask::guest::Guest;
use xtask::guest::qemu::Machine;

const LONG: Duration = Duration::from_secs(120);

/// Sends a file, tells, and sends it again; everything comes back from guest 4.
const THERE_AND_BACK: &str = "
dd if=/dev/urandom of=/tmp/a bs=64k count=32 2>/dev/null
until socat -u OPEN:/dev/null VSOCK-CONNECT:4:80 2>/dev/null; do sleep 0.1; done
mkfifo /tmp/f
socat -t 60 -b 65536 - VSOCK-CONNECT:4:80 < /tmp/f > /tmp/back 2> /tmp/said &
exec 3> /tmp/f
{ IFS= read -r word < /dev/ttyS1; echo $word > /tmp/word; } &
cat /tmp/a >&3
echo half
while [ ! -s /tmp/word ]; do sleep 0.1; done
cat /tmp/a >&3
exec 3>&-
wait
cat /tmp/said
cat /tmp/a /tmp/a > /tmp/all
cmp /tmp/all /tmp/back && echo same
wc -c < /tmp/back
";

fn serve(file: &Path, dir: &Path, more: &[&str]) -> Result<Device> {
    let mut command = Command::new(backend::outboard()?);
    Device::start(command.arg("serve").arg(file).args(more).current_dir(dir), dir, "three")
}

fn guest(lab: &Lab, name: &str) -> Result<Guest> {
    let dir = lab.path().join(name);
    fs::create_dir(&dir)?;
    let machine = Machine {
        modules: vec!["vsock", "vmw_vsock_virtio_transport"],
        programs: vec!["usr/bin/socat"],
        ..Machine::default()
    };
    let socket = backend::socket(lab.path(), name);
    machine.with_device("vhost-user-vsock-pci", &socket).boot(&lab.root, &dir)
}

#[test]
fn a_stream_from_guest_to_guest_goes_on_while_their_devices_are_replaced() -> Result<()> {
    let Some(lab) = Lab::open(|| backend::outboard().map(drop))? else { return Ok(()) };
    let file = lab.path().join("two.toml");
    let socket = |name| backend::socket(lab.path(), name);
    let device = |name, cid| {
        let (socket, path) = (socket(name), lab.path().join(format!("vm{cid}")));
        format!(
            "[[device]]\ntype = \"vsock\"\nname = \"{name}\"\nsocket-path = {socket:?}\n\
             guest-cid = {cid}\nuds-path = {path:?}\ngroup = [\"pair\"]\n"
        )
    };
    fs::write(&file, format!("control = \"ctl\"\n{}{}", device("three", 3), device("four", 4)))?;
    let mut old = serve(&file, lab.path(), &[])?;
    let mut three = sound(guest(&lab, "three"), &old)?;
    let mut four = sound(guest(&lab, "four"), &old)?;
    four.start("socat -t 60 -b 65536 VSOCK-LISTEN:80,fork EXEC:/bin/cat")?;
    three.start(THERE_AND_BACK)?;
    sound(three.expect("half", LONG), &old)?;
    let new = serve(&file, lab.path(), &["--take-over", "ctl"])?;
    let end = Instant::now() + LONG;
    while old.lives()? {
        ensure!(Instant::now() < end, "the old program stays\n{}", new.said());
        std::thread::sleep(Duration::from_millis(5)); // its end sends no event that is waited for here
    }
    three.say("go")?;
    let said = sound(three.finish(LONG), &new)?;
    ensure!(said.lines().last() == Some(&(64 << 16).to_string()), "{said}\n{}", new.said());
    drop((three, four));
    new.terminate()
}
