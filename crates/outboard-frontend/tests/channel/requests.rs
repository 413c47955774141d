//! Every request that is no mapping: what the caller hears of it, and what the back-end is answered.

use std::os::fd::OwnedFd;

use outboard_frontend::transcript::Transcript;
use outboard_frontend::{Channel, ChannelEvent, Error, SharedObjects};
use outboard_protocol::payload::{Iotlb, Uuid, VringArea, VringFd, VringState};
use outboard_protocol::{ChannelEffect, ChannelRequest as Request, ChannelStep};

use crate::peer::{BackEnd, MOMENT, PATIENCE, channel, file, map, page, setup};

const UUID: Uuid = Uuid { bytes: [0x11; 16] };

/// The event of a request that succeeds.
fn done(channel: &mut Channel, back: &mut BackEnd, request: Request<OwnedFd>) -> ChannelEvent {
    let (event, answer) = back.round(channel, request);
    assert!(answer.is_ok(), "{event:?}");
    event
}

#[test]
fn config_changes_ring_signals_and_iotlb_messages_are_events() {
    let (mut channel, mut back) = channel(setup());
    let ring = |index| VringState { index, num: 0 };
    let miss = Iotlb { iova: 0x7000, perm: 2, kind: 1, ..Iotlb::default() };
    let mut event = |request| done(&mut channel, &mut back, request);
    assert!(matches!(event(Request::ConfigChange), ChannelEvent::ConfigChanged));
    let call = event(Request::VringCall(ring(1)));
    assert!(matches!(call, ChannelEvent::VringCall { queue: 1 }));
    let err = event(Request::VringErr(ring(0)));
    assert!(matches!(err, ChannelEvent::VringErr { queue: 0 }));
    let missed = event(Request::Iotlb(miss));
    assert!(matches!(missed, ChannelEvent::IotlbMiss { iova: 0x7000, perm: 2 }));
    let denied = event(Request::Iotlb(Iotlb { kind: 4, size: 16, ..miss }));
    let is = ChannelEvent::IotlbAccessFailure { iova: 0x7000, size: 16, perm: 2 };
    assert_eq!(format!("{denied:?}"), format!("{is:?}"));
    for index in [2, 256, 65536, u32::MAX] {
        for request in [Request::VringCall(ring(index)), Request::VringErr(ring(index))] {
            let reason = back.refused(&mut channel, request);
            assert!(reason.contains(&format!("ring {index:#x} of 2")), "{reason}");
        }
    }
}

#[test]
fn a_host_notifier_is_one_page_of_a_ring_that_exists() {
    let (mut channel, mut back) = channel(setup());
    let area = VringArea { vring: VringFd::new(1, true).0, size: page(), offset: page() };
    let event = done(&mut channel, &mut back, Request::HostNotifier(area, Some(file(2))));
    let ChannelEvent::HostNotifier { queue: 1, page: Some(window) } = event else {
        panic!("{event:?}")
    };
    let mut byte = [0];
    window.read(0, &mut byte).expect("mapped");
    assert_eq!(byte, [1], "the second page of the file");
    let end = VringArea { vring: VringFd::new(1, false).0, size: 0, offset: 0 };
    let event = done(&mut channel, &mut back, Request::HostNotifier(end, None));
    assert!(matches!(event, ChannelEvent::HostNotifier { queue: 1, page: None }));
    let wrong = [
        VringArea { size: 2 * page(), offset: 0, ..area },
        VringArea { size: 1, ..area },
        VringArea { offset: 1, ..area },
        VringArea { offset: 2 * page(), ..area },
        VringArea { vring: VringFd::new(2, true).0, ..area },
        VringArea { vring: 1 << 9, ..area },
        VringArea { vring: 1 << 63, ..area },
    ];
    for area in wrong {
        back.refused(&mut channel, Request::HostNotifier(area, Some(file(2))));
    }
}

