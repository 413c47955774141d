//! Threads that serve requests of any queue, so that one that waits for a file holds up none behind it.
//!
//! Invariant: a queue does not stop while the pool has requests of it ([`outboard::Deferred`]).

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use outboard::{Deferred, Error};
use tracing::warn;

use super::server::Serve;
use super::worker::own_directory;

#[derive(Default)]
struct Waiting {
    requests: VecDeque<(Deferred, bool)>,
    over: bool,
}

#[derive(Default)]
struct Desk {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next request; None: there will be none.
    fn next(&self) -> Option<(Deferred, bool)> {
        let mut waiting = self.lock();
        loop {
            match waiting.requests.pop_front() {
                None if waiting.over => return None,
                None => {
                    waiting = self.more.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                }
                found => return found,
            }
        }
    }
}

/// See the module.
pub(super) struct Pool {
    desk: Arc<Desk>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn new(threads: usize, server: &Arc<dyn Serve>) -> Result<Self, Error> {
        let mut pool = Self { desk: Arc::default(), threads: Vec::new() };
        for number in 0..threads {
            let (desk, server) = (Arc::clone(&pool.desk), Arc::clone(server));
            let thread = Builder::new().name(format!("pool{number}")).spawn(move || {
                if let Err(error) = own_directory() {
                    warn!("a thread of the pool: {error}");
                }
                while let Some((mut request, repeated)) = desk.next() {
                    let written = server.serve(&mut request, repeated);
                    request.done(written);
                }
            })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    pub(super) fn take(&self, request: Deferred, repeated: bool) {
        self.desk.lock().requests.push_back((request, repeated));
        self.desk.more.notify_one();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.desk.lock().over = true;
        self.desk.more.notify_all();
        for thread in self.threads.drain(..) {
            // What it panicked with was logged there.
            let _ = thread.join();
        }
    }
}
