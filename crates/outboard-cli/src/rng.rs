//! `outboard rng`: a source of entropy for a VMM (virtio 1.3 §5.4).
//!
//! Invariant: a source that cannot be opened is found before the socket exists.

use std::path::PathBuf;
use std::time::Duration;

use outboard_devices::rng::{Limit, Rng, RngOptions};

use crate::Failure;
use crate::device::{self, DeviceArgs, Kind, Made, Origin, Prepared};
use crate::lock::{Reach, SandboxArgs};

const EXAMPLES: &str = "\
Examples:
  outboard rng --socket-path /run/rng.sock
  outboard rng --socket-path /run/rng.sock --source /dev/hwrng --max-bytes 1024 --period 1000

QEMU (its memory must be shared):
  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\
    -chardev socket,id=c,path=/run/rng.sock -device vhost-user-rng-pci,chardev=c ...
In a Linux guest: cat /sys/class/misc/hw_random/rng_current says virtio_rng.0, /dev/hwrng reads from it.

A request gets what there is, 64 KiB at most; while the source has nothing, or the limit is reached,
requests wait in the ring. A source may be a device, a file or a FIFO; it is never waited for.
SIGTERM and SIGINT end the device and remove the socket.";

/// Give a guest entropy, from a file of the host.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    device: DeviceArgs<Entropy>,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten, next_help_heading = "Entropy")]
    entropy: EntropyArgs,
}

#[derive(clap::Args)]
struct EntropyArgs {
    /// Where the bytes come from.
    #[arg(long, value_name = "FILE", default_value = "/dev/urandom", visible_alias = "filename")]
    source: PathBuf,
    /// Give at most so many bytes in each period.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    max_bytes: Option<u64>,
    /// Length of a period for --max-bytes, in milliseconds.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 65536, requires = "max_bytes", value_parser = clap::value_parser!(u32).range(1..))]
    period: u32,
    /// Largest ring size that a front-end may choose, a power of two.
    #[arg(long, value_name = "ENTRIES", default_value_t = 256)]
    queue_size: u16,
}

/// What the common options have to know of a source of entropy.
#[derive(Clone)]
struct Entropy;

impl Kind for Entropy {
    const CAPABILITIES: &str = r#"{"type":"rng","features":[]}"#;
    const EXAMPLE: &str = "";

    fn feature(_: &str) -> Option<u64> {
        None
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    device::run(&args.device, &args.sandbox, Reach::default(), || args.entropy.make())
}

/// One of many devices.
pub(crate) fn prepare(args: &Args, origin: Origin<'_>) -> Result<Prepared, Failure> {
    args.sandbox.among()?;
    device::prepare(&args.device, origin, || args.entropy.make())
}

impl EntropyArgs {
    fn make(&self) -> Result<Made<Rng>, Failure> {
        let period = Duration::from_millis(self.period.into());
        let limit = self.max_bytes.map(|bytes| Limit { bytes, period });
        let (source, queue_size) = (self.source.clone(), self.queue_size);
        let model = Rng::new(RngOptions { source, limit, queue_size }).map_err(Failure::usage)?;
        let described = match limit {
            Some(limit) => {
                let (bytes, period) = (limit.bytes, self.period);
                format!("entropy of {}, {bytes} bytes in {period} ms", self.source.display())
            }
            None => format!("entropy of {}", self.source.display()),
        };
        Ok(Made { model, described: Box::new(move || described), begins: None })
    }
}
