//! Turns a function into an address that can be sent, and runs it where it arrives.
//!
//! A function travels as the place of its entry in the image plus a fingerprint of its types. The receiver enters
//! only what the image's own table lists, and the entry runs only what was encoded for exactly these types.
#![forbid(unsafe_code)]

pub(crate) use super::executor::Executor;
use super::function::Function;
use super::outcome::VALUE;
pub(crate) use super::outcome::{IS_ERROR, IS_PANIC, IS_VALUE, LAST_TAG, Outcome, encode_error};
use super::panics::{self, catch_next_panic};
pub(crate) use super::panics::{catch_panic, survive, text_of};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::image::{self, Enter};
use crate::os::{fork, spawn};
use crate::wire::{self, Attachment, Parcel, Payload};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;

/// A function in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Call {
    offset: u64,
    fingerprint: u64,
}

impl Call {
    pub(crate) fn of<F, A, M>(function: F) -> Self
    where
        F: Function<A, M>,
        A: DeserializeOwned + 'static,
    {
        let offset = image::offset_of::<EntryPoint<F, A, M>>(function);
        Self { offset, fingerprint: fingerprint::<F, A, F::Output>() }
    }

    /// Decodes the arguments, runs the function and encodes its result, error or panic.
    pub(crate) fn run(self, arguments: Parcel, executor: &mut Executor) -> Outcome {
        let Some(enter) = image::entry_at(self.offset) else {
            return Outcome::error(image::unknown(self.offset));
        };
        let executor_here = std::mem::take(executor);
        let fingerprint = self.fingerprint;
        let work = Work::One(arguments);
        let mut frame = Frame { fingerprint, work, executor: executor_here, outcome: None };
        enter(&mut frame);
        *executor = frame.executor;
        frame.outcome.unwrap_or_else(|| {
            let why = "a call names something that is not a function for other processes";
            Outcome::error(Error::new(ErrorKind::Decode, why))
        })
    }

    /// Runs the function for each item of `batch`, and returns the batch. With an error the function could not be
    /// entered, and the items are still in the batch.
    pub(crate) fn run_batch(self, batch: Box<dyn Batch>, executor: &mut Executor) -> (Box<dyn Batch>, Result<()>) {
        let Some(enter) = image::entry_at(self.offset) else {
            return (batch, Err(image::unknown(self.offset)));
        };
        let (fingerprint, executor_here) = (self.fingerprint, std::mem::take(executor));
        let mut frame = Frame { fingerprint, work: Work::Many(batch), executor: executor_here, outcome: None };
        enter(&mut frame);
        *executor = frame.executor;
        let entered = match frame.outcome {
            None => Ok(()),
            Some(outcome) => Outcome::read(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() }),
        };
        match frame.work {
            Work::Many(batch) => (batch, entered),
            // An entry takes one piece of work only.
            Work::One(_) | Work::Taken => (Box::new(NoItems), entered),
        }
    }

    /// The function's name, as the compiler spells it. Enters the function's entry, and runs no user code.
    ///
    /// # Errors
    /// `Decode` if this program has no such function, or one for other types.
    pub(crate) fn label(self) -> Result<&'static str> {
        let (batch, entered) = self.run_batch(Box::new(NameOnly(None)), &mut Executor::default());
        entered?;
        let named = (batch as Box<dyn Any>).downcast::<NameOnly>().ok();
        let unnamed =
            || Error::new(ErrorKind::Decode, "a call names something that is not a function for other processes");
        named.and_then(|named| named.0).ok_or_else(unnamed)
    }

    /// As two words, for a head that is not encoded.
    pub(crate) fn to_words(self) -> [u64; 2] {
        [self.offset, self.fingerprint]
    }

    pub(crate) fn from_words([offset, fingerprint]: [u64; 2]) -> Self {
        Self { offset, fingerprint }
    }
}

