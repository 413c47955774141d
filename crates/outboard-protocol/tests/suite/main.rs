//! The tests of the protocol crate. None opens a socket: descriptors are numbers, and time does not
//! pass. `common` holds a model host, a `Pair` of both ends, and the transcript runner.

#[cfg(test)]
mod channel;
#[cfg(test)]
mod channel_ends;
#[cfg(test)]
mod channel_random;
#[cfg(test)]
mod common;
#[cfg(test)]
mod decoder;
#[cfg(test)]
mod document;
#[cfg(test)]
mod frontend;
#[cfg(test)]
mod machine;
#[cfg(test)]
mod pair;
#[cfg(test)]
mod ring_rules;
#[cfg(test)]
mod ring_states;
#[cfg(test)]
mod table;
#[cfg(test)]
mod transcripts;
