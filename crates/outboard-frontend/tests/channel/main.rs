//! The back-end channel and the calls around it, against a device by script: honest, wrong and hostile.

#[cfg(test)]
mod calls;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod mappings;
#[cfg(test)]
mod peer;
#[cfg(test)]
mod requests;
