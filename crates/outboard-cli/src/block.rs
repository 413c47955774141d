//! `outboard block`: a disk for a VMM (vhost-user, "Backend program conventions").
//!
//! Invariant: everything that can be wrong with the command line or the image is found before the
//! socket exists; then nothing was made and nothing removed, and the exit code is 2.

use std::ffi::OsStr;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::ValueEnum;
use outboard::protocol::{ProtocolFeatures, virtio};
use outboard::{HandlerOptions, LoopKind, Server, WorkerDevice, WorkerOptions};
use outboard_devices::block::{
    Block, BlockOptions, CacheMode, EngineKind, Image, ImageOptions, feature,
};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing::info;

use crate::{Failure, service};

/// For management programs: what this one understands of vhost-user.json.
const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

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
    /// Print what this program understands, as JSON, and exit.
    #[arg(long)]
    print_capabilities: bool,
    #[command(flatten, next_help_heading = "Socket")]
    socket: SocketArgs,
    #[command(flatten, next_help_heading = "Disk")]
    disk: DiskArgs,
    #[command(flatten, next_help_heading = "Engine")]
    engine: EngineArgs,
}

#[derive(clap::Args)]
struct SocketArgs {
    /// Listen on this path; a stale socket is replaced, a live one is not.
    #[arg(long, value_name = "PATH", group = "socket")]
    socket_path: Option<PathBuf>,
    /// Serve this inherited descriptor, a connected or a listening Unix socket.
    #[arg(long, value_name = "NUMBER", group = "socket")]
    fd: Option<RawFd>,
    /// Connect to a front-end that listens on this path.
    #[arg(long, value_name = "PATH", group = "socket")]
    connect: Option<PathBuf>,
    /// Take the place of a running device that has this control socket: its sockets and its
    /// front-end, which sees nothing but a pause. If that fails, the other one goes on.
    #[arg(long, value_name = "CONTROL", group = "socket")]
    take_over: Option<PathBuf>,
    /// Make a control socket here, on which a newer program can take over.
    #[arg(long, value_name = "PATH", conflicts_with = "take_over")]
    control: Option<PathBuf>,
    /// Do not offer a feature: VIRTIO_BLK_F_DISCARD, event-idx, CONFIGURE_MEM_SLOTS ... (repeatable).
    #[arg(long, value_name = "FEATURE", value_parser = parse_feature)]
    without: Vec<Feature>,
    /// Offer packed rings too. The requests on them are not kept track of for a process that follows a crash.
    #[arg(long)]
    packed: bool,
    /// Longest wait for requests under way when the front-end stops a queue.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    drain_deadline: u32,
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
    /// Threads that serve the queues; by default one for each queue, as far as there are processors.
    #[arg(long, value_name = "COUNT")]
    threads: Option<u16>,
    /// Past the page cache of the host (O_DIRECT).
    #[arg(long)]
    direct: bool,
    /// How the image is reached: auto is mmap for files in memory and uring for others.
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    engine: Engine,
    /// What the threads wait on: auto is uring, or epoll where io_uring is refused.
    #[arg(long, value_enum, default_value_t = Loop::Auto)]
    event_loop: Loop,
    /// Longest look at the rings before a thread sleeps, in microseconds; 0 always sleeps, `always`
    /// never does while a ring runs: for processors of their own.
    #[arg(long, value_name = "MICROSECONDS", default_value = "50", value_parser = parse_poll)]
    poll_us: Poll,
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

#[derive(Clone, Copy, ValueEnum)]
enum Loop {
    Auto,
    Uring,
    Epoll,
}

/// How long a thread looks at its rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Poll(Duration);

fn parse_poll(text: &str) -> Result<Poll, String> {
    if text == "always" {
        return Ok(Poll(WorkerOptions::NEVER_SLEEP));
    }
    let micros = text.parse().ok().filter(|micros| *micros <= 1_000_000);
    let micros =
        micros.ok_or_else(|| format!("'{text}' is not from 0 to 1000000, nor 'always'"))?;
    Ok(Poll(Duration::from_micros(micros)))
}

impl EngineArgs {
    fn options(&self) -> WorkerOptions {
        WorkerOptions { event_loop: self.event_loop.into(), poll: self.poll_us.0 }
    }
}

/// A feature that is not to be offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Feature {
    Virtio(u64),
    Protocol(ProtocolFeatures),
}

/// Runs the command.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    if args.print_capabilities {
        println!("{CAPABILITIES}");
        return Ok(());
    }
    let (path, read_only) = args.image()?;
    let options =
        ImageOptions { read_only, direct: args.engine.direct, block_size: args.disk.block_size };
    let image = Image::open(path, options).map_err(Failure::usage)?;
    let (described, engine) = (describe(&image, args.disk.num_queues), image.engine());
    let block = Block::new(image, args.block_options()).map_err(Failure::usage)?;
    let device =
        WorkerDevice::with_options(block, args.engine.options()).map_err(Failure::usage)?;
    let server = args.socket.server()?.with_options(args.socket.handler_options());
    stop_on_signals(&server).map_err(Failure::failed)?;
    info!("serving {described}, engine {}", engine.get().unwrap_or(&"unknown"));
    service::ready(&server);
    server.serve(device).map_err(Failure::failed)
}

