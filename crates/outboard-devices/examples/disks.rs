//! Several disks served by one process: a [`Server`] and a thread for each.
//!
//! `disks SOCKET IMAGE [SOCKET IMAGE ...]`. Each socket has its own front-end, queues and guest memory;
//! what one front-end does, the others do not notice (`outboard soak storm` measures how much).

use std::error::Error;
use std::thread;

use outboard::{Server, WorkerDevice};
use outboard_devices::block::{Block, BlockOptions, Image, ImageOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let pairs = words.chunks_exact(2);
    if words.is_empty() || !pairs.remainder().is_empty() {
        return Err("usage: disks SOCKET IMAGE [SOCKET IMAGE ...]".into());
    }
    let mut threads = Vec::new();
    for pair in pairs {
        let [socket, image] = pair else { continue };
        let image = Image::open(image, ImageOptions::default())?;
        let device = WorkerDevice::new(Block::new(image, BlockOptions::default())?)?;
        let server = Server::listen(socket)?;
        threads.push(thread::spawn(move || server.serve(device)));
    }
    for thread in threads {
        thread.join().map_err(|_| "a disk's thread has died")??;
    }
    Ok(())
}
