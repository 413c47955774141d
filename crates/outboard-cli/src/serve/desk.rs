//! The control socket of `outboard serve`: takes orders, one line of JSON each, and answers them.
//!
//! Only the same user and root are listened to (SO_PEERCRED). Each connection has a thread, a bound
//! on its line and on its silence: none holds another up, nor the devices.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt};
use tracing::{info, warn};

use super::bell::Ear;
use super::fleet::Fleet;
use super::order::{LONGEST, Order, Reply};
use super::plan::{Known, Plan};

/// How long somebody may take for an order, or to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections at a time.
const MOST: usize = 16;

/// A control socket that is listened on; its file goes with it.
pub(crate) struct Desk {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
}

impl Desk {
    /// Listens on `path`; a stale socket is replaced, a live one is not.
    pub(crate) fn listen(path: &Path) -> Result<Self, String> {
        let failed = |why: io::Error| format!("{}: {why}", path.display());
        if std::fs::symlink_metadata(path).is_ok() {
            match UnixStream::connect(path) {
                Ok(_) => {
                    return Err(format!("{}: another program takes orders here", path.display()));
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(failed)?;
                }
                Err(error) => return Err(failed(error)),
            }
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let made = std::fs::symlink_metadata(path).map_err(failed)?;
        let path = std::path::absolute(path).map_err(failed)?;
        Ok(Self { listener, path, inode: (made.dev(), made.ino()) })
    }

    /// Takes orders until the bell is rung.
    pub(crate) fn serve(&self, fleet: &Arc<Fleet>, ear: &Ear) -> io::Result<()> {
        let present = Arc::new(AtomicUsize::new(0));
        while wait_for(ear, Some(&self.listener))? {
            match self.listener.accept() {
                Ok((peer, _)) => admit(peer, fleet, &present),
                // Gone again, or no descriptor left: looked at again, not in a circle.
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    warn!("control socket: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(_) => {}
            }
        }
        Ok(())
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let there = std::fs::symlink_metadata(&self.path);
        if there.is_ok_and(|there| (there.dev(), there.ino()) == self.inode) {
            // What cannot be removed is found stale by the next one.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Waits for the bell or a connection; false: it was the bell.
pub(crate) fn wait_for(ear: &Ear, listener: Option<&UnixListener>) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(ear, PollFlags::IN)];
    fds.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
    loop {
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        return Ok(fds.first().is_some_and(|bell| bell.revents().is_empty()));
    }
}

/// Hears one connection on a thread of its own.
fn admit(peer: UnixStream, fleet: &Arc<Fleet>, present: &Arc<AtomicUsize>) {
    if present.load(Ordering::Relaxed) >= MOST {
        warn!("control socket: more than {MOST} connections, one was closed");
        return;
    }
    present.fetch_add(1, Ordering::Relaxed);
    let (fleet, count) = (Arc::clone(fleet), Arc::clone(present));
    let heard = std::thread::Builder::new().name("control".to_owned()).spawn(move || {
        if let Err(error) = hear(peer, &fleet) {
            warn!("control socket: {error}");
        }
        count.fetch_sub(1, Ordering::Relaxed);
    });
    if let Err(error) = heard {
        present.fetch_sub(1, Ordering::Relaxed);
        warn!("control socket: no thread: {error}");
    }
}

fn hear(mut peer: UnixStream, fleet: &Arc<Fleet>) -> io::Result<()> {
    let who = sockopt::socket_peercred(&peer)?.uid;
    peer.set_nonblocking(false)?;
    peer.set_read_timeout(Some(PATIENCE))?;
    peer.set_write_timeout(Some(PATIENCE))?;
    if !who.is_root() && who != rustix::process::geteuid() {
        return answer(&peer, &Reply::Refused("only the same user and root".to_owned()), None);
    }
    let line = read_line(&mut peer)?;
    let order = match serde_json::from_slice(&line) {
        Ok(order) => order,
        Err(error) => {
            return answer(&peer, &Reply::Refused(format!("not an order: {error}")), None);
        }
    };
    if matches!(order, Order::Watch) {
        answer(&peer, &Reply::Done("until I end".to_owned()), None)?;
        // Ends when either side does.
        peer.set_read_timeout(None)?;
        let _ = peer.read(&mut [0])?;
        return Ok(());
    }
    let (reply, gate) = carry_out(order, fleet).unwrap_or_else(|why| (Reply::Refused(why), None));
    answer(&peer, &reply, gate)
}

/// A line, without its end.
fn read_line(peer: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut room = [0; 4096];
    while !line.ends_with(b"\n") && line.len() < LONGEST {
        let got = peer.read(&mut room)?;
        if got == 0 {
            break;
        }
        line.extend(room.iter().take(got));
    }
    Ok(line)
}

fn carry_out(order: Order, fleet: &Arc<Fleet>) -> Result<(Reply, Option<OwnedFd>), String> {
    let reply = match order {
        Order::List => Reply::Devices(fleet.list()),
        Order::Stats { device } => Reply::Stats(fleet.stats(device.as_deref())?),
        Order::Add { toml } => Reply::Done(add(&toml, fleet)?),
        Order::Remove { device } => {
            fleet.remove(&device)?;
            Reply::Done(format!("{device} was removed"))
        }
        Order::Resize { device } => Reply::Done(fleet.resize(&device)?),
        Order::TakeOver { device } => {
            let gate = fleet.gate(&device)?;
            info!("{device} may be taken over");
            return Ok((Reply::Done(device), Some(gate)));
        }
        Order::Watch => Reply::Refused("not in the middle".to_owned()),
    };
    Ok((reply, None))
}

/// Serves what a text asks for: all of its devices or none.
fn add(text: &str, fleet: &Arc<Fleet>) -> Result<String, String> {
    let worker = |name: &str| fleet.worker(name).is_some();
    let switch = |name: &str| fleet.switch(name).is_some();
    let known = Known { worker: &worker, switch: &switch };
    let mut plan = Plan::parse(text, known).map_err(|why| format!("line {why}"))?;
    if plan.control.is_some() {
        return Err("the control socket stays where it is".to_owned());
    }
    if plan.lock.is_some() {
        return Err("the process is locked in already: no seccomp here".to_owned());
    }
    if let Some(taken) = plan.devices.iter().find(|entry| fleet.has(&entry.name)) {
        return Err(format!("line {}: there is a device '{}'", taken.line, taken.name));
    }
    let placed = |line, why| format!("line {line}: {why}");
    let workers = plan.start_workers().map_err(|(line, why)| placed(line, why))?;
    let switches = plan.make_switches().map_err(|(line, why)| placed(line, why))?;
    switches.iter().try_for_each(|lan| lan.connect()).map_err(|(line, why)| placed(line, why))?;
    let mut ready = Vec::new();
    for entry in plan.devices {
        let worker = |name: &str| workers.get(name).cloned().or_else(|| fleet.worker(name));
        let switch = |name: &str| {
            let new = switches.iter().find(|lan| lan.name == name);
            new.map(Arc::clone).or_else(|| fleet.switch(name))
        };
        let prepared =
            entry.prepare(None, &worker, &switch).map_err(|why| placed(entry.line, why))?;
        ready.push((entry, prepared));
    }
    workers.into_iter().for_each(|(name, worker)| fleet.employ(name, worker));
    switches.into_iter().for_each(|switch| fleet.lay(switch));
    let mut names = Vec::new();
    for (entry, prepared) in ready {
        fleet.add(&entry.name, &entry.kind, prepared)?;
        names.push(entry.name);
    }
    Ok(format!("serving {}", names.join(", ")))
}

/// One line, and the descriptor with its first byte.
fn answer(peer: &UnixStream, reply: &Reply, gate: Option<OwnedFd>) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = gate.as_ref().map(|gate| [gate.as_fd()]);
    if let Some(fds) = &fds {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let sent = sendmsg(peer, &[IoSlice::new(&line)], &mut ancillary, SendFlags::NOSIGNAL)?;
    (&*peer).write_all(line.get(sent..).unwrap_or_default())
}
