//! `outboard net`: a network card on an interface of the host or on a stream socket, for a VMM (virtio 1.3 §5.1).
//!
//! Invariant: a link that cannot be made is found before the socket exists.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use outboard::inherited_descriptor;
use outboard::memory::Tap;
use outboard_devices::net::{MOST_PAIRS, Net, NetOptions, Stream, Wire, feature};

use crate::Failure;
use crate::device::{self, DeviceArgs, Kind, Made, Origin, Prepared};
use crate::lock::{Reach, SandboxArgs};
use crate::serve::lan::Plugged;

const EXAMPLES: &str = "\
Examples:
  outboard net --socket-path /run/net.sock --tap up0 --queue-pairs 2  on an interface of the host; made if it
                                                                      is not there. Then: ip link set up0 up
  outboard net --socket-path /run/net.sock --stream /run/passt.sock   through passt --socket /run/passt.sock
  outboard net --socket-path /run/a.sock --stream-listen /run/link &      two guests, back to back
  outboard net --socket-path /run/b.sock --stream /run/link

QEMU (its memory must be shared):
  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\
    -chardev socket,id=c,path=/run/net.sock -netdev vhost-user,id=n,chardev=c,queues=2 \\
    -device virtio-net-pci,netdev=n,mq=on,vectors=6,mac=52:54:00:12:34:56 ...
cloud-hypervisor:
  cloud-hypervisor --memory size=1G,shared=on --net vhost_user=true,socket=/run/net.sock ...

On an interface the guest leaves checksums and the cutting of large packets to the host, both ways (CSUM, TSO, USO).
A stream speaks as QEMU's -netdev stream: each packet follows its length, four bytes, big endian. When the
peer leaves the link is down; with --stream-listen the next peer brings it up again.
Cards of several guests that are connected to each other: outboard switch, or [[switch]] in a file of outboard serve.
SIGTERM and SIGINT end the device and remove its sockets.";

/// Give a guest a network card.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    device: DeviceArgs<Card>,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten, next_help_heading = "Network")]
    net: NetArgs,
}

#[derive(clap::Args)]
#[group(required = false)]
struct NetArgs {
    /// Connect the card to this TAP interface of the host.
    #[arg(long, value_name = "NAME", group = "wire")]
    tap: Option<String>,
    /// Connect the card to a TAP interface by an inherited descriptor; one for each pair of queues
    /// (repeatable).
    #[arg(long, value_name = "NUMBER", group = "wire")]
    tap_fd: Vec<RawFd>,
    /// Connect the card to who listens on this path: passt, or QEMU's stream with server=on.
    #[arg(long, value_name = "PATH", group = "wire")]
    stream: Option<PathBuf>,
    /// Connect the card to who connects to this path, one at a time.
    #[arg(long, value_name = "PATH", group = "wire")]
    stream_listen: Option<PathBuf>,
    /// The card's address; one of its own by default. (QEMU shows its guest its own.)
    #[arg(long, value_name = "ADDRESS", value_parser = parse_mac)]
    mac: Option<[u8; 6]>,
    /// The largest packet, without its header, that the guest is to send.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    mtu: Option<u16>,
    /// Write every packet to this file, for tcpdump and Wireshark.
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// Pairs of queues, each with a queue of the interface. (With --tap; as many as there are descriptors
    /// with --tap-fd, one with a stream.)
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MOST_PAIRS as i64))]
    queue_pairs: u16,
    /// Threads that serve the pairs; one for each by default.
    #[arg(long = "workers", alias = "threads", value_name = "NUMBER", default_value_t = 0)]
    threads: usize,
    /// Largest ring size that a front-end may choose, a power of two.
    #[arg(long, value_name = "ENTRIES", default_value_t = 1024)]
    queue_size: u16,
}

/// What the common options have to know of a card.
#[derive(Clone)]
struct Card;

impl Kind for Card {
    const CAPABILITIES: &str = r#"{"type":"net","features":[]}"#;
    const EXAMPLE: &str = "VIRTIO_NET_F_CTRL_VLAN, ";

    fn feature(name: &str) -> Option<u64> {
        feature::by_name(name)
    }

