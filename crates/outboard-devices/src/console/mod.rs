//! A console with one or many ports: the device of virtio 1.3 §5.3, on terminals, sockets and files of
//! the host.
//!
//! ```text
//!  guest ◀─ queues ─▶ worker ─▶ hub: ports ─▶ host's side: pty, stdio, socket, file
//!                                 └─ control messages: names, open and closed, sizes
//! ```
//! Invariants: a guest never waits for a host's side that is not there; a port whose host does not read
//! holds up itself only; what a guest sends, however long and of whatever bytes, is bytes.
//!
//! ```no_run
//! use outboard::{Server, WorkerDevice};
//! use outboard_devices::console::{Console, ConsoleOptions, Host, PortOptions};
//!
//! let mut options = ConsoleOptions::default();
//! let host = Host::Socket("/run/agent.sock".into());
//! options.ports.push(PortOptions { name: "org.example.agent".to_owned(), console: false, host });
//! let device = WorkerDevice::new(Console::new(options)?)?;
//! Server::listen("/run/console.sock")?.serve(device)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod control;
mod heritage;
mod host;
mod hub;
mod port;
mod state;
mod worker;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard::{
    BackendChannel, ConfigWrite, Error, Heirloom, Hooks, MakeWorker, Model, QueueSpec, Saved,
    Snapshot,
};

pub use config::{CONFIG_SIZE, Size, feature};
pub use host::Host;
use hub::Hub;
use port::Port;
pub use state::STATE_VERSION;
use state::State;
pub use worker::ConsoleWorker;
use worker::Role;

use crate::bell::Bell;
use crate::watches::{Ask, Watches};

/// Ports of one console: with control queues no more than 256 rings.
pub const MOST_PORTS: usize = 127;
/// Bytes of a port's name.
const NAME: usize = 128;

/// Of a packed ring's index: whose turn it is to say what.
const WRAPS: u32 = 0x8000_8000;

/// What an operator can set about one port.
#[derive(Clone, Debug)]
pub struct PortOptions {
    /// What a guest finds it by (`/dev/virtio-ports/NAME` on Linux); may be empty.
    pub name: String,
    /// Whether the guest makes a console of it (`/dev/hvc0` on Linux).
    pub console: bool,
    /// What it is connected to.
    pub host: Host,
}

/// What an operator can set about a console.
#[derive(Clone, Debug)]
pub struct ConsoleOptions {
    /// Its ports, 1 to [`MOST_PORTS`].
    pub ports: Vec<PortOptions>,
    /// Size of the terminals whose host does not know one.
    pub size: Size,
    /// Largest ring size: a power of two up to 32768.
    pub queue_size: u16,
    /// Terminals and sockets come from a process whose place this one takes: none are made before that.
    pub inherits: bool,
}

impl Default for ConsoleOptions {
    /// One port, a console on a pseudo-terminal.
    fn default() -> Self {
        let host = Host::Pty { link: None };
        let ports = vec![PortOptions { name: String::new(), console: true, host }];
        Self { ports, size: Size::default(), queue_size: 256, inherits: false }
    }
}

/// What the worker and the model share. The lock is held for moments, and by two threads at most.
#[derive(Debug)]
struct Shared {
    hub: Mutex<Hub>,
    watches: Watches,
    /// Wakes the worker.
    bell: Bell,
    channel: BackendChannel,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Hub> {
        // A worker that panicked has lost its rings; the ports are sound.
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The terminal of port `port` has this size from now on.
    fn resize(&self, hub: &mut Hub, port: usize, size: Size) {
        if hub.resize(port, size) && port == 0 && !hub.multiport {
            self.channel.config_changed();
        }
    }
}

/// Changes the size of a console's terminals, from any thread.
#[derive(Clone, Debug)]
pub struct Resizer(Arc<Shared>);

impl Resizer {
    /// The terminal of port `port` has this size from now on. A port that is not there has none.
    pub fn resize(&self, port: usize, size: Size) {
        self.0.resize(&mut self.0.lock(), port, size);
        self.0.bell.ring();
    }
}

/// The model of a console; [`outboard::WorkerDevice`] makes a whole device of it.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
    ports: usize,
    queue_size: u16,
}

impl Console {
    /// Opens the host's sides, but for what is to be inherited.
    ///
    /// # Errors
    /// One of them cannot be opened; ports or names are too many or too long, or the queue size is no
    /// ring's.
    pub fn new(options: ConsoleOptions) -> Result<Self, Error> {
        check_options(&options)?;
        let watches = Watches::new()?;
        let bell = Bell::new()?;
        watches.add(&bell, hub::BELL, Ask::Bytes)?;
        let mut ports = Vec::with_capacity(options.ports.len());
        for (token, port) in (0..).step_by(2).zip(&options.ports) {
            ports.push(Port::open(port, options.size, token, options.inherits, &watches)?);
        }
        let hub = Mutex::new(Hub::new(ports));
        let shared = Shared { hub, watches, bell, channel: BackendChannel::new() };
        let ports = options.ports.len();
        Ok(Self { shared: Arc::new(shared), ports, queue_size: options.queue_size })
    }

