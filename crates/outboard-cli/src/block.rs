//! `outboard block`: a disk for a VMM (vhost-user, "Backend program conventions").
//!
//! Invariant: what is wrong with the image is found before the socket exists.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use outboard_devices::block::{
    Block, BlockOptions, CacheMode, EngineKind, Image, ImageOptions, feature,
};

use crate::Failure;
use crate::device::{self, DeviceArgs, Kind, Made, Origin, Prepared, Resize};
use crate::lock::{Reach, SandboxArgs};

const EXAMPLES: &str = "\
Examples:
  outboard block --socket-path /run/disk.sock disk.img
  outboard block --socket-path /run/disk.sock --read-only --serial GOLD-7 golden.img
  outboard block --socket-path /run/disk.sock --num-queues 4 --direct /dev/nvme0n1

QEMU (its memory must be shared):
  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m \\
    -chardev socket,id=c,path=/run/disk.sock -device vhost-user-blk-pci,chardev=c,num-queues=1 ...
cloud-hypervisor:
  cloud-hypervisor --memory size=1G,shared=on --disk vhost_user=true,socket=/run/disk.sock ...

A live upgrade, with a device that was started with --control /run/disk.ctl:
  outboard-new block --take-over /run/disk.ctl disk.img

Under systemd (Type=notify, FileDescriptorStoreMax=1, Restart=always) the socket outlives a restart.
Without --socket-path, --fd, --connect and --take-over, a socket passed by systemd (LISTEN_FDS) is served.
SIGTERM and SIGINT finish what the guest has asked for and remove the socket; a second one ends at once.
OUTBOARD_LOG=debug (or outboard=trace, ...) says more, OUTBOARD_LOG=warn less.";

/// Serve a file or a block device as a disk, on a vhost-user socket.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The image: a raw file, a block device, ram:SIZE (gone with the process) or null:SIZE (stores nothing).
    #[arg(value_name = "IMAGE", group = "image")]
    operand: Option<PathBuf>,
    /// The image, as QEMU's conventions name it.
    #[arg(long, value_name = "IMAGE", group = "image")]
    blk_file: Option<PathBuf>,
    /// The image, as crosvm names it.
    #[arg(long, value_name = "IMAGE[:read-only]", group = "image")]
    file: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs<Disk>,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten, next_help_heading = "Disk")]
    disk: DiskArgs,
    #[command(flatten, next_help_heading = "Engine")]
    engine: EngineArgs,
}

/// What the common options have to know of a disk.
#[derive(Clone)]
struct Disk;

impl Kind for Disk {
    const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;
    const EXAMPLE: &str = "VIRTIO_BLK_F_DISCARD, ";

    fn feature(name: &str) -> Option<u64> {
        feature::by_name(name)
    }

    /// Virtio 1.3 §5.2.5.2: whoever offers CONFIG_WCE must offer FLUSH.
    fn without(hidden: u64) -> u64 {
        if hidden & feature::FLUSH == 0 { hidden } else { hidden | feature::CONFIG_WCE }
    }
}

#[derive(clap::Args)]
struct DiskArgs {
    /// Never write; several devices may share the image.
    #[arg(long)]
    read_only: bool,
    /// What the guest sees as serial number, up to 20 bytes.
    #[arg(long, value_name = "TEXT", default_value = "")]
    serial: String,
    /// When finished writes are durable, until the guest chooses: after a flush, or at once.
    #[arg(long, value_enum, default_value_t = Cache::Writeback)]
    cache: Cache,
    /// Logical block size, 512 or 4096 bytes; the image's own by default.
    #[arg(long, value_name = "BYTES")]
    block_size: Option<u32>,
    /// Number of request queues.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    num_queues: u16,
    /// Largest ring size that a front-end may choose, a power of two.
    #[arg(long, value_name = "ENTRIES", default_value_t = 1024)]
    queue_size: u16,
}

#[derive(clap::Args)]
struct EngineArgs {
    /// Threads that serve the queues, which are dealt out to them in turn; by default one for each queue, as far as there
    /// are processors.
    #[arg(long, alias = "threads", value_name = "COUNT")]
    workers: Option<u16>,
    /// Past the page cache of the host (O_DIRECT).
    #[arg(long)]
    direct: bool,
    /// How the image is reached: auto is mmap for files in memory and uring for others.
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    engine: Engine,
}

#[derive(Clone, Copy, ValueEnum)]
enum Cache {
    Writeback,
    Writethrough,
}

#[derive(Clone, Copy, ValueEnum)]
enum Engine {
    Auto,
    Uring,
    Sync,
    Mmap,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    device::run(&args.device, &args.sandbox, Reach::default(), || args.make())
}

/// One of many devices.
pub(crate) fn prepare(args: &Args, origin: Origin<'_>) -> Result<Prepared, Failure> {
    args.sandbox.among()?;
    let mut resizer = None;
    let make = || {
        let made = args.make()?;
        resizer = Some(made.model.resizer());
        Ok(made)
    };
    let mut prepared = device::prepare(&args.device, origin, make)?;
    prepared.resize = resizer.map(|resizer| -> Resize {
        Arc::new(move || match resizer.resize() {
            Ok(size) => Ok(format!("{size} bytes")),
            Err(error) => Err(error.to_string()),
        })
    });
    Ok(prepared)
}

