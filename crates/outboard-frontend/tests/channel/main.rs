//! The back-end channel and the calls around it, against a device by script: honest, wrong and hostile.

mod calls;
mod hostile;
mod mappings;
mod peer;
mod requests;
