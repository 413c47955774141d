//! Judge and load any vhost-user back-end
