//! `outboard net` on an interface of the host, in a network of its own: a Debian guest talks over it.

use crate::lab::{Lab, sound};
use anyhow::{Context as _, Result, ensure};
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use xtask::backend::{self, Device};
use xtask::guest::Guest;
use xtask::guest::qemu::Machine;
use xtask::process::{self, Running};

pub(crate) const LONG: Duration = Duration::from_secs(120);
/// Bytes that go each way.
const BULK: usize = 4 << 20;

/// The card's address and name in the guest.
pub(crate) const UP: &str = "
for at in 1 2 3 4 5 6 7 8 9 10; do [ -e /sys/class/net/eth0 ] && break; sleep 0.2; done
ip link set eth0 up
ip addr add 10.7.0.2/24 dev eth0
";

/// The features that the guest has taken, the smallest first, as the kernel shows them.
const FEATURES: &str = "cat /sys/class/net/eth0/device/features";

/// A socket on which a newer program can take over.
const CONTROL: &str = "net.ctl";

/// A device in a network of its own, with the programs of busybox in it.
pub(crate) struct Network<'a> {
    lab: &'a Lab,
    pub(crate) device: Device,
}

impl<'a> Network<'a> {
    /// Starts `outboard net` on the interface up0, which is up then.
    fn start(lab: &'a Lab, arguments: &[&str]) -> Result<Self> {
        Self::named("net", lab, arguments)
    }

    /// One of several.
    pub(crate) fn named(name: &str, lab: &'a Lab, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(lab.root.path("bin/busybox"));
        command.args(["unshare", "-n"]).arg(backend::outboard()?);
        command.args(["net", "--tap", "up0"]).args(arguments);
        command.arg("--socket-path").arg(backend::socket(lab.path(), name));
        if name == "net" {
            command.arg("--control").arg(lab.path().join(CONTROL));
        }
        let device = Device::start(&mut command, lab.path(), name)?;
        let network = Self { lab, device };
        // The same in every network, as a gateway that a guest finds again after a move.
        network.run(&["ip", "link", "set", "up0", "address", "02:00:00:00:07:01"])?;
        network.run(&["ip", "addr", "add", "10.7.0.1/24", "dev", "up0"])?;
        network.run(&["ip", "link", "set", "up0", "up"])?;
        Ok(network)
    }

    /// A new program takes the card over, and the old one ends.
    fn take_over(&mut self, arguments: &[&str]) -> Result<()> {
        let program = backend::outboard()?;
        let program = program.to_str().context("a path that is text")?;
        let control = self.lab.path().join(CONTROL);
        let control = control.to_str().context("a path that is text")?;
        let words = ["nsenter", "-t", &self.device.pid().to_string(), "-n", program, "net"];
        let mut command = Command::new(self.lab.root.path("bin/busybox"));
        command.args(words).args(["--tap", "up0", "--take-over", control]).args(arguments);
        let next = Device::start(&mut command, self.lab.path(), "net")?;
        let mut old = std::mem::replace(&mut self.device, next);
        let end = Instant::now() + LONG;
        while old.lives()? {
            ensure!(Instant::now() < end, "the old program does not end");
            std::thread::sleep(Duration::from_millis(10)); // std has no wait with a bound
        }
        Ok(())
    }