/// Equal on both sides exactly if function, arguments and result are of the same types.
#[inline]
pub(crate) fn fingerprint<F: 'static, A: 'static, R: 'static>() -> u64 {
    /// A [`TypeId`] is a hash already, and hands over as much of it as fits: so this is a constant.
    #[derive(Default)]
    struct Words(u64);

    impl Hasher for Words {
        fn write(&mut self, bytes: &[u8]) {
            // FNV-1a, should it ever come in bytes.
            self.0 = bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
        }
        fn write_u64(&mut self, word: u64) {
            self.0 = self.0.rotate_left(32) ^ word;
        }
        fn finish(&self) -> u64 {
            self.0
        }
    }

    let mut words = Words::default();
    TypeId::of::<(F, A, R)>().hash(&mut words);
    words.finish()
}

/// The input and output of an entry.
struct Frame {
    fingerprint: u64,
    work: Work,
    executor: Executor,
    outcome: Option<Outcome>,
}

enum Work {
    One(Parcel),
    Many(Box<dyn Batch>),
    Taken,
}

/// Items for which one function is run, and the receiver of their outcomes.
pub(crate) trait Batch: Any {
    /// Receives the name of the function, before anything else.
    fn begin(&mut self, label: &'static str);
    /// Starts the next item: its arguments.
    fn next(&mut self) -> Option<Result<Arguments<'_>>>;
    /// Receives the encoded outcome of the item that was started last; false to stop.
    fn report(&mut self, tag: u8, payload: Payload<'_>, attachments: &[Attachment]) -> bool;
}

/// The arguments of one item. Bytes that are owned become the value, where it is bytes.
pub(crate) struct Arguments<'a> {
    pub(crate) bytes: Cow<'a, [u8]>,
    pub(crate) fds: Vec<std::os::fd::OwnedFd>,
}

impl Arguments<'_> {
    #[inline]
    fn decode<A: DeserializeOwned + 'static>(self) -> Result<A> {
        match self.bytes {
            Cow::Borrowed(bytes) => wire::decode_bytes(bytes, self.fds),
            Cow::Owned(bytes) => wire::decode(Parcel { bytes, fds: self.fds }),
        }
    }
}

struct NoItems;

impl Batch for NoItems {
    fn begin(&mut self, _: &'static str) {}
    fn next(&mut self) -> Option<Result<Arguments<'_>>> {
        None
    }
    fn report(&mut self, _: u8, _: Payload<'_>, _: &[Attachment]) -> bool {
        false
    }
}

/// A batch without items that keeps the name of the function.
struct NameOnly(Option<&'static str>);

impl Batch for NameOnly {
    fn begin(&mut self, label: &'static str) {
        self.0 = Some(label);
    }
    fn next(&mut self) -> Option<Result<Arguments<'_>>> {
        None
    }
    fn report(&mut self, _: u8, _: Payload<'_>, _: &[Attachment]) -> bool {
        false
    }
}

/// Reports an error as the outcome of an item.
pub(crate) fn report_error(batch: &mut dyn Batch, error: Error) -> bool {
    let (tag, payload) = encode_error(&error);
    batch.report(tag, Payload::Borrowed(&payload), &[])
}

struct EntryPoint<F, A, M>(PhantomData<(F, A, M)>);

impl<F, A, M> Enter for EntryPoint<F, A, M>
where
    F: Function<A, M>,
    A: DeserializeOwned + 'static,
{
    type Function = F;

    fn enter(function: F, frame: &mut dyn Any) {
        let Some(frame) = frame.downcast_mut::<Frame>() else { return };
        if frame.fingerprint != fingerprint::<F, A, F::Output>() {
            let what = std::any::type_name::<F>();
            let why = format!("the arguments were encoded for another function than {what}: not the same build");
            let error = Error::new(ErrorKind::Decode, why).explained_by(Topic::NotTheSameBuild);
            frame.outcome = Some(Outcome::error(error));
            return;
        }
        let Frame { work, executor, .. } = frame;
        match work {
            Work::Many(batch) => {
                batch.begin(std::any::type_name::<F>());
                panics::forget_last();
                while each::<F, A, M>(function, &mut **batch, executor) {}
            }
            Work::One(_) => {
                let Work::One(arguments) = std::mem::replace(work, Work::Taken) else { return };
                let here = Here::now();
                let outcome = catch_panic(|| {
                    let value = function.call(wire::decode(arguments)?, executor);
                    here.end_others(0);
                    Outcome::value(value?)
                });
                here.end_others(PANICKED);
                frame.outcome = Some(outcome.unwrap_or_else(Outcome::error));
            }
            Work::Taken => {}
        }
    }
}