impl Args {
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
            threads: self.engine.threads.map_or(queues.min(processors), usize::from),
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

impl From<Loop> for LoopKind {
    fn from(kind: Loop) -> Self {
        match kind {
            Loop::Auto => Self::Auto,
            Loop::Uring => Self::Uring,
            Loop::Epoll => Self::Epoll,
        }
    }
}

impl SocketArgs {
    fn server(&self) -> Result<Server, Failure> {
        let server = if let Some(path) = &self.socket_path {
            match service::kept_socket() {
                Some(fd) => Server::inherited(fd).and_then(|server| server.with_socket_file(path)),
                None => Server::listen(path),
            }
            .map(Some)
        } else if let Some(fd) = self.fd {
            Server::inherited(fd).map(Some)
        } else if let Some(path) = &self.connect {
            Server::connect(path).map(Some)
        } else if let Some(path) = &self.take_over {
            Server::take_over(path).map(Some)
        } else {
            Server::activated()
        };
        let missing = || Failure::Usage(NO_SOCKET.to_owned());
        let server = server.map_err(Failure::usage)?.ok_or_else(missing)?;
        match &self.control {
            Some(path) => server.with_control(path).map_err(Failure::usage),
            None => Ok(server),
        }
    }

    fn handler_options(&self) -> HandlerOptions {
        let mut options = HandlerOptions {
            drain_deadline: Duration::from_secs(self.drain_deadline.into()),
            packed_rings: self.packed,
            ..HandlerOptions::default()
        };
        for feature in &self.without {
            match feature {
                Feature::Virtio(bits) => options.without_features |= bits,
                Feature::Protocol(bits) => options.without_protocol_features |= *bits,
            }
        }
        // Virtio 1.3 §5.2.5.2: whoever offers CONFIG_WCE must offer FLUSH.
        if options.without_features & feature::FLUSH != 0 {
            options.without_features |= feature::CONFIG_WCE;
        }
        options
    }
}

const NO_SOCKET: &str =
    "no socket: say --socket-path PATH, --fd NUMBER, --connect PATH or --take-over CONTROL";

/// The disk's own features first: a bare MQ is VIRTIO_BLK_F_MQ.
fn parse_feature(name: &str) -> Result<Feature, String> {
    feature::by_name(name)
        .or_else(|| virtio::by_name(name))
        .map(Feature::Virtio)
        .or_else(|| ProtocolFeatures::by_name(name).map(Feature::Protocol))
        .ok_or_else(|| {
            "no such feature; examples are VIRTIO_BLK_F_DISCARD, VIRTIO_RING_F_EVENT_IDX, \
             VHOST_USER_PROTOCOL_F_REPLY_ACK"
                .to_owned()
        })
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

/// The first SIGTERM or SIGINT has the server finish, the second one ends the process.
fn stop_on_signals(server: &Server) -> io::Result<()> {
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked))?;
        signal_hook::flag::register(signal, Arc::clone(&asked))?;
        signal_hook::low_level::pipe::register(signal, server.stop_handle().descriptor()?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

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
    fn polling_has_a_bound_or_none_at_all() {
        let polled = |line: &str| good(line).engine.options().poll;
        assert_eq!(polled("a"), Duration::from_micros(50));
        assert_eq!(polled("a --poll-us 0"), Duration::ZERO);
        assert_eq!(polled("a --poll-us 1000000"), Duration::from_secs(1));
        assert_eq!(polled("a --poll-us always"), WorkerOptions::NEVER_SLEEP);
        for wrong in ["1000001", "-1", "ever", "1.5", ""] {
            assert!(parse(&format!("a --poll-us={wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_one_socket_can_be_named() {
        assert!(parse("a --socket-path s --fd 3").is_err());
        assert!(parse("a --connect s --fd 3").is_err());
        assert!(parse("a --fd three").is_err());
    }

    #[test]
    fn features_to_hide_are_known_by_every_table() {
        let options = good(
            "a --without discard --without VIRTIO_RING_F_EVENT_IDX --without mq \
             --without CONFIGURE_MEM_SLOTS --without VHOST_USER_PROTOCOL_F_MQ",
        )
        .socket
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
        let options = good("a --without flush").socket.handler_options();
        assert_eq!(options.without_features, feature::FLUSH | feature::CONFIG_WCE);
    }

    #[test]
    fn threads_are_as_many_as_queues_and_processors_allow() {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        assert_eq!(good("a").block_options().threads, 1);
        assert_eq!(good("a --num-queues 256").block_options().threads, processors.min(256));
        assert_eq!(good("a --num-queues 4 --threads 3").block_options().threads, 3);
        assert!(parse("a --num-queues 0").is_err());
        assert!(parse("a --num-queues 257").is_err());
    }
}
