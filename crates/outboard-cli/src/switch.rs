//! `outboard switch`: network cards for several guests, and a learning switch between them.
//!
//! Invariant: all that can be wrong with the ports and the interface is found before a guest is served; the first
//! port that fails ends the others.

use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

use outboard::memory::Tap;
use outboard::{
    Error, HandlerOptions, Server, SharedOptions, SharedThread, WorkerDevice, WorkerOptions,
};
use outboard_devices::net::{MOST_PORTS, Net, NetOptions, Stream, Switch, Uplink, Wire};
use tracing::info;

use crate::device::{ThreadArgs, stop_on_signals};
use crate::lock::{LockArgs, Program, Reach, SandboxArgs};
use crate::{Failure, losses};

const EXAMPLES: &str = "\
Examples:
  outboard switch --port /run/a.sock --port /run/b.sock             two guests
  outboard switch --port /run/a.sock --port /run/b.sock --tap up0   and the host, on an interface that is made
                                                                    if it is not there. Then: ip link set up0 up

As a part of a program with other devices, with ports that come and go: [[switch]] in a file of outboard serve.
Each port is a network card as that of `outboard net`, without offloads; see there for the guests' side.
Packets go from one guest's memory to the other's without a system call for each. A guest that takes nothing
holds up those who send to it for --patience, and is then passed over until it takes something.
Ports share worker threads: one for each processor but one, which is the guests', unless --workers or --pin says
otherwise. Two ports on one thread hand packets to each other without waking anybody.
SIGTERM and SIGINT end the switch and remove its sockets.";

/// Give guests network cards that are connected to each other.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Make a port: a card for the front-end that connects to this path (repeatable).
    #[arg(long, value_name = "PATH", required = true)]
    port: Vec<PathBuf>,
    #[command(flatten)]
    switch: SwitchArgs,
    #[command(flatten, next_help_heading = "Threads")]
    threads: ThreadArgs,
    /// Threads that serve the ports, in turn; by default one for each processor but one, or for each of --pin,
    /// and no more than ports.
    #[arg(long, value_name = "NUMBER", help_heading = "Threads", value_parser = clap::value_parser!(u16).range(1..))]
    workers: Option<u16>,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten, next_help_heading = "Lock")]
    lock: LockArgs,
}

/// What a switch is: `outboard switch`, and a `[[switch]]` of `outboard serve`.
#[derive(clap::Args)]
pub(crate) struct SwitchArgs {
    /// Connect this TAP interface of the host to one more port (repeatable).
    #[arg(long, value_name = "NAME")]
    tap: Vec<String>,
    /// Connect who listens on this path to one more port: passt, or QEMU's stream with server=on (repeatable).
    #[arg(long, value_name = "PATH")]
    stream: Vec<PathBuf>,
    /// Connect who connects to this path, one at a time, to one more port (repeatable).
    #[arg(long, value_name = "PATH")]
    stream_listen: Vec<PathBuf>,
    /// The largest packet, without its header, that the switch takes; guests are told.
    #[arg(long, value_name = "BYTES", default_value_t = 1500, value_parser = clap::value_parser!(u16).range(68..))]
    pub(crate) mtu: u16,
    /// How long those who send to a guest wait while it takes nothing.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    patience: u64,
}

impl SwitchArgs {
    /// The switch, without its uplinks.
    ///
    /// # Errors
    /// It has more uplinks than places.
    pub(crate) fn make(&self) -> Result<Switch, String> {
        let uplinks = self.tap.len() + self.stream.len() + self.stream_listen.len();
        if uplinks >= MOST_PORTS {
            return Err(format!("{uplinks} uplinks: a switch has {MOST_PORTS} ports"));
        }
        let patience = Duration::from_millis(self.patience);
        Switch::with_patience(MOST_PORTS, self.mtu, patience).map_err(|error| error.to_string())
    }

    /// Connects what it is to be connected to.
    ///
    /// # Errors
    /// Which link cannot be made, and why.
    pub(crate) fn connect(&self, switch: &Switch) -> Result<Vec<Uplink>, String> {
        let tap = |name: &String| {
            let tap = Tap::open(name, false).map(Arc::new);
            tap.map(|tap| Wire::Tap(vec![tap])).map_err(|why| format!("interface {name}: {why}"))
        };
        let connected = |path: &PathBuf| Ok(Wire::Stream(Stream::Connect(path.clone())));
        let listened = |path: &PathBuf| Ok(Wire::Stream(Stream::Listen(path.clone())));
        let (taps, streams) = (self.tap.iter().map(tap), self.stream.iter().map(connected));
        let wires = taps.chain(streams).chain(self.stream_listen.iter().map(listened));
        let uplink = |(number, wire): (usize, Result<Wire, String>)| {
            let port = switch.plug(&format!("uplink:{}", number + 1));
            let wire = wire?;
            port.and_then(|port| Uplink::new(port, &wire)).map_err(|error| error.to_string())
        };
        wires.enumerate().map(uplink).collect()
    }
}

