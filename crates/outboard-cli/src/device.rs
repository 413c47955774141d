//! What every device of the program has in common: its sockets, its threads, its life
//! (vhost-user, "Backend program conventions").
//!
//! A device's own module has its options and a function that builds it; [`run`] does the rest.
//! Invariant: everything that can be wrong with the command line or with what the device stands on
//! is found before the socket exists; then nothing was made and nothing removed, and the exit code
//! is 2.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::ValueEnum;
use outboard::protocol::{ProtocolFeatures, virtio};
use outboard::{
    Error, HandlerOptions, Inspect, LoopKind, Model, Server, SharedOptions, SharedThread,
    WorkerDevice, WorkerOptions,
};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing::info;

use crate::lock::{LockArgs, Program, Reach, SandboxArgs};
use crate::serve::lan::Plugged;
use crate::{Failure, losses, service};

/// What the common options have to know of a kind of device.
pub(crate) trait Kind: Clone + Send + Sync + 'static {
    /// For management programs: what this one understands of vhost-user.json.
    const CAPABILITIES: &str;
    /// Names to give as examples when `--without` does not know one.
    const EXAMPLE: &str;

    /// The feature bit that a name stands for, among the device's own.
    fn feature(name: &str) -> Option<u64>;

    /// `hidden` and all that must not be offered without them.
    fn without(hidden: u64) -> u64 {
        hidden
    }
}

/// Options of every device.
#[derive(clap::Args)]
pub(crate) struct DeviceArgs<K: Kind> {
    /// Print what this program understands, as JSON, and exit.
    #[arg(long)]
    print_capabilities: bool,
    #[command(flatten, next_help_heading = "Socket")]
    socket: SocketArgs<K>,
    #[command(flatten, next_help_heading = "Threads")]
    threads: ThreadArgs,
    #[command(flatten, next_help_heading = "Lock")]
    lock: LockArgs,
}

#[derive(clap::Args)]
struct SocketArgs<K: Kind> {
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
    /// Do not offer a feature: the device's own, event-idx, packed, CONFIGURE_MEM_SLOTS ... (repeatable).
    #[arg(long, value_name = "FEATURE", value_parser = parse_feature::<K>)]
    without: Vec<Feature>,
    /// Longest wait for requests under way when the front-end stops a queue.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    drain_deadline: u32,
    #[arg(skip)]
    kind: PhantomData<K>,
}

/// What worker threads wait on, and how long they look before that.
#[derive(clap::Args)]
pub(crate) struct ThreadArgs {
    /// What the threads wait on: auto is uring, or epoll where io_uring is refused.
    #[arg(long, value_enum, default_value_t = Loop::Auto)]
    event_loop: Loop,
    /// Longest look at the rings before a thread sleeps, in microseconds; 0 always sleeps, `always`
    /// never does while a ring runs: for processors of their own.
    #[arg(long, value_name = "MICROSECONDS", default_value = "50", value_parser = parse_poll)]
    poll_us: Poll,
    /// Processors for the threads that serve queues, in turn: the first thread runs on the first one, and so on, round and
    /// round. Without it they run where the system puts them.
    #[arg(long, value_name = "CPU,…", value_delimiter = ',')]
    pin: Vec<usize>,
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

/// A feature that is not to be offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Feature {
    Virtio(u64),
    Protocol(ProtocolFeatures),
}

/// A device that is ready to be served, and what it is in words.
pub(crate) struct Made<M> {
    pub(crate) model: M,
    /// Told once its workers are made.
    pub(crate) described: Box<dyn FnOnce() -> String>,
    /// Called once the process is locked in: from here on there may be threads.
    pub(crate) begins: Option<Begins>,
}

/// See [`Made::begins`].
pub(crate) type Begins = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// Builds a device, locks the process in with it and `reach`, and serves it until it is told to stop.
pub(crate) fn run<K: Kind, M: Model>(
    args: &DeviceArgs<K>,
    sandbox: &SandboxArgs,
    mut reach: Reach,
    make: impl FnOnce() -> Result<Made<M>, Failure>,
) -> Result<(), Failure> {
    if args.print_capabilities {
        println!("{}", K::CAPABILITIES);
        return Ok(());
    }
    args.socket.reached(&mut reach);
    let mut kept = "none";
    // Before its workers' threads begin, and its socket is there.
    let make = || {
        let made = make()?;
        kept = sandbox.enter(&reach)?;
        Ok(made)
    };
    let device = prepare(args, Origin::Alone, make)?;
    let stop = device.server.stop_handle();
    stop_on_signals(|| stop.descriptor()).map_err(Failure::failed)?;
    info!("serving {}", device.described);
    service::ready(&device.server);
    let inspect = device.inspect.clone();
    args.lock.enter(Program::Device, kept, std::slice::from_ref(&inspect))?;
    let served = device.serve();
    losses::tell("the device", &inspect);
    served.map_err(Failure::failed)
}

