//! A live upgrade of a console: terminals, listeners and clients go to the next process.
//!
//! ```text
//!  old: rest ─▶ give: descriptors, bytes ─▶ State: ports ─▶ wake (not handed over) or leave
//!  new: receive: descriptors, bytes ─▶ restore: ports ─▶ own: everything that happened meanwhile
//! ```
//! Invariants: while it rests no byte comes from or goes to the host's side and no request is taken, in neither
//! process; a port whose descriptor did not come opens its own; standard input and output stay where they are, and a
//! file is opened by both.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use outboard::{Error, Heirloom};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::pty::ptsname;
use tracing::info;

use super::Shared;
use super::host::{Host, Side, Way, make_link, open, watch_opens};
use super::hub::Hub;
use super::port::{INPUT, OUTPUT, REQUEST};
use crate::names::Name;

/// Names of heirlooms; the port's number is behind them.
const TERMINAL: &str = "terminal";
const LISTENER: &str = "listener";
const CLIENT: &str = "client";
/// Bytes that wait for the host, and for the guest: in a file without a name.
const WRITTEN: &str = "written";
const UNREAD: &str = "unread";

impl Hub {
    /// Rests, and gives what of the host's it has.
    pub(super) fn give(&mut self) -> Result<Vec<Heirloom>, Error> {
        self.rest(true);
        let mut all = Vec::new();
        for (index, port) in self.ports.iter().enumerate() {
            let mut give = |what, fd| all.push(Heirloom { name: format!("{what}-{index}"), fd });
            for (what, fd) in port.side.descriptors().into_iter().flatten() {
                give(what, fd.try_clone_to_owned()?);
            }
            // With a guest they come with its state, too; without one nothing else has them.
            for (what, bytes) in [(WRITTEN, &port.output), (UNREAD, &port.input)] {
                if !bytes.is_empty() {
                    give(what, in_memory(bytes)?);
                }
            }
        }
        Ok(all)
    }

    /// Everything is another process's: names in the file system stay.
    pub(super) fn leave(&mut self) {
        self.names().for_each(Name::leave);
    }

    /// Goes on, with what happened meanwhile.
    pub(super) fn wake(&mut self, shared: &Shared) {
        self.rest(false);
        for edge in std::mem::take(&mut self.late) {
            self.edge(edge, shared);
        }
        // The worker looks what there is to do.
        shared.bell.ring();
    }

    /// Rests with what another process gives; ports that await something else open it themselves.
    pub(super) fn receive(
        &mut self,
        heirlooms: Vec<Heirloom>,
        shared: &Shared,
    ) -> Result<(), Error> {
        self.rest(true);
        let named = heirlooms.into_iter().map(|Heirloom { name, fd }| (name, fd));
        let mut came: HashMap<_, _> = named.collect();
        for (index, port) in self.ports.iter_mut().enumerate() {
            let mut take = |what: &str| came.remove(&format!("{what}-{index}"));
            if let Way::Awaited(host) = &port.side.way {
                let host = host.clone();
                port.side.inherit(&host, &mut take)?;
                port.side.watch(&shared.watches)?;
                port.size = port.side.size().unwrap_or(port.size);
            }
            if let Some(terminal) = port.terminal() {
                info!("port {index} on {}", terminal.display());
            }
            port.output = bytes_of(take(WRITTEN), OUTPUT as u64 + REQUEST)?;
            port.input = bytes_of(take(UNREAD), INPUT as u64)?;
        }
        Ok(())
    }

    /// Everything is this process's.
    pub(super) fn own(&mut self, shared: &Shared) {
        self.names().for_each(Name::own);
        self.wake(shared);
        for port in &mut self.ports {
            port.side.look_at_pty();
        }
        self.go_on();
    }

    fn rest(&mut self, on: bool) {
        self.rests = on;
        self.ports.iter_mut().for_each(|port| port.side.rests = on);
    }

    fn names(&mut self) -> impl Iterator<Item = &mut Name> {
        self.ports.iter_mut().filter_map(|port| match &mut port.side.way {
            Way::Pty { link, .. } => link.as_mut(),
            Way::Socket { name, .. } => Some(name),
            Way::Awaited(_) | Way::Stdio { .. } | Way::File(_) => None,
        })
    }
}

impl Side {
    /// What of it can be another process's.
    fn descriptors(&self) -> [Option<(&'static str, BorrowedFd<'_>)>; 2] {
        match &self.way {
            Way::Pty { master, .. } => [Some((TERMINAL, master.as_fd())), None],
            Way::Socket { listener, client, .. } => {
                let client = client.as_ref().map(|client| (CLIENT, client.as_fd()));
                [Some((LISTENER, listener.as_fd())), client]
            }
            Way::Awaited(_) | Way::Stdio { .. } | Way::File(_) => [None, None],
        }
    }

