//! `outboard serve`: many devices in one process, from a file; orders over one control socket.
//!
//! ```text
//!  FILE.toml ─▶ plan: command lines ─▶ devices, all of them ready ─▶ fleet: a thread each
//!                                                                     ▲ add, remove, stats …
//!                                                control socket ─▶ desk
//! ```
//! Invariant: what is wrong with any device is found before one of them is served; then nothing was
//! made, and the exit code is 2.

mod bell;
mod desk;
mod fleet;
pub(crate) mod lan;
pub(crate) mod order;
mod plan;
mod worker;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use outboard::SharedThread;
use tracing::{info, warn};

use crate::ctl::Line;
use crate::device::{Among, Origin, Prepared, stop_on_signals};
use crate::lock::Program;
use crate::{Failure, service};
use bell::{Ear, bell};
use desk::Desk;
use fleet::Fleet;
use lan::Lan;
use order::{Order, Reply};
use plan::{Entry, Known, Plan};

const EXAMPLES: &str = "\
A file:
  control = \"/run/outboard.ctl\"
  seccomp = \"errno\"                   # for the whole process: errno, kill, log or none

  [[device]]
  type = \"block\"                      # any device of outboard --help
  name = \"root\"                       # for orders; by itself the type, with a number
  socket-path = \"/run/root.sock\"      # the options of outboard block --help, without dashes
  image = \"/srv/root.img\"
  num-queues = 2
  without = [\"discard\", \"mq\"]         # an option that may be repeated

  [[worker]]                          # a thread that devices share; by itself each has its own
  name = \"first\"
  pin = [2, 3]                        # processors that it may run on; also event-loop, poll-us

  [[device]]
  type = \"rng\"
  worker = \"first\"                    # or several, for several queues: [\"first\", \"second\"]
  socket-path = \"/run/rng.sock\"

  [[switch]]                          # connects network cards to each other, without a system call for a packet
  name = \"lan\"
  tap = \"up0\"                         # and to the host; also stream, stream-listen, mtu, patience

  [[device]]
  type = \"net\"
  switch = \"lan\"                      # a port of the switch, in the place of tap and stream
  worker = \"first\"                    # ports on one thread hand packets to each other without waking anybody
  socket-path = \"/run/net.sock\"

Examples:
  outboard serve vm7.toml --check              is the file in order?
  outboard serve vm7.toml
  outboard ctl /run/outboard.ctl list
  outboard ctl /run/outboard.ctl add more.toml
  outboard-new serve vm7.toml --take-over /run/outboard.ctl     a live upgrade of all of them

Each device has a thread for its front-end, and workers of its own: none waits for another. On a shared worker
devices have their turns by the time that they take; one request of a device that takes long holds up the
others for as long. (A shared directory, type fs, has threads of its own always.) The process comes behind one
filter of system calls, but is not kept from files, since orders may name any: give it a user of its own. Under systemd
(Type=notify, FileDescriptorStoreMax=64, Restart=always) the listening sockets outlive a restart.
SIGTERM and SIGINT finish what the guests have asked for; a second one ends at once.";

/// Serve many devices in one process, as a TOML file lists them.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The file: TOML, one device table for each device.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Only look whether the file is in order: nothing is opened or served.
    #[arg(long)]
    check: bool,
    /// Take the place of the program that takes orders on this socket, device by device; their guests
    /// see nothing but a pause. What cannot be taken over goes on there.
    #[arg(long, value_name = "CONTROL", conflicts_with = "check")]
    take_over: Option<PathBuf>,
}

