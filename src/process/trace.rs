//! Carries the `tracing` spans and events of a child to the subscriber of the process that started it.
//!
//! ```text
//! child                                                        starter
//! tracing macro -> Recorder -> Outbox == packet socket ==> TraceInbox -> Replay -> the subscriber, under the span of the spawn
//! ```
//!
//! A spawn under a subscriber sends one end of a socket, and the level that is of interest, with the order. The child's main thread then has a
//! [`Recorder`] as its subscriber, and so have the threads of a manager. Without a subscriber the spawn costs one load more, and no descriptor.
//! Tasks of a pool use the same recorder and the same replay, with the worker's lane between them.
//!
//! # Moves
//! - A record is sent at once, in a packet. A child never waits for room: while there is none, up to [`outbox::MOST_WAITING`] bytes of records
//!   wait in the child, and go out with a later record or at its end. Records beyond that are dropped and counted.
//! - A packet begins with the number of records that were dropped before it. A child reports the rest at its end, over its report socket.
//! - The starter reads on a task of the runtime in which it spawned. A caller that has waited for the child's end reads the rest, so all
//!   records are replayed before the result is there.
//!
//! # Invariants
//! 1. A packet holds whole records, and is sent whole or not at all.
//! 2. A subscriber that the child's program sets for itself wins: a record goes to it or to the starter, never to both.
//! 3. A process that was forked by the child's function sends nothing, and takes no lock for it.
//!
//! # Death
//! | killed | what follows | test (`tests/tracing.rs`) |
//! |---|---|---|
//! | the child, before a packet is sent | its records are lost, with those that wait; earlier ones arrive | `records_of_a_killed_child_arrive_up_to_its_death` |
//! | the child, after that | the records arrive; the spans that it has left open are closed | the same |
//! | the starter | its children end with it | - |
//!
//! # Cancel
//! | dropped | what follows | test |
//! |---|---|---|
//! | the handle of the child, or a future of it | the task goes on reading | `records_are_read_while_the_child_runs_also_without_its_handle`, `ten_thousand_dropped_joins_lose_no_record` |
//! | the runtime in which it was spawned | nobody reads until the end of the child is awaited, or this process waits for its children at its own end; records that find no room are dropped | `child_goes_on_when_the_runtime_that_reads_is_gone` |
#![forbid(unsafe_code)]

mod inbox;
mod outbox;
mod record;
mod recorder;
mod replay;

pub(super) use inbox::{Read, TraceInbox, Traces, blocking_read_rest, read_rest};
pub(crate) use outbox::on_this_thread;
pub(super) use outbox::{begin, finish, flush};
pub(crate) use record::Message;
pub(crate) use recorder::{Recorder, Sink};
pub(crate) use replay::{Caller, Replay};

/// The field of a replayed record that names the process it comes from.
const PID: &str = "process.pid";
