//! An entropy device (virtio 1.3 §5.4): `cargo run --example rng -- /run/rng.sock`, then in QEMU
//! `-chardev socket,id=c,path=/run/rng.sock -device vhost-user-rng-pci,chardev=c`.

use std::fs::File;

use outboard::{Error, QueueSpec, Request, Served, Server, Worker, WorkerDevice};

/// What one request gets at most, however much its driver asks for.
const MOST: u32 = 64 << 10;

struct Entropy(File);

impl Worker for Entropy {
    fn serve(&mut self, mut request: Request<'_>) -> Result<Served, Error> {
        let written = request.writable().read_from(&mut self.0, MOST)?;
        Ok(request.done(written))
    }
}

fn main() -> Result<(), Error> {
    let Some(socket) = std::env::args_os().nth(1) else {
        return Err(Error::refused("usage: rng SOCKET"));
    };
    let queues = [QueueSpec::new("requests", 256)];
    let device = WorkerDevice::plain(&queues, |_| Ok(Entropy(File::open("/dev/urandom")?)))?;
    Server::listen(socket)?.serve(device)
}
