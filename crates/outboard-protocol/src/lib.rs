//! The vhost-user wire protocol as pure state machines, both ends
