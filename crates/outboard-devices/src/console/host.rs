//! The host's side of a port: a pseudo-terminal, standard input and output, a Unix socket, a file.
//!
//! Invariants: nothing here waits; a side that breaks off takes no bytes with it that were not handed
//! to it; edges are remembered (`readable`, `writable`) until a call says that there is no more.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use outboard::Error;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, inotify, openat};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tracing::{info, warn};

use super::config::Size;
use crate::names::{self, Name};
use crate::watches::{Ask, Edge, Watches};

/// Bytes of clients that have left which wait for the guest while another one is there; and a piece.
pub(super) const LAST_WORDS: usize = 64 << 10;

/// What a port is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// A pseudo-terminal of its own, and perhaps a symbolic link to it.
    Pty {
        /// Where the link is made; it is removed at the end.
        link: Option<PathBuf>,
    },
    /// Standard input and output of the process.
    Stdio,
    /// A Unix socket that one client at a time can connect to.
    Socket(PathBuf),
    /// What the guest writes is added to this file.
    File(PathBuf),
}

/// Which of a side's descriptors an edge is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Where bytes come from, and go to if there is no other.
    Main,
    /// Where bytes go to; who knocks; who opens.
    Other,
}

#[derive(Debug)]
pub(super) enum Way {
    /// Another process's: it comes with a live upgrade.
    Awaited(Host),
    Pty {
        master: OwnedFd,
        opens: OwnedFd,
        path: PathBuf,
        link: Option<Name>,
    },
    Stdio {
        input: OwnedFd,
        output: OwnedFd,
        before: Option<Termios>,
    },
    Socket {
        listener: UnixListener,
        name: Name,
        client: Option<UnixStream>,
    },
    File(File),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) way: Way,
    pub(super) token: u64,
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// No more bytes come from it.
    pub(super) ended: bool,
    /// Somebody is there to take bytes.
    pub(super) present: bool,
    /// Another process has, or may get it: nothing is read or written.
    pub(super) rests: bool,
    /// A failure is told once.
    failed: bool,
}

impl Side {
    /// Opens what `host` names; its edges come under `token` and the next number. `awaited`: what can come from
    /// another process is not opened.
    pub(super) fn open(
        host: &Host,
        token: u64,
        awaited: bool,
        watches: &Watches,
    ) -> Result<Self, Error> {
        let way = match host {
            Host::Pty { .. } | Host::Socket(_) if awaited => Way::Awaited(host.clone()),
            _ => open(host)?,
        };
        let here = matches!(way, Way::Stdio { .. } | Way::File(_));
        let side = Self {
            ended: matches!(way, Way::File(_)),
            way,
            token,
            readable: here,
            writable: here,
            present: here,
            rests: false,
            failed: false,
        };
        side.watch(watches)?;
        Ok(side)
    }

    /// Has its edges reported; what is true of it now is the first.
    pub(super) fn watch(&self, watches: &Watches) -> Result<(), Error> {
        let token = self.token;
        match &self.way {
            Way::Pty { master, opens, .. } => {
                watches.add(master, token, Ask::Room)?;
                watches.add(opens, token + 1, Ask::Bytes)?;
            }
            Way::Stdio { input, output, .. } => {
                watches.add(input, token, Ask::Bytes)?;
                watches.add(output, token + 1, Ask::Room)?;
            }
            Way::Socket { listener, client, .. } => {
                watches.add(listener, token + 1, Ask::Bytes)?;
                if let Some(client) = client {
                    watches.add(client, token, Ask::Room)?;
                }
            }
            Way::File(_) | Way::Awaited(_) => {}
        }
        Ok(())
    }

    /// Whether somebody is there to read what the guest writes, or may be.
    pub(super) fn is_present(&self) -> bool {
        self.present || self.rests
    }

    /// Whether somebody is there, or has left bytes behind.
    pub(super) fn is_open(&self) -> bool {
        match &self.way {
            Way::Socket { client, .. } => client.is_some(),
            Way::Pty { .. } => self.present,
            Way::Stdio { .. } | Way::File(_) => true,
            Way::Awaited(_) => false,
        }
    }

    /// Where its pseudo-terminal is, if it has one.
    pub(super) fn terminal(&self) -> Option<&Path> {
        match &self.way {
            Way::Pty { path, .. } => Some(path),
            _ => None,
        }
    }

