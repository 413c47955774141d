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
pub(crate) const NAME: &str = "outboard.socket";

/// The same for one of many devices.
pub(crate) fn name_among(device: &str) -> String {
    format!("outboard.socket.{device}")
}

/// The listening socket that was kept for us from the process before, if it was.
pub(crate) fn kept_socket(name: &str) -> Option<RawFd> {
    let mut passed = sd_notify::listen_fds_with_names().ok()?;
    passed.find(|(_, kept)| kept == name).map(|(fd, _)| fd)
}

/// The device can be connected to: keep its socket, the service is up.
pub(crate) fn ready(server: &Server) {
    told(match server.listener() {
        Some(listener) => sd_notify::notify_with_fds(
            &[NotifyState::FdStore, NotifyState::FdName(NAME), NotifyState::Ready],
            &[listener.as_fd()],
        ),
        None => sd_notify::notify(&[NotifyState::Ready]),
    });
}

/// The service manager is to keep the socket under `name`.
pub(crate) fn keep(server: &Server, name: &str) {
    if let Some(listener) = server.listener() {
        let kept = [NotifyState::FdStore, NotifyState::FdName(name)];
        told(sd_notify::notify_with_fds(&kept, &[listener.as_fd()]));
    }
}

/// The service is up.
pub(crate) fn up() {
    told(sd_notify::notify(&[NotifyState::Ready]));
}

fn told(outcome: std::io::Result<()>) {
    if let Err(error) = outcome {
        warn!("service manager: {error}");
    }
}
