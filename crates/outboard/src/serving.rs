//! How front-ends are served: one at a time, the next one when it leaves, until the server is told to
//! stop or a new process takes over (contract §5).
//!
//! Invariant: a socket file is removed by the process that has it at the end, and by no other.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};
use tracing::{info, warn};

use crate::device::VhostUserDevice;
use crate::error::HostError;
use crate::handler::{Attention, DeviceRequestHandler, Ended, Inheritance, bequeath};
use crate::hooks::{Heirloom, Hooks};
use crate::reactor::{Raced, Reactor, race};
use crate::server::{Server, SocketFile, Source};
use crate::take_over::{Belongings, Control, Door, Estate, HandOverError, Heir, Letter};

/// How long to wait before accepting again when descriptors have run out.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a new process may take to accept what a device hands over while no front-end is there.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a server listens to.
struct Stage<R: Reactor> {
    reactor: R,
    stop: R::Source,
    listener: Option<R::Source>,
    door: Option<Door<R>>,
    /// Socket files of ours, to be removed.
    files: Vec<SocketFile>,
}

/// Serves until the end.
pub(crate) async fn serve_on<R: Reactor, D: VhostUserDevice>(
    server: Server,
    reactor: R,
    device: D,
) -> Result<(), HostError> {
    let Server { source, file, mut options, stop: (_writer, stop), control } = server;
    options.hand_over |= control.is_some() || matches!(source, Source::Predecessor(_));
    let mut handler = DeviceRequestHandler::new(device, options)?;
    let stop = reactor.source(stop.into()).map_err(HostError::io("stop"))?;
    match source {
        Source::Connected(socket) => {
            let end = socket.try_clone().map_err(HostError::io("socket"))?;
            let mut stage = Stage::new(reactor.clone(), stop, None, file, control)?;
            let ended = handler.run_on(reactor, socket, stage.attention(&|| true)).await;
            if stage.gives_away(&ended) {
                return Ok(());
            }
            // The number that we inherited may still be open: the peer is to see the end.
            let _ = shutdown(&end, Shutdown::Both);
            ended.map(|_| ())
        }
        Source::Listening(listener) => {
            let mut stage = Stage::new(reactor, stop, Some(listener), file, control)?;
            accept_loop(&mut stage, &mut handler).await
        }
        Source::Predecessor(socket) => {
            let heir = Heir::new(reactor.clone(), socket)?;
            let Some((heirlooms, estate)) = ask(&reactor, &heir, &stop).await? else {
                return Ok(());
            };
            let accepts = !heirlooms.is_empty() && estate.front_end.is_none();
            if let Some(hooks) = handler.as_mut().hooks() {
                hooks.inherit(heirlooms)?;
            }
            if accepts {
                // Nothing else would tell the old process.
                heir.send(Letter::TakeOver).await?;
            }
            succeed(reactor, stop, heir, estate, control, &mut handler).await
        }
    }
}

/// Asks for what another process has; `None`: stopped meanwhile.
async fn ask<R: Reactor>(
    reactor: &R,
    heir: &Heir<R>,
    stop: &R::Source,
) -> Result<Option<(Vec<Heirloom>, Estate)>, HostError> {
    heir.send(Letter::TakeOver).await?;
    let mut heirlooms = Vec::new();
    loop {
        match race(heir.receive(), reactor.readable(stop)).await {
            Raced::First(letter) => match letter? {
                Letter::Heirlooms(more) => heirlooms.extend(more),
                Letter::HandOver(estate) => return Ok(Some((heirlooms, *estate))),
                Letter::Refused(why) => return Err(HostError::TakeOver(why)),
                _ => return Err(HostError::TakeOver("a letter out of turn".to_owned())),
            },
            Raced::Second(_) => return Ok(None),
        }
    }
}

