//! A live upgrade of a guest's sockets: listeners, clients and connections go to the next process.
//!
//! ```text
//!  old: rest ─▶ give: descriptors ─▶ State: connections ─▶ wake (not handed over) or leave
//!  new: receive: descriptors ─▶ restore: connections ─▶ own: everything that happened meanwhile
//! ```
//! Invariants: while it rests nothing is read, written or accepted, in neither process; a connection whose
//! descriptor did not come ends with a Reset; what a state claims of credit is checked.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use outboard::{Error, Heirloom};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use super::{CLIENTS, Client, Hub, MESSAGES, PATIENCE, STREAMS};
use crate::vsock::link::{Link, SavedLink};
use crate::vsock::packet::{Header, Kind};
use crate::vsock::table::{Entry, SavedEntry, Way};
use crate::watches::{Ask, Edge};

/// Names of heirlooms; connections and clients have a number behind theirs.
const LISTENERS: [&str; 2] = ["streams", "messages"];
const CLIENT: [&str; 2] = ["client-of-streams-", "client-of-messages-"];
const CONNECTION: &str = "connection-";

/// What a hub does while another process has, or may get, what it has.
#[derive(Debug, Default)]
pub(super) struct Rest {
    pub(super) on: bool,
    /// What happened meanwhile.
    pub(super) late: Vec<Edge>,
    /// What came from another process, by name.
    came: Option<HashMap<String, OwnedFd>>,
}

/// The connections of a guest, as they stand in a state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::vsock) struct Connections {
    entries: Vec<(usize, SavedEntry)>,
    refusals: Vec<Vec<u8>>,
    next_port: u32,
    owes_reset: bool,
}

fn of_kind(kind: Kind, names: [&str; 2]) -> &str {
    let [streams, messages] = names;
    match kind {
        Kind::Stream => streams,
        Kind::Seqpacket => messages,
    }
}

impl Hub {
    /// Rests, and gives what of the host's it has.
    pub(in crate::vsock) fn give(&mut self) -> Result<Vec<Heirloom>, Error> {
        self.rest.on = true;
        let mut all = Vec::new();
        let mut give = |name: String, fd: &dyn AsFd| -> Result<(), Error> {
            all.push(Heirloom { name, fd: fd.as_fd().try_clone_to_owned()? });
            Ok(())
        };
        for kind in [Kind::Stream, Kind::Seqpacket] {
            if let Some(listener) = self.host.listener(kind) {
                give(of_kind(kind, LISTENERS).to_owned(), &listener)?;
            }
        }
        for (id, client) in &self.clients {
            give(format!("{}{id}", of_kind(client.kind, CLIENT)), &client.socket)?;
        }
        for id in self.table.ids() {
            if let Some(link) = self.table.get(id).and_then(|entry| entry.way.link()) {
                give(format!("{CONNECTION}{id}"), &*link)?;
            }
        }
        Ok(all)
    }

    /// Whether somebody else has, or may get, all this.
    pub(in crate::vsock) fn rests(&self) -> bool {
        self.rest.on
    }

    /// The connections, for a state that goes with what was given.
    pub(in crate::vsock) fn connections(&mut self) -> Connections {
        let mut entries = Vec::new();
        for id in self.table.ids() {
            let staged = self.stage.bytes_of(id);
            if let Some(entry) = self.table.get(id) {
                entries.push((id, entry.save(staged)));
            }
        }
        // Those whose addresses are free again first: others may have them.
        entries.sort_by_key(|(_, entry)| !entry.machine.is_done());
        let refusals = self.refusals.iter().map(|header| header.as_bytes().to_vec()).collect();
        let (next_port, owes_reset) = (self.next_port, self.owes_reset);
        Connections { entries, refusals, next_port, owes_reset }
    }

    /// Everything is another process's: names in the file system stay.
    pub(in crate::vsock) fn leave(&mut self) {
        self.host.leave();
    }

