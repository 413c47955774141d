//! A driver for vhost-user block devices (virtio 1.3 §5.2): configuration, requests, several queues.
//!
//! [`BlockDevice`] opens a back-end and offers plain blocking calls; [`BlockQueue`] is one queue with
//! many requests under way, for a thread of its own. Invariant: the device is not trusted; a status that
//! does not exist, a length that cannot be or a request that never ends is an error with a name.

mod config;
mod device;
mod queue;
mod request;

pub use config::{
    BlockConfig, CONFIG_SIZE, ConfigError, DiscardLimits, Geometry, SECTOR, Topology,
    WriteZeroesLimits, features,
};
pub use device::{BlockDevice, BlockOptions};
pub use queue::{BlockQueue, Completion};
pub use request::{Operation, Status};
