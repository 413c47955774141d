//! A directory of the host in a guest: the file system device of virtio 1.3 §5.11.
//!
//! ```text
//!  hiprio, requests ─▶ worker of the queue ─▶ server (FUSE) ─▶ PassthroughFs ─▶ the shared directory
//!                          └ pool, if there is one ┘      └ window (DAX), if the front-end maps
//! ```
//! What the operations mean is the library of the crate `virtiofsd`'s affair ([`virtiofsd::passthrough`]): nodes,
//! handles, credentials, maps of attributes and of users, what is migrated. The other crate there is,
//! fuse-backend-rs, needs 26 packages instead of 105 and has DAX (of a draft), but knows no POSIX ACLs, attribute maps,
//! read-only shares, limit of descriptors or migration, and those are what is hard to get right. Of the crate's
//! FUSE server nothing is used: it is tied to another crate's rings and guest memory, gives up on a reply that does
//! not fit, and lets names through that are paths. The server here (`server`) goes by the same trait
//! [`virtiofsd::filesystem::FileSystem`], with our cursors.
//!
//! Invariants: what a guest names lies in the shared directory; a guest that opens all it can leaves descriptors for
//! everybody else; a queue whose file call waits holds up no other queue.
//!
//! ```no_run
//! use outboard::{Server, WorkerDevice};
//! use outboard_devices::fs::{Fs, FsOptions, Sandbox};
//!
//! let inside = Sandbox::Namespace.prepare("/srv/share".as_ref())?;
//! let server = Server::listen("/run/fs.sock")?;
//! let device = WorkerDevice::new(Fs::new(FsOptions::new("share", inside.enter()?))?)?;
//! server.serve(device)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod exchange;
mod image;
mod ledger;
mod nameless;
mod pool;
mod sandbox;
mod server;
mod state;
mod window;
mod worker;

use std::fs::File;
use std::sync::Arc;

use outboard::{
    BackendChannel, Error, Hooks, MakeWorker, Model, QueueSpec, Saved, SharedMemoryRegion, Snapshot,
};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};
use virtiofsd::passthrough::{PassthroughFs, read_only::PassthroughFsRo};

pub use config::{CONFIG_SIZE, MOST_TAG};
use ledger::Ledger;
use nameless::Places;
use pool::Pool;
pub use sandbox::{Confined, Prepared, Sandbox};
use server::{Serve, Server, Setting};
pub use state::STATE_VERSION;
pub use virtiofsd::passthrough as semantics;
pub use virtiofsd::soft_idmap::cmdline::IdMap;
use window::Window;
pub use worker::FsWorker;

/// Descriptors that are never the guest's.
const RESERVE: u64 = 256;
/// Open files that are asked for, if the hard limit allows them.
const MANY: u64 = 1_000_000;

/// What an operator can set about a file system.
#[derive(Debug)]
pub struct FsOptions {
    /// Under which name the guest mounts it, up to [`MOST_TAG`] bytes.
    pub tag: String,
    /// What it does; [`FsOptions::new`] has set what depends on where the directory is.
    pub semantics: semantics::Config,
    /// The guest changes nothing.
    pub readonly: bool,
    /// Request queues beside the one of high priority, each with a thread.
    pub request_queues: u16,
    /// Threads that serve the requests of all request queues; 0: each queue's own serves them.
    pub pool: usize,
    /// Largest ring size: a power of two up to 32768.
    pub queue_size: u16,
    /// A file of ours in which it is noted what the guest has open, for the process that follows this one if it is
    /// killed; what a killed one has left there is taken up.
    pub notes: Option<File>,
    /// Bytes of the DAX window, whole units of 2 MiB; 0: none.
    pub dax_window: u64,
}

impl FsOptions {
    /// A share of what is inside, with everything else as usual.
    #[must_use]
    pub fn new(tag: impl Into<String>, inside: Confined) -> Self {
        let semantics = semantics::Config {
            root_dir: inside.root,
            mountinfo_prefix: inside.mountinfo_prefix,
            proc_sfd_rawfd: Some(inside.proc_self_fd),
            proc_mountinfo_rawfd: Some(inside.mountinfo),
            guest_fd_limit: inside.open_files.saturating_sub(RESERVE),
            announce_submounts: true,
            inode_file_handles: match inside.by_handle {
                true => semantics::InodeFileHandlesMode::Prefer,
                false => semantics::InodeFileHandlesMode::Never,
            },
            ..semantics::Config::default()
        };
        let tag = tag.into();
        Self {
            tag,
            semantics,
            readonly: false,
            request_queues: 1,
            pool: 0,
            queue_size: 1024,
            dax_window: 0,
            notes: None,
        }
    }
}

/// Raises this process's limit of open files as far as it may, to a million. Returns the limit.
///
/// # Errors
/// It cannot be raised.
pub fn raise_open_files() -> Result<u64, Error> {
    let now = getrlimit(Resource::Nofile);
    let most = now.maximum.unwrap_or(MANY).min(MANY);
    let current = now.current.unwrap_or(u64::MAX);
    if current >= most {
        return Ok(current);
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: now.maximum })?;
    Ok(most)
}

