//! Calls: how they go from object to object, wait in line or for a change, and are answered.

use super::objects::{Holder, Object};
use super::state::{Job, Next, Server, Task};
use crate::error::{Error, ErrorKind, Topic};
use crate::manager::wire::local::AT_WORK_ON;
use crate::manager::wire::messages::{self, Op, Reader, Writer};
use crate::manager::wire::method::Frame;
use crate::os::fault;
use crate::os::sync::lock;
use crate::process::entry::survive;
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

thread_local! {
    /// The function that this thread called last.
    pub(crate) static LAST_ENTRY: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Calls.
impl Server {
    /// Works off `job` and all that this lets go on, unless it has to wait, or is better left to an overflow thread.
    pub(crate) fn work(self: &Arc<Self>, job: Box<Job>) {
        let is_slow = || job.entry().is_some_and(|entry| lock(&self.slow).contains(&entry));
        if self.has_slow.load(Relaxed) && is_slow() { self.delegate(job) } else { self.work_here(job) }
    }

    pub(crate) fn delegate(self: &Arc<Self>, job: Box<Job>) {
        if let Err((Task::Work(job), _)) = self.overflow.run(self, Task::Work(job)) {
            self.work_here(job);
        }
    }

    /// Tells an object of what became of a request that may wait, after everything that came to it before.
    pub(crate) fn enqueue(self: &Arc<Self>, object: Arc<Object<Box<Job>>>, what: Next) {
        let mut job = Job::new(Reader::default(), 0, Writer::default(), None);
        (job.next, job.object) = (Some(what), Some(object.clone()));
        if let Some(job) = object.take_turn(job) {
            self.work_here(job);
        }
    }

    pub(crate) fn work_here(self: &Arc<Self>, job: Box<Job>) {
        let mut todo = VecDeque::from([job]);
        while let Some(job) = todo.pop_front() {
            self.advance(job, &mut todo);
        }
    }

    /// Runs the operations of a job until it is done or waits for an object. Jobs whose turn has come join `todo`.
    fn advance(self: &Arc<Self>, job: Box<Job>, todo: &mut VecDeque<Box<Job>>) {
        let mut prepared = Some(job);
        while let Some(mut job) = prepared {
            prepared = match (job.next.take(), job.object.take()) {
                (Some(next), Some(object)) => {
                    let has_to_wait = self.run(&object, next, &mut job);
                    fault::point("manager.ran");
                    self.retry(&object, todo);
                    let job = if has_to_wait {
                        lock(&object.parked).push(job);
                        None
                    } else {
                        self.prepare(job, Some(&object))
                    };
                    let next = job.as_ref().and_then(|job| job.object.as_ref());
                    // It keeps its turn.
                    if !next.is_some_and(|next| Arc::ptr_eq(next, &object)) {
                        todo.extend(object.pass_on());
                    }
                    job
                }
                (Some(Next::Run(op)), None) => {
                    self.make(&mut job, &op);
                    self.prepare(job, None)
                }
                (Some(Next::Settle(..) | Next::Expire(_)), None) => return,
                (None, _) => return job.finish(),
            };
        }
    }

    /// Tries the jobs that are parked at an object whose turn is held, first come, first served.
    fn retry(&self, object: &Object<Box<Job>>, todo: &mut VecDeque<Box<Job>>) {
        loop {
            let parked = std::mem::take(&mut *lock(&object.parked));
            if parked.is_empty() {
                return;
            }
            let (count, mut left) = (parked.len(), Vec::new());
            for mut job in parked {
                let has_to_wait = job.next.take().is_some_and(|next| self.run(object, next, &mut job));
                // It has only one operation, so it is done if it need not wait.
                if has_to_wait { left.push(job) } else { todo.push_back(job) }
            }
            let is_settled = left.len() == count;
            *lock(&object.parked) = left;
            if is_settled {
                return;
            }
        }
    }

    /// Gets a job ready for its next operation, or for its end. `None`: it waits in line at its object. It keeps the turn
    /// at the object where it `has` it if that is the next one, too, and nobody waits there.
    pub(crate) fn prepare(&self, mut job: Box<Job>, has: Option<&Arc<Object<Box<Job>>>>) -> Option<Box<Job>> {
        while job.next.is_none() && job.left > 0 {
            job.left -= 1;
            let frame = &mut job.frame;
            let (op, arguments) = match frame.reader.op().and_then(|op| Ok((op, frame.reader.value()?))) {
                Ok(next) => next,
                Err(error) => {
                    self.fail(&mut frame.out, &error);
                    job.left = 0;
                    return Some(job);
                }
            };
            frame.arguments = Some(arguments);
            if self.exposed.as_ref().is_some_and(|exposed| !exposed.contains(&op.entry)) {
                let error = Error::other("this function is not exposed by the manager");
                self.fail(&mut frame.out, &error.explained_by(Topic::NotExposed));
            } else if op.object == messages::MAKER {
                job.next = Some(Next::Run(op));
            } else if let Some(object) = has.filter(|has| has.number == op.object && has.is_nobody_waiting()) {
                (job.next, job.object) = (Some(Next::Run(op)), Some(object.clone()));
            } else if let Some(object) = self.objects.find(op.object) {
                if let (Some(wait), Some(connection)) = (&frame.wait, &job.reply_to) {
                    lock(&connection.asked).insert(wait.now.ticket.1, object.clone());
                }
                (job.next, job.object) = (Some(Next::Run(op)), Some(object.clone()));
                return object.take_turn(job);
            } else {
                self.fail(&mut frame.out, &Error::closed("object of this proxy"));
            }
        }
        Some(job)
    }

    fn make(&self, job: &mut Job, op: &Op) {
        // Handles among the arguments are the new object's.
        let number = self.objects.reserve();
        let outer = AT_WORK_ON.replace(number);
        LAST_ENTRY.set(Some(op.entry));
        let result = job.frame.enter(op);
        AT_WORK_ON.set(outer);
        let value = job.frame.object.take();
        let made = result.and_then(|()| value.ok_or_else(messages::malformed)).and_then(|value| {
            let holder = job.reply_to.as_ref().map_or(Holder::Message, |connection| connection.holder());
            self.objects.add_as(number, value, holder);
            job.frame.out.reference(number)
        });
        made.unwrap_or_else(|error| self.fail(&mut job.frame.out, &error));
    }

    /// Answers a call by an error.
    fn fail(&self, answer: &mut Writer, error: &Error) {
        // The others are ordinary outcomes of waits.
        let is_failure =
            matches!(error.kind(), ErrorKind::Panicked | ErrorKind::Decode | ErrorKind::Encode | ErrorKind::Other);
        self.failed.fetch_add(u64::from(is_failure), Relaxed);
        answer.error(error);
    }

    /// Runs one operation of a job on an object whose turn is held. True if it has to wait, and is the job's next again.
    fn run(&self, object: &Object<Box<Job>>, next: Next, job: &mut Job) -> bool {
        let outer = AT_WORK_ON.replace(object.number);
        let mut value = lock(&object.value).take();
        match next {
            Next::Run(op) => {
                let frame = &mut job.frame;
                frame.object = value.take();
                LAST_ENTRY.set(Some(op.entry));
                let result = frame.enter(&op);
                value = frame.object.take();
                if let Some(settle) = frame.wait.as_ref().and_then(|wait| wait.settle) {
                    object.settle.get_or_init(|| settle);
                }
                let has_to_wait = result.is_ok() && frame.wait.as_ref().is_some_and(|wait| wait.kept.is_some());
                if let Err(error) = result {
                    self.fail(&mut frame.out, &error);
                }
                job.next = has_to_wait.then_some(Next::Run(op));
            }
            Next::Settle(ticket, end) => {
                let is_its = |job: &mut Box<Job>| job.frame.wait.as_ref().is_some_and(|wait| wait.now.ticket == ticket);
                let waited: Vec<_> = lock(&object.parked).extract_if(.., is_its).collect();
                if let (Some(settle), Some(value)) = (object.settle.get(), &mut value) {
                    survive(|| settle(&mut **value, ticket, end));
                }
                survive(|| drop(waited));
            }
            Next::Expire(ticket) => {
                let mut parked = lock(&object.parked);
                let mut waits = parked.iter_mut().filter_map(|job| job.frame.wait.as_mut());
                // It is tried again, as all are.
                waits.find(|wait| wait.now.ticket == ticket).into_iter().for_each(|wait| wait.now.is_late = true);
            }
        }
        *lock(&object.value) = value;
        AT_WORK_ON.set(outer);
        job.next.is_some()
    }
}

impl Job {
    fn finish(self: Box<Self>) {
        fault::point("manager.answer");
        let Self { frame: Frame { out, wait, .. }, reply_to, .. } = *self;
        // The captured values are the user's.
        survive(|| drop(wait));
        if let Some(connection) = reply_to {
            connection.reply(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::manager::client::proxy;
    use crate::manager::mock::{test_manager, until};
    use futures_util::FutureExt;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    static MADE: AtomicU64 = AtomicU64::new(0);
    static GONE: AtomicU64 = AtomicU64::new(0);

    struct Counted;

    impl Drop for Counted {
        fn drop(&mut self) {
            GONE.fetch_add(1, SeqCst);
        }
    }

    #[tokio::test]
    async fn object_created_within_the_manager_by_dropped_call_is_released() {
        let make = || {
            MADE.fetch_add(1, SeqCst);
            Counted
        };
        let test_manager = test_manager().await;
        let here = test_manager.here();
        let mut before_it = Box::pin(proxy::create(&here, make, ()));
        // It may be done by then.
        let was_done = (&mut before_it).now_or_never().is_some();
        drop((before_it, was_done));
        until(|| GONE.load(SeqCst) == 1).await;
        let mut after_it = Box::pin(proxy::create(&here, make, ()));
        let was_done = (&mut after_it).now_or_never().is_some();
        until(|| MADE.load(SeqCst) == 2).await;
        drop((after_it, was_done));
        until(|| GONE.load(SeqCst) == 2).await;
    }
}