/// Takes the place of another process and serves on.
async fn succeed<R: Reactor, D: VhostUserDevice>(
    reactor: R,
    stop: R::Source,
    heir: Heir<R>,
    mut estate: Estate,
    own: Option<Control>,
    handler: &mut DeviceRequestHandler<D>,
) -> Result<(), HostError> {
    // The other one's is closed with its process.
    let own_file = own.and_then(|own| {
        estate.control = Some(own.listener);
        estate.control_file = own.file.as_ref().map(|file| file.path().to_owned());
        own.file
    });
    let Estate { listener, socket_file, control, control_file, front_end, mappings, stopped } =
        estate;
    let belongings = Belongings {
        listener: listener
            .as_ref()
            .map(OwnedFd::try_clone)
            .transpose()
            .map_err(HostError::io("dup"))?,
        socket_file: socket_file.clone(),
        control_file: control_file.clone(),
    };
    let door =
        control.map(|control| Door::new(reactor.clone(), control, belongings)).transpose()?;
    let listener = listener.map(|listener| reactor.source(listener)).transpose();
    let listener = listener.map_err(HostError::io("listener"))?;
    let files = own_file.into_iter().collect();
    let mut stage = Stage { reactor, stop, listener, door, files };
    let reactor = stage.reactor.clone();
    let ended = match front_end {
        Some(front_end) => {
            let inheritance = Inheritance { front_end, mappings, stopped, heir };
            let away = || stage.turn_away();
            handler.inherit_on(reactor, inheritance, stage.attention(&away)).await
        }
        None => match heir.receive().await? {
            Letter::Go => {
                handler.as_mut().hooks().into_iter().for_each(<dyn Hooks>::inherited);
                Ok(Ended::Left)
            }
            _ => Err(HostError::TakeOver("a letter out of turn".to_owned())),
        },
    };
    if matches!(ended, Err(HostError::TakeOver(_))) {
        return ended.map(|_| ());
    }
    let inherited = [socket_file, control_file].into_iter().flatten();
    let inherited = inherited.filter(|path| stage.files.iter().all(|own| own.path() != path));
    let files: Vec<_> = inherited.filter_map(|path| SocketFile::of(&path).ok()).collect();
    stage.files.extend(files);
    if stage.gives_away(&ended) || stage.is_over(&ended) {
        return Ok(());
    }
    accept_loop(&mut stage, handler).await
}

impl<R: Reactor> Stage<R> {
    fn new(
        reactor: R,
        stop: R::Source,
        listener: Option<OwnedFd>,
        file: Option<SocketFile>,
        control: Option<Control>,
    ) -> Result<Self, HostError> {
        let mut files: Vec<_> = file.into_iter().collect();
        let door = match control {
            None => None,
            Some(Control { listener: control, file }) => {
                let path = |file: &SocketFile| file.path().to_owned();
                let again = listener.as_ref().map(OwnedFd::try_clone).transpose();
                let belongings = Belongings {
                    listener: again.map_err(HostError::io("dup"))?,
                    socket_file: files.first().map(path),
                    control_file: file.as_ref().map(path),
                };
                files.extend(file);
                Some(Door::new(reactor.clone(), control, belongings)?)
            }
        };
        let listener = listener.map(|listener| reactor.source(listener)).transpose();
        let listener = listener.map_err(HostError::io("listener"))?;
        Ok(Self { reactor, stop, listener, door, files })
    }

    /// What a session looks out for.
    fn attention<'a>(&'a self, turn_away: &'a (dyn Fn() -> bool + Sync)) -> Attention<'a, R> {
        let knock = self.listener.as_ref().map(|listener| (listener, turn_away));
        Attention { stop: Some(&self.stop), knock, door: self.door.as_ref() }
    }

    fn turn_away(&self) -> bool {
        self.listener.as_ref().is_none_or(turn_away)
    }

    /// Whether a new process has everything now, the socket files too.
    fn gives_away(&mut self, ended: &Result<Ended, HostError>) -> bool {
        let gone = matches!(ended, Ok(Ended::HandedOver));
        if gone {
            self.files.iter_mut().for_each(SocketFile::give_away);
        }
        gone
    }

    /// Whether nobody can come any more.
    fn is_over(&self, ended: &Result<Ended, HostError>) -> bool {
        if let Err(error) = ended {
            warn!("session ended: {error}");
        }
        matches!(ended, Ok(Ended::Stopped)) || self.listener.is_none()
    }

