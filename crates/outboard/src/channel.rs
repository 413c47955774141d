//! The back-end channel: requests of the device to its front-end (contract §3, vhost-user
//! "Back-end message types").
//!
//! ```text
//!   worker, device ─ask─▶ Shared { machine, waiting } ◀─drive─ the session's task ◀─▶ socket
//!        ▲                     │ waker                              (SET_BACKEND_REQ_FD of the moment)
//!        └──── Answer ◀────────┘
//! ```
//! A [`BackendChannel`] belongs to the device and lives as long as it does; the handler plugs the
//! front-end's socket in, another one when another comes, and none when it leaves. Asking never
//! blocks: many requests may be outstanding, each has a deadline, and a front-end that never reads
//! its end costs a bounded queue. Config changes that were not sent yet are one.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use outboard_memory::Permission;
use outboard_protocol::channel::{ChannelAnswer, ChannelBackend, ChannelRequest, RequestId};
use outboard_protocol::payload::{IOTLB_ACCESS_FAIL, IOTLB_MISS, Iotlb};
use outboard_protocol::{BackendCode, Frame, ProtocolFeatures, Refusal, Violation};

use crate::mailbox::{Change, Mailbox};

/// How long an answer is waited for.
const DEADLINE: Duration = Duration::from_secs(5);
/// Requests that may be outstanding: a front-end that answers none costs no more.
const MOST: usize = 256;

/// Why a request on the channel failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The front-end has given no channel, or has left.
    #[error("the front-end has no back-end channel open")]
    Closed,
    /// The device is suspended: it sends nothing.
    #[error("the device is suspended")]
    Suspended,
    /// The request needs a feature that was not negotiated.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// The front-end said no.
    #[error("the front-end answered {0:#x}")]
    Failed(u64),
    /// The front-end said that it has the shared object, and sent no descriptor.
    #[error("the front-end answered without the object's descriptor")]
    NoObject,
    /// The front-end did not answer in time.
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Late,
    /// Too many requests are outstanding.
    #[error("{MOST} requests are outstanding")]
    Busy,
}

/// The answer to come. It may be awaited, waited for, or dropped.
#[derive(Debug)]
pub struct Answer(oneshot::Receiver<Told>);

type Told = Result<Option<OwnedFd>, ChannelError>;

impl Answer {
    /// Blocks the calling thread until the answer is there; the session's deadline bounds it. Not
    /// to be called on the session's own thread, which brings the answers.
    ///
    /// # Errors
    /// As the [`ChannelError`] says.
    pub fn wait(self) -> Told {
        crate::reactor::block_on(self).unwrap_or(Err(ChannelError::Closed))
    }
}

impl Future for Answer {
    type Output = Told;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Told> {
        Pin::new(&mut self.0).poll(context).map(|told| told.unwrap_or(Err(ChannelError::Closed)))
    }
}

/// Who wants to know how a request went.
#[derive(Debug)]
enum Tell {
    /// Whoever holds the [`Answer`].
    Asker(oneshot::Sender<Told>),
    /// Queues that wait for an entry of the IOTLB, each with the number of its question.
    Queues(Vec<(Arc<Mailbox>, u64)>),
}

impl Tell {
    /// Whoever asked may have lost interest.
    fn tell(self, told: Told) {
        match self {
            Self::Asker(asker) => {
                let _ = asker.send(told);
            }
            Self::Queues(queues) => {
                let told = told.map(drop);
                for (queue, number) in queues {
                    queue.tell(Change::Translated { number, told: told.clone() });
                }
            }
        }
    }
}

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Any,
    Config,
    /// The I/O address and the access of an IOTLB miss.
    Miss((u64, u8)),
}

impl Purpose {
    /// How many requests may be outstanding for one more. A queue asks again only when its last
    /// question was answered or is late, so misses are few; no other request keeps them out.
    const fn most(self) -> usize {
        match self {
            Self::Any | Self::Config => MOST,
            Self::Miss(_) => 8 * MOST,
        }
    }

    const fn miss(self) -> Option<(u64, u8)> {
        match self {
            Self::Any | Self::Config => None,
            Self::Miss(miss) => Some(miss),
        }
    }
}

/// One request under way.
#[derive(Debug)]
struct Waiting {
    id: RequestId,
    until: Instant,
    config: bool,
    /// The I/O address and the access of an IOTLB miss.
    miss: Option<(u64, u8)>,
    tell: Tell,
}

#[derive(Debug, Default)]
struct State {
    machine: Option<ChannelBackend<OwnedFd>>,
    /// In the order in which they were asked, so also of their deadlines.
    waiting: VecDeque<Waiting>,
    /// The configuration changed since the last notice that was sent.
    config_changed: bool,
    suspended: bool,
    mappings: BTreeMap<(u8, u64), u64>,
    driver: Option<Waker>,
}

/// See the module. Clones are the same channel.
#[derive(Clone, Debug, Default)]
pub struct BackendChannel(Arc<Mutex<State>>);