/// The model of a file system; [`outboard::WorkerDevice`] makes a whole device of it.
pub struct Fs {
    server: Arc<dyn Serve>,
    pool: Option<Arc<Pool>>,
    tag: String,
    request_queues: u16,
    queue_size: u16,
    window: Option<Arc<Window>>,
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Fs {
    /// Opens the share.
    ///
    /// # Errors
    /// The directory cannot be opened, or an option makes no sense.
    pub fn new(options: FsOptions) -> Result<Self, Error> {
        let FsOptions { tag, mut semantics, readonly, request_queues, pool, .. } = options;
        let queue_size = options.queue_size;
        if tag.is_empty() || tag.len() > MOST_TAG || tag.contains('\0') {
            return Err(Error::refused(format!("tag {tag:?}: it must have 1 to 36 bytes")));
        }
        if !queue_size.is_power_of_two() || queue_size > 32768 {
            return Err(Error::refused(format!(
                "queue size {queue_size}: it must be a power of two up to 32768"
            )));
        }
        if !(1..=64).contains(&request_queues) || pool > 256 {
            return Err(Error::refused("there are 1 to 64 request queues and up to 256 threads"));
        }
        semantics.guest_fd_limit = semantics.guest_fd_limit.saturating_sub(pool as u64);
        let window = match options.dax_window {
            0 => None,
            size => Some(Self::window(size, &mut semantics)?),
        };
        // The library clears it; the threads that need that have one of their own.
        let umask = umask(Mode::empty());
        let server = Self::server(semantics, readonly, window.clone(), options.notes);
        rustix::process::umask(umask);
        let server = server?;
        let pool = match pool {
            0 => None,
            threads => Some(Arc::new(Pool::new(threads, &server)?)),
        };
        Ok(Self { server, pool, tag, request_queues, queue_size, window })
    }

    fn server(
        mut semantics: semantics::Config,
        readonly: bool,
        window: Option<Arc<Window>>,
        notes: Option<File>,
    ) -> Result<Arc<dyn Serve>, Error> {
        // What is offered to the guest is one thing; a write that says so clears those bits whatever was offered.
        let killpriv_v2 = std::mem::replace(&mut semantics.killpriv_v2, true);
        let descriptors = semantics.proc_sfd_rawfd.as_ref().map(File::try_clone).transpose()?;
        let root = semantics.root_dir.clone();
        let places = descriptors.map(|descriptors| Places { descriptors, root });
        let (ledger, table) = notes.map(Ledger::open).transpose()?.unzip();
        let setting = Setting { killpriv_v2, places, window, ledger };
        let table = table.unwrap_or_default();
        Ok(if readonly {
            Arc::new(Server::new(PassthroughFsRo::new(semantics)?, setting).taking_up(&table))
        } else {
            Arc::new(Server::new(PassthroughFs::new(semantics)?, setting).taking_up(&table))
        })
    }

    /// A window, whose descriptors are taken off what the guest may open.
    fn window(size: u64, semantics: &mut semantics::Config) -> Result<Arc<Window>, Error> {
        let window = Window::new(size)?;
        let left = semantics.guest_fd_limit.checked_sub(Window::most(size));
        semantics.guest_fd_limit = left.filter(|left| *left >= RESERVE).ok_or_else(|| {
            let many = Window::most(size) + 3 * RESERVE;
            Error::refused(format!("a window of {size} bytes needs a limit of {many} open files"))
        })?;
        Ok(Arc::new(window))
    }
}

impl Model for Fs {
    type Worker = FsWorker;

    fn queues(&self) -> Vec<QueueSpec> {
        let hiprio = std::iter::once(QueueSpec::new("hiprio", self.queue_size));
        let requests = QueueSpec::new("requests", self.queue_size);
        hiprio.chain((0..self.request_queues).map(|_| requests)).collect()
    }

    /// They have a directory and a umask of their own.
    fn shares_threads(&self) -> bool {
        false
    }

    fn threads(&self) -> usize {
        1 + usize::from(self.request_queues)
    }

    fn make_worker(&self) -> MakeWorker<FsWorker> {
        let (server, pool) = (Arc::clone(&self.server), self.pool.clone());
        Arc::new(move |_| FsWorker::new(Arc::clone(&server), pool.clone()))
    }

    fn config_size(&self) -> u32 {
        CONFIG_SIZE
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        config::read(&self.tag, self.request_queues, offset, bytes);
        Ok(())
    }

    fn ring_starts(&mut self, _queue: u16, _base: u32) {
        if let Some(window) = &self.window {
            window.ring_starts();
        }
    }

    fn front_end_left(&mut self) {
        if let Some(window) = &self.window {
            window.is_gone();
        }
        self.server.leave();
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.front_end_left();
        self.server.destroy();
        Ok(())
    }

    fn device_type(&self) -> String {
        "fs".to_owned()
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        Ok(state::save(&self.server, self.window.as_deref()))
    }

    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        state::load(&*self.server, self.window.as_deref(), saved)
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        self.window.is_some().then_some(self as &mut dyn Hooks)
    }
}

impl Hooks for Fs {
    fn back_end_channel(&self) -> Option<BackendChannel> {
        self.window.as_ref().map(|window| window.channel.clone())
    }

    fn shared_memory(&self) -> Vec<SharedMemoryRegion> {
        self.window.iter().map(|window| window.region()).collect()
    }
}
