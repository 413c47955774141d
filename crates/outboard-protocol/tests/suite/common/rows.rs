//! Requests made from the rows of the table, and what their refusal looks like.

use outboard_protocol::table::{ErrorForm, MessageInfo, ReplyKind, front_end_table};
use outboard_protocol::{Backend, Frame, FrontendCode, MemRegion, ProtocolFeatures, Ring};
use zerocopy::FromBytes;

use super::host::{Seen, exchange};
use super::{FEATURES, Fd, all_protocol, full_offer, negotiated, postcopy_protocol, valid};

/// What a refused request must not change.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct State {
    pub(crate) acked: u64,
    pub(crate) protocol: ProtocolFeatures,
    pub(crate) features_set: bool,
    pub(crate) rings: Vec<Ring>,
    pub(crate) regions: Vec<MemRegion>,
}

pub(crate) fn state(backend: &Backend<Fd>) -> State {
    State {
        acked: backend.acked_features(),
        protocol: backend.acked_protocol_features(),
        features_set: backend.features_set(),
        rings: backend.rings().to_vec(),
        regions: backend.regions().to_vec(),
    }
}

/// One combination of what is negotiated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) features: u64,
    pub(crate) reply_ack: bool,
}

pub(crate) const EVERYTHING: Setting = Setting { features: FEATURES, reply_ack: true };

/// A back-end in which a row's message is legal as far as negotiation and memory go; `None` if the
/// setting cannot be combined with the message.
pub(crate) fn ready(row: &MessageInfo, setting: Setting) -> Option<Backend<Fd>> {
    let mut protocol =
        if row.needs.without.is_empty() { all_protocol() } else { postcopy_protocol() };
    if !setting.reply_ack {
        protocol -= ProtocolFeatures::REPLY_ACK | ProtocolFeatures::INBAND_NOTIFICATIONS;
    }
    let mut backend = negotiated(full_offer(), setting.features, protocol);
    if !row.needs.is_open(backend.negotiated()) {
        return None;
    }
    let before: &[FrontendCode] = match row.name {
        "REM_MEM_REG" => &[FrontendCode::AddMemReg],
        "POSTCOPY_LISTEN" | "POSTCOPY_END" => &[FrontendCode::PostcopyAdvise],
        _ => &[],
    };
    for code in before {
        let row = front_end_table().iter().find(|row| row.id == code.id()).expect("a row");
        let seen = send(&mut backend, row, false);
        assert!(seen.violations.is_empty(), "{seen:?}");
    }
    Some(backend)
}

pub(crate) fn request(
    row: &MessageInfo,
    need_reply: bool,
    payload: &[u8],
    fds: usize,
) -> Frame<Fd> {
    Frame::request(row.id, need_reply, payload, (100..).take(fds).collect())
}

pub(crate) fn send(backend: &mut Backend<Fd>, row: &MessageInfo, need_reply: bool) -> Seen {
    let (payload, fds) = valid::parts(row);
    exchange(backend, &request(row, need_reply, &payload, fds))
}

/// The payloads of the replies.
pub(crate) fn replies(seen: &Seen, row: &MessageInfo) -> Vec<Vec<u8>> {
    let payload = |frame: &Frame<Fd>| {
        let head: Vec<u8> = [row.id, 5, u32::try_from(frame.bytes.len() - 12).expect("small")]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        assert_eq!(frame.bytes[..12], head, "{}: id, flags 5 and an honest size", row.name);
        frame.bytes[12..].to_vec()
    };
    seen.replies.iter().map(payload).collect()
}

/// Asserts that a request was turned down as its row documents, and that nothing else happened.
pub(crate) fn assert_turned_down(
    backend: &mut Backend<Fd>,
    row: &MessageInfo,
    before: &State,
    asked: bool,
    seen: &Seen,
) {
    let name = row.name;
    assert!(seen.effects.is_empty(), "{name}: {seen:?}");
    assert_eq!(&state(backend), before, "{name} was refused and changed something");
    let replies = replies(seen, row);
    let nak = vec![1u64.to_ne_bytes().to_vec()];
    match row.error {
        ErrorForm::Nak if asked => assert_eq!(replies, nak, "{name}"),
        ErrorForm::Nak => assert!(replies.is_empty(), "{name}: {replies:?}"),
        ErrorForm::Empty => assert_eq!(replies, [Vec::<u8>::new()], "{name}"),
        ErrorForm::Status(word) => assert_eq!(replies, [word.to_ne_bytes().to_vec()], "{name}"),
        ErrorForm::NoInflight => assert_eq!(replies, [vec![0; 24]], "{name}"),
        ErrorForm::NoSession => {
            let id = i64::read_from_bytes(&replies[0][1064..]).expect("8 bytes");
            assert!(id < 0 && replies.len() == 1, "{name}");
        }
        ErrorForm::None if asked => assert_eq!(replies, [vec![0xff; 8]], "{name}"),
        ErrorForm::None => {
            let fatal = seen.fatal.as_ref().unwrap_or_else(|| panic!("{name}: no close: {seen:?}"));
            assert!(fatal.is_fatal() && replies.is_empty(), "{name}: {seen:?}");
            assert_eq!(backend.poll().expect_err("closed for good"), *fatal);
            return;
        }
    }
    assert_eq!(seen.fatal, None, "{name}: in step, so the connection lives");
    assert_eq!(seen.violations.len(), 1, "{name}: logged once");
    assert_alive(backend);
}

pub(crate) fn assert_alive(backend: &mut Backend<Fd>) {
    let seen = exchange(backend, &valid::frame(FrontendCode::GetFeatures, false, &[], 0));
    assert_eq!(seen.replies.len(), 1, "GET_FEATURES is answered: {seen:?}");
    assert!(backend.at_message_boundary());
}

/// Every setting of REPLY_ACK and need_reply, with a fresh back-end for each.
pub(crate) fn in_every_voice(
    row: &MessageInfo,
    mut check: impl FnMut(&mut Backend<Fd>, bool, bool),
) -> usize {
    let mut checked = 0;
    for (reply_ack, need_reply) in [(true, true), (true, false), (false, true), (false, false)] {
        let Some(mut backend) = ready(row, Setting { features: FEATURES, reply_ack }) else {
            assert_eq!(row.name, "VRING_KICK", "only in-band kicks need REPLY_ACK");
            continue;
        };
        let asked = need_reply && (reply_ack || row.reply == ReplyKind::AckWheneverAsked);
        check(&mut backend, need_reply, asked);
        checked += 1;
    }
    checked
}

/// The row with this name.
pub(crate) fn named(name: &str) -> &'static MessageInfo {
    let found = front_end_table().iter().find(|row| row.name == name);
    found.unwrap_or_else(|| panic!("no row {name}"))
}
