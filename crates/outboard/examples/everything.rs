//! A device that offers every feature a device can offer: `cargo run --example everything -- SOCKET`.
//!
//! It takes commands as requests on its first queue, one line of text each, and answers in text; an
//! async fn serves them, so that a command may wait for the front-end. What the front-end tells the
//! device (an address, an MTU, a crypto session, a display socket) can be asked back. The tests
//! drive it message by message; it also shows how each hook of the library is used.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard::protocol::ProtocolFeatures;
use outboard::protocol::channel::ChannelRequest;
use outboard::protocol::payload::{CryptoSession, Uuid, VringArea};
use outboard::{
    Access, AsyncWorker, BackendChannel, ConfigWrite, Deferred, Error, Hooks, MakeWorker,
    MappingSource, Model, QueueSpec, Requests, Server, SharedMemoryMapper, SharedMemoryRegion,
    WorkerDevice,
};

const REGIONS: [SharedMemoryRegion; 2] =
    [SharedMemoryRegion { id: 1, size: 1 << 20 }, SharedMemoryRegion { id: 7, size: 64 << 10 }];
const CONFIG: u32 = 16;

/// What the front-end told the device, and what the device made.
#[derive(Default)]
struct State {
    config: [u8; CONFIG as usize],
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
    sessions: HashMap<u64, u64>,
    display: Option<OwnedFd>,
    objects: HashMap<[u8; 16], OwnedFd>,
    /// Memory of this process that was mapped (EXTERNAL_MAP).
    pages: Vec<Box<[u8]>>,
    resets: u32,
}

/// The device's model.
#[derive(Clone)]
pub(crate) struct Everything {
    state: Arc<Mutex<State>>,
    channel: BackendChannel,
}

impl Everything {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves commands for as long as the queue runs.
    async fn serve(self, mut requests: Requests) {
        loop {
            let mut request = requests.next().await;
            let answer = match command(&mut request) {
                Some(words) => {
                    self.obey(&words).await.unwrap_or_else(|error| format!("no: {error}"))
                }
                None => "no: not a line of text".to_owned(),
            };
            let bytes = answer.as_bytes();
            let room = usize::try_from(request.writable().len()).unwrap_or(0).min(bytes.len());
            let sent = bytes.get(..room).unwrap_or_default();
            let written = request.writable().write_all(sent).map_or(0, |()| room);
            request.done(u32::try_from(written).unwrap_or(0));
        }
    }

    async fn obey(&self, words: &[String]) -> Result<String, Error> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["config", value] => {
                let byte = u8::try_from(number(value)?).map_err(refused)?;
                self.state().config[0] = byte;
                self.channel.config_changed();
                Ok("ok".to_owned())
            }
            ["map", region, offset, text] => self.map(region, offset, text).await,
            ["unmap", region, offset] => {
                let mapper = self.mapper(region)?;
                mapper.remove_mapping(number(offset)?).await.map_err(refused)?;
                Ok("ok".to_owned())
            }
            ["gpu", region, offset, text] => {
                let fd = memory(&page(text))?.into();
                let (device, driver) = (uuid("device"), uuid("driver"));
                let size = 4096;
                // Handle type 4 is shared memory to crosvm: no GPU is needed to map it.
                let source = MappingSource::Vulkan {
                    fd,
                    handle_type: 4,
                    memory_index: 3,
                    device,
                    driver,
                    size,
                };
                self.add(region, offset, source).await
            }
            ["external", region, offset, text] => {
                let bytes = page(text).into_boxed_slice();
                let pointer = bytes.as_ptr().addr() as u64;
                // It stays where it is for as long as the device lives.
                self.state().pages.push(bytes);
                self.add(region, offset, MappingSource::External { pointer, size: 4096 }).await
            }
            ["object", name] => self.export(name).await,
            ["forget", name] => {
                self.state().objects.remove(&uuid(name));
                let remove = ChannelRequest::SharedObjectRemove(Uuid { bytes: uuid(name) });
                self.channel.ask(remove).await.map_err(refused)?;
                Ok("ok".to_owned())
            }
            ["lookup", name] => {
                let object = Uuid { bytes: uuid(name) };
                let found = self.channel.ask(ChannelRequest::SharedObjectLookup(object)).await;
                found.map(|fd| format!("found {}", fd.is_some())).map_err(refused)
            }
            ["notifier", queue] => {
                let file = memory(&[0; 4096])?;
                let area = VringArea { vring: number(queue)?, size: 4096, offset: 0 };
                let set = ChannelRequest::HostNotifier(area, Some(file.into()));
                self.channel.ask(set).await.map_err(refused)?;
                Ok("ok".to_owned())
            }
            ["told"] => Ok(self.told()),
            _ => Err(Error::refused("an unknown command")),
        }
    }

    fn mapper(&self, region: &str) -> Result<SharedMemoryMapper, Error> {
        let id = number(region)?;
        let region = REGIONS.into_iter().find(|region| u64::from(region.id) == id);
        let region = region.ok_or_else(|| Error::refused(format!("there is no region {id}")))?;
        Ok(SharedMemoryMapper::new(region, self.channel.clone()))
    }

    /// Maps a page that starts with `text`.
    async fn map(&self, region: &str, offset: &str, text: &str) -> Result<String, Error> {
        let fd = memory(&page(text))?.into();
        let source = MappingSource::Descriptor { fd, offset: 0, size: 4096 };
        self.add(region, offset, source).await
    }

    async fn add(
        &self,
        region: &str,
        offset: &str,
        source: MappingSource,
    ) -> Result<String, Error> {
        let mapper = self.mapper(region)?;
        let mapped = mapper.add_mapping(source, number(offset)?, Access::ReadWrite).await;
        mapped.map_err(refused)?;
        Ok("ok".to_owned())
    }

    /// Exports a page under a name.
    async fn export(&self, name: &str) -> Result<String, Error> {
        let object = memory(name.as_bytes())?;
        self.state().objects.insert(uuid(name), object.into());
        let add = ChannelRequest::SharedObjectAdd(Uuid { bytes: uuid(name) });
        self.channel.ask(add).await.map_err(refused)?;
        Ok("ok".to_owned())
    }

    fn told(&self) -> String {
        let state = self.state();
        let mut text = format!("mtu {:?} sessions {}", state.mtu, state.sessions.len());
        let _ = write!(text, " display {} resets {}", state.display.is_some(), state.resets);
        if let Some(mac) = state.mac {
            let _ = write!(text, " mac {mac:02x?}");
        }
        text
    }
}

