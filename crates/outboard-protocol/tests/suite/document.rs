//! The table as a document, and the example as a test. `BLESS=1` writes the document anew.

use std::path::Path;

use outboard_protocol::table::{
    ErrorForm, FdRule, MessageInfo, ReplyKind, RingRule, Sizes, back_end_table, front_end_table,
};
use outboard_protocol::virtio;

#[path = "../../examples/by_hand.rs"]
mod by_hand;

#[test]
fn the_example_that_drives_the_machine_by_hand_runs_to_its_end() {
    by_hand::main().expect("the example succeeds");
}

#[test]
fn the_document_of_the_messages_is_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("MESSAGES.md");
    let now = document();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &now).expect("a writable document");
    }
    let recorded = std::fs::read_to_string(&path).expect("the document is there");
    assert!(recorded == now, "MESSAGES.md is out of date: BLESS=1 writes it anew");
}

fn document() -> String {
    let mut text = String::from(
        "# Messages\n\nGenerated from the message table of `outboard-protocol`; do not edit. \
         \"Live\" is a ring whose queue is with a worker: running, parked or broken.\n",
    );
    let sides = [
        ("From the front-end, on the main socket", front_end_table()),
        ("From the back-end, on the socket of SET_BACKEND_REQ_FD", back_end_table()),
    ];
    for (title, rows) in sides {
        text.push_str(&format!(
            "\n## {title}\n\n| id | name | payload, bytes | descriptors | answered with | refused \
             with | needs | rings |\n|---|---|---|---|---|---|---|---|\n"
        ));
        rows.iter().for_each(|row| text.push_str(&line(row)));
    }
    text
}

fn line(row: &MessageInfo) -> String {
    let sizes = match row.payload.sizes() {
        Sizes::OneOf(sizes) => {
            sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
        }
        Sizes::Steps(low, high, 1) => format!("{low}–{high}"),
        Sizes::Steps(low, high, step) => format!("{low}–{high} in steps of {step}"),
    };
    let payload = match sizes.as_str() {
        "0" => "–".to_owned(),
        sizes => format!("{:?}, {sizes}", row.payload),
    };
    let fds = match row.fds {
        FdRule::None => "–",
        FdRule::One => "1",
        FdRule::OneIgnored => "0, or 1 that is closed",
        FdRule::VringFd => "1, or 0 with bit 8",
        FdRule::PerRegion => "1 per region",
    };
    let error = match row.error {
        ErrorForm::Nak => "acknowledgement 1".to_owned(),
        ErrorForm::Empty => "empty reply".to_owned(),
        ErrorForm::Status(word) => format!("{word:#x}"),
        ErrorForm::NoInflight => "zeros".to_owned(),
        ErrorForm::NoSession => "session −1".to_owned(),
        ErrorForm::None => "nothing: closes".to_owned(),
    };
    let rings = match row.rings {
        RingRule::Any => "any",
        RingRule::RingStopped => "that ring not live",
        RingRule::SameWhileLive => "live: only the log flag and address may change",
        RingRule::AllStopped => "none live",
        RingRule::NoMemory => "after ADVISE, no region mapped",
        RingRule::LogToggleWhileLive => "live: only LOG_ALL and bit 30 may change",
    };
    let MessageInfo { id, name, .. } = row;
    let (reply, needs) = (reply(row.reply), needs(row));
    format!("| {id} | {name} | {payload} | {fds} | {reply} | {error} | {needs} | {rings} |\n")
}

const fn reply(kind: ReplyKind) -> &'static str {
    match kind {
        ReplyKind::Ack => "acknowledgement",
        ReplyKind::AckWheneverAsked => "acknowledgement, even without REPLY_ACK",
        ReplyKind::U64 => "u64",
        ReplyKind::Status => "u64 0",
        ReplyKind::StatusAndFd => "u64 0 and a descriptor",
        ReplyKind::VringState => "ring and base",
        ReplyKind::Log => "the log again",
        ReplyKind::Config => "the same with bytes",
        ReplyKind::CryptoSession => "the same with an id",
        ReplyKind::Fd => "a descriptor",
        ReplyKind::MaybeFd => "a descriptor or none",
        ReplyKind::Inflight => "Inflight and a descriptor",
        ReplyKind::DeviceState => "u64 0x100, or 0 and a descriptor",
        ReplyKind::ShmemConfig => "ShmemConfig",
        ReplyKind::MemTable => "MemTable",
    }
}

fn needs(row: &MessageInfo) -> String {
    let mut needs: Vec<_> =
        row.needs.protocol.iter_names().map(|(name, _)| name.to_owned()).collect();
    needs.extend(row.needs.without.iter_names().map(|(name, _)| format!("not {name}")));
    let bits = [
        (virtio::PROTOCOL_FEATURES, "bit 30"),
        (virtio::ACCESS_PLATFORM, "ACCESS_PLATFORM"),
        (virtio::LOG_ALL, "LOG_ALL"),
        (virtio::NET_MTU, "VIRTIO_NET_F_MTU"),
    ];
    for (bit, name) in bits {
        if row.needs.offered & bit != 0 {
            needs.push(format!("{name} offered"));
        }
        if row.needs.acked & bit != 0 {
            needs.push(format!("{name} acknowledged"));
        }
    }
    if row.needs.gpu_socket {
        needs.push("a display".to_owned());
    }
    if needs.is_empty() { "–".to_owned() } else { needs.join(", ") }
}
