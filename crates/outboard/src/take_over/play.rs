//! The old process plays the front-end: it sets the new process up as the real one had set up ours,
//! by the protocol's own messages, each acknowledged.

use std::os::fd::OwnedFd;

use outboard_protocol::table::{FrontendCode, Side, info};
use outboard_protocol::{Answer, Expect, Frontend, ProtocolFeatures, Request, virtio};

use super::HandOverError;
use crate::connection::{Connection, Received};
use crate::error::HostError;
use crate::reactor::Reactor;

/// The longest reply: header and the largest payload.
const BUFFER: usize = 12 + 4096;

/// See the module.
pub(crate) struct Play<R: Reactor> {
    machine: Frontend<OwnedFd>,
    connection: Connection<R>,
}

impl<R: Reactor> Play<R> {
    pub(crate) fn new(reactor: R, socket: OwnedFd) -> Result<Self, HostError> {
        Ok(Self { machine: Frontend::new(), connection: Connection::new(reactor, socket)? })
    }

    /// The same features again, and acknowledgements while we play even if the front-end wants
    /// none.
    pub(crate) async fn negotiate(
        &mut self,
        features: u64,
        protocol: ProtocolFeatures,
    ) -> Result<(), HandOverError> {
        let offered = self.offered().await?;
        if offered & virtio::PROTOCOL_FEATURES == 0 {
            let bits = virtio::PROTOCOL_FEATURES;
            return Err(HandOverError::Lacks { what: "features", bits });
        }
        let Some(Answer::ProtocolFeatures(offered)) =
            self.ask(Request::GetProtocolFeatures).await?
        else {
            return Err(HandOverError::Refused { message: "GET_PROTOCOL_FEATURES" });
        };
        let wanted = protocol | ProtocolFeatures::REPLY_ACK | ProtocolFeatures::DEVICE_STATE;
        let lacks = (wanted - offered).bits();
        if lacks != 0 {
            return Err(HandOverError::Lacks { what: "protocol features", bits: lacks });
        }
        self.ask(Request::SetProtocolFeatures(wanted)).await?;
        self.ask(Request::SetOwner).await?;
        // What an IOMMU needs is offered only now.
        let lacks = features & !self.offered().await?;
        if lacks != 0 {
            return Err(HandOverError::Lacks { what: "features", bits: lacks });
        }
        Ok(())
    }

    async fn offered(&mut self) -> Result<u64, HandOverError> {
        match self.ask(Request::GetFeatures).await? {
            Some(Answer::Features(offered)) => Ok(offered),
            _ => Err(HandOverError::Refused { message: "GET_FEATURES" }),
        }
    }

    /// Acknowledgements as the front-end has them; the last thing of all.
    pub(crate) async fn finish(&mut self, protocol: ProtocolFeatures) -> Result<(), HandOverError> {
        self.ask(Request::SetProtocolFeatures(protocol)).await?;
        // Everything before it has been carried out when this is answered.
        self.ask(Request::GetFeatures).await?;
        Ok(())
    }

    /// Stops a ring over there, and says where it stands.
    pub(crate) async fn base(&mut self, index: u16) -> Result<u32, HandOverError> {
        match self.ask(Request::GetVringBase { index: index.into() }).await? {
            Some(Answer::VringBase { base, .. }) => Ok(base),
            _ => Err(HandOverError::Refused { message: "GET_VRING_BASE" }),
        }
    }

    /// Sends one message and waits for its answer, if one comes; a refusal is an error.
    pub(crate) async fn ask(
        &mut self,
        request: Request<OwnedFd>,
    ) -> Result<Option<Answer<OwnedFd>>, HandOverError> {
        let message = name(request.code());
        let expect = self.machine.send(request).map_err(HandOverError::unable)?;
        while let Some(frame) = self.machine.transmit() {
            self.connection.send(frame).await?;
        }
        if expect == Expect::Nothing {
            return Ok(None);
        }
        let mut buffer = vec![0; BUFFER];
        loop {
            if let Some(answer) = self.machine.poll()? {
                let refused = HandOverError::Refused { message };
                return if answer.is_success() { Ok(Some(answer)) } else { Err(refused) };
            }
            let room = buffer.get_mut(..self.machine.wanted().clamp(1, BUFFER));
            let room = room.unwrap_or_default();
            match self.connection.receive(room).await? {
                Received::Bytes(count, fds) => {
                    self.machine.receive(room.get(..count).unwrap_or_default(), fds);
                }
                Received::End => return Err(HandOverError::unable("the new process has left")),
            }
        }
    }
}

fn name(code: FrontendCode) -> &'static str {
    info(Side::FrontEnd, code.id()).map_or("a message", |row| row.name)
}