    /// Becomes what `host` names, of what has come if that is the same.
    fn inherit(
        &mut self,
        host: &Host,
        take: &mut impl FnMut(&str) -> Option<OwnedFd>,
    ) -> Result<(), Error> {
        self.way = match host {
            Host::Pty { link } => match take(TERMINAL) {
                Some(master) => terminal(master, link.as_deref())?,
                None => open(host)?,
            },
            Host::Socket(path) => {
                let listener = take(LISTENER).map(UnixListener::from);
                match listener.filter(|listener| is_at(listener, path)) {
                    Some(listener) => {
                        let name = Name::of_another(path);
                        Way::Socket { listener, name, client: None }
                    }
                    None => open(host)?,
                }
            }
            Host::Stdio | Host::File(_) => open(host)?,
        };
        if let (Way::Socket { client, .. }, Some(came)) = (&mut self.way, take(CLIENT)) {
            *client = Some(UnixStream::from(came));
            (self.readable, self.writable, self.present) = (true, true, true);
        }
        Ok(())
    }
}

fn terminal(master: OwnedFd, link: Option<&Path>) -> Result<Way, Error> {
    let path = ptsname(&master, Vec::new())?;
    let path = PathBuf::from(path.to_string_lossy().into_owned());
    let opens = watch_opens(&path)?;
    let leads_there = |link: &Path| link.read_link().is_ok_and(|target| target == path);
    let link = match link {
        Some(link) if leads_there(link) => Some(Name::of_another(link)),
        Some(link) => Some(make_link(link, &path)?),
        None => None,
    };
    Ok(Way::Pty { master, opens, path, link })
}

fn is_at(listener: &UnixListener, path: &Path) -> bool {
    listener.local_addr().is_ok_and(|address| address.as_pathname() == Some(path))
}

fn in_memory(bytes: &VecDeque<u8>) -> Result<OwnedFd, Error> {
    let mut file = File::from(memfd_create("port", MemfdFlags::CLOEXEC)?);
    let (front, back) = bytes.as_slices();
    file.write_all(front)?;
    file.write_all(back)?;
    file.rewind()?;
    Ok(file.into())
}

/// What is in such a file; nothing, if there is none.
fn bytes_of(file: Option<OwnedFd>, most: u64) -> Result<VecDeque<u8>, Error> {
    let mut bytes = Vec::new();
    if let Some(file) = file {
        File::from(file).take(most).read_to_end(&mut bytes)?;
    }
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use outboard::{Hooks, Model};

    use super::*;
    use crate::console::{Console, ConsoleOptions, PortOptions};

    /// A console on a socket; without a driver there is port 0.
    fn console(path: &Path, inherits: bool) -> Console {
        let host = Host::Socket(path.to_owned());
        let ports = vec![PortOptions { name: String::new(), console: true, host }];
        let options = ConsoleOptions { ports, inherits, ..ConsoleOptions::default() };
        Console::new(options).expect("a console")
    }

    /// As a worker does.
    fn look(console: &Console) {
        loop {
            let edges = console.shared.watches.look().expect("an epoll");
            if edges.len() == 0 {
                return;
            }
            let mut hub = console.shared.lock();
            edges.for_each(|edge| hub.edge(edge, &console.shared));
        }
    }

    fn write(console: &Console, bytes: &[u8]) {
        console.shared.lock().ports.iter_mut().for_each(|port| port.push(bytes));
    }

    fn says(client: &mut UnixStream) -> String {
        let mut bytes = [0; 100];
        let got = client.read(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(bytes.get(..got).unwrap_or_default()).into_owned()
    }

    #[test]
    fn two_processes_that_rest_take_nothing_and_one_of_them_goes_on_with_all() {
        for gone in [false, true] {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("port");
            let (mut old, mut new) = (console(&path, false), console(&path, true));
            let mut client = UnixStream::connect(&path).expect("it listens");
            client.set_nonblocking(true).expect("a socket");
            look(&old);
            write(&old, b"early");
            assert_eq!(says(&mut client), "early");
            let heirlooms = old.hand_over().expect("given");
            new.inherit(heirlooms).expect("taken");
            new.resume().expect("starts");
            client.write_all(b"hello").expect("sent");
            for console in [&old, &new] {
                write(console, b"late");
                look(console);
                assert!(!console.shared.lock().has_input(0), "nothing is read");
                assert_eq!(says(&mut client), "", "nothing is written");
            }
            old.handed_over(gone);
            let heir = if gone {
                new.inherited();
                drop(old);
                new
            } else {
                drop(new);
                old
            };
            look(&heir);
            assert_eq!(says(&mut client), "late");
            assert!(heir.shared.lock().has_input(0));
            assert!(path.exists(), "it listens on");
            drop(heir);
            assert!(!path.exists());
        }
    }
}