/// Where a device stands among others.
pub(crate) enum Origin<'a> {
    /// The program is this device.
    Alone,
    /// It is one of many.
    Among(Among<'a>),
}

/// One device of many.
pub(crate) struct Among<'a> {
    pub(crate) name: &'a str,
    /// The way to the process that has it now, if one has.
    pub(crate) gate: Option<OwnedFd>,
    /// The threads that serve it beside others; none: it has its own.
    pub(crate) shared: Vec<SharedThread>,
    /// A card's place in a switch.
    pub(crate) port: Option<Plugged>,
}

impl Origin<'_> {
    /// Whether the device takes the place of one that runs elsewhere.
    pub(crate) fn takes_over(&self) -> bool {
        matches!(self, Self::Among(Among { gate: Some(_), .. }))
    }

    /// The card's place in a switch, if it has one; once.
    pub(crate) fn take_port(&mut self) -> Option<Plugged> {
        match self {
            Self::Alone => None,
            Self::Among(among) => among.port.take(),
        }
    }
}

/// A device that was built and has its socket.
pub(crate) struct Prepared {
    pub(crate) server: Server,
    pub(crate) described: String,
    pub(crate) inspect: Inspect,
    /// Has the guest see what the device has grown by; says so in words.
    pub(crate) resize: Option<Resize>,
    serve: Box<dyn FnOnce(Server) -> Result<(), Error> + Send>,
}

/// See [`Prepared::resize`].
pub(crate) type Resize = Arc<dyn Fn() -> Result<String, String> + Send + Sync>;

impl Prepared {
    /// Serves until it is told to stop.
    pub(crate) fn serve(self) -> Result<(), Error> {
        (self.serve)(self.server)
    }
}

/// Builds a device: first what it stands on, its socket last.
pub(crate) fn prepare<K: Kind, M: Model>(
    args: &DeviceArgs<K>,
    origin: Origin<'_>,
    make: impl FnOnce() -> Result<Made<M>, Failure>,
) -> Result<Prepared, Failure> {
    let inspect = Inspect::new();
    let Made { model, described, begins } = make()?;
    let mut options = WorkerOptions { inspect: inspect.clone(), ..args.threads.options() };
    if let Origin::Among(Among { name, shared, .. }) = &origin {
        (options.name, options.shared) = ((*name).to_owned(), shared.clone());
    }
    let device = WorkerDevice::with_options(model, options).map_err(Failure::usage)?;
    let server = match origin {
        Origin::Alone => args.socket.server(service::NAME)?,
        Origin::Among(Among { gate: Some(gate), .. }) => {
            Server::take_over_from(gate).map_err(Failure::failed)?
        }
        Origin::Among(Among { name, .. }) => args.socket.server(&service::name_among(name))?,
    };
    let options = HandlerOptions { inspect: inspect.clone(), ..args.handler_options() };
    let (server, described) = (server.with_options(options), described());
    let serve = Box::new(move |server: Server| {
        begins.map_or(Ok(()), |begins| begins())?;
        server.serve(device)
    });
    Ok(Prepared { server, described, inspect, resize: None, serve })
}

/// As [`run`], for a device that locks the process in: `prepare` opens what has to be open, `make` locks the
/// process in and builds the device. In between the socket is made and the service manager told, since neither
/// can be reached any more then.
pub(crate) fn run_confined<K: Kind, P, M: Model>(
    args: &DeviceArgs<K>,
    sandbox: &str,
    prepare: impl FnOnce() -> Result<P, Failure>,
    make: impl FnOnce(P) -> Result<Made<M>, Failure>,
) -> Result<(), Failure> {
    if args.print_capabilities {
        println!("{}", K::CAPABILITIES);
        return Ok(());
    }
    let prepared = prepare()?;
    let server = args.socket.server(service::NAME)?;
    let stop = server.stop_handle();
    stop_on_signals(|| stop.descriptor()).map_err(Failure::failed)?;
    service::ready(&server);
    let inspect = Inspect::new();
    let Made { model, described, .. } = make(prepared)?;
    let options = WorkerOptions { inspect: inspect.clone(), ..args.threads.options() };
    let device = WorkerDevice::with_options(model, options).map_err(Failure::failed)?;
    let options = HandlerOptions { inspect: inspect.clone(), ..args.handler_options() };
    info!("serving {}", described());
    args.lock.enter(Program::Share, sandbox, &[inspect])?;
    server.with_options(options).serve(device).map_err(Failure::failed)
}

impl<K: Kind> DeviceArgs<K> {
    /// The path to listen on, if there is one.
    pub(crate) fn socket_path(&self) -> Option<&Path> {
        self.socket.socket_path.as_deref()
    }

    /// Whether it takes the place of a process that runs.
    pub(crate) fn takes_over(&self) -> bool {
        self.socket.take_over.is_some()
    }

