//! A model of the host: answers every kind of effect, and starts rings as a handler would.

use outboard_protocol::payload::{Inflight, ShmemConfig};
use outboard_protocol::ticket::{Ack, Reply};
use outboard_protocol::{
    Backend, Effect, Frame, Refusal, RingEvent, RunState, Step, Ticket, Violation,
};

use super::Fd;

/// How the next effect is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Succeed,
    /// The ring stands here.
    Base(u32),
    /// These bytes of configuration space.
    Bytes(Vec<u8>),
    /// With a descriptor of ours where the reply may carry one.
    WithFd(Fd),
    Refuse,
    Drop,
}

/// Everything that came out of a machine since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) effects: Vec<String>,
    pub(crate) violations: Vec<Violation>,
    pub(crate) replies: Vec<Frame<Fd>>,
    pub(crate) fatal: Option<Violation>,
}

/// Feeds one frame and settles everything that follows with success.
pub(crate) fn exchange(backend: &mut Backend<Fd>, frame: &Frame<Fd>) -> Seen {
    backend.receive(&frame.bytes, frame.fds.clone());
    drain(backend, &Verdict::Succeed)
}

/// Polls to the end, answering each effect in the same way.
pub(crate) fn drain(backend: &mut Backend<Fd>, verdict: &Verdict) -> Seen {
    let mut seen = Seen::default();
    loop {
        match backend.poll() {
            Ok(Some(Step::Effect(effect))) => {
                seen.effects.push(describe(&effect));
                settle(backend, effect, verdict);
            }
            Ok(Some(Step::Violation(violation))) => seen.violations.push(violation),
            Ok(None) => break,
            Err(fatal) => {
                seen.fatal = Some(fatal);
                break;
            }
        }
    }
    seen.replies.extend(std::iter::from_fn(|| backend.transmit()));
    seen
}

/// An effect in one line, numbers in hexadecimal, without its ticket.
pub(crate) fn describe(effect: &Effect<Fd>) -> String {
    let words: Vec<_> = format!("{effect:#x?}").split_whitespace().map(str::to_owned).collect();
    words
        .join(" ")
        .replace(" ticket: Ticket,", "")
        .replace(", }", " }")
        .replace(", ]", "]")
        .replace(", )", ")")
        .replace("( ", "(")
        .replace("[ ", "[")
        .replace(" { }", "")
}

/// Carries out an effect: nothing happens in this host, except that rings start and stop.
pub(crate) fn settle(backend: &mut Backend<Fd>, effect: Effect<Fd>, verdict: &Verdict) {
    match effect {
        Effect::GetVringBase { index, ticket, .. } => {
            let set = backend.ring(index).expect("checked").base;
            let base = if let Verdict::Base(base) = verdict { *base } else { set };
            answer(backend, ticket, verdict, base);
        }
        Effect::ReadConfig { offset, size, ticket } => {
            let bytes = match verdict {
                Verdict::Bytes(bytes) => bytes.clone(),
                _ => (offset..offset + size).map(|at| u8::try_from(at).expect("256")).collect(),
            };
            answer(backend, ticket, verdict, bytes);
        }
        Effect::GetInflightFd { num_queues, queue_size, ticket } => {
            let size = u64::from(num_queues) * Inflight::area_size(queue_size, false);
            let area = Inflight { mmap_size: size, num_queues, queue_size, ..Inflight::default() };
            let area = fd(verdict).map(|fd| (area, fd));
            answer(backend, ticket, verdict, area);
        }
        Effect::SetDeviceStateFd { ticket, .. } => answer(backend, ticket, verdict, fd(verdict)),
        Effect::GetSharedObject { ticket, .. } => answer(backend, ticket, verdict, fd(verdict)),
        Effect::PostcopyAdvise { ticket } => answer_fd(backend, ticket, verdict),
        Effect::PostcopyMap { regions, ticket } => {
            let bases = (1..=regions.len() as u64).map(|at| at << 32).collect();
            answer(backend, ticket, verdict, bases);
        }
        Effect::CreateCryptoSession { ticket, .. } => answer(backend, ticket, verdict, 7),
        Effect::GetStatus { ticket } => answer(backend, ticket, verdict, 0x0f),
        Effect::GetShmemConfig { ticket } => {
            let mut sizes = ShmemConfig { count: 1, ..ShmemConfig::default() };
            sizes.sizes[3] = 0x1000;
            answer(backend, ticket, verdict, Box::new(sizes));
        }
        plain => {
            let ticket = ack_ticket(plain).expect("every other effect is acknowledged");
            answer(backend, ticket, verdict, ());
        }
    }
    start_what_can_run(backend);
}

fn fd(verdict: &Verdict) -> Option<Fd> {
    if let Verdict::WithFd(fd) = verdict { Some(*fd) } else { None }
}

fn answer<R, T>(backend: &mut Backend<Fd>, ticket: Ticket<R>, verdict: &Verdict, value: T)
where
    R: Reply<Fd, Value = Result<T, Refusal>>,
{
    match verdict {
        Verdict::Drop => drop(ticket),
        Verdict::Refuse => backend.answer(ticket, Err(Refusal::because("the host says no"))),
        _ => backend.answer(ticket, Ok(value)),
    }
}

fn answer_fd<R>(backend: &mut Backend<Fd>, ticket: Ticket<R>, verdict: &Verdict)
where
    R: Reply<Fd, Value = Result<Fd, Refusal>>,
{
    answer(backend, ticket, verdict, fd(verdict).unwrap_or(99));
}

/// The ticket of an effect that is only acknowledged.
pub(crate) fn ack_ticket(effect: Effect<Fd>) -> Option<Ticket<Ack>> {
    Some(match effect {
        Effect::SetFeatures { ticket, .. }
        | Effect::SetProtocolFeatures { ticket, .. }
        | Effect::ResetOwner { ticket }
        | Effect::ResetDevice { ticket }
        | Effect::SetMemTable { ticket, .. }
        | Effect::AddMemRegion { ticket, .. }
        | Effect::RemMemRegion { ticket, .. }
        | Effect::RingConfigured { ticket, .. }
        | Effect::SetVringKick { ticket, .. }
        | Effect::SetVringCall { ticket, .. }
        | Effect::SetVringErr { ticket, .. }
        | Effect::SetVringEnable { ticket, .. }
        | Effect::WriteConfig { ticket, .. }
        | Effect::SetBackendReqFd { ticket, .. }
        | Effect::SetLogBase { ticket, .. }
        | Effect::SetLogFd { ticket, .. }
        | Effect::SetInflightFd { ticket, .. }
        | Effect::CheckDeviceState { ticket }
        | Effect::Iotlb { ticket, .. }
        | Effect::SetStatus { ticket, .. }
        | Effect::SendRarp { ticket, .. }
        | Effect::NetSetMtu { ticket, .. }
        | Effect::SetVringEndian { ticket, .. }
        | Effect::CloseCryptoSession { ticket, .. }
        | Effect::PostcopyListen { ticket }
        | Effect::PostcopyRegister { ticket }
        | Effect::PostcopyEnd { ticket }
        | Effect::GpuSetSocket { ticket, .. }
        | Effect::VringKick { ticket, .. } => ticket,
        _ => return None,
    })
}

/// Starts the rings that wait and have all they need.
fn start_what_can_run(backend: &mut Backend<Fd>) {
    if !backend.features_set() || backend.regions().is_empty() {
        return;
    }
    for index in 0..backend.offer().queues {
        let ring = backend.ring(index).expect("counted");
        if ring.run == RunState::Waiting && ring.is_configured() {
            assert!(backend.ring_event(index, RingEvent::Started));
        }
    }
}