impl Args {
    /// Of a program that takes the place of the one that takes orders on `control`.
    pub(crate) fn successor(file: PathBuf, control: PathBuf) -> Self {
        Self { file, check: false, take_over: Some(control) }
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut plan = read(&args.file)?;
    if args.check {
        let count = plan.devices.len();
        println!("{}: {count} devices, in order", args.file.display());
        return Ok(());
    }
    if plan.devices.is_empty() && plan.control.is_none() {
        let file = args.file.display();
        return Err(Failure::Usage(format!("{file}: neither a [[device]] nor a control socket")));
    }
    let old = args.take_over.as_deref().map(|path| Predecessor::of(path, &plan)).transpose()?;
    let place = |(line, why)| Failure::Usage(format!("{}:{line}: {why}", args.file.display()));
    let workers = plan.start_workers().map_err(place)?;
    let switches = plan.make_switches().map_err(place)?;
    for switch in switches.iter().filter(|_| old.is_none()) {
        switch.connect().map_err(place)?;
    }
    let mut ready = Vec::new();
    for entry in plan.devices {
        let gate = old.as_ref().map_or(Ok(None), |old| old.gate(&entry.name))?;
        let prepared = entry.prepare(gate, &|name| workers.get(name).cloned(), &|name| {
            switches.iter().find(|lan| lan.name == name).map(Arc::clone)
        });
        ready.push((prepared.map_err(|why| place((entry.line, why)))?, entry));
    }
    // The old program's, when it has ended; otherwise before anything is served.
    let desk = match (&plan.control, &old) {
        (Some(path), None) => Some(Desk::listen(path).map_err(Failure::Usage)?),
        _ => None,
    };
    let (bell, ear) = bell().map_err(Failure::failed)?;
    stop_on_signals(|| bell.descriptor()).map_err(Failure::failed)?;
    let fleet = Fleet::new(bell);
    workers.into_iter().for_each(|(name, worker)| fleet.employ(name, worker));
    switches.into_iter().for_each(|switch| fleet.lay(switch));
    let inspects = ready.iter().map(|(prepared, _)| prepared.inspect.clone()).collect::<Vec<_>>();
    plan.lock.enter(Program::Serve, "none", &inspects)?;
    for (prepared, entry) in ready {
        if let Err(why) = fleet.add(&entry.name, &entry.kind, prepared) {
            // Those before it have guests already.
            fleet.stop();
            return Err(Failure::Failed(why));
        }
    }
    service::up();
    let watched = attend(&fleet, &ear, desk, old, plan.control.as_deref());
    fleet.stop();
    watched?;
    match fleet.has_failed() {
        true => Err(Failure::Failed("a device failed: the log has its reason".to_owned())),
        false => Ok(()),
    }
}

fn read(file: &Path) -> Result<Plan, Failure> {
    let failed = |why: String| Failure::Usage(format!("{}: {why}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| failed(error.to_string()))?;
    Plan::parse(&text, Known::NOTHING)
        .map_err(|why| Failure::Usage(format!("{}:{why}", file.display())))
}

/// Takes orders, where there is a control socket, until the bell rings.
fn attend(
    fleet: &Arc<Fleet>,
    ear: &Ear,
    mut desk: Option<Desk>,
    old: Option<Predecessor>,
    control: Option<&Path>,
) -> Result<(), Failure> {
    if let Some(old) = old {
        if !old.has_ended(ear).map_err(Failure::failed)? {
            return Ok(());
        }
        info!("the old program has ended");
        // It had their interfaces and sockets.
        for (_, why) in fleet.switches().iter().filter_map(|lan| lan.connect().err()) {
            warn!("a switch is not connected to the host: {why}");
        }
        if let Some(path) = control {
            match Desk::listen(path) {
                Ok(listening) => desk = Some(listening),
                // The guests come first.
                Err(why) => warn!("no orders are taken: {why}"),
            }
        }
    }
    match desk {
        Some(desk) => desk.serve(fleet, ear),
        None => desk::wait_for(ear, None).map(drop),
    }
    .map_err(Failure::failed)
}

impl Entry {
    /// Builds the device, with `gate` in the place of one that runs elsewhere; `worker` has threads by their names,
    /// `switch` has switches.
    ///
    /// # Errors
    /// Why it cannot be built, in words.
    fn prepare(
        &self,
        gate: Option<OwnedFd>,
        worker: &dyn Fn(&str) -> Option<SharedThread>,
        switch: &dyn Fn(&str) -> Option<Arc<Lan>>,
    ) -> Result<Prepared, String> {
        let shared = self.workers.iter().filter_map(|name| worker(name)).collect();
        let lan = self.switch.as_deref().and_then(switch);
        let port = lan.map(|lan| lan.plug(&self.name)).transpose()?;
        let among = Among { name: &self.name, gate, shared, port };
        let prepared = self.command.device(Origin::Among(among));
        let prepared = prepared.ok_or_else(|| format!("{} is no device", self.kind))?;
        prepared.map_err(|failure| match failure {
            Failure::Usage(why) | Failure::Failed(why) => why,
        })
    }
}

/// The program whose place is taken.
struct Predecessor {
    control: PathBuf,
    names: Vec<String>,
    /// Closed when it ends.
    watch: Line,
}

impl Predecessor {
    /// Asks what it runs: all of that is to be in the plan.
    fn of(control: &Path, plan: &Plan) -> Result<Self, Failure> {
        let listed = Line::open(control)?.ask(&Order::List)?.0;
        let Reply::Devices(listed) = listed else {
            return Err(Failure::Failed("the old program answers something else".to_owned()));
        };
        let names: Vec<_> = listed.into_iter().map(|device| device.name).collect();
        let planned = |name: &String| plan.devices.iter().any(|entry| entry.name == *name);
        if let Some(left) = names.iter().find(|name| !planned(name)) {
            let socket = control.display();
            return Err(Failure::Usage(format!(
                "'{left}' runs there and is not in the file: remove it first (outboard ctl {socket} remove {left})"
            )));
        }
        let mut watch = Line::open(control)?;
        watch.ask(&Order::Watch)?;
        Ok(Self { control: control.to_owned(), names, watch })
    }

    /// The way to a device that it runs.
    fn gate(&self, name: &str) -> Result<Option<OwnedFd>, Failure> {
        if !self.names.iter().any(|own| own == name) {
            return Ok(None);
        }
        let order = Order::TakeOver { device: name.to_owned() };
        match Line::open(&self.control)?.ask(&order)? {
            (_, Some(gate)) => Ok(Some(gate)),
            (_, None) => Err(Failure::Failed(format!("{name}: no way to take it over"))),
        }
    }

    /// Waits until it has ended; false: the bell came first.
    fn has_ended(&self, ear: &Ear) -> std::io::Result<bool> {
        self.watch.is_closed(ear)
    }
}