/// A card and the socket of its front-end.
type Served = (Server, WorkerDevice<Net>);

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let switch = args.switch.make().map_err(Failure::Usage)?;
    // What the process may use of the processors stands in files.
    let workers = args.workers();
    // Before its uplinks, which have threads.
    let kept = args.sandbox.enter(&args.reach())?;
    let (ports, uplinks) = args.plug(&switch, workers)?;
    let (theirs, ours) = UnixStream::pair().map_err(Failure::failed)?;
    let stops: Vec<_> = ports.iter().map(|(server, _)| server.stop_handle()).collect();
    let theirs = Arc::new(theirs);
    let signal = Arc::clone(&theirs);
    stop_on_signals(move || -> io::Result<OwnedFd> { Ok(signal.try_clone()?.into()) })
        .map_err(Failure::failed)?;
    info!("serving a switch with {} ports", args.port.len());
    crate::service::up();
    args.lock.enter(Program::Device, kept, &[])?;
    let served = ports.into_iter().map(|(server, device)| {
        let ended = Arc::clone(&theirs);
        thread::spawn(move || {
            let result: Result<(), Error> = server.serve(device);
            // Whoever ends first ends all.
            let _ = rustix::io::write(&*ended, &[0]);
            result
        })
    });
    let served: Vec<_> = served.collect();
    // A signal, or a port that has ended.
    let _ = rustix::io::read(&ours, &mut [0; 1]);
    stops.iter().for_each(outboard::StopHandle::stop);
    let mut result = Ok(());
    for port in served {
        let ended = port.join().unwrap_or_else(|_| Err(Error::refused("a port has died")));
        result = result.and(ended.map_err(Failure::failed));
    }
    drop(uplinks);
    losses::tell("the switch", switch.inspect());
    result
}

impl Args {
    /// Its sockets, and interfaces if it has some.
    fn reach(&self) -> Reach {
        let mut reach = Reach::default();
        reach.random();
        self.port.iter().chain(&self.switch.stream_listen).for_each(|path| reach.socket(path));
        if !self.switch.tap.is_empty() {
            reach.interfaces();
        }
        reach
    }

    /// How many threads the ports have.
    fn workers(&self) -> usize {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let count = self.workers.map_or_else(
            || match SharedOptions::from(&self.threads).pin.len() {
                0 => (processors - 1).max(1),
                pinned => pinned,
            },
            usize::from,
        );
        count.min(self.port.len())
    }

    /// Starts them.
    fn start(&self, workers: usize) -> Result<Vec<SharedThread>, Failure> {
        let options = SharedOptions::from(&self.threads);
        let worker = |number: usize| {
            let pin = options.pin.iter().cycle().nth(number).into_iter().copied().collect();
            let options = SharedOptions { pin, ..options.clone() };
            SharedThread::start(&format!("worker{number}"), &options).map_err(Failure::usage)
        };
        (0..workers).map(worker).collect()
    }

    /// Plugs the cards and the uplinks in.
    fn plug(&self, switch: &Switch, workers: usize) -> Result<(Vec<Served>, Vec<Uplink>), Failure> {
        let uplinks = self.switch.connect(switch).map_err(Failure::Usage)?;
        let workers = self.start(workers)?;
        let card = |(path, worker): (&PathBuf, &SharedThread)| {
            let port = switch.plug(&name_of(path)).map_err(Failure::usage)?;
            let mut options = NetOptions::new(Wire::Port(port));
            options.mtu = Some(self.switch.mtu);
            let card = Net::new(&options).map_err(Failure::usage)?;
            let shared = vec![worker.clone()];
            let threads = WorkerOptions { shared, ..WorkerOptions::default() };
            WorkerDevice::with_options(card, threads).map_err(Failure::usage)
        };
        let cards = self.port.iter().zip(workers.iter().cycle()).map(card);
        let cards = cards.collect::<Result<Vec<_>, _>>()?;
        let ports = self.port.iter().zip(cards).map(|(path, card)| {
            let server = Server::listen(path).map_err(Failure::usage)?;
            Ok((server.with_options(HandlerOptions::default()), card))
        });
        Ok((ports.collect::<Result<_, Failure>>()?, uplinks))
    }
}

/// What a port is called whose front-end connects there.
fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