    /// Virtio 1.3 §5.1.3.1: what needs a feature goes with it.
    fn without(hidden: u64) -> u64 {
        feature::with_dependants(hidden)
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    device::run(&args.device, &args.sandbox, args.net.reach(), || args.net.make(None))
}

/// One of many devices.
pub(crate) fn prepare(args: &Args, mut origin: Origin<'_>) -> Result<Prepared, Failure> {
    args.sandbox.among()?;
    let port = origin.take_port();
    device::prepare(&args.device, origin, || args.net.make(port))
}

impl NetArgs {
    /// A socket that it listens on goes with it.
    fn reach(&self) -> Reach {
        let mut reach = Reach::default();
        self.stream_listen.iter().for_each(|path| reach.socket(path));
        reach
    }

    fn make(&self, port: Option<Plugged>) -> Result<Made<Net>, Failure> {
        let most = port.as_ref().map(|plugged| plugged.mtu);
        if let Some((mtu, most)) = self.mtu.zip(most).filter(|(mtu, most)| mtu > most) {
            return Err(Failure::Usage(format!("MTU {mtu}: the switch takes {most} at most")));
        }
        let (wire, link) = match port {
            Some(Plugged { port, switch, .. }) => {
                (Wire::Port(port), format!("the switch {switch}"))
            }
            None => self.wire()?,
        };
        let described = format!("a network card on {link}");
        let options = NetOptions {
            mac: self.mac,
            mtu: self.mtu.or(most),
            pcap: self.pcap.clone(),
            queue_size: self.queue_size,
            threads: self.threads,
            ..NetOptions::new(wire)
        };
        let model = Net::new(&options).map_err(Failure::usage)?;
        Ok(Made { model, described: Box::new(move || described), begins: None })
    }

    /// Where packets go, and that in words.
    fn wire(&self) -> Result<(Wire, String), Failure> {
        let pairs = usize::from(self.queue_pairs);
        if let Some(name) = &self.tap {
            let failed = |error| Failure::Usage(format!("interface {name}: {error}"));
            let tap = |_| Tap::open(name, pairs > 1).map(Arc::new).map_err(failed);
            let taps = (0..pairs).map(tap).collect::<Result<_, _>>()?;
            return Ok((Wire::Tap(taps), format!("the interface {name}")));
        }
        if !self.tap_fd.is_empty() {
            let tap = |fd: &RawFd| {
                let failed = |error| Failure::Usage(format!("descriptor {fd}: {error}"));
                inherited_descriptor(*fd).and_then(Tap::from_fd).map(Arc::new).map_err(failed)
            };
            let taps = self.tap_fd.iter().map(tap).collect::<Result<Vec<_>, _>>()?;
            let name = taps.first().map_or_else(String::new, |tap| tap.name().to_owned());
            return Ok((Wire::Tap(taps), format!("the interface {name}")));
        }
        let stream = match (&self.stream, &self.stream_listen) {
            (Some(path), _) => Stream::Connect(path.clone()),
            (None, Some(path)) => Stream::Listen(path.clone()),
            (None, None) => return Err(Failure::Usage(NO_LINK.to_owned())),
        };
        if pairs > 1 {
            return Err(Failure::Usage("a stream has one pair of queues".to_owned()));
        }
        let (Stream::Connect(path) | Stream::Listen(path)) = &stream;
        let link = path.display().to_string();
        Ok((Wire::Stream(stream), link))
    }
}

const NO_LINK: &str =
    "no link: say --tap NAME, --tap-fd NUMBER, --stream PATH or --stream-listen PATH";

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let digits =
            |part: &&str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        let part = parts.next().filter(digits);
        let parsed = part.and_then(|part| u8::from_str_radix(part, 16).ok());
        *byte = parsed.ok_or("an address looks like 52:54:00:12:34:56")?;
    }
    match parts.next() {
        None => Ok(mac),
        Some(_) => Err("an address has six bytes".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_six_bytes_with_colons() {
        assert_eq!(parse_mac("52:54:00:ab:CD:0f"), Ok([0x52, 0x54, 0, 0xab, 0xcd, 0x0f]));
        for wrong in [
            "",
            "52",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "5:54:00:12:34:56",
            "gg:54:00:12:34:56",
            "+2:54:00:12:34:56",
        ] {
            assert!(parse_mac(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_needs_a_feature_is_hidden_with_it() {
        let hidden = Card::without(feature::CTRL_VQ);
        assert_eq!(hidden & (feature::CONTROL | feature::MQ), feature::CONTROL | feature::MQ);
        assert_eq!(Card::without(feature::CSUM), feature::HOST);
        assert_eq!(Card::without(feature::GUEST_CSUM), feature::GUEST);
        assert_eq!(Card::without(feature::STATUS), feature::STATUS);
    }
}
