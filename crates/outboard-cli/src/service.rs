//! What the service manager is told and keeps (sd_notify(3), systemd's file descriptor store).
//!
//! The listening socket is kept by systemd under a name, so that a front-end that connects while
//! the device is being restarted waits in its queue instead of failing. Invariant: without a
//! service manager nothing here does anything.

use std::os::fd::{AsFd, RawFd};

use outboard::Server;
use sd_notify::NotifyState;
use tracing::warn;

/// Under which name the listening socket is kept (`FDNAME=`).
const NAME: &str = "outboard.socket";

/// The listening socket that was kept for us from the process before, if it was.
pub(crate) fn kept_socket() -> Option<RawFd> {
    let mut passed = sd_notify::listen_fds_with_names().ok()?;
    passed.find(|(_, name)| name == NAME).map(|(fd, _)| fd)
}

/// The device can be connected to: keep its socket, the service is up.
pub(crate) fn ready(server: &Server) {
    let told = match server.listener() {
        Some(listener) => sd_notify::notify_with_fds(
            &[NotifyState::FdStore, NotifyState::FdName(NAME), NotifyState::Ready],
            &[listener.as_fd()],
        ),
        None => sd_notify::notify(&[NotifyState::Ready]),
    };
    if let Err(error) = told {
        warn!("service manager: {error}");
    }
}
