//! The frame of a device state: what was written is read back, what was touched is refused, and
//! nothing is read that is longer than the limit.

use outboard::{DeviceState, STATE_HEADER, STATE_MAGIC, StateError};

use crate::cover::{reached, wanted};
use crate::input::Input;

/// Plays one script.
pub fn run(data: &[u8]) {
    wanted(|| {
        let kinds = ["Foreign", "Format", "Short", "Long", "TooLarge", "Damaged", "whole"];
        kinds.map(|kind| format!("state {kind}")).into()
    });
    let limit = 1 << 16;
    // As it comes: a damaged header must not be believed.
    let mut raw = STATE_MAGIC.to_vec();
    raw.extend(data);
    for bytes in [data, &raw] {
        if let Ok(state) = DeviceState::parse(bytes, limit) {
            assert!(state.value.len() as u64 <= limit);
        }
    }
    let mut input = Input::new(data);
    let length = input.below(40);
    let state = DeviceState {
        device_type: (0..input.below(33)).map(|_| char::from(b'a' + input.byte() % 26)).collect(),
        queues: input.number() as u16,
        features: input.one_in(2).then(|| input.number()),
        protocol_features: input.number(),
        version: input.number() as u32,
        value: input.take(length).to_vec(),
    };
    let mut bytes = state.to_bytes();
    assert_eq!(bytes.len(), STATE_HEADER + state.value.len());
    assert_eq!(DeviceState::parse(&bytes, limit).ok().as_ref(), Some(&state), "read back");
    reached("state whole".into());
    match input.below(5) {
        0 => bytes.truncate(input.below(bytes.len())),
        1 => bytes.push(input.byte()),
        2 => {
            let less = state.value.len() as u64;
            if less > 0 {
                return seen(&DeviceState::parse(&bytes, less - 1));
            }
            return;
        }
        _ => {
            let (at, bit) = (input.below(bytes.len()), input.below(8));
            bytes[at] ^= 1 << bit;
        }
    }
    seen(&DeviceState::parse(&bytes, limit));
}

/// A state that was touched is refused.
fn seen(parsed: &Result<DeviceState, StateError>) {
    let error = parsed.as_ref().expect_err("a state that was touched");
    let text = format!("{error:?}");
    reached(format!("state {}", text.split([' ', '(', '{']).next().unwrap_or_default()));
}
