//! A device that keeps something: `cargo run --example keeper -- /run/keeper.sock`.
//!
//! Each request is a line of text; `keep TEXT` remembers it and announces a change of the
//! configuration, where the text then stands, and anything else is answered by what is kept. The
//! text outlives the process: `snapshot` and `restore` are all that this takes. It has sixteen
//! queues, for the tests of the life-cycle.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard::{
    BackendChannel, Error, Hooks, MakeWorker, Model, QueueSpec, Request, Saved, Served, Server,
    Snapshot, Worker, WorkerDevice,
};
use serde::{Deserialize, Serialize};

/// Bytes of the configuration space, and of the longest text.
const ROOM: u32 = 16;

/// What outlives the process: version 1.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Kept {
    text: String,
}

#[derive(Clone)]
struct Keeper {
    kept: Arc<Mutex<Kept>>,
    channel: BackendChannel,
}

impl Keeper {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Worker for Keeper {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let length = usize::try_from(request.readable().len()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length.min(256)];
        request.readable().read_exact(&mut bytes)?;
        let line = String::from_utf8_lossy(&bytes).into_owned();
        if let Some(text) = line.strip_prefix("keep ") {
            self.kept().text = text.chars().take(ROOM as usize).collect();
            self.channel.config_changed();
        }
        let answer = self.kept().text.clone();
        request.writable().write_all(answer.as_bytes())?;
        Ok(request.done(u32::try_from(answer.len()).unwrap_or(0)))
    }
}

impl Model for Keeper {
    type Worker = Self;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("lines", 256); 16]
    }

    fn make_worker(&self) -> MakeWorker<Self> {
        let keeper = self.clone();
        Arc::new(move |_| Ok(keeper.clone()))
    }

    fn device_type(&self) -> String {
        "keeper".to_owned()
    }

    fn config_size(&self) -> u32 {
        ROOM
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        bytes.fill(0);
        let kept = self.kept();
        let text = kept.text.bytes().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        bytes.iter_mut().zip(text).for_each(|(to, from)| *to = from);
        Ok(())
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        Ok(Snapshot::of(1, self.kept().clone()))
    }

    fn restore(&mut self, saved: Saved<'_>) -> Result<(), Error> {
        let kept: Kept = saved.read(1)?;
        if kept.text.len() > ROOM as usize {
            let length = kept.text.len();
            return Err(Error::refused(format!("a text of {length} bytes, {ROOM} have room")));
        }
        *self.kept() = kept;
        Ok(())
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }
}

impl Hooks for Keeper {
    fn back_end_channel(&self) -> Option<BackendChannel> {
        Some(self.channel.clone())
    }
}

fn main() -> Result<(), Error> {
    let Some(socket) = std::env::args_os().nth(1) else {
        return Err(Error::refused("usage: keeper SOCKET"));
    };
    let keeper = Keeper { kept: Arc::default(), channel: BackendChannel::new() };
    Server::listen(socket)?.serve(WorkerDevice::new(keeper)?)
}