    fn command(&self, words: &[&str]) -> Command {
        let busybox = self.lab.root.path("bin/busybox");
        let mut command = Command::new(&busybox);
        command.args(["nsenter", "-t", &self.device.pid().to_string(), "-n"]);
        command.arg(&busybox).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Result<String> {
        process::output(&mut self.command(words))
    }

    /// A program that runs until it is dropped, or ends by itself; its output goes to `to`.
    fn spawn(&self, words: &[&str], to: Stdio) -> Result<Running> {
        // Its input stays open: nc takes its end for that of the connection.
        let child = self.command(words).stdin(Stdio::piped()).stdout(to).spawn()?;
        Ok(Running(child))
    }

    /// Sends `file` to the guest and takes it back, and compares what arrived.
    fn bulk(&self, guest: &mut Guest) -> Result<()> {
        let folder = self.lab.path();
        let sent = std::fs::read(folder.join("bulk"))?;
        let web = folder.to_str().context("a path that is text")?;
        let _server = self.spawn(&["httpd", "-f", "-p", "8080", "-h", web], Stdio::null())?;
        let back = folder.join("back");
        let taker = self.spawn(&["nc", "-l", "-p", "9000"], File::create(&back)?.into())?;
        let fetch = "
            for at in 1 2 3 4 5; do wget -q -O /tmp/bulk http://10.7.0.1:8080/bulk && break; sleep 0.5; done
            nc 10.7.0.1 9000 < /tmp/bulk
            wc -c < /tmp/bulk";
        let said = sound(guest.run(fetch, LONG), &self.device)?;
        ensure!(said.trim() == BULK.to_string(), "{said} bytes of {BULK} arrived");
        ended(taker)?;
        let back = std::fs::read(back)?;
        let same = back.iter().zip(&sent).take_while(|(back, sent)| back == sent).count();
        let (came, went) = (back.len(), sent.len());
        ensure!(back == sent, "{came} bytes came back of {went}, the first {same} of them right");
        Ok(())
    }
}

/// What the guest's ethtool is to say of offloads that QEMU has passed on.
const OFFLOADS: &[&str] = &[
    "tx-checksumming: on",
    "rx-checksumming: on",
    "scatter-gather: on",
    "tx-tcp-segmentation: on",
    "tx-tcp6-segmentation: on",
];

/// iperf3, from the guest to the host and back, over as many connections as there are pairs of queues.
fn iperf3(network: &Network<'_>, guest: &mut Guest, pairs: u16) -> Result<()> {
    let program = network.lab.root.command("usr/bin/iperf3");
    let words = std::iter::once(program.get_program()).chain(program.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<_> = words.iter().map(String::as_str).chain(["-s"]).collect();
    let mut server = network.command(&[]);
    server.arg("env").args(words).stdout(Stdio::null());
    let _server = Running(server.spawn()?);
    let seconds = std::env::var("OUTBOARD_IPERF_SECONDS").unwrap_or_else(|_| "1".into());
    for (way, option) in [("guest to host", ""), ("host to guest", "-R")] {
        let script = format!(
            "for at in $(seq 50); do nc -z 10.7.0.1 5201 && break; sleep 0.1; done
             iperf3 -c 10.7.0.1 -t {seconds} -P {pairs} {option} -f m"
        );
        let said = sound(guest.run(&script, LONG), &network.device)?;
        let sums: Vec<_> = said.lines().filter(|line| line.contains("receiver")).collect();
        let sum = sums.last().with_context(|| format!("no sum: {said}"))?;
        println!("{pairs} pairs, {way}: {sum}");
        assert!(!sum.contains(" 0.00 "), "{said}");
    }
    Ok(())
}

/// Waits for a program that ends by itself.
fn ended(mut child: Running) -> Result<()> {
    let end = Instant::now() + LONG;
    while wait(&mut child.0)?.is_none() {
        ensure!(Instant::now() < end, "it does not end");
        std::thread::sleep(Duration::from_millis(10)); // std has no wait with a bound
    }
    Ok(())
}

fn wait(child: &mut Child) -> Result<Option<()>> {
    Ok(child.try_wait()?.map(drop))
}

/// The packages, our program, and the right to make networks.
pub(crate) fn lab() -> Result<Option<Lab>> {
    Lab::open(|| {
        backend::outboard()?;
        let tun = File::options().read(true).write(true).open("/dev/net/tun");
        tun.context("no /dev/net/tun")?;
        let mut probe = Command::new("unshare");
        let made = probe.args(["-n", "true"]).stderr(Stdio::null()).status()?;
        ensure!(made.success(), "this process may not make networks");
        Ok(())
    })
}

/// A guest with a card of so many pairs of queues behind the socket.
fn guest(lab: &Lab, socket: &Path, pairs: u16, more: &str) -> Result<Guest> {
    machine(socket, pairs, more).boot(&lab.root, lab.path())
}

/// What it runs on.
pub(crate) fn machine(socket: &Path, pairs: u16, more: &str) -> Machine {
    let chardev = format!("socket,id=net,path={},reconnect-ms=100", socket.display());
    let netdev = format!("vhost-user,id=n,chardev=net,queues={pairs}");
    let vectors = 2 * pairs + 2;
    let device = format!("virtio-net-pci,netdev=n,romfile=,mq=on,vectors={vectors}{more}");
    let programs = vec!["usr/bin/iperf3", "sbin/ethtool"];
    let modules = vec!["virtio_net"];
    let machine = Machine { cpus: pairs, modules, programs, ..Machine::default() };
    machine.with(&["-chardev", &chardev, "-netdev", &netdev, "-device", &device])
}

/// Random bytes: nothing repeats that could arrive in another place unseen.
fn bulk(lab: &Lab) -> Result<()> {
    let mut bytes = vec![0; BULK];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    Ok(std::fs::write(lab.path().join("bulk"), bytes)?)
}

/// Offloads, an MTU, a reboot, and a device that is killed and started again.
#[test]
fn a_guest_talks_over_an_interface_with_offloads_also_when_the_card_was_replaced_and_killed()
-> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    bulk(&lab)?;
    let mut network = Network::start(&lab, &["--mtu", "1400"])?;
    let (socket, device) = (network.device.socket.clone(), &network.device);
    let mut guest = sound(guest(&lab, &socket, 1, ",host_mtu=1400"), device)?;
    sound(guest.run(UP, LONG), device)?;
    let said = sound(guest.run("ping -c 3 10.7.0.1; cat /sys/class/net/eth0/mtu", LONG), device)?;
    assert!(said.contains("3 packets received") && said.ends_with("1400\n"), "{said}");
    let taken = sound(guest.run(FEATURES, LONG), device)?;
    // CSUM, GUEST_CSUM, MTU, GUEST_TSO4 and 6, HOST_TSO4 and 6, MRG_RXBUF. (QEMU keeps USO for its own TAP.)
    for bit in [0, 1, 3, 7, 8, 11, 12, 15] {
        assert_eq!(taken.as_bytes().get(bit), Some(&b'1'), "feature {bit} of {taken}");
    }
    let offloads = sound(guest.run("ethtool -k eth0", LONG), device)?;
    for offload in OFFLOADS {
        assert!(offloads.contains(offload), "{offload}: {offloads}");
    }
    network.bulk(&mut guest)?;
    iperf3(&network, &mut guest, 1)?;
    sound(guest.reboot(), device)?;
    sound(guest.run(UP, LONG), device)?;
    network.bulk(&mut guest)?;

    // A new program takes over in the middle of a transfer.
    let web = lab.path().to_str().context("a path that is text")?;
    let server = network.spawn(&["httpd", "-f", "-p", "8081", "-h", web], Stdio::null())?;
    let fetch = "
        echo fetching
        for at in $(seq 8); do wget -q -O /tmp/again http://10.7.0.1:8081/bulk; cmp /tmp/again /tmp/bulk; done";
    guest.start(fetch)?;
    guest.expect("fetching", LONG)?;
    network.take_over(&["--mtu", "1400"])?;
    sound(guest.finish(LONG), &network.device)?;
    drop(server);

    drop(network); // SIGKILL
    let network = Network::start(&lab, &["--mtu", "1400"])?;
    let again = "
        for at in $(seq 100); do ping -c 1 -W 1 10.7.0.1 > /dev/null && break; sleep 0.1; done
        ping -c 3 10.7.0.1";
    let said = sound(guest.run(again, LONG), &network.device)?;
    assert!(said.contains("3 packets received"), "{said}");
    network.bulk(&mut guest)?;
    sound(guest.power_off(), &network.device)?;
    network.device.terminate()
}

#[test]
fn a_guest_uses_two_and_four_pairs_of_queues() -> Result<()> {
    for pairs in [2, 4] {
        let Some(lab) = lab()? else { return Ok(()) };
        bulk(&lab)?;
        let network = Network::start(&lab, &["--queue-pairs", &pairs.to_string()])?;
        let device = &network.device;
        let mut guest = sound(guest(&lab, &device.socket, pairs, ""), device)?;
        sound(guest.run(UP, LONG), device)?;
        let queues = "ls /sys/class/net/eth0/queues | grep -c rx";
        let said = sound(guest.run(queues, LONG), device)?;
        assert_eq!(said.trim(), pairs.to_string());
        let channels = sound(guest.run("ethtool -l eth0", LONG), device)?;
        let combined = format!("Combined:\t{pairs}");
        assert_eq!(channels.matches(&combined).count(), 2, "most and current: {channels}");
        iperf3(&network, &mut guest, pairs)?;
        network.bulk(&mut guest)?;
        // Every one of them: the kernel chooses by the connection.
        let many = "
            for at in $(seq 24); do
                (wget -q -O - http://10.7.0.1:8080/small | grep -q right && echo got) &
            done
            wait";
        std::fs::write(lab.path().join("small"), "right\n")?;
        let web = lab.path().to_str().context("a path that is text")?.to_owned();
        let _server = network.spawn(&["httpd", "-f", "-p", "8080", "-h", &web], Stdio::null())?;
        let said = sound(guest.run(many, LONG), device)?;
        assert_eq!(said.matches("got").count(), 24, "{said}");
        sound(guest.power_off(), device)?;
        network.device.terminate()?;
    }
    Ok(())
}
