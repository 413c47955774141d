//! `outboard vsock`: socat in a Debian guest and Unix sockets of the host.

use crate::lab::{Lab, sound};
use anyhow::{Result, anyhow, ensure};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketType, recv, socket};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use xtask::backend::{self, Device};
use xtask::guest::Guest;
use xtask::guest::qemu::Machine;

const LONG: Duration = Duration::from_secs(120);
/// Bytes that go each way.
const BULK: usize = 4 << 20;

fn patient(stream: UnixStream) -> Result<UnixStream> {
    stream.set_read_timeout(Some(LONG))?;
    stream.set_write_timeout(Some(LONG))?;
    Ok(stream)
}

/// What a server of the host gets on its port from who comes first.
fn taken(listener: &UnixListener) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    patient(listener.accept()?.0)?.read_to_end(&mut all)?;
    Ok(all)
}

/// A connection to a port of the guest.
fn call(path: &Path, port: u32) -> Result<UnixStream> {
    let mut stream = patient(UnixStream::connect(path)?)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0; 1];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
        line.extend(byte);
    }
    ensure!(line.starts_with(b"OK "), "{:?} is no answer", String::from_utf8_lossy(&line));
    Ok(stream)
}

struct Host<'a> {
    path: PathBuf,
    device: &'a Device,
}

impl Host<'_> {
    fn listen(&self, port: u32) -> Result<UnixListener> {
        Ok(UnixListener::bind(format!("{}_{port}", self.path.display()))?)
    }

    /// The guest sends a file, and gets it back through a connection that the host makes.
    fn bulk(&self, guest: &mut Guest) -> Result<()> {
        let listener = self.listen(1234)?;
        guest.start(&format!(
            "dd if=/dev/urandom of=/tmp/a bs=64k count={} 2>/dev/null
            socat -u -b 65536 FILE:/tmp/a VSOCK-CONNECT:2:1234
            socat -u -b 65536 VSOCK-LISTEN:22 CREATE:/tmp/b &
            echo listens
            wait
            cmp /tmp/a /tmp/b && wc -c < /tmp/b",
            BULK >> 16
        ))?;
        let sent = taken(&listener)?;
        ensure!(sent.len() == BULK, "{} bytes of {BULK} arrived", sent.len());
        guest.expect("listens", LONG)?;
        let mut stream = self.call_until_it_listens(22)?;
        stream.write_all(&sent)?;
        drop(stream);
        let said = guest.finish(LONG)?;
        ensure!(said.trim() == BULK.to_string(), "{said} bytes of {BULK} came back");
        Ok(())
    }

    /// The guest sends a message.
    fn messages(&self, guest: &mut Guest) -> Result<()> {
        let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
        let address = SocketAddrUnix::new(format!("{}_77", self.path.display()))?;
        rustix::net::bind(&listener, &address)?;
        rustix::net::listen(&listener, 1)?;
        // The family is AF_VSOCK, then two bytes of nothing, port 77, the host, and nothing.
        guest.start(
            "echo a message |
            socat -u - SOCKET-CONNECT:40:0:x00004d0000000200000000000000,type=5",
        )?;
        let stream = rustix::net::accept(&listener)?;
        let mut said = Vec::new();
        loop {
            let mut bytes = [0; 100];
            let (_, count) = recv(&stream, &mut bytes, RecvFlags::empty())?;
            let Some(message) = bytes.get(..count).filter(|message| !message.is_empty()) else {
                break;
            };
            said.push(String::from_utf8_lossy(message).into_owned());
        }
        ensure!(said == ["a message\n"], "{said:?}");
        guest.finish(LONG).map(drop)
    }

    /// socat is started and takes its time until it listens; nobody tells.
    fn call_until_it_listens(&self, port: u32) -> Result<UnixStream> {
        let end = std::time::Instant::now() + LONG;
        loop {
            match call(&self.path, port) {
                Ok(stream) => return Ok(stream),
                Err(error) if std::time::Instant::now() > end => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// The host says that it has sent everything, and still gets the answer; many at a time.
    fn echoes(&self, guest: &mut Guest) -> Result<()> {
        guest.start(
            "socat -t 60 VSOCK-LISTEN:23,fork EXEC:/bin/cat & echo $! > /tmp/echo; wait || true",
        )?;
        drop(self.call_until_it_listens(23)?);
        let echoes = (0..8_u8).map(|seed| {
            // socat takes five at a time; the guest's kernel turns the others away.
            let stream = self.call_until_it_listens(23);
            std::thread::spawn(move || -> Result<bool> {
                let mut stream = stream?;
                let sent = vec![seed; 100_000];
                let mut writer = stream.try_clone()?;
                let copy = sent.clone();
                let writes = std::thread::spawn(move || -> Result<()> {
                    writer.write_all(&copy)?;
                    Ok(writer.shutdown(Shutdown::Write)?)
                });
                let mut back = Vec::new();
                stream.read_to_end(&mut back)?;
                writes.join().map_err(|_| anyhow!("the writer panicked"))??;
                Ok(back == sent)
            })
        });
        let echoes: Vec<_> = echoes.collect();
        for echo in echoes {
            let same = echo.join().map_err(|_| anyhow!("an echo panicked"))??;
            ensure!(same, "other bytes came back");
        }
        Ok(())
    }
}

#[test]
fn a_debian_guest_talks_to_the_host_over_sockets_both_ways() -> Result<()> {
    let Some(lab) = Lab::open(|| backend::outboard().map(drop))? else { return Ok(()) };
    let path = lab.path().join("vm");
    let mut command = Command::new(backend::outboard()?);
    command.args(["vsock", "--guest-cid", "42", "--uds-path"]).arg(&path).arg("--socket-path");
    command.arg(backend::socket(lab.path(), "vsock"));
    let device = Device::start(&mut command, lab.path(), "vsock")?;
    let machine = Machine {
        modules: vec!["vsock", "vmw_vsock_virtio_transport"],
        programs: vec!["usr/bin/socat"],
        ..Machine::default()
    };
    let machine = machine.with_device("vhost-user-vsock-pci", &device.socket);
    let mut guest = sound(machine.boot(&lab.root, lab.path()), &device)?;
    let host = Host { path, device: &device };
    sound(host.bulk(&mut guest), host.device)?;
    sound(host.messages(&mut guest), host.device)?;
    sound(host.echoes(&mut guest), host.device)?;
    drop(guest);
    device.terminate()
}
