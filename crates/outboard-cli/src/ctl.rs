//! `outboard ctl`: orders for a running `outboard serve`.
//!
//! Invariant: an order is carried out or refused with a reason, and the exit code tells which.

use std::collections::BTreeMap;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;

use crate::Failure;
use crate::report::{Table, say};
use crate::serve;
use crate::serve::order::{LONGEST, Listed, Order, Reply};

/// The longest wait for an answer: a device that is removed finishes first.
const PATIENCE: Duration = Duration::from_secs(60);

const EXAMPLES: &str = "\
Examples:
  outboard ctl /run/outboard.ctl list
  outboard ctl /run/outboard.ctl stats root
  outboard ctl /run/outboard.ctl add more.toml         serve the devices of another file too
  outboard ctl /run/outboard.ctl remove root           what its guest has asked for is finished first
  truncate -s 20G root.img && outboard ctl /run/outboard.ctl resize root
  outboard-new ctl /run/outboard.ctl take-over vm7.toml     a live upgrade of all devices

Programs send one line of JSON and read one: {\"order\":\"list\"}, {\"order\":\"remove\",\"device\":\"root\"} …
Exit code: 0 done, 1 refused, 2 the command line was wrong or nobody takes orders there.";

/// Give an order to a running `outboard serve`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The control socket, as the file of `outboard serve` names it.
    #[arg(value_name = "CONTROL")]
    control: PathBuf,
    /// Answer as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    wanted: Wanted,
}

#[derive(clap::Subcommand)]
enum Wanted {
    #[command(flatten)]
    Order(Asked),
    /// Take the place of the program that takes orders there, with this one, which stays: the same as
    /// outboard serve FILE --take-over CONTROL.
    TakeOver {
        /// A file as for outboard serve.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// What the running program does, and answers.
#[derive(clap::Subcommand)]
enum Asked {
    /// All devices: is a front-end there, how much was done?
    List,
    /// What devices show of themselves: front-end, memory, rings, counters.
    Stats {
        /// One device; all of them by default.
        #[arg(value_name = "DEVICE")]
        device: Option<String>,
    },
    /// Serve the devices of another file too.
    Add {
        /// A file as for outboard serve.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Finish what is under way, then end a device.
    Remove {
        /// Its name.
        #[arg(value_name = "DEVICE")]
        device: String,
    },
    /// Have the guest see the size that the image has now.
    Resize {
        /// Its name.
        #[arg(value_name = "DEVICE")]
        device: String,
    },
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let order = match &args.wanted {
        Wanted::Order(asked) => asked.order()?,
        Wanted::TakeOver { file } => {
            return serve::run(&serve::Args::successor(file.clone(), args.control.clone()));
        }
    };
    let (reply, _) = Line::open(&args.control)?.ask(&order)?;
    if args.json {
        say(serde_json::to_string_pretty(&reply).map_err(Failure::failed)?);
        return Ok(());
    }
    match reply {
        Reply::Devices(devices) => say(table(&devices).to_string().trim_end()),
        Reply::Stats(devices) => say(tree(&devices).trim_end()),
        Reply::Done(words) | Reply::Refused(words) => say(words),
    }
    Ok(())
}

impl Asked {
    fn order(&self) -> Result<Order, Failure> {
        Ok(match self {
            Self::List => Order::List,
            Self::Stats { device } => Order::Stats { device: device.clone() },
            Self::Add { file } => {
                let toml = std::fs::read_to_string(file);
                let failed = |error| Failure::Usage(format!("{}: {error}", file.display()));
                Order::Add { toml: toml.map_err(failed)? }
            }
            Self::Remove { device } => Order::Remove { device: device.clone() },
            Self::Resize { device } => Order::Resize { device: device.clone() },
        })
    }
}

fn table(devices: &[Listed]) -> Table {
    let mut table = Table::new(["device", "type", "front-end", "finished", "what"]);
    for device in devices {
        let front_end = if device.connected { "connected" } else { "-" };
        table.row([
            device.name.clone(),
            device.kind.clone(),
            front_end.to_owned(),
            device.finished.to_string(),
            device.what.clone(),
        ]);
    }
    table
}

/// A fact on each line, what belongs together indented.
fn tree(devices: &BTreeMap<String, Value>) -> String {
    let mut text = String::new();
    for (name, facts) in devices {
        branch(&mut text, name, facts, 0);
    }
    text
}

fn branch(text: &mut String, name: &str, value: &Value, depth: usize) {
    text.push_str(&"  ".repeat(depth));
    text.push_str(name);
    match value {
        Value::Object(inner) => {
            text.push('\n');
            for (name, value) in inner {
                branch(text, name, value, depth + 1);
            }
        }
        Value::String(words) => text.push_str(&format!(": {words}\n")),
        other => text.push_str(&format!(": {other}\n")),
    }
}

/// A connection to a control socket, for one order.
pub(crate) struct Line(UnixStream);

impl Line {
    /// Connects to `control`.
    pub(crate) fn open(control: &Path) -> Result<Self, Failure> {
        let failed = |error| Failure::Usage(format!("{}: {error}", control.display()));
        let stream = UnixStream::connect(control).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(Failure::failed)?;
        Ok(Self(stream))
    }

    /// Gives the order; the answer, and the descriptor that came with it. A refusal is a failure.
    pub(crate) fn ask(&mut self, order: &Order) -> Result<(Reply, Option<OwnedFd>), Failure> {
        let mut line = serde_json::to_vec(order).map_err(Failure::failed)?;
        line.push(b'\n');
        // Turned away before it was heard: the answer says why.
        let _ = self.0.write_all(&line);
        let mut answer = vec![0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut room = [IoSliceMut::new(&mut answer)];
        let got = recvmsg(&self.0, &mut room, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let got = got.map_err(Failure::failed)?.bytes;
        let mut gate = None;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                gate = fds.next();
            }
        }
        answer.truncate(got);
        let mut room = [0; 4096];
        while !answer.ends_with(b"\n") && answer.len() < 16 * LONGEST {
            match self.0.read(&mut room).map_err(Failure::failed)? {
                0 => break,
                got => answer.extend(room.iter().take(got)),
            }
        }
        match serde_json::from_slice(&answer) {
            Ok(Reply::Refused(why)) => Err(Failure::Failed(why)),
            Ok(reply) => Ok((reply, gate)),
            Err(error) => Err(Failure::Failed(format!("no answer that can be read: {error}"))),
        }
    }

    /// Waits until the other side closes; false: `other` became readable first.
    pub(crate) fn is_closed(&self, other: &impl AsFd) -> std::io::Result<bool> {
        let mut fds = [PollFd::new(other, PollFlags::IN), PollFd::new(&self.0, PollFlags::IN)];
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let [other, _] = &fds;
        Ok(other.revents().is_empty())
    }
}
