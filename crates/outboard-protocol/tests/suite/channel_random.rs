//! The back-end channel under random schedules and random bytes.

use std::collections::VecDeque;

use outboard_protocol::channel::ChannelRequest as Request;
use outboard_protocol::table::{FdRule, back_end_table};
use outboard_protocol::{
    BackendCode, ChannelEffect, ChannelFrontend, ChannelStep, Frame, RequestId,
};

use crate::channel::one_of_each;
use crate::common::channel_pair::{Channel, IOMMU};
use crate::common::{Fd, all_protocol};

/// Xorshift: the same numbers every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 1).expect("63 bits") % limit
    }
}

/// What the test itself knows of a request.
struct Known {
    id: RequestId,
    code: BackendCode,
    /// `None` while its effect is outstanding; then whether it succeeded.
    success: Option<bool>,
    forgotten: bool,
}

#[test]
fn whatever_the_schedule_each_request_gets_its_own_answer_once() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..200 {
        let mut channel = Channel::new(all_protocol());
        let mut sent: Vec<Known> = Vec::new();
        let mut arrived: VecDeque<usize> = VecDeque::new();
        let mut order: Vec<usize> = Vec::new();
        for _ in 0..60 {
            channel.chunk = 1 + random.below(80);
            match random.below(8) {
                0..=2 => {
                    let request = one_of_each().swap_remove(random.below(13));
                    let code = request.code();
                    let id = channel.send(request);
                    sent.push(Known { id, code, success: None, forgotten: false });
                    arrived.push_back(sent.len() - 1);
                }
                3 | 4 if !channel.effects.is_empty() => {
                    let at = random.below(channel.effects.len());
                    let success = random.below(2) == 0;
                    channel.settle(at, success);
                    sent[order.remove(at)].success = Some(success);
                }
                5 if !channel.effects.is_empty() => {
                    let at = random.below(channel.effects.len());
                    drop(channel.effects.remove(at));
                    sent[order.remove(at)].success = Some(false);
                }
                6 if !sent.is_empty() => {
                    let at = random.below(sent.len());
                    if channel.back.forget(sent[at].id) {
                        arrived.retain(|other| *other != at);
                        // It never arrives, so nothing ever answers it.
                        sent[at].success = Some(false);
                    }
                    sent[at].forgotten = true;
                }
                _ => channel.drive(),
            }
            while order.len() < channel.effects.len() {
                order.push(arrived.pop_front().expect("effects come in the order of sending"));
            }
            check(&mut channel, &mut sent);
        }
        channel.drive();
        channel.effects.clear();
        channel.drive();
        check(&mut channel, &mut sent);
        assert_eq!((channel.back.owed(), channel.front.outstanding()), (0, 0));
    }
}

/// Compares the answers that have come with what is known, and takes those requests out of play.
fn check(channel: &mut Channel, sent: &mut [Known]) {
    for answer in std::mem::take(&mut channel.answers) {
        let known = sent.iter_mut().find(|known| known.id == answer.id).expect("was sent");
        assert!(!known.forgotten, "a forgotten request is not heard of");
        assert_eq!(answer.request, known.code);
        // Outstanding effects are dropped at the end, which refuses them.
        assert_eq!(answer.result.is_ok(), known.success.unwrap_or(false));
        known.forgotten = true;
    }
}

#[test]
fn random_requests_get_at_most_one_answer_each_and_never_panic() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut front: ChannelFrontend<Fd> = ChannelFrontend::new(all_protocol(), IOMMU);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..60_000 {
        let row = &back_end_table()[random.below(back_end_table().len())];
        let size = usize::try_from(row.payload.sizes().largest()).expect("small");
        let mut payload = vec![0; size];
        for _ in 0..random.below(12) {
            if let Some(byte) = payload.get_mut(random.below(size.max(1))) {
                *byte = u8::try_from(random.below(256)).expect("a byte");
            }
        }
        let fds = if random.below(8) == 0 {
            random.below(4)
        } else {
            usize::from(row.fds != FdRule::None)
        };
        if random.below(16) == 0 {
            payload.truncate(random.below(64));
        }
        let asks = random.below(2) == 0;
        let frame = Frame::request(row.id, asks, &payload, vec![5; fds]);
        front.receive(&frame.bytes, frame.fds);
        match front.poll().expect("in step").expect("a whole message") {
            ChannelStep::Effect(ChannelEffect::Request { ticket, request }) => {
                assert_eq!(request.check(), Ok(()));
                assert_eq!(request.encode(asks).bytes, frame.bytes, "what came is what is seen");
                front.answer(ticket, Ok(()));
                accepted += 1;
            }
            ChannelStep::Effect(ChannelEffect::Lookup { ticket, .. }) => {
                front.answer(ticket, Ok(None));
            }
            ChannelStep::Violation(_) => refused += 1,
        }
        let due = usize::from(asks || row.reply.is_own());
        assert_eq!(std::iter::from_fn(|| front.transmit()).count(), due, "{}", row.name);
        assert_eq!(front.outstanding(), 0);
    }
    assert!(accepted > 10_000 && refused > 10_000, "{accepted} {refused}");
    let alive: Request<Fd> = Request::ConfigChange;
    front.receive(&alive.encode(true).bytes, Vec::new());
    assert!(matches!(front.poll(), Ok(Some(ChannelStep::Effect(_)))));
}