    /// The next thing that happens between two sessions.
    async fn next(&self) -> Result<Next<R>, HostError> {
        let Some(listener) = &self.listener else { return Ok(Next::Stop) };
        let front_end = accept(&self.reactor, listener);
        let stop = self.reactor.readable(&self.stop);
        let heir = async {
            match &self.door {
                Some(door) => match race(door.heir(), door.keep()).await {
                    Raced::First(heir) => heir,
                    Raced::Second(()) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        };
        Ok(match race(race(stop, front_end), heir).await {
            Raced::First(Raced::First(_)) => Next::Stop,
            Raced::First(Raced::Second(socket)) => Next::FrontEnd(socket?),
            Raced::Second(heir) => Next::Heir(heir),
        })
    }

    /// Hands the sockets over while no front-end is there; whether that went well.
    async fn hand_over<D: VhostUserDevice>(
        &self,
        heir: &Heir<R>,
        device: &mut D,
    ) -> Result<bool, HostError> {
        let Some(door) = &self.door else { return Ok(false) };
        let given = give_idle(&self.reactor, door, heir, device).await;
        if let Some(hooks) = device.hooks() {
            hooks.handed_over(given.is_ok());
        }
        match given {
            Ok(()) => info!("handed over"),
            Err(why) => {
                warn!("not handed over, the device goes on here: {why}");
                // It may be gone.
                let _ = heir.send(Letter::Refused(why.to_string())).await;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// All that a device without a front-end has.
async fn give_idle<R: Reactor, D: VhostUserDevice>(
    reactor: &R,
    door: &Door<R>,
    heir: &Heir<R>,
    device: &mut D,
) -> Result<(), HandOverError> {
    let estate = door.estate().map_err(HostError::io("dup"))?;
    let any = bequeath(device, heir).await?;
    heir.send(Letter::HandOver(Box::new(estate))).await?;
    if any {
        // It may not want them.
        match race(heir.receive(), reactor.sleep(PATIENCE)).await {
            Raced::First(Ok(Letter::TakeOver)) => {}
            Raced::First(Ok(_)) => return Err(HandOverError::unable("a letter out of turn")),
            Raced::First(Err(error)) => return Err(error.into()),
            Raced::Second(()) => return Err(HandOverError::unable("the new process says nothing")),
        }
    }
    heir.send(Letter::Go).await?;
    Ok(())
}

/// See [`Stage::next`].
enum Next<R: Reactor> {
    Stop,
    FrontEnd(OwnedFd),
    Heir(Heir<R>),
}

async fn accept_loop<R: Reactor, D: VhostUserDevice>(
    stage: &mut Stage<R>,
    handler: &mut DeviceRequestHandler<D>,
) -> Result<(), HostError> {
    loop {
        let ended = match stage.next().await? {
            Next::Stop => return Ok(()),
            Next::FrontEnd(socket) => {
                info!("front-end connected");
                let away = || stage.turn_away();
                handler.run_on(stage.reactor.clone(), socket, stage.attention(&away)).await
            }
            Next::Heir(heir) => match stage.hand_over(&heir, handler.as_mut()).await {
                Ok(true) => Ok(Ended::HandedOver),
                Ok(false) => Ok(Ended::Left),
                Err(error) => Err(error),
            },
        };
        if stage.gives_away(&ended) || stage.is_over(&ended) {
            return Ok(());
        }
    }
}

/// Waits for the next front-end. Running out of descriptors is waited out, not fatal (case A96).
async fn accept<R: Reactor>(reactor: &R, listener: &R::Source) -> Result<OwnedFd, HostError> {
    loop {
        let readable = reactor.readable(listener).await;
        readable.map_err(HostError::io("wait for a front-end"))?;
        match try_accept(listener) {
            Ok(Some(socket)) => return Ok(socket),
            Ok(None) => {}
            Err(error) => {
                warn!("accept: {error}");
                reactor.sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Accepts without blocking, whatever the listener's flags are: they may be shared.
pub(crate) fn try_accept(listener: &impl AsFd) -> io::Result<Option<OwnedFd>> {
    let mut ready = [rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    if matches!(rustix::event::poll(&mut ready, Some(&now)), Ok(0) | Err(_)) {
        return Ok(None);
    }
    match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        Ok(socket) => Ok(Some(socket)),
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A second front-end is closed at once. False: it cannot be now, for want of descriptors.
fn turn_away(listener: &impl AsFd) -> bool {
    match try_accept(listener) {
        Ok(Some(socket)) => {
            drop(socket);
            warn!("a second front-end was turned away: this device serves one at a time");
        }
        Ok(None) => {}
        Err(error) => {
            warn!("accept: {error}");
            return false;
        }
    }
    true
}
