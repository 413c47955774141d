//! Ready virtio devices for vhost-user
