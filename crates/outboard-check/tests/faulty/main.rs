//! For each check a back-end that makes exactly that check break: a small block device on the protocol's
//! state machine, sound unless it is told which rule to break. `table` says which checks each fault
//! breaks; the device runs as a process of this very program.
#![expect(clippy::expect_used, reason = "a failed step of a test is its end")]

mod device;
mod faults;
mod rows;
mod serve;
mod table;

/// Not a test by itself: the process that the judge starts. Without the variable it has nothing to do.
#[test]
fn the_back_end_that_is_judged() {
    let Some(socket) = std::env::var_os("OUTBOARD_FAULTY_SOCKET") else { return };
    let fault = std::env::var("OUTBOARD_FAULT").unwrap_or_default();
    serve::serve(&socket, &fault);
}
