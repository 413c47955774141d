//! Write a virtio device that runs outside the VMM, over vhost-user
