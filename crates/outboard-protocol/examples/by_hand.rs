//! Drives the sans-io [`Backend`] by hand: no socket, no thread, no memory. Descriptors are words
//! here; a program uses `OwnedFd`. Run it with `cargo run -p outboard-protocol --example by_hand`.

use std::error::Error;

use outboard_protocol::{
    Answer, Backend, Effect, Frontend, MemRegion, Notifier, Offer, ProtocolFeatures, Request,
    RingEvent, Step, VringAddr, virtio,
};

type Fd = &'static str;
type Done = Result<(), Box<dyn Error>>;

/// Runs one device's life: negotiate, start a ring, serve, stop.
pub(crate) fn main() -> Done {
    let mut back = Backend::new(Offer {
        features: virtio::VERSION_1 | virtio::RING_EVENT_IDX,
        protocol_features: ProtocolFeatures::REPLY_ACK | ProtocolFeatures::CONFIG,
        queues: 1,
        max_queue_size: 256,
        mem_slots: 0,
        gpu_socket: false,
    });
    let mut front = Frontend::new();
    let region = MemRegion { guest_addr: 0, size: 1 << 20, user_addr: 0x7000_0000, offset: 0 };
    let ring = VringAddr {
        desc: 0x7000_0000,
        avail: 0x7000_1000,
        used: 0x7000_2000,
        ..VringAddr::default()
    };
    let features = virtio::VERSION_1 | virtio::PROTOCOL_FEATURES;
    let requests = [
        Request::GetFeatures,
        Request::GetProtocolFeatures,
        Request::SetProtocolFeatures(ProtocolFeatures::REPLY_ACK | ProtocolFeatures::CONFIG),
        Request::SetFeatures(features),
        Request::GetConfig { offset: 0, size: 8 },
        Request::SetVringKick { index: 0, kick: Notifier::Fd("kick") }, // early: remembered
        Request::SetVringNum { index: 0, size: 256 },
        Request::SetVringAddr(ring),
        Request::SetVringBase { index: 0, base: 7 },
        Request::SetVringEnable { index: 0, enabled: true },
        Request::SetMemTable(vec![(region, "memory")]), // now it can start
        Request::GetVringBase { index: 0 },
    ];
    for request in requests {
        println!("> {request:?}");
        let _answered = front.send(request)?;
        turn(&mut front, &mut back)?;
    }
    // What is no message at all ends the connection, and says why.
    back.receive(&[0; 12], Vec::new());
    let reason = back.poll().err().ok_or("a message of version 0 was taken")?;
    println!("x {reason}");
    Ok(())
}

/// Carries bytes there and back, and out what they ask for.
fn turn(front: &mut Frontend<Fd>, back: &mut Backend<Fd>) -> Done {
    while let Some(frame) = front.transmit() {
        back.receive(&frame.bytes, frame.fds);
    }
    while let Some(step) = back.poll()? {
        match step {
            Step::Violation(broken) => println!("x {broken}"),
            Step::Effect(effect) => carry_out(back, effect),
        }
    }
    while let Some(frame) = back.transmit() {
        front.receive(&frame.bytes, frame.fds);
    }
    while let Some(answer) = front.poll()? {
        println!("< {answer:?}");
        if let Answer::VringBase { base, .. } = answer {
            assert_eq!(base, 10, "seven, and the three that were served");
        }
    }
    Ok(())
}

/// The host: each effect has a ticket, and each ticket is answered once.
fn carry_out(back: &mut Backend<Fd>, effect: Effect<Fd>) {
    println!("! {}", effect.name());
    match effect {
        Effect::ReadConfig { size, ticket, .. } => {
            back.answer(ticket, Ok((0..).take(usize::try_from(size).unwrap_or(0)).collect()));
        }
        Effect::GetVringBase { index, ticket, .. } => {
            let base = back.ring(index).map_or(0, |ring| ring.base);
            back.answer(ticket, Ok(base + 3));
        }
        Effect::SetFeatures { ticket, .. }
        | Effect::SetProtocolFeatures { ticket, .. }
        | Effect::RingConfigured { ticket, .. }
        | Effect::SetVringKick { ticket, .. }
        | Effect::SetVringEnable { ticket, .. }
        | Effect::SetMemTable { ticket, .. } => back.answer(ticket, Ok(())),
        // Dropping an effect refuses its request.
        _ => {}
    }
    let ready = |back: &Backend<Fd>| back.features_set() && !back.regions().is_empty();
    let waits = back.ring(0).is_some_and(|ring| ring.kicked && ring.is_configured());
    if waits && ready(back) && back.ring_event(0, RingEvent::Started) {
        println!("  ring 0 runs");
    }
}
