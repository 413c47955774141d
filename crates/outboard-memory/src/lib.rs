//! Guest memory shared over vhost-user: regions, translation, ring cells
