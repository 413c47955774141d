//! A session changes its process: the old one's half (stop, play, give) and the new one's
//! (`inherit`). See [`crate::take_over`].

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use outboard_protocol::{
    Given, MemRegion, Notifier, ProtocolFeatures, Refusal, Request, Ring, RingEvent,
    StateDirection, VringAddr, virtio,
};
use rustix::pipe::{PipeFlags, pipe_with};
use tracing::{info, warn};

use super::session::Session;
use crate::connection::Connection;
use crate::device::VhostUserDevice;
use crate::error::HostError;
use crate::hooks::Hooks;
use crate::notify::Kick;
use crate::reactor::{Raced, Reactor, race};
use crate::take_over::{Estate, HandOverError, Heir, Letter, Play, now, parcels};

/// How long the new process may take for all of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A ring as it stood when the hand-over began.
struct Stood {
    index: u16,
    record: Ring,
    /// Where it goes on.
    base: u32,
    /// A worker had it.
    ran: bool,
}

impl<D: VhostUserDevice, R: Reactor> Session<'_, D, R> {
    /// Hands the session over. `false`: it came to nothing, and the rings run again.
    ///
    /// # Errors
    /// A ring did not drain.
    pub(super) async fn hand_over(
        &mut self,
        heir: Heir<R>,
        estate: Result<Estate, HostError>,
    ) -> Result<bool, HostError> {
        if self.is_transferring() {
            let why = "device state is being transferred".to_owned();
            let _ = heir.send(Letter::Refused(why)).await;
            return Ok(false);
        }
        info!("handing over to a new process");
        let stopped = now();
        let mut rings = Vec::new();
        for index in 0..u16::try_from(self.rings.len()).unwrap_or(u16::MAX) {
            let Some(record) = self.backend.ring(index).copied() else { continue };
            let ran = self.is_running(index);
            let base = if ran { self.stop(index).await?.base() } else { record.base };
            rings.push(Stood { index, record, base, ran });
        }
        if rings.iter().any(|ring| ring.ran) {
            self.suspend().await?;
        }
        let channel = self.plug.get();
        let reactor = self.reactor.clone();
        let given = async {
            self.channel_rests().await?;
            self.plug.set(None);
            let estate = Estate { stopped, ..estate? };
            bequeath(&mut *self.device, &heir).await?;
            self.give(&heir, estate, &mut rings, channel.1.as_deref()).await
        };
        let given = match race(given, reactor.sleep(PATIENCE)).await {
            Raced::First(given) => given,
            Raced::Second(()) => {
                Err(HandOverError::unable(format_args!("nothing within {} s", PATIENCE.as_secs())))
            }
        };
        if let Some(hooks) = self.device.hooks() {
            hooks.handed_over(given.is_ok());
        }
        let Err(error) = given else {
            info!("handed over");
            return Ok(true);
        };
        warn!("not handed over, the device goes on here: {error}");
        // It may be gone.
        let _ = heir.send(Letter::Refused(error.to_string())).await;
        drop(heir);
        self.plug.set(channel.1);
        self.go_on(&rings).await;
        Ok(false)
    }

    /// Every answer that the front-end owes has come: none of them may reach the new process.
    async fn channel_rests(&self) -> Result<(), HandOverError> {
        let rests = std::future::poll_fn(|context| self.channel.poll_rest(context));
        match race(rests, self.reactor.sleep(PATIENCE / 2)).await {
            Raced::First(()) => Ok(()),
            Raced::Second(()) => {
                Err(HandOverError::unable("the front-end owes an answer on the back-end channel"))
            }
        }
    }

    /// Plays the front-end for the new process, then lets it go on by itself.
    async fn give(
        &mut self,
        heir: &Heir<R>,
        mut estate: Estate,
        rings: &mut [Stood],
        channel: Option<&Connection<R>>,
    ) -> Result<(), HandOverError> {
        let (ours, theirs) = UnixStream::pair().map_err(HostError::io("socketpair"))?;
        estate.mappings = self.channel.mappings(|all| {
            all.iter().map(|(&(region, offset), &size)| (region, offset, size)).collect()
        });
        estate.front_end = Some(crate::take_over::FrontEnd {
            play: theirs.into(),
            socket: self.connection.descriptor()?,
        });
        heir.send(Letter::HandOver(Box::new(estate))).await?;
        let mut play = Play::new(self.reactor.clone(), ours.into())?;
        self.play_device(&mut play, channel).await?;
        for ring in &*rings {
            self.play_ring(&mut play, ring).await?;
        }
        let kicked = self.play_kicks(&mut play, rings).await;
        let finished = match kicked {
            Ok(()) => play.finish(self.backend.acked_protocol_features()).await,
            Err(error) => Err(error),
        };
        let gone = match finished {
            Ok(()) => heir.send(Letter::Go).await.map_err(HandOverError::from),
            Err(error) => Err(error),
        };
        if gone.is_err() {
            take_back(&mut play, rings).await;
        }
        gone
    }

    /// What concerns the device as a whole.
    async fn play_device(
        &mut self,
        play: &mut Play<R>,
        channel: Option<&Connection<R>>,
    ) -> Result<(), HandOverError> {
        let protocol = self.backend.acked_protocol_features();
        play.negotiate(self.backend.acked_features(), protocol).await?;
        if self.backend.features_set() {
            play.ask(Request::SetFeatures(self.backend.acked_features())).await?;
        }
        if let Some(request) = self.inflight.again().map_err(HostError::io("dup"))? {
            play.ask(request).await?;
        }
        for request in self.log.again().map_err(HostError::io("dup"))? {
            play.ask(request).await?;
        }
        if protocol.contains(ProtocolFeatures::STATUS) && self.status != 0 {
            play.ask(Request::SetStatus(self.status)).await?;
        }
        if let Some(channel) = channel {
            play.ask(Request::SetBackendReqFd(channel.descriptor()?)).await?;
        }
        self.play_memory(play, protocol).await?;
        self.play_state(play).await
    }

    /// The device's own state, the way that a migration takes.
    async fn play_state(&mut self, play: &mut Play<R>) -> Result<(), HandOverError> {
        let pipe = pipe_with(PipeFlags::CLOEXEC);
        let (theirs, ours) = pipe.map_err(|errno| HostError::io("pipe")(errno.into()))?;
        self.save_into(ours).await.map_err(HandOverError::unable)?;
        let load = Request::SetDeviceStateFd(StateDirection::Load, theirs);
        let loaded = match play.ask(load).await {
            Ok(_) => play.ask(Request::CheckDeviceState).await,
            Err(error) => Err(error),
        };
        self.end_transfer().await;
        loaded.map(|_| ())
    }

    async fn play_memory(
        &self,
        play: &mut Play<R>,
        protocol: ProtocolFeatures,
    ) -> Result<(), HandOverError> {
        let mut regions = Vec::new();
        for region in self.backend.regions() {
            regions.push((*region, self.region_file(region)?));
        }
        if regions.is_empty() {
            return Ok(());
        }
        if !protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            play.ask(Request::SetMemTable(regions)).await?;
            return Ok(());
        }
        for (region, file) in regions {
            play.ask(Request::AddMemReg(region, file)).await?;
        }
        Ok(())
    }

    /// Another descriptor of the file that a region is part of.
    fn region_file(&self, region: &MemRegion) -> Result<OwnedFd, HandOverError> {
        let regions = self.memory.regions();
        let found = regions.iter().find(|have| have.spec().guest_addr == region.guest_addr);
        let file = found.and_then(|region| region.file());
        let kept = file.ok_or_else(|| HandOverError::unable("guest memory has no descriptor"))?;
        Ok(kept.try_clone_to_owned().map_err(HostError::io("dup"))?)
    }

    /// A ring, all but its kick.
    async fn play_ring(&self, play: &mut Play<R>, ring: &Stood) -> Result<(), HandOverError> {
        let Stood { index, record, base, .. } = ring;
        let index = u32::from(*index);
        if let Some(size) = record.size {
            play.ask(Request::SetVringNum { index, size: size.into() }).await?;
        }
        if let Some(addresses) = record.addresses {
            play.ask(Request::SetVringAddr(VringAddr { index, ..addresses })).await?;
        }
        play.ask(Request::SetVringBase { index, base: *base }).await?;
        let host = self.rings.get(usize::from(ring.index));
        let call = host.and_then(|host| host.call_fd());
        if let Some(call) = notifier(record.call, call)? {
            play.ask(Request::SetVringCall { index, call }).await?;
        }
        let err = host.and_then(|host| host.err_fd());
        if let Some(err) = notifier(record.err, err)? {
            play.ask(Request::SetVringErr { index, err }).await?;
        }
        if self.backend.acked_features() & virtio::PROTOCOL_FEATURES != 0 {
            play.ask(Request::SetVringEnable { index, enabled: record.enabled }).await?;
        }
        Ok(())
    }

    /// The rings start over there, one after the other.
    async fn play_kicks(&self, play: &mut Play<R>, rings: &[Stood]) -> Result<(), HandOverError> {
        for ring in rings.iter().filter(|ring| ring.record.kicked) {
            let host = self.rings.get(usize::from(ring.index));
            let kick = match host.and_then(|host| host.kick()) {
                Some(Kick::Fd(fd)) => Notifier::Fd(fd.try_clone().map_err(HostError::io("dup"))?),
                Some(Kick::Message | Kick::Poll) => Notifier::Poll,
                None => continue,
            };
            play.ask(Request::SetVringKick { index: ring.index.into(), kick }).await?;
        }
        Ok(())
    }

    /// The new process did not want it: the rings start again where they stood.
    async fn go_on(&mut self, rings: &[Stood]) {
        let late = self.claim_deadline();
        for ring in rings.iter().filter(|ring| ring.ran) {
            self.backend.resume(ring.index, ring.record.kick, ring.base);
            if let Err(refusal) = self.start_if_ready(ring.index, late).await {
                warn!(queue = ring.index, "ring not started again: {refusal}");
                self.backend.ring_event(ring.index, RingEvent::Broken);
            }
        }
    }

    /// The new process, before anything is played to it: what the front-end has mapped for the old one.
    pub(crate) fn inherit_mappings(&self, mappings: Vec<(u8, u64, u64)>) {
        self.channel.mappings(|all| {
            all.extend(mappings.into_iter().map(|(id, offset, size)| ((id, offset), size)));
        });
    }

    /// The new process: everything was played to us; waits for the word, then for the front-end
    /// itself.
    pub(crate) async fn inherit(
        &mut self,
        heir: &Heir<R>,
        socket: OwnedFd,
        stopped: u64,
    ) -> Result<(), HostError> {
        let word = match race(heir.receive(), self.reactor.sleep(PATIENCE)).await {
            Raced::First(word) => word?,
            Raced::Second(()) => {
                return Err(HostError::TakeOver("the old process gave no word".to_owned()));
            }
        };
        match word {
            Letter::Go => self.device.hooks().into_iter().for_each(<dyn Hooks>::inherited),
            Letter::Refused(why) => return Err(HostError::TakeOver(why)),
            _ => return Err(HostError::TakeOver("a letter out of turn".to_owned())),
        }
        self.connection = Connection::new(self.reactor.clone(), socket)?;
        let pause = Duration::from_nanos(now().saturating_sub(stopped));
        info!("taken over; the rings stood still for {} us", pause.as_micros());
        Ok(())
    }
}

