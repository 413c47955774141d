//! Whole conversations: messages, descriptors and ring contents against the real handler with a
//! real device, on one thread and without any wait, and a model beside it that says what each
//! message is answered with and what guest memory holds after each step.
//!
//! ```text
//!  script ─▶ socket ─▶ DeviceRequestHandler (ByHand::turn) ─▶ Hands: queues served by the script
//!    │                        │ answers                            │ guest memory, calls
//!    └────▶ Model ────────────┴────────────── the same ? ──────────┘
//! ```
//! Held after every step: the bytes of all answers; guest memory, byte for byte; the counter of
//! every call and err eventfd; which rings run, parked or broken, their base and requests in
//! flight; what the device was told. At the end: no descriptor is left.

pub mod config;
pub mod device;
pub mod guest;
pub mod log;
pub mod model;
pub mod notes;
pub mod ring;
pub mod script;
pub mod start;
pub mod wire;
pub mod world;

use std::cell::RefCell;

use outboard::{DeviceRequestHandler, HandlerOptions};
use outboard_protocol::ProtocolFeatures;

use crate::cover::wanted;
use crate::input::Input;
use device::Hands;
use guest::Guest;
use model::{FEATURES, Model, PROTOCOL};
use world::{Bells, World};

thread_local! {
    static KEPT: RefCell<(Guest, Bells)> = RefCell::default();
}

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(wants);
    KEPT.with_borrow_mut(|(guest, bells)| {
        let before = descriptors();
        play(&mut Input::new(data), guest, bells);
        assert_eq!(descriptors(), before, "descriptors at the end");
    });
}

fn wants() -> Vec<String> {
    let done = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 21, 24, 25];
    let more = [31, 32, 34, 35, 36, 37, 38, 39, 40];
    let refused = [2, 5, 6, 8, 9, 10, 11, 12, 16, 18, 24, 25, 31, 32, 37, 38];
    let mut wants: Vec<String> =
        done.iter().chain(&more).map(|id| format!("conversation {id} done")).collect();
    wants.extend(refused.map(|id| format!("conversation {id} refused")));
    wants.extend([5, 11, 38].map(|id| format!("conversation drain before {id}")));
    let others = [
        "close: version",
        "close: reply",
        "close: no error form",
        "close: in-band notifications alone",
        "unknown message",
        "not negotiated",
        "ring parked",
        "ring broken",
        "ring came back",
        "a ring waits for its memory",
        "request dropped while disabled",
        "request deferred",
        "dropped session",
        "left inside a message",
        "called",
        "called by message",
        "page marked",
        "used ring marked",
        "log changed",
        "request in flight marked in a new log",
        "region fresh",
        "batch of a killed process was shown",
        "ring owes requests",
        "request of a killed process",
        "killed with requests in flight",
    ];
    wants.extend(others.map(|what| format!("conversation {what}")));
    wants
}

/// Descriptors of this process.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn play(input: &mut Input<'_>, guest: &mut Guest, bells: &mut Bells) {
    guest.reset();
    bells.reset();
    let hands = Hands::default();
    let options = HandlerOptions {
        without_features: !FEATURES,
        without_protocol_features: ProtocolFeatures::all() - PROTOCOL,
        ..HandlerOptions::default()
    };
    let mut handler = DeviceRequestHandler::new(hands.clone(), options).expect("a handler");
    let mut before = Model::default();
    for _ in 0..3 {
        let model = before.next_front_end();
        before = World::new(&mut handler, &hands, guest, bells, model).play(input);
        if input.is_empty() {
            break;
        }
    }
}