impl BackendChannel {
    /// A channel that no front-end has given a socket to yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the front-end has given a socket.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lock().machine.is_some()
    }

    /// Whether there is a front-end with a socket that has negotiated such a request.
    #[must_use]
    pub fn permits(&self, request: BackendCode) -> bool {
        self.lock().machine.as_ref().is_some_and(|machine| machine.permits(request))
    }

    /// Whether an answer is late that may still come: whoever waits for the next one waits as long.
    pub(crate) fn is_overdue(&self) -> bool {
        self.lock().machine.as_ref().is_some_and(|machine| machine.owed() > machine.outstanding())
    }

    /// Tells the front-end to read the configuration again. Notices that were not sent yet become
    /// one; while the device is suspended the notice waits.
    pub fn config_changed(&self) {
        let mut state = self.lock();
        state.config_changed = true;
        state.wake();
    }

    /// Asks anything. Nothing blocks; the answer comes through what is returned.
    pub fn ask(&self, request: ChannelRequest<OwnedFd>) -> Answer {
        let (tell, receiver) = oneshot::channel();
        let mut state = self.lock();
        if state.suspended {
            // Nobody can have lost interest yet.
            let _ = tell.send(Err(ChannelError::Suspended));
        } else {
            state.ask(request, Purpose::Any, Tell::Asker(tell));
        }
        Answer(receiver)
    }

    /// Asks the front-end for an entry of the IOTLB; the answer goes to `queue`'s mailbox, under
    /// `number`. Queues that miss the same entry ask once.
    pub(crate) fn ask_translation(
        &self,
        iova: u64,
        access: Permission,
        queue: &Arc<Mailbox>,
        number: u64,
    ) {
        let mut state = self.lock();
        let miss = (iova, access.bits());
        let asked = state.waiting.iter_mut().find(|waiting| waiting.miss == Some(miss));
        if let Some(Waiting { tell: Tell::Queues(queues), .. }) = asked {
            queues.push((Arc::clone(queue), number));
            return;
        }
        let tell = Tell::Queues(vec![(Arc::clone(queue), number)]);
        if state.suspended {
            tell.tell(Err(ChannelError::Suspended));
            return;
        }
        let entry = Iotlb { iova, perm: access.bits(), kind: IOTLB_MISS, ..Iotlb::default() };
        state.ask(ChannelRequest::Iotlb(entry), Purpose::Miss(miss), tell);
    }

    /// The IOTLB changes: what was asked before may have been answered by a change that is history
    /// by now, so nobody joins in asking it.
    pub(crate) fn iotlb_changes(&self) {
        for waiting in &mut self.lock().waiting {
            waiting.miss = None;
        }
    }

    /// Tells the front-end that the device was not allowed an access.
    pub(crate) fn report_access_failure(&self, iova: u64, len: u64, access: Permission) {
        let (perm, kind) = (access.bits(), IOTLB_ACCESS_FAIL);
        drop(self.ask(ChannelRequest::Iotlb(Iotlb {
            iova,
            size: len,
            perm,
            kind,
            ..Iotlb::default()
        })));
    }

    /// Plugs a socket in; requests on the old one fail.
    pub(crate) fn open(&self, protocol: ProtocolFeatures, features: u64) {
        let mut state = self.lock();
        state.fail_all(&ChannelError::Closed);
        state.machine = Some(ChannelBackend::new(protocol, features));
        state.wake();
    }

    /// SET_FEATURES has come: it decides which requests may be made.
    pub(crate) fn negotiate(&self, protocol: ProtocolFeatures, features: u64) {
        if let Some(machine) = &mut self.lock().machine {
            machine.negotiate(protocol, features);
        }
    }

    /// The front-end has left, or broke the channel's rules.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.machine = None;
        state.config_changed = false;
        state.mappings.clear();
        state.fail_all(&ChannelError::Closed);
    }

    /// Suspended devices send nothing.
    pub(crate) fn set_suspended(&self, suspended: bool) {
        let mut state = self.lock();
        state.suspended = suspended;
        state.wake();
    }

    /// The front-end has dropped every mapping: a reset, or it left.
    pub(crate) fn forget_mappings(&self) {
        self.lock().mappings.clear();
    }

    /// Works on the mappings that the front-end was asked for: (region, offset) to bytes.
    pub(crate) fn mappings<T>(&self, work: impl FnOnce(&mut BTreeMap<(u8, u64), u64>) -> T) -> T {
        work(&mut self.lock().mappings)
    }

    /// Whether requests wait for answers; registers who is to be woken when one does.
    pub(crate) fn is_waiting(&self, context: &Context<'_>) -> bool {
        let mut state = self.lock();
        state.driver = Some(context.waker().clone());
        !state.waiting.is_empty()
    }

    /// Resolves when the front-end owes no answer.
    pub(crate) fn poll_rest(&self, context: &Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        state.driver = Some(context.waker().clone());
        match &state.machine {
            Some(machine) if machine.owed() > 0 => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }

    /// The next message to send; registers who is to be woken for the one after it.
    pub(crate) fn transmit(&self, context: &Context<'_>) -> Option<Frame<OwnedFd>> {
        let mut state = self.lock();
        state.driver = Some(context.waker().clone());
        state.notice();
        state.machine.as_mut()?.transmit()
    }

    /// Bytes to read at most.
    pub(crate) fn wanted(&self) -> usize {
        self.lock().machine.as_ref().map_or(1, ChannelBackend::wanted)
    }

    /// Takes what came.
    ///
    /// # Errors
    /// The front-end broke the channel's rules: it is to be closed.
    pub(crate) fn receive(&self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(), Violation> {
        let mut state = self.lock();
        let Some(machine) = state.machine.as_mut() else { return Ok(()) };
        machine.receive(bytes, fds);
        while let Some((id, told)) = state.next_answer()? {
            if let Some(at) = state.waiting.iter().position(|waiting| waiting.id == id)
                && let Some(waiting) = state.waiting.remove(at)
            {
                waiting.tell.tell(told);
            }
        }
        state.wake();
        Ok(())
    }

    /// Gives up what is overdue; when the next one will be.
    pub(crate) fn expire(&self) -> Option<Instant> {
        let mut state = self.lock();
        let now = Instant::now();
        while state.waiting.front().is_some_and(|waiting| waiting.until <= now) {
            let Some(late) = state.waiting.pop_front() else { break };
            if let Some(machine) = &mut state.machine {
                machine.forget(late.id);
            }
            late.tell.tell(Err(ChannelError::Late));
        }
        state.waiting.front().map(|waiting| waiting.until)
    }
}

impl State {
    fn wake(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    fn fail_all(&mut self, error: &ChannelError) {
        for waiting in self.waiting.drain(..) {
            waiting.tell.tell(Err(error.clone()));
        }
    }

    fn ask(&mut self, request: ChannelRequest<OwnedFd>, purpose: Purpose, tell: Tell) {
        let Some(machine) = &mut self.machine else {
            tell.tell(Err(ChannelError::Closed));
            return;
        };
        if machine.owed() >= purpose.most() {
            tell.tell(Err(ChannelError::Busy));
            return;
        }
        let sent = match machine.send(request) {
            Ok(sent) => sent,
            Err(refusal) => {
                tell.tell(Err(refusal.into()));
                return;
            }
        };
        if sent.answer {
            let until = Instant::now() + DEADLINE;
            let (config, miss) = (purpose == Purpose::Config, purpose.miss());
            self.waiting.push_back(Waiting { id: sent.id, until, config, miss, tell });
        } else {
            // No answer was negotiated: sent is all that can be known.
            tell.tell(Ok(None));
        }
        self.wake();
    }

    /// Sends the notice of a changed configuration, if none is under way.
    fn notice(&mut self) {
        let under_way = self.waiting.iter().any(|waiting| waiting.config);
        if !self.config_changed || self.suspended || under_way || self.machine.is_none() {
            return;
        }
        self.config_changed = false;
        let (tell, _) = oneshot::channel();
        self.ask(ChannelRequest::ConfigChange, Purpose::Config, Tell::Asker(tell));
    }

    fn next_answer(&mut self) -> Result<Option<(RequestId, Told)>, Violation> {
        let Some(machine) = &mut self.machine else { return Ok(None) };
        let answer = machine.poll()?;
        Ok(answer.map(|ChannelAnswer { id, request, result }| {
            let told = result.map_err(ChannelError::Failed);
            // Success is a descriptor here: a front-end may have lost it on its way (QEMU does).
            let lost = request == BackendCode::SharedObjectLookup && matches!(told, Ok(None));
            (id, if lost { Err(ChannelError::NoObject) } else { told })
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outboard_protocol::payload::Uuid;

    /// A look-up, answered by a frame with this number and these descriptors.
    fn look_up(number: u64, fds: Vec<OwnedFd>) -> Told {
        let channel = BackendChannel::new();
        channel.open(ProtocolFeatures::SHARED_OBJECT | ProtocolFeatures::REPLY_ACK, 0);
        let answer = channel.ask(ChannelRequest::SharedObjectLookup(Uuid { bytes: [7; 16] }));
        let mut context = Context::from_waker(Waker::noop());
        assert!(channel.transmit(&context).is_some(), "the request leaves");
        let code = BackendCode::SharedObjectLookup.id();
        let frame = Frame::reply(code, &number.to_ne_bytes(), fds);
        channel.receive(&frame.bytes, frame.fds).expect("a sound answer");
        let mut answer = std::pin::pin!(answer);
        match answer.as_mut().poll(&mut context) {
            Poll::Ready(told) => told,
            Poll::Pending => panic!("the answer has come"),
        }
    }

    #[test]
    fn an_object_that_was_found_and_lost_on_its_way_is_not_found() {
        let object = std::fs::File::open("/dev/null").expect("a file").into();
        assert!(matches!(look_up(0, vec![object]), Ok(Some(_))));
        assert_eq!(look_up(0, Vec::new()).map(drop), Err(ChannelError::NoObject));
        assert_eq!(look_up(2, Vec::new()).map(drop), Err(ChannelError::Failed(2)));
    }
}