impl Model for Everything {
    type Worker = AsyncWorker;

    fn queues(&self) -> Vec<QueueSpec> {
        vec![QueueSpec::new("commands", 256), QueueSpec::transmit("void", 256)]
    }

    fn make_worker(&self) -> MakeWorker<AsyncWorker> {
        let device = self.clone();
        Arc::new(move |context| {
            let device = device.clone();
            AsyncWorker::new(context, move |requests| device.clone().serve(requests))
        })
    }

    fn features(&self) -> u64 {
        outboard::protocol::virtio::NET_MTU
    }

    fn config_size(&self) -> u32 {
        CONFIG
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), Error> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let state = self.state();
        let part = state.config.get(from..).unwrap_or_default();
        for (byte, value) in bytes.iter_mut().zip(part) {
            *byte = *value;
        }
        Ok(())
    }

    fn write_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _origin: ConfigWrite,
    ) -> Result<(), Error> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut state = self.state();
        let part = state.config.get_mut(from..).unwrap_or_default();
        for (byte, value) in part.iter_mut().zip(bytes) {
            *byte = *value;
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.state().resets += 1;
        Ok(())
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }
}

impl Hooks for Everything {
    fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures::RARP
            | ProtocolFeatures::MTU
            | ProtocolFeatures::CRYPTO_SESSION
            | ProtocolFeatures::SHARED_OBJECT
            | ProtocolFeatures::HOST_NOTIFIER
            | ProtocolFeatures::BACKEND_SEND_FD
    }

    fn back_end_channel(&self) -> Option<BackendChannel> {
        Some(self.channel.clone())
    }

    fn shared_memory(&self) -> Vec<SharedMemoryRegion> {
        REGIONS.to_vec()
    }

    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        self.state().mac = Some(mac);
        Ok(())
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), Error> {
        if mtu < 68 {
            return Err(Error::refused(format!("an MTU of {mtu} bytes carries no IPv4")));
        }
        self.state().mtu = Some(mtu);
        Ok(())
    }

    fn create_crypto_session(&mut self, session: &CryptoSession) -> Result<i64, Error> {
        let mut state = self.state();
        let id = state.sessions.len() as u64 + 1;
        state.sessions.insert(id, session.op_code);
        i64::try_from(id).map_err(|_| Error::refused("too many sessions"))
    }

    fn close_crypto_session(&mut self, id: u64) -> Result<(), Error> {
        let gone = self.state().sessions.remove(&id);
        gone.map(drop).ok_or_else(|| Error::refused(format!("there is no session {id}")))
    }

    fn takes_gpu_socket(&self) -> bool {
        true
    }

    fn set_gpu_socket(&mut self, socket: OwnedFd) -> Result<(), Error> {
        self.state().display = Some(socket);
        Ok(())
    }

    fn shared_object(&mut self, uuid: [u8; 16]) -> Result<Option<OwnedFd>, Error> {
        let object = self.state().objects.get(&uuid).map(OwnedFd::try_clone);
        Ok(object.transpose()?)
    }
}

/// The words of a request's line.
fn command(request: &mut Deferred) -> Option<Vec<String>> {
    let length = usize::try_from(request.readable().len()).ok().filter(|length| *length <= 256)?;
    let mut bytes = vec![0; length];
    request.readable().read_exact(&mut bytes).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    Some(text.split_whitespace().map(str::to_owned).collect())
}

fn number(text: &str) -> Result<u64, Error> {
    let hex = text.strip_prefix("0x").map(|digits| u64::from_str_radix(digits, 16));
    hex.unwrap_or_else(|| text.parse()).map_err(|_| Error::refused(format!("{text} is no number")))
}

/// A name as sixteen bytes.
fn uuid(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (byte, letter) in bytes.iter_mut().zip(name.bytes()) {
        *byte = letter;
    }
    bytes
}

/// A page that starts with `text`.
fn page(text: &str) -> Vec<u8> {
    let mut page = vec![0; 4096];
    for (byte, letter) in page.iter_mut().zip(text.bytes()) {
        *byte = letter;
    }
    page
}

/// A file in memory with these bytes.
fn memory(bytes: &[u8]) -> Result<File, Error> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create("everything", flags)?);
    file.write_all(bytes)?;
    Ok(file)
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::refused(error.to_string())
}

/// The device, asleep.
pub(crate) fn device() -> Result<WorkerDevice<Everything>, Error> {
    WorkerDevice::new(Everything { state: Arc::default(), channel: BackendChannel::new() })
}

fn main() -> Result<(), Error> {
    let Some(socket) = std::env::args_os().nth(1) else {
        return Err(Error::refused("usage: everything SOCKET"));
    };
    Server::listen(socket)?.serve(device()?)
}
