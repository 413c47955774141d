//! The device of a conversation: its queues are served by hand, on the one thread there is.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use outboard::{
    ConfigWrite, Deferred, Error, HostError, Queue, QueueSpec, VhostUserDevice, WhenDisabled,
};

use super::model::{CONFIG, OWN_FEATURES, QUEUES, TRANSMITS};

/// What the harness and the device share.
#[derive(Default)]
pub struct Shared {
    pub queues: [Option<Queue>; QUEUES],
    pub held: [Vec<Deferred>; QUEUES],
    pub config: [u8; CONFIG],
    pub acked: u64,
    pub suspended: bool,
    /// Refuse the next call of its kind.
    pub refuse_start: bool,
    pub refuse_ack: bool,
    pub refuse_config: bool,
    /// Stops do not wait for the harness: the session is being dropped.
    pub abandon: bool,
    pub resets: u32,
}

impl Shared {
    /// Nothing was told to this session yet.
    pub fn next_front_end(&mut self) {
        (self.refuse_start, self.refuse_ack, self.refuse_config) = (false, false, false);
        self.abandon = false;
    }
}

/// See the module.
#[derive(Clone, Default)]
pub struct Hands(Arc<Mutex<Shared>>);

impl Hands {
    pub fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const SPECS: [QueueSpec; QUEUES] = {
    let mut specs = [QueueSpec::new("hold", 16); QUEUES];
    specs[TRANSMITS].when_disabled = WhenDisabled::Discard;
    specs
};

impl VhostUserDevice for Hands {
    fn queues(&self) -> &[QueueSpec] {
        &SPECS
    }

    fn features(&self) -> u64 {
        OWN_FEATURES
    }

    fn ack_features(&mut self, features: u64) -> Result<(), Error> {
        let mut shared = self.lock();
        if std::mem::take(&mut shared.refuse_ack) {
            return Err(Error::refused("as told"));
        }
        assert_eq!(features & !OWN_FEATURES, 0, "a device sees its own bits");
        shared.acked = features;
        Ok(())
    }

    fn config_size(&self) -> u32 {
        CONFIG as u32
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        let mut shared = self.lock();
        if std::mem::take(&mut shared.refuse_config) {
            return Err(Error::refused("as told"));
        }
        bytes.copy_from_slice(&shared.config[offset as usize..][..bytes.len()]);
        Ok(())
    }

    fn write_config(&mut self, offset: u32, bytes: &[u8], _: ConfigWrite) -> Result<(), Error> {
        let mut shared = self.lock();
        if std::mem::take(&mut shared.refuse_config) {
            return Err(Error::refused("as told"));
        }
        shared.config[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn start_queue(&mut self, index: u16, queue: Queue) -> Result<(), Error> {
        let mut shared = self.lock();
        if std::mem::take(&mut shared.refuse_start) {
            return Err(Error::refused("as told"));
        }
        shared.suspended = false;
        let slot = &mut shared.queues[usize::from(index)];
        assert!(slot.is_none(), "a queue has one owner");
        *slot = Some(queue);
        Ok(())
    }

    async fn stop_queue(&mut self, index: u16) -> Result<Queue, HostError> {
        let at = usize::from(index);
        poll_fn(|_| {
            let shared = &mut *self.lock();
            let Some(queue) = &mut shared.queues[at] else {
                return Poll::Ready(Err(HostError::NotStarted(index)));
            };
            if shared.abandon {
                shared.held[at].clear();
                queue.poll_control();
            }
            if queue.in_flight() > 0 {
                return Poll::Pending;
            }
            queue.publish();
            Poll::Ready(shared.queues[at].take().ok_or(HostError::NotStarted(index)))
        })
        .await
    }

    async fn reset(&mut self) -> Result<(), Error> {
        let shared = &mut *self.lock();
        assert!(shared.queues.iter().all(Option::is_none), "a reset finds no queue started");
        shared.config = [0; CONFIG];
        shared.resets += 1;
        Ok(())
    }

    async fn enter_suspended_state(&mut self) -> Result<(), Error> {
        let shared = &mut *self.lock();
        assert!(shared.queues.iter().all(Option::is_none), "suspended: no queue is started");
        shared.suspended = true;
        Ok(())
    }
}