#[test]
fn objects_are_exported_once_and_withdrawn_by_their_owner() {
    let (mut channel, mut back) = channel(setup());
    let event = done(&mut channel, &mut back, Request::SharedObjectAdd(UUID));
    assert!(matches!(event, ChannelEvent::SharedObjectAdded(UUID)));
    back.refused(&mut channel, Request::SharedObjectAdd(UUID));
    back.refused(&mut channel, Request::SharedObjectRemove(Uuid { bytes: [2; 16] }));
    let event = done(&mut channel, &mut back, Request::SharedObjectRemove(UUID));
    assert!(matches!(event, ChannelEvent::SharedObjectRemoved(UUID)));
    back.refused(&mut channel, Request::SharedObjectRemove(UUID));
}

#[test]
fn a_flood_of_exported_objects_is_bounded() {
    let (mut channel, mut back) = channel(setup());
    let name = |n: u128| Uuid { bytes: n.to_ne_bytes() };
    for n in 0..1024 {
        done(&mut channel, &mut back, Request::SharedObjectAdd(name(n)));
    }
    back.refused(&mut channel, Request::SharedObjectAdd(name(1024)));
    done(&mut channel, &mut back, Request::SharedObjectRemove(name(0)));
    done(&mut channel, &mut back, Request::SharedObjectAdd(name(1024)));
}

#[test]
fn objects_are_found_by_every_device_that_shares_the_table() {
    let objects = SharedObjects::new();
    let mut with_table = setup();
    with_table.objects = objects.clone();
    let (mut channel, mut back) = channel(with_table);
    let look_up = |channel: &mut Channel, back: &mut BackEnd| {
        let (event, answer) = back.round(channel, Request::SharedObjectLookup(UUID));
        let ChannelEvent::SharedObjectLookup { uuid: UUID, found } = event else {
            panic!("{event:?}")
        };
        assert_eq!(answer.is_ok(), found);
        answer.ok().flatten()
    };
    assert!(look_up(&mut channel, &mut back).is_none());
    objects.insert(UUID, file(1));
    let mut found = std::fs::File::from(look_up(&mut channel, &mut back).expect("there now"));
    let size = std::io::Seek::seek(&mut found, std::io::SeekFrom::End(0)).expect("a file");
    assert_eq!(size, page());
    assert!(objects.remove(&UUID).is_some());
    assert!(look_up(&mut channel, &mut back).is_none());
}

#[test]
fn a_caller_may_answer_by_itself_late_and_out_of_step() {
    let (mut channel, mut back) = channel(setup());
    back.ask(Request::ConfigChange);
    back.ask(Request::SharedObjectAdd(UUID));
    let mut tickets = Vec::new();
    for _ in 0..2 {
        let step = channel.next_step(PATIENCE).expect("in step").expect("a request");
        let ChannelStep::Effect(ChannelEffect::Request { ticket, .. }) = step else {
            panic!("{step:?}")
        };
        tickets.push(ticket);
    }
    assert!(channel.next_step(MOMENT).expect("in step").is_none());
    channel.answer(tickets.pop().expect("two"), Ok(())).expect("sent");
    let second = back.answer();
    assert!(second.result.is_ok());
    drop(tickets);
    assert!(channel.next_step(MOMENT).expect("in step").is_none());
    let first = back.answer();
    assert!(first.id < second.id && first.result.is_err(), "a dropped ticket refuses");
}

#[test]
fn requests_in_single_bytes_are_put_together() {
    let (mut channel, mut back) = channel(setup());
    let frame = Request::<OwnedFd>::SharedObjectAdd(UUID).encode(true);
    let _ = back.machine.send(Request::SharedObjectAdd(UUID)).expect("legal");
    back.machine.transmit().expect("sent by hand");
    for (at, byte) in frame.bytes.iter().enumerate() {
        back.socket.send(&[*byte], &[], crate::peer::soon()).expect("room");
        if at + 1 < frame.bytes.len() {
            let none = channel.next_event(std::time::Duration::ZERO).expect("in step");
            assert!(none.is_none(), "{at}");
        }
    }
    let event = channel.next_event(PATIENCE).expect("in step").expect("an event");
    assert!(matches!(event, ChannelEvent::SharedObjectAdded(UUID)));
    assert!(back.answer().result.is_ok());
}

