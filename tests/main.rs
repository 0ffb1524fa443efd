//! Tests against real servers and the built binary. Unit tests stand at the foot of each source file.

mod support;

mod contract;
mod fault;
mod fuzz;
mod live;

#[global_allocator]
static MEMORY: fuzz::memory::Counting = fuzz::memory::Counting;
