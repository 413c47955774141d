//! A disk of zeros that grows by a mebibyte with each write, and says so:
//! `cargo run --example growing -- /run/growing.sock`, then in QEMU
//! `-chardev socket,id=c,path=/run/growing.sock -device vhost-user-blk-pci,chardev=c`.
//!
//! It shows how a device announces a changed configuration (virtio 1.3 §5.2.4, CONFIG_CHANGE_MSG).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use outboard::{
    BackendChannel, Error, Hooks, MakeWorker, Model, QueueSpec, Request, Served, Server, Worker,
    WorkerDevice,
};

/// Sectors of 512 bytes in a mebibyte.
const STEP: u64 = 2048;
/// VIRTIO_BLK_T_OUT.
const OUT: [u8; 4] = 1u32.to_le_bytes();

#[derive(Clone)]
struct Growing {
    sectors: Arc<AtomicU64>,
    channel: BackendChannel,
}

impl Worker for Growing {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let mut kind = [0; 4];
        request.readable().read_exact(&mut kind)?;
        request.reserve_tail(1)?;
        let mut data = request.writable();
        data.fill_zero(data.len())?;
        let written = u32::try_from(data.written()).unwrap_or(u32::MAX);
        request.write_tail(&[0])?;
        if kind == OUT {
            self.sectors.fetch_add(STEP, Ordering::Relaxed);
            self.channel.config_changed();
        }
        Ok(request.done(written.saturating_add(1)))
    }
}

impl Hooks for Growing {
    fn back_end_channel(&self) -> Option<BackendChannel> {
        Some(self.channel.clone())
    }
}

impl Model for Growing {
    type Worker = Self;

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("requests", 256)]
    }

    fn make_worker(&self) -> MakeWorker<Self> {
        let device = self.clone();
        Arc::new(move |_| Ok(device.clone()))
    }

    fn config_size(&self) -> u32 {
        8
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        let capacity = self.sectors.load(Ordering::Relaxed).to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in bytes.iter_mut().zip(capacity.iter().skip(from)) {
            *byte = *value;
        }
        Ok(())
    }
}

fn main() -> Result<(), Error> {
    let Some(socket) = std::env::args_os().nth(1) else {
        return Err(Error::refused("usage: growing SOCKET"));
    };
    let sectors = Arc::new(AtomicU64::new(16 * STEP));
    let device = WorkerDevice::new(Growing { sectors, channel: BackendChannel::new() })?;
    Server::listen(socket)?.serve(device)
}