#[test]
fn what_goes_over_the_channel_is_written_down() {
    let (mut channel, mut back) = channel(setup());
    let transcript = Transcript::new();
    channel.record(transcript.clone());
    done(&mut channel, &mut back, Request::ConfigChange);
    let unmap = Request::ShmemUnmap(map(0, 1));
    back.refused(&mut channel, unmap);
    let size = page();
    let expected = format!(
        "<< CONFIG_CHANGE_MSG need_reply\n>> CONFIG_CHANGE_MSG ok\n\
         << SHMEM_UNMAP region 1 at 0x0 size {size:#x} file 0x0 flags 1 need_reply\n\
         >> SHMEM_UNMAP refused 0x1\n"
    );
    assert_eq!(transcript.text(), expected);
}

#[test]
fn a_thread_serves_the_channel_while_the_caller_does_something_else() {
    let (channel, mut back) = channel(setup());
    let mut thread = channel.spawn().expect("a thread");
    back.ask(Request::ShmemMap(map(0, 2), file(2)));
    assert!(back.answer().result.is_ok(), "nobody has asked for the event");
    let mut byte = [0];
    thread.regions().read(1, page(), &mut byte).expect("mapped");
    assert_eq!(byte, [1]);
    thread.objects().insert(UUID, file(1));
    back.ask(Request::SharedObjectLookup(UUID));
    assert!(back.answer().result.expect("found").is_some());
    let event = thread.next_event(PATIENCE).expect("alive").expect("an event");
    assert!(matches!(event, ChannelEvent::Map { region: 1, .. }));
    let event = thread.next_event(PATIENCE).expect("alive").expect("an event");
    assert!(matches!(event, ChannelEvent::SharedObjectLookup { found: true, .. }));
    assert!(thread.next_event(MOMENT).expect("alive").is_none());
    drop(back);
    let end = thread.next_event(PATIENCE);
    assert!(matches!(end, Err(Error::ChannelClosed { inside: false })), "{end:?}");
    assert!(matches!(thread.next_event(MOMENT), Err(Error::GivenUp)));
}

#[test]
fn a_thread_ends_whatever_it_waits_for() {
    // For bytes.
    let (quiet, _back) = channel(setup());
    drop(quiet.spawn().expect("a thread"));
    // For a back-end that reads no answers.
    let (flooded, mut back) = channel(setup());
    let thread = flooded.spawn().expect("a thread");
    for _ in 0..300 {
        back.ask(Request::ConfigChange);
    }
    drop(thread);
}

#[test]
fn a_caller_that_takes_no_events_does_not_stop_the_channel() {
    const MORE: usize = 1000;
    let (channel, mut back) = channel(setup());
    let mut thread = channel.spawn().expect("a thread");
    for _ in 0..MORE {
        // An event like one that waits already says nothing new.
        back.ask(Request::ConfigChange);
        assert!(back.answer().result.is_ok());
        back.ask(Request::ShmemMap(map(0, 1), file(1)));
        assert!(back.answer().result.is_ok(), "nobody takes events");
        back.ask(Request::ShmemUnmap(map(0, 1)));
        assert!(back.answer().result.is_ok());
    }
    let mut taken = 0;
    let mut last = None;
    drop(back);
    while let Ok(Some(event)) = thread.next_event(PATIENCE) {
        taken += 1;
        last = Some(event);
    }
    assert!(taken > 0 && taken < MORE, "memory does not grow: {taken}");
    assert!(matches!(last, Some(ChannelEvent::Unmap { .. })), "the newest are kept: {last:?}");
    assert!(thread.missed() > 0, "and what was lost is told");
}