impl Args {
    fn make(&self) -> Result<Made<Block>, Failure> {
        let (path, read_only) = self.image()?;
        let options = ImageOptions {
            read_only,
            direct: self.engine.direct,
            block_size: self.disk.block_size,
        };
        let image = Image::open(path, options).map_err(Failure::usage)?;
        let (described, engine) = (describe(&image, self.disk.num_queues), image.engine());
        let model = Block::new(image, self.block_options()).map_err(Failure::usage)?;
        // Chosen where the workers are made.
        let described =
            move || format!("{described}, engine {}", engine.get().unwrap_or(&"unknown"));
        Ok(Made { model, described: Box::new(described), begins: None })
    }

    /// Which image, and whether it is never to be written.
    fn image(&self) -> Result<(&Path, bool), Failure> {
        let read_only = self.disk.read_only;
        if let Some(path) = self.operand.as_ref().or(self.blk_file.as_ref()) {
            return Ok((path, read_only));
        }
        let Some(file) = &self.file else {
            return Err(Failure::Usage("no image: name a file or a block device".to_owned()));
        };
        let bytes = file.as_os_str().as_bytes();
        Ok(match bytes.strip_suffix(b":read-only") {
            Some(path) => (Path::new(OsStr::from_bytes(path)), true),
            None => (file, read_only),
        })
    }

    fn block_options(&self) -> BlockOptions {
        let queues = usize::from(self.disk.num_queues);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        BlockOptions {
            serial: self.disk.serial.clone(),
            num_queues: self.disk.num_queues,
            queue_size: self.disk.queue_size,
            threads: self.engine.workers.map_or(queues.min(processors), usize::from),
            cache: match self.disk.cache {
                Cache::Writeback => CacheMode::Writeback,
                Cache::Writethrough => CacheMode::Writethrough,
            },
            engine: match self.engine.engine {
                Engine::Auto => EngineKind::Auto,
                Engine::Uring => EngineKind::Uring,
                Engine::Sync => EngineKind::Sync,
                Engine::Mmap => EngineKind::Mmap,
            },
        }
    }
}

fn describe(image: &Image, queues: u16) -> String {
    let bytes = image.geometry().size;
    let mut size = format!("{bytes} bytes");
    for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >> shift > 0 && bytes.is_multiple_of(1 << shift) {
            size = format!("{} {unit}", bytes >> shift);
            break;
        }
    }
    let mode = if image.read_only() { "read-only" } else { "read-write" };
    let plural = if queues == 1 { "queue" } else { "queues" };
    format!("{}: {size}, {mode}, {queues} {plural}", image.path().display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use outboard::protocol::{ProtocolFeatures, virtio};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, String> {
        let words = std::iter::once("block").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.args).map_err(|error| error.to_string())
    }

    fn good(line: &str) -> Args {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn an_image_has_three_names_and_one_is_enough() {
        for line in ["disk.img", "--blk-file disk.img", "--blk-file=disk.img", "--file disk.img"] {
            let args = good(line);
            let (path, read_only) = args.image().expect("an image");
            assert_eq!((path, read_only), (Path::new("disk.img"), false), "{line}");
        }
        for line in ["--file a:b:read-only", "--read-only a:b", "--file a:b --read-only"] {
            let args = good(line);
            let (path, read_only) = args.image().expect("an image");
            assert_eq!((path, read_only), (Path::new("a:b"), true), "{line}");
        }
        assert!(good("--socket-path s").image().is_err());
        assert!(parse("disk.img --blk-file disk.img").is_err());
        assert!(parse("--file a --blk-file b").is_err());
    }

    #[test]
    fn features_to_hide_are_known_by_every_table() {
        let options = good(
            "a --without discard --without VIRTIO_RING_F_EVENT_IDX --without mq \
             --without CONFIGURE_MEM_SLOTS --without VHOST_USER_PROTOCOL_F_MQ",
        )
        .device
        .handler_options();
        assert_eq!(
            options.without_features,
            feature::DISCARD | feature::MQ | virtio::RING_EVENT_IDX
        );
        assert_eq!(
            options.without_protocol_features,
            ProtocolFeatures::MQ | ProtocolFeatures::CONFIGURE_MEM_SLOTS
        );
        assert!(parse("a --without what").is_err_and(|error| error.contains("no such feature")));
        let options = good("a --without flush").device.handler_options();
        assert_eq!(options.without_features, feature::FLUSH | feature::CONFIG_WCE);
    }

    #[test]
    fn threads_are_as_many_as_queues_and_processors_allow() {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        assert_eq!(good("a").block_options().threads, 1);
        assert_eq!(good("a --num-queues 256").block_options().threads, processors.min(256));
        assert_eq!(good("a --num-queues 4 --workers 3").block_options().threads, 3);
        assert_eq!(good("a --num-queues 4 --threads 3").block_options().threads, 3, "its old name");
        assert!(parse("a --num-queues 0").is_err());
        assert!(parse("a --num-queues 257").is_err());
    }
}
