//! Clients of the host, until they have said which port of the guest they want.
//!
//! Invariant: whoever says nothing, or something else, has a place for a while only.

use std::os::fd::OwnedFd;
use std::time::Instant;

use tracing::{debug, warn};

use super::{CLIENTS, FIRST_PORT, Greeting, Hub, PATIENCE};
use crate::vsock::host::{Said, read_line};
use crate::vsock::packet::{Address, HOST_CID, Kind};
use crate::vsock::table::Key;
use crate::watches::Ask;

#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: OwnedFd,
    pub(super) kind: Kind,
    pub(super) deadline: Instant,
}

impl Hub {
    /// Lets in who waits.
    pub(super) fn accept(&mut self, kind: Kind) {
        loop {
            let socket = match self.host.accept(kind) {
                Ok(Some(socket)) => socket,
                Ok(None) => return,
                Err(error) => return warn!("a client cannot be let in: {error}"),
            };
            let id = self.clients.vacant_key();
            if self.is_full() || self.watches.add(&socket, CLIENTS + id as u64, Ask::Bytes).is_err()
            {
                self.counters.refused.add(1);
                continue;
            }
            let deadline = Instant::now() + PATIENCE;
            self.clients.insert(Client { socket, kind, deadline });
            self.start_timer();
            self.client_speaks(id);
        }
    }

    pub(super) fn client_speaks(&mut self, id: usize) {
        let Some(client) = self.clients.get(id) else { return };
        let said = read_line(&client.socket);
        if said == Said::Nothing {
            return;
        }
        let Some(client) = self.clients.try_remove(id) else { return };
        match said {
            Said::Port(port) => self.ask(client, port),
            _ => debug!("a client that names no port"),
        }
    }

    /// A client of the host wants a connection.
    fn ask(&mut self, client: Client, port: u32) {
        let Client { socket, kind, .. } = client;
        if !self.options.guest_ports.contains(port) || !self.takes(kind) {
            return self.counters.refused.add(1);
        }
        let Some(peer) = self.free_port(port) else { return };
        self.ask_guest(Key { port, peer }, kind, socket, Greeting::Line);
    }

    /// A port of the host's that this port of the guest is not connected to.
    fn free_port(&mut self, port: u32) -> Option<Address> {
        (0..=self.options.connections).find_map(|_| {
            let peer = Address { cid: HOST_CID, port: self.next_port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            self.table.find(Key { port, peer }).is_none().then_some(peer)
        })
    }
}