    /// Something has happened to one of its descriptors. What a client that is followed by another one had sent goes
    /// behind `input`.
    pub(super) fn edge(
        &mut self,
        part: Part,
        edge: Edge,
        input: &mut VecDeque<u8>,
        watches: &Watches,
    ) {
        match (&self.way, part) {
            (Way::Pty { .. }, _) => self.look_at_pty(),
            (Way::Socket { .. }, Part::Other) => self.accept(input, watches),
            // Nobody listens any more; what was sent before can still be read.
            (Way::Socket { .. }, Part::Main) if edge.hung_up => {
                (self.readable, self.present) = (true, false);
            }
            (Way::Stdio { .. }, Part::Other) => self.writable |= edge.writable,
            _ => {
                self.readable |= edge.readable;
                self.writable |= edge.writable;
            }
        }
    }

    /// Reads what there is, up to the length of `to`; 0: nothing now.
    pub(super) fn read(&mut self, to: &mut [u8]) -> usize {
        if !self.readable || self.ended || self.rests {
            return 0;
        }
        let got = match &self.way {
            Way::Pty { master: fd, .. } | Way::Stdio { input: fd, .. } => rustix::io::read(fd, to),
            Way::Socket { client: Some(client), .. } => rustix::io::read(client, to),
            Way::Socket { client: None, .. } | Way::File(_) | Way::Awaited(_) => Err(Errno::AGAIN),
        };
        match got {
            Ok(0) => self.end_of_input(),
            Ok(got) => return got,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => self.readable = false,
            // A pseudo-terminal that nobody has open.
            Err(Errno::IO) if matches!(self.way, Way::Pty { .. }) => self.readable = false,
            Err(error) => {
                self.tell(error);
                self.end_of_input();
            }
        }
        0
    }

    /// Writes as much as there is room for; 0: none now.
    pub(super) fn write(&mut self, bytes: &[u8]) -> usize {
        if !self.writable || !self.present || self.rests || bytes.is_empty() {
            return 0;
        }
        let put = match &self.way {
            Way::Pty { master: fd, .. } | Way::Stdio { output: fd, .. } => {
                rustix::io::write(fd, bytes)
            }
            Way::Socket { client: Some(client), .. } => {
                rustix::net::send(client, bytes, rustix::net::SendFlags::NOSIGNAL)
            }
            Way::Socket { client: None, .. } | Way::Awaited(_) => Err(Errno::AGAIN),
            Way::File(file) => rustix::io::write(file, bytes),
        };
        match put {
            Ok(put) => return put,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => self.writable = false,
            Err(error) if matches!(self.way, Way::File(_) | Way::Stdio { .. }) => {
                // A full disk, a closed pipe: the guest is not to wait for it.
                self.tell(error);
                return bytes.len();
            }
            // The reader is gone.
            Err(_) => self.present = false,
        }
        0
    }

    /// The size of the terminal at the other end, if it is one and knows it.
    pub(super) fn size(&self) -> Option<Size> {
        let terminal = match &self.way {
            Way::Pty { master, .. } => master.as_fd(),
            Way::Stdio { output, .. } => output.as_fd(),
            Way::Socket { .. } | Way::File(_) | Way::Awaited(_) => return None,
        };
        let size = tcgetwinsize(terminal).ok()?;
        (size.ws_col != 0 && size.ws_row != 0)
            .then_some(Size { columns: size.ws_col, rows: size.ws_row })
    }

    fn tell(&mut self, error: Errno) {
        if !std::mem::replace(&mut self.failed, true) {
            warn!("host's side of a port: {error}");
        }
    }

    fn end_of_input(&mut self) {
        self.ended = true;
        if let Way::Socket { client, .. } = &mut self.way {
            // One that has only said its last word may still listen.
            let gone = client.as_ref().is_none_or(|client| is_hung_up(client.as_fd()));
            if gone || !self.present {
                (*client, self.present) = (None, false);
            }
        }
    }

    /// Whether somebody has its terminal open; nothing for other sides.
    pub(super) fn look_at_pty(&mut self) {
        let Way::Pty { master, opens, .. } = &self.way else { return };
        // What was opened and closed does not matter, only how it is now.
        let mut events = [0; 512];
        while rustix::io::read(opens, &mut events).is_ok() {}
        self.present = !is_hung_up(master.as_fd());
        // What was written before the last one closed it can still be read.
        self.readable = true;
        self.writable = self.present;
    }

