//! The VMM side of vhost-user: connection, shared memory, driver queues
