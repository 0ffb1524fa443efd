//! Tests against real servers and the built binary. Unit tests stand at the foot of each source file.

mod support;

mod contract;
mod fault;
mod live;