/// Hands over what the device itself has open; whether there was anything.
///
/// # Errors
/// The device wants to stay, or the new process is gone.
pub(crate) async fn bequeath<D: VhostUserDevice, R: Reactor>(
    device: &mut D,
    heir: &Heir<R>,
) -> Result<bool, HandOverError> {
    let heirlooms = match device.hooks() {
        Some(hooks) => hooks.hand_over().map_err(HandOverError::unable)?,
        None => Vec::new(),
    };
    let letters = parcels(heirlooms).map_err(HandOverError::unable)?;
    let any = !letters.is_empty();
    for letter in letters {
        heir.send(letter).await?;
    }
    Ok(any)
}

/// A notifier of the front-end, as it gave it; `None`: it gave none.
fn notifier(
    given: Given,
    fd: Option<&OwnedFd>,
) -> Result<Option<Notifier<OwnedFd>>, HandOverError> {
    Ok(match (given, fd) {
        (Given::Fd, Some(fd)) => {
            let fd = fd.as_fd().try_clone_to_owned().map_err(HostError::io("dup"))?;
            Some(Notifier::Fd(fd))
        }
        (Given::Poll, _) => Some(Notifier::Poll),
        _ => None,
    })
}

/// Rings that started over there are stopped, and go on here where they stand now.
async fn take_back<R: Reactor>(play: &mut Play<R>, rings: &mut [Stood]) {
    for ring in rings.iter_mut().filter(|ring| ring.ran) {
        match play.base(ring.index).await {
            Ok(base) => ring.base = base,
            // It never started there, or the process is gone: where it stood is where it stands.
            Err(error) => warn!(queue = ring.index, "not taken back: {error}"),
        }
    }
}

/// What the protocol machine says when a hand-over cannot be.
impl From<Refusal> for HandOverError {
    fn from(refusal: Refusal) -> Self {
        Self::unable(refusal)
    }
}