    /// Goes on, with what happened meanwhile.
    pub(in crate::vsock) fn wake(&mut self) {
        self.rest.on = false;
        for edge in std::mem::take(&mut self.rest.late) {
            self.happened(edge);
        }
        // The worker looks what there is to say.
        self.gate.bell.ring();
    }

    /// Rests with what another process gives; listens anew if it gives no listeners.
    pub(in crate::vsock) fn receive(&mut self, heirlooms: Vec<Heirloom>) -> Result<(), Error> {
        self.rest.on = true;
        let named = heirlooms.into_iter().map(|Heirloom { name, fd }| (name, fd));
        let mut came: HashMap<_, _> = named.collect();
        let listeners = LISTENERS.map(|name| came.remove(name));
        if !self.host.listens() {
            self.host.adopt(&self.options.uds_path, listeners)?;
        }
        self.rest.came = Some(came);
        Ok(())
    }

    /// Takes connections whose descriptors have come.
    ///
    /// # Errors
    /// None have come, or the state is not sound; nothing has changed.
    pub(in crate::vsock) fn restore(&mut self, saved: Connections) -> Result<(), Error> {
        let Some(came) = &mut self.rest.came else {
            return Err(Error::refused("connections come with a live upgrade only"));
        };
        if let Some((id, _)) = saved.entries.iter().find(|(_, entry)| !entry.is_sound()) {
            return Err(Error::refused(format!("connection {id} cannot be as the state has it")));
        }
        let mut fds = std::mem::take(came);
        self.forget();
        (self.next_port, self.owes_reset) = (saved.next_port, saved.owes_reset);
        let refusals = saved.refusals.iter().take(super::REFUSALS);
        self.refusals.extend(refusals.filter_map(|bytes| Header::read_from_bytes(bytes).ok()));
        for (number, entry) in saved.entries {
            let fd = fds.remove(&format!("{CONNECTION}{number}"));
            self.restore_entry(entry, fd);
        }
        self.rest.came = Some(fds);
        Ok(())
    }

    fn restore_entry(&mut self, saved: SavedEntry, fd: Option<OwnedFd>) {
        let waits = saved.waits;
        let (mut entry, link) = Entry::restored(saved);
        let id = self.table.next_id();
        entry.way = match (link, fd) {
            (Some((calling, saved)), Some(fd)) => self.restored_way(id, calling, saved, fd, &entry),
            _ => Way::Gone,
        };
        if matches!(entry.way, Way::Gone) {
            entry.abort();
        }
        self.table.insert(entry);
        if waits {
            self.set_deadline(id, PATIENCE);
        }
        self.settle(id);
    }

    fn restored_way(
        &mut self,
        id: usize,
        calling: bool,
        saved: SavedLink,
        fd: OwnedFd,
        entry: &Entry,
    ) -> Way {
        let link = Link::restored(fd, entry.kind, saved);
        match (self.watches.add(&link, id as u64, link.asks()), calling) {
            (Err(_), _) => Way::Gone,
            (Ok(_), true) => Way::Calling(link),
            (Ok(_), false) => Way::Up(link),
        }
    }

    /// Everything is this process's: listens, and lets clients go on.
    pub(in crate::vsock) fn own(&mut self) -> Result<(), Error> {
        for (name, socket) in self.rest.came.take().unwrap_or_default() {
            let kinds = [Kind::Stream, Kind::Seqpacket];
            let kind = kinds.into_iter().find(|kind| name.starts_with(of_kind(*kind, CLIENT)));
            let Some(kind) = kind else { continue };
            let id = self.clients.vacant_key();
            if self.watches.add(&socket, CLIENTS + id as u64, Ask::Bytes).is_ok() {
                self.clients.insert(Client { socket, kind, deadline: Instant::now() + PATIENCE });
                self.start_timer();
            }
        }
        self.host.own([STREAMS, MESSAGES], &self.watches)?;
        self.wake();
        Ok(())
    }
}