    fn accept(&mut self, input: &mut VecDeque<u8>, watches: &Watches) {
        let Way::Socket { listener, client, .. } = &mut self.way else { return };
        loop {
            match listener.accept() {
                Ok((new, _)) => {
                    let busy = client.as_ref().is_some_and(|old| !is_hung_up(old.as_fd()));
                    if busy {
                        info!("a second client of a port was turned away");
                        continue;
                    }
                    let ready = new
                        .set_nonblocking(true)
                        .and_then(|()| watches.add(&new, self.token, Ask::Room).map(drop));
                    if let Err(error) = ready {
                        warn!("a client of a port cannot be served: {error}");
                        continue;
                    }
                    if let Some(old) = client.replace(new) {
                        read_last_words(&old, input);
                    }
                    (self.present, self.ended) = (true, false);
                    (self.readable, self.writable) = (true, true);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        if let Way::Stdio { input, before: Some(before), .. } = &self.way {
            // A terminal that is gone needs nothing.
            let _ = tcsetattr(input, OptionalActions::Now, before);
        }
    }
}

/// Reads what a client that has left had sent, as far as it is to be kept.
fn read_last_words(old: &UnixStream, input: &mut VecDeque<u8>) {
    let mut bytes = [0; 4096];
    while input.len() < LAST_WORDS {
        match rustix::io::read(old, &mut bytes) {
            Ok(got @ 1..) => input.extend(bytes.iter().take(got)),
            Err(Errno::INTR) => {}
            Ok(0) | Err(_) => return,
        }
    }
    info!("a client of a port was followed by another one before all was read that it had sent");
}

/// Whether the other end is closed altogether.
fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(&fd, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let looked = poll(&mut polled, Some(&now));
    looked.is_ok() && polled.iter().any(|one| one.revents().contains(PollFlags::HUP))
}

fn failed(what: &Path, error: impl Into<io::Error>) -> Error {
    Error::refused(format!("{}: {}", what.display(), error.into()))
}

/// Opens what `host` names.
pub(super) fn open(host: &Host) -> Result<Way, Error> {
    match host {
        Host::Pty { link } => open_pty(link.as_deref()),
        Host::Stdio => open_stdio(),
        Host::Socket(path) => listen(path),
        Host::File(path) => Ok(Way::File(open_file(path)?)),
    }
}

fn open_pty(link: Option<&Path>) -> Result<Way, Error> {
    let name = Path::new("/dev/ptmx");
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).map_err(|error| failed(name, error))?;
    grantpt(&master)?;
    unlockpt(&master)?;
    rustix::io::ioctl_fionbio(&master, true)?;
    let path = ptsname(&master, Vec::new())?;
    // Opened once, and closed: from then on the master says whether somebody has it open.
    let slave = openat(CWD, &path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    let mut termios = tcgetattr(&slave)?;
    termios.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &termios)?;
    let path = PathBuf::from(path.to_string_lossy().into_owned());
    let opens = watch_opens(&path)?;
    drop(slave);
    let link = link.map(|link| make_link(link, &path)).transpose()?;
    Ok(Way::Pty { master, opens, path, link })
}

/// Says when somebody opens the terminal.
pub(super) fn watch_opens(terminal: &Path) -> Result<OwnedFd, Error> {
    let opens = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&opens, terminal, inotify::WatchFlags::OPEN)?;
    Ok(opens)
}

pub(super) fn make_link(link: &Path, terminal: &Path) -> Result<Name, Error> {
    // A link that an earlier process left is replaced, anything else is not.
    if link.symlink_metadata().is_ok_and(|found| found.is_symlink()) {
        std::fs::remove_file(link).map_err(|error| failed(link, error))?;
    }
    std::os::unix::fs::symlink(terminal, link).map_err(|error| failed(link, error))?;
    Ok(Name::of(link))
}

fn open_stdio() -> Result<Way, Error> {
    let (input, output) = (reopened(0, io::stdin().as_fd())?, reopened(1, io::stdout().as_fd())?);
    let before = tcgetattr(&input).ok();
    if let Some(before) = &before {
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&input, OptionalActions::Now, &raw)?;
    }
    Ok(Way::Stdio { input, output, before })
}

/// A terminal or a pipe is opened anew, so that not waiting for it is our affair alone.
fn reopened(number: u8, fd: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    let fd = fd.try_clone_to_owned()?;
    let file = File::from(fd.try_clone()?);
    let kind = file.metadata()?.file_type();
    if kind.is_socket() {
        rustix::io::ioctl_fionbio(&fd, true)?;
    }
    if !kind.is_char_device() && !kind.is_fifo() {
        return Ok(fd);
    }
    let access = if number == 0 { OFlags::RDONLY } else { OFlags::WRONLY };
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{number}");
    Ok(openat(CWD, path, flags, Mode::empty()).unwrap_or(fd))
}

fn listen(path: &Path) -> Result<Way, Error> {
    let (listener, name) = names::listen(path).map_err(|error| failed(path, error))?;
    Ok(Way::Socket { listener, name, client: None })
}

fn open_file(path: &Path) -> Result<File, Error> {
    let opened = OpenOptions::new().append(true).create(true).open(path);
    opened.map_err(|error| failed(path, error))
}