    /// What the handler is told.
    pub(crate) fn handler_options(&self) -> HandlerOptions {
        let mut options = HandlerOptions {
            drain_deadline: Duration::from_secs(self.socket.drain_deadline.into()),
            ..HandlerOptions::default()
        };
        for feature in &self.socket.without {
            match feature {
                Feature::Virtio(bits) => options.without_features |= bits,
                Feature::Protocol(bits) => options.without_protocol_features |= *bits,
            }
        }
        options.without_features = K::without(options.without_features);
        options
    }
}

impl ThreadArgs {
    pub(crate) fn options(&self) -> WorkerOptions {
        WorkerOptions {
            event_loop: self.event_loop.into(),
            poll: self.poll_us.0,
            pin: self.pin.clone(),
            ..WorkerOptions::default()
        }
    }
}

impl From<&ThreadArgs> for SharedOptions {
    /// One thread, which may run on any of the processors.
    fn from(args: &ThreadArgs) -> Self {
        Self { event_loop: args.event_loop.into(), poll: args.poll_us.0, pin: args.pin.clone() }
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

impl<K: Kind> SocketArgs<K> {
    /// What is removed at the end.
    fn reached(&self, reach: &mut Reach) {
        [&self.socket_path, &self.control]
            .into_iter()
            .flatten()
            .for_each(|path| reach.socket(path));
        if self.take_over.is_some() {
            reach.heir();
        }
    }

    /// The server; a socket that the service manager has kept is kept under `name`.
    fn server(&self, name: &str) -> Result<Server, Failure> {
        let server = if let Some(path) = &self.socket_path {
            match service::kept_socket(name) {
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
}

const NO_SOCKET: &str =
    "no socket: say --socket-path PATH, --fd NUMBER, --connect PATH or --take-over CONTROL";

/// The device's own features first: a bare MQ is a disk's VIRTIO_BLK_F_MQ.
fn parse_feature<K: Kind>(name: &str) -> Result<Feature, String> {
    K::feature(name)
        .or_else(|| virtio::by_name(name))
        .map(Feature::Virtio)
        .or_else(|| ProtocolFeatures::by_name(name).map(Feature::Protocol))
        .ok_or_else(|| {
            format!(
                "no such feature; examples are {}VIRTIO_RING_F_EVENT_IDX, \
                 VHOST_USER_PROTOCOL_F_REPLY_ACK",
                K::EXAMPLE
            )
        })
}

/// The first SIGTERM or SIGINT writes to a descriptor, the second one ends the process.
pub(crate) fn stop_on_signals(descriptor: impl Fn() -> io::Result<OwnedFd>) -> io::Result<()> {
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked))?;
        signal_hook::flag::register(signal, Arc::clone(&asked))?;
        signal_hook::low_level::pipe::register(signal, descriptor()?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Clone)]
    struct Bare;

    impl Kind for Bare {
        const CAPABILITIES: &str = "{}";
        const EXAMPLE: &str = "";

        fn feature(_: &str) -> Option<u64> {
            None
        }
    }

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: DeviceArgs<Bare>,
    }

    fn parse(line: &str) -> Result<DeviceArgs<Bare>, String> {
        let words = std::iter::once("device").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.args).map_err(|error| error.to_string())
    }

    #[test]
    fn only_one_socket_can_be_named() {
        assert!(parse("--socket-path s").is_ok());
        assert!(parse("--socket-path s --fd 3").is_err());
        assert!(parse("--connect s --fd 3").is_err());
        assert!(parse("--fd three").is_err());
        assert!(parse("--take-over c --control d").is_err());
    }

    #[test]
    fn polling_has_a_bound_or_none_at_all() {
        let polled = |line: &str| parse(line).map(|args| args.threads.options().poll);
        assert_eq!(polled(""), Ok(Duration::from_micros(50)));
        assert_eq!(polled("--poll-us 0"), Ok(Duration::ZERO));
        assert_eq!(polled("--poll-us 1000000"), Ok(Duration::from_secs(1)));
        assert_eq!(polled("--poll-us always"), Ok(WorkerOptions::NEVER_SLEEP));
        for wrong in ["1000001", "-1", "ever", "1.5", ""] {
            assert!(polled(&format!("--poll-us={wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn threads_are_pinned_to_processors_by_number() {
        let pinned = |line: &str| parse(line).map(|args| args.threads.options().pin);
        assert_eq!(pinned(""), Ok(vec![]));
        assert_eq!(pinned("--pin 1"), Ok(vec![1]));
        assert_eq!(pinned("--pin 2,0,2"), Ok(vec![2, 0, 2]));
        for wrong in ["-1", "x", "1,,2"] {
            assert!(pinned(&format!("--pin={wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn features_of_rings_and_of_the_protocol_can_be_hidden_from_every_device() {
        let args = parse("--without event-idx --without CONFIGURE_MEM_SLOTS").expect("known");
        let options = args.handler_options();
        assert_eq!(options.without_features, virtio::RING_EVENT_IDX);
        assert_eq!(options.without_protocol_features, ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        assert!(parse("--without what").is_err_and(|error| error.contains("no such feature")));
    }
}