/// Runs the next item of a batch; false if it was the last.
#[inline]
fn each<F, A, M>(function: F, batch: &mut dyn Batch, executor: &mut Executor) -> bool
where
    F: Function<A, M>,
    A: DeserializeOwned + 'static,
{
    // State that a panic leaves half changed belongs to the function.
    let mut goes_on = None;
    let here = Here::now();
    let done = catch_next_panic(|| {
        let Some(arguments) = batch.next() else {
            goes_on = Some(false);
            return Ok(());
        };
        let value = function.call(arguments?.decode()?, executor);
        here.end_others(0);
        let value = value?;
        let mut message = wire::encode(&value)?;
        let value = message.needed(value);
        let (payload, attachments) = message.parts_of(value.as_ref());
        goes_on = Some(batch.report(VALUE[0], payload, attachments));
        Ok(())
    });
    here.end_others(PANICKED);
    match (goes_on, done) {
        (Some(goes_on), _) => goes_on,
        (None, Err(error)) => report_error(batch, error),
        (None, Ok(())) => false,
    }
}

/// The process in which a function was called. A process that the function forks may return from it, too. It would report a
/// second result and take the next order, so it is ended there.
#[derive(Clone, Copy)]
struct Here {
    was_forked: bool,
}

/// The exit code of a Rust program that has panicked.
const PANICKED: i32 = 101;

impl Here {
    fn now() -> Self {
        Self { was_forked: fork::is_forked() }
    }

    /// Ends any other process, without running the exit handlers of the process that it was forked from.
    #[inline]
    fn end_others(self, code: i32) {
        if fork::is_forked() && !self.was_forked {
            spawn::exit_now(code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parcel<T: Serialize + 'static>(value: T) -> Parcel {
        let bytes = wire::encode(&value).unwrap().payload(&value).to_vec();
        Parcel { bytes, fds: Vec::new() }
    }

    fn run<F, A, M>(function: F, args: A) -> Result<F::Output>
    where
        F: Function<A, M>,
        A: Serialize + DeserializeOwned + Send + 'static,
    {
        let outcome = Call::of(function).run(parcel(args), &mut Executor::default());
        Outcome::read(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() })
    }

    fn twice(x: i64) -> i64 {
        2 * x
    }
    async fn later(x: i64, y: String) -> String {
        tokio::task::yield_now().await;
        format!("{x}{y}")
    }
    fn zero<T: Default>() -> T {
        T::default()
    }

    #[test]
    fn every_kind_of_function_is_entered_by_its_address() {
        assert_eq!(run(twice, (4,)).unwrap(), 8);
        assert_eq!(run(later, (4, "x".into())).unwrap(), "4x");
        assert_eq!(run(|a: i32, b: i32| a - b, (5, 3)).unwrap(), 2);
        assert_eq!(run(async |a: i32| a + 1, (5,)).unwrap(), 6);
        assert_eq!(run(zero::<f64>, ()).unwrap(), 0.0);
        assert_eq!(run(zero::<u8>, ()).unwrap(), 0);
        assert_eq!(run(std::process::id, ()).unwrap(), std::process::id());
    }

    #[test]
    fn an_address_that_is_not_listed_is_refused() {
        let call = Call { offset: Call::of(twice).offset + 1, fingerprint: 0 };
        let outcome = call.run(parcel((4i64,)), &mut Executor::default());
        let error = Outcome::read::<i64>(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
    }

    #[test]
    fn a_wrong_fingerprint_is_refused() {
        let call = Call { fingerprint: Call::of(zero::<u8>).fingerprint, ..Call::of(twice) };
        let outcome = call.run(parcel((4i64,)), &mut Executor::default());
        let error = Outcome::read::<i64>(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Decode);
    }

    #[test]
    fn a_panic_is_an_error_and_the_next_call_is_unharmed() {
        let fails = |x: i32| -> i32 { std::panic::panic_any(format!("no {x}")) };
        let error = run(fails, (7,)).unwrap_err();
        assert_eq!((error.kind(), error.panic().unwrap().message()), (ErrorKind::Panicked, "no 7"));
        assert_eq!(run(twice, (1,)).unwrap(), 2);
    }
}