    /// The pseudo-terminals of its ports, by port; those that are to be inherited are not known yet.
    #[must_use]
    pub fn terminals(&self) -> Vec<(usize, PathBuf)> {
        let hub = self.shared.lock();
        let terminals = hub.ports.iter().enumerate();
        terminals.filter_map(|(index, port)| Some((index, port.terminal()?.to_owned()))).collect()
    }

    /// What changes the size of its terminals while it runs.
    #[must_use]
    pub fn resizer(&self) -> Resizer {
        Resizer(Arc::clone(&self.shared))
    }
}

fn check_options(options: &ConsoleOptions) -> Result<(), Error> {
    let (count, size) = (options.ports.len(), options.queue_size);
    if !(1..=MOST_PORTS).contains(&count) {
        return Err(Error::refused(format!("{count} ports: a console has 1 to {MOST_PORTS}")));
    }
    if !size.is_power_of_two() || size > 32768 {
        return Err(Error::refused(format!(
            "queue size {size}: it must be a power of two up to 32768"
        )));
    }
    let named = || options.ports.iter().map(|port| &port.name).filter(|name| !name.is_empty());
    for (index, name) in named().enumerate() {
        if name.len() > NAME || name.contains('\0') || name.contains('/') {
            let most = format!("at most {NAME} bytes, no slash");
            return Err(Error::refused(format!("port name {name:?}: {most}")));
        }
        if named().take(index).any(|other| other == name) {
            return Err(Error::refused(format!("two ports are called {name:?}")));
        }
    }
    Ok(())
}

impl Model for Console {
    type Worker = ConsoleWorker;

    fn queues(&self) -> Vec<QueueSpec> {
        let size = self.queue_size;
        let mut queues = vec![
            QueueSpec::new("rx0", size),
            QueueSpec::new("tx0", size),
            QueueSpec::new("control-rx", size),
            QueueSpec::new("control-tx", size),
        ];
        for _ in 1..self.ports {
            queues.extend([QueueSpec::new("rx", size), QueueSpec::new("tx", size)]);
        }
        queues
    }

    fn make_worker(&self) -> MakeWorker<ConsoleWorker> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move |context| ConsoleWorker::new(Arc::clone(&shared), context))
    }

    fn features(&self) -> u64 {
        feature::SIZE | feature::MULTIPORT | feature::EMERG_WRITE
    }

    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        self.shared.lock().multiport = features & feature::MULTIPORT != 0;
        Ok(())
    }

    fn config_size(&self) -> u32 {
        CONFIG_SIZE
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        let ports = u32::try_from(self.ports).unwrap_or(1);
        config::read(self.shared.lock().size(), ports, offset, bytes);
        Ok(())
    }

    fn write_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        origin: ConfigWrite,
    ) -> Result<(), Error> {
        // A front-end that puts back what it has read writes nothing.
        if origin == ConfigWrite::Migration {
            return Ok(());
        }
        let Some(character) = config::emergency(offset, bytes) else {
            return Err(Error::refused(format!("configuration byte {offset} cannot be changed")));
        };
        if let Some(port) = self.shared.lock().ports.first_mut() {
            port.push(&[character]);
        }
        Ok(())
    }

    fn ring_starts(&mut self, queue: u16, base: u32) {
        if Role::of(queue) == Role::ControlTransmit && base & !WRAPS != 0 {
            self.shared.lock().driver_returns();
            self.shared.bell.ring();
        }
    }

    fn resume(&mut self) -> Result<(), Error> {
        self.shared.lock().go_on();
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        let mut hub = self.shared.lock();
        (hub.multiport, hub.fresh) = (false, false);
        hub.ports.iter_mut().for_each(Port::forget_driver);
        Ok(())
    }

    fn device_type(&self) -> String {
        "console".to_owned()
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        let mut hub = self.shared.lock();
        // The bytes are the next process's to hand over, unless this one goes on.
        hub.moved = true;
        Ok(State::of(&hub.ports).save())
    }

    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        let mut hub = self.shared.lock();
        let state = State::read(saved, &hub.ports)?;
        state.apply(&mut hub.ports);
        hub.fresh = false;
        Ok(())
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }
}

impl Hooks for Console {
    fn back_end_channel(&self) -> Option<BackendChannel> {
        Some(self.shared.channel.clone())
    }

    /// A live upgrade: terminals, listeners and clients go along.
    fn hand_over(&mut self) -> Result<Vec<Heirloom>, Error> {
        self.shared.lock().give()
    }

    fn handed_over(&mut self, gone: bool) {
        let mut hub = self.shared.lock();
        if gone { hub.leave() } else { hub.wake(&self.shared) }
    }

    fn inherit(&mut self, heirlooms: Vec<Heirloom>) -> Result<(), Error> {
        self.shared.lock().receive(heirlooms, &self.shared)
    }

    fn inherited(&mut self) {
        self.shared.lock().own(&self.shared);
    }
}
