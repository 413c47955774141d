//! `outboard vsock`: sockets between a guest, its host and other guests (virtio 1.3 §5.10).
//!
//! Invariant: a path that cannot be listened on is found before the socket exists.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use outboard_devices::vsock::{CONNECTIONS, Neighbours, Ports, ROOM, Vsock, VsockOptions, feature};

use crate::Failure;
use crate::device::{self, DeviceArgs, Kind, Made, Origin, Prepared};
use crate::lock::{Reach, SandboxArgs};

/// The guests of this process: `outboard serve` may have several.
static NEIGHBOURS: LazyLock<Neighbours> = LazyLock::new(Neighbours::new);

const EXAMPLES: &str = "\
Examples:
  outboard vsock --socket-path /run/vsock.sock --guest-cid 3 --uds-path /run/vm.vsock
  outboard vsock --socket-path /run/vsock.sock --guest-cid 3 --uds-path /run/vm.vsock \\
    --host-ports 1024-2047 --guest-ports 22

QEMU (its memory must be shared):
  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\
    -chardev socket,id=c,path=/run/vsock.sock -device vhost-user-vsock-pci,chardev=c ...

From the guest to the host: who listens on the Unix socket /run/vm.vsock_1234 is the host's port 1234:
  host:  socat UNIX-LISTEN:/run/vm.vsock_1234 -           guest: socat - VSOCK-CONNECT:2:1234
From the host to the guest: connect to /run/vm.vsock, say \"CONNECT 22\" and a line feed; the answer
\"OK\", a port and a line feed means that the guest's port 22 is at the other end, as with Firecracker
and cloud-hypervisor. For sockets with messages (SOCK_SEQPACKET) connect to /run/vm.vsock.seqpacket;
a guest's own reach /run/vm.vsock_PORT if that is such a socket.

From guest to guest: several devices of type vsock in one outboard serve; guest 3 reaches port 80 of
guest 4 as VSOCK-CONNECT:4:80 if they have a --group in common.

A slow host holds up its own connection only, with --buffer-size bytes; a guest without receive
buffers holds up itself. Connections go along with a live upgrade (--take-over, with the same --uds-path);
they do not move with a guest to another host: after a migration or a crash of this program the guest is
told that they are gone and makes new ones.
SIGTERM and SIGINT end the device and remove its sockets.";

/// Give a guest sockets to its host.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    device: DeviceArgs<Sockets>,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten, next_help_heading = "Sockets")]
    vsock: VsockArgs,
}

#[derive(clap::Args)]
struct VsockArgs {
    /// The guest's address, 3 or more.
    #[arg(long, value_name = "CID", default_value_t = 3)]
    guest_cid: u64,
    /// Where clients of the host find the guest; the guest finds servers at this path with _PORT behind it.
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    uds_path: Option<PathBuf>,
    /// Ports of the host that the guest may call: numbers and ranges, all or none.
    #[arg(long, value_name = "PORTS", default_value = "all")]
    host_ports: Ports,
    /// Ports of the guest that the host may call.
    #[arg(long, value_name = "PORTS", default_value = "all")]
    guest_ports: Ports,
    /// A group of guests of one program (outboard serve) that may reach each other (repeatable).
    #[arg(long, value_name = "NAME", default_value = "default")]
    group: Vec<String>,
    /// Connections at once; each has one descriptor here.
    #[arg(long, value_name = "NUMBER", default_value_t = CONNECTIONS)]
    max_connections: usize,
    /// What a guest may send on one connection before the host has read it, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = ROOM)]
    buffer_size: u32,
    /// Largest ring size that a front-end may choose, a power of two.
    #[arg(long, value_name = "ENTRIES", default_value_t = 256)]
    queue_size: u16,
}

/// What the common options have to know of sockets.
#[derive(Clone)]
struct Sockets;

impl Kind for Sockets {
    const CAPABILITIES: &str = r#"{"type":"vsock","features":[]}"#;
    const EXAMPLE: &str = "VIRTIO_VSOCK_F_SEQPACKET, ";

    fn feature(name: &str) -> Option<u64> {
        feature::by_name(name)
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    device::run(&args.device, &args.sandbox, args.vsock.reach(), || {
        args.vsock.make(args.device.takes_over())
    })
}

/// One of many devices.
pub(crate) fn prepare(args: &Args, origin: Origin<'_>) -> Result<Prepared, Failure> {
    args.sandbox.among()?;
    let inherits = origin.takes_over();
    device::prepare(&args.device, origin, || args.vsock.make(inherits))
}

impl VsockArgs {
    /// The sockets that it listens on go with it; those of the host's servers are connected to.
    fn reach(&self) -> Reach {
        let mut reach = Reach::default();
        self.uds_path.iter().for_each(|path| reach.socket(path));
        reach
    }

    fn make(&self, inherits: bool) -> Result<Made<Vsock>, Failure> {
        let path = self.uds_path.as_deref().unwrap_or(Path::new(""));
        let mut options = VsockOptions::new(self.guest_cid, path);
        options.host_ports = self.host_ports.clone();
        options.guest_ports = self.guest_ports.clone();
        options.groups = self.group.clone();
        options.connections = self.max_connections;
        options.room = self.buffer_size;
        options.queue_size = self.queue_size;
        options.inherits = inherits;
        let model = Vsock::new(options, &NEIGHBOURS).map_err(Failure::usage)?;
        let described = format!("sockets of guest {} on {}", self.guest_cid, path.display());
        Ok(Made { model, described: Box::new(move || described), begins: None })
    }
}
