//! Functions that make an object or work on one, and how they are entered where the object is.

use super::messages::{Lend, MAKER, Op, Reader, Span, Writer, malformed};
use super::waiting::{self, Settle, Ticket, Try, Waits};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::image::{self, Enter};
use crate::process::entry::{catch_panic, fingerprint};
use crate::process::function::{captures_nothing, up_to_eleven};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::any::{Any, type_name};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::marker::PhantomData;
use std::task::Poll;

/// A function that creates an object, for [`Manager::create`](crate::Manager::create).
///
/// It is implemented for all functions of up to 11 arguments, and for closures that capture nothing. `Args` is the tuple of the
/// arguments. It cannot be implemented by hand.
///
/// ```
/// fn makes<F: multiprocess::Maker<Args>, Args>(_: F) {}
///
/// fn open(path: String, mode: u32) -> (String, u32) { (path, mode) }
/// makes(open);
/// makes(|n: usize| vec![0u8; n]);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot make an object of a manager from the arguments `{Args}`",
    note = "it must be a `fn` or a closure that captures nothing, called with one tuple of all arguments"
)]
pub trait Maker<Args>: Copy + Send + 'static {
    /// The type of the object. The object stays in the manager's process, so it need not be a serde value.
    type Object: Send + 'static;

    #[doc(hidden)]
    fn make(self, args: Args) -> Self::Object;
}

/// A function that can be called on an object of type `T`, by [`Proxy::call`](crate::Proxy::call).
///
/// It is implemented for all functions of `&mut T` and up to 11 more arguments, and for closures that capture nothing. `Args` is the
/// tuple of the other arguments. It cannot be implemented by hand.
///
/// ```
/// fn works_on<T, F: multiprocess::Method<T, Args>, Args>(_: F) {}
///
/// struct Tally(u64);
/// impl Tally {
///     fn add(&mut self, n: u64) -> u64 { self.0 += n; self.0 }
/// }
/// works_on::<Tally, _, _>(Tally::add);
/// works_on::<Tally, _, _>(|tally: &mut Tally| tally.0);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be called on a `{T}` with the arguments `{Args}`",
    note = "it must be a `fn(&mut {T}, ..)` or a closure that captures nothing, called with one tuple of the other arguments",
    note = "its arguments and its result must be `Serialize + DeserializeOwned + Send + 'static`"
)]
pub trait Method<T, Args>: Copy + Send + 'static {
    /// The type of the result.
    type Output: Serialize + DeserializeOwned + Send + 'static;

    #[doc(hidden)]
    fn call(self, object: &mut T, args: Args) -> Self::Output;
}

/// The result of a method, which can be sent back.
#[doc(hidden)]
#[diagnostic::on_unimplemented(
    message = "the result `{Self}` of a method cannot be sent back from the manager [not-serde]",
    label = "returns `{Self}`",
    note = "a result must be `Serialize + DeserializeOwned + Send + 'static`, the error of a `Result` too: for one that is not, such as `anyhow::Error`, return `multiprocess::Result<T>` and use `.map_err(multiprocess::Error::other)`"
)]
pub trait Answer: Serialize + DeserializeOwned + Send + 'static {}

#[diagnostic::do_not_recommend]
impl<R: Serialize + DeserializeOwned + Send + 'static> Answer for R {}

macro_rules! methods {
    ($($arg:ident)*) => {
        impl<F, R, $($arg),*> Maker<($($arg,)*)> for F
        where
            F: Fn($($arg),*) -> R + Copy + Send + 'static,
            R: Send + 'static,
        {
            type Object = R;

            #[allow(non_snake_case)]
            fn make(self, ($($arg,)*): ($($arg,)*)) -> R {
                self($($arg),*)
            }
        }

        impl<F, T, R, $($arg),*> Method<T, ($($arg,)*)> for F
        where
            F: Fn(&mut T, $($arg),*) -> R + Copy + Send + 'static,
            R: Answer,
        {
            type Output = R;

            #[allow(non_snake_case)]
            fn call(self, object: &mut T, ($($arg,)*): ($($arg,)*)) -> R {
                self(object, $($arg),*)
            }
        }
    };
}

up_to_eleven!(methods);

/// A method and how its result is encoded.
pub(crate) trait Invoke<T, A, M>: Copy + 'static {
    /// How what it brings is settled, if it may have to wait.
    const SETTLE: Option<Settle> = None;

    /// Takes the arguments, unless it has to wait, and appends the result.
    fn invoke(self, object: &mut T, args: &mut Option<A>, now: Option<Try>, out: &mut Writer) -> Poll<Result<()>>;
}

/// Marks a method that returns a value.
pub(crate) enum Owned {}

/// Marks a method of ours that encodes what it lends.
pub(crate) enum Lent {}

/// Marks a method of ours that may have to wait.
pub(crate) enum Waiting {}

impl<F: Method<T, A>, T, A> Invoke<T, A, Owned> for F {
    fn invoke(self, object: &mut T, args: &mut Option<A>, _: Option<Try>, out: &mut Writer) -> Poll<Result<()>> {
        let value = self.call(object, args.take().ok_or_else(malformed)?);
        Poll::Ready(out.append_part(&value))
    }
}

impl<F, T, A> Invoke<T, Lend<A>, Lent> for F
where
    F: Fn(&mut T, A, &mut Writer) -> Result<()> + Copy + 'static,
{
    fn invoke(self, object: &mut T, args: &mut Option<Lend<A>>, _: Option<Try>, out: &mut Writer) -> Poll<Result<()>> {
        let Lend(args) = args.take().ok_or_else(malformed)?;
        Poll::Ready(self(object, args, out))
    }
}

impl<F, T: Waits, A> Invoke<T, A, Waiting> for F
where
    F: Fn(&mut T, &mut Option<A>, Try, &mut Writer) -> Poll<Result<()>> + Copy + 'static,
{
    const SETTLE: Option<Settle> = Some(waiting::settle::<T>);

    fn invoke(self, object: &mut T, args: &mut Option<A>, now: Option<Try>, out: &mut Writer) -> Poll<Result<()>> {
        self(object, args, now.ok_or_else(malformed)?, out)
    }
}

/// An operation that may have to wait.
pub(crate) struct Attempt {
    pub(crate) now: Try,
    /// How what it brings is settled; known once it was tried.
    pub(crate) settle: Option<Settle>,
    /// The rest of its arguments, while it has to wait.
    kept: Option<Box<dyn Any + Send>>,
}

impl Attempt {
    pub(crate) fn new(ticket: Ticket) -> Self {
        Self { now: Try { ticket, is_late: false }, settle: None, kept: None }
    }

    /// Returns `true` if it is to be tried again.
    pub(crate) fn has_to_wait(&self) -> bool {
        self.kept.is_some()
    }
}

/// The operation that makes an object by `f`.
pub(crate) fn make_op<F, A>(f: F) -> Op
where
    F: Maker<A>,
    A: DeserializeOwned + 'static,
{
    let entry = image::offset_of::<MakerEntry<F, A>>(f);
    Op { object: MAKER, entry, fingerprint: fingerprint::<F, A, F::Object>() }
}

/// The operation that calls `f` on `object`, which is a `T`.
pub(crate) fn call_op<F, T, A, M>(object: u64, f: F) -> Op
where
    F: Invoke<T, A, M>,
    T: Send + 'static,
    A: DeserializeOwned + Send + 'static,
    M: 'static,
{
    let entry = image::offset_of::<MethodEntry<F, T, A, M>>(f);
    Op { object, entry, fingerprint: fingerprint::<F, A, T>() }
}

thread_local! {
    /// The dispatch table: entries that were found, by their place.
    static FOUND: RefCell<BTreeMap<u64, image::Entry>> = const { RefCell::new(BTreeMap::new()) };
}

/// The input and output of an entry.
pub(crate) struct Frame {
    fingerprint: u64,
    /// The object that is called, or was made.
    pub(crate) object: Option<Box<dyn Any + Send>>,
    /// The arguments are part of it.
    pub(crate) reader: Reader,
    pub(crate) arguments: Option<Span>,
    /// The answer, to which the result is appended.
    pub(crate) out: Writer,
    /// If the call may have to wait.
    pub(crate) wait: Option<Attempt>,
    /// `None` until an entry of ours was called.
    result: Option<Result<()>>,
}

struct MakerEntry<F, A>(PhantomData<(F, A)>);
struct MethodEntry<F, T, A, M>(PhantomData<(F, T, A, M)>);

impl<F, A> Enter for MakerEntry<F, A>
where
    F: Maker<A>,
    A: DeserializeOwned + 'static,
{
    type Function = F;

    fn enter(f: F, frame: &mut dyn Any) {
        let Some(frame) = frame.downcast_mut::<Frame>() else { return };
        // Its new object would replace the one that the request names, for all holders.
        if frame.object.is_some() || frame.wait.is_some() {
            frame.result = Some(Err(Error::new(ErrorKind::Decode, "a function that makes objects is called on one")));
            return;
        }
        let made = frame.arguments::<F, A, F::Object>().and_then(|args| {
            frame.object = Some(Box::new(catch_panic(|| Ok(f.make(args)))?));
            Ok(())
        });
        frame.result = Some(made);
    }
}

impl<F, T, A, M> Enter for MethodEntry<F, T, A, M>
where
    F: Invoke<T, A, M>,
    T: Send + 'static,
    A: DeserializeOwned + Send + 'static,
    M: 'static,
{
    type Function = F;

    fn enter(f: F, frame: &mut dyn Any) {
        let Some(frame) = frame.downcast_mut::<Frame>() else { return };
        if frame.wait.is_some() == F::SETTLE.is_some() {
            frame.result = Some(frame.call::<F, T, A, M>(f));
        }
    }
}

impl Frame {
    pub(crate) fn new(reader: Reader, out: Writer) -> Self {
        Self { fingerprint: 0, object: None, reader, arguments: None, out, wait: None, result: None }
    }

    /// Calls a method on the object, or makes one where there is none. After an error, the answer is as before.
    pub(crate) fn enter(&mut self, op: &Op) -> Result<()> {
        let entry = entry_at(op.entry)?;
        (self.fingerprint, self.result) = (op.fingerprint, None);
        // All that is the user's may panic, also what decodes and drops arguments. The object stays, and its caller gets an error.
        let start = self.out.len();
        let entered = catch_panic(|| {
            entry(self);
            Ok(())
        });
        let why = "a call names something that is not a function for objects of a manager";
        let called =
            entered.and_then(|()| self.result.take().unwrap_or_else(|| Err(Error::new(ErrorKind::Decode, why))));
        called.inspect_err(|_| self.out.truncate(start))
    }

    fn call<F, T, A, M>(&mut self, f: F) -> Result<()>
    where
        F: Invoke<T, A, M>,
        T: 'static,
        A: DeserializeOwned + Send + 'static,
    {
        let kept = self.wait.as_mut().and_then(|wait| wait.kept.take());
        let mut args = match kept {
            None => Some(self.arguments::<F, A, T>()?),
            Some(kept) => *kept.downcast::<Option<A>>().map_err(|_| malformed())?,
        };
        let object = self.object.as_mut().and_then(|object| object.downcast_mut::<T>()).ok_or_else(|| {
            Error::new(ErrorKind::Decode, format!("the object of this proxy is no {}", type_name::<T>()))
        })?;
        let Some(wait) = &mut self.wait else {
            let Poll::Ready(done) = f.invoke(object, &mut args, None, &mut self.out) else { return Err(malformed()) };
            return done;
        };
        // Only now is it known that the object has such an operation.
        wait.settle = F::SETTLE;
        // The rest of the arguments is the user's; its drop may panic.
        let invoked = catch_panic(|| Ok(f.invoke(object, &mut args, Some(wait.now), &mut self.out)));
        let Poll::Ready(done) = invoked.unwrap_or_else(|panic| Poll::Ready(Err(panic))) else {
            wait.kept = Some(Box::new(args));
            return Ok(());
        };
        let dropped = catch_panic(|| {
            drop(args);
            Ok(())
        });
        done.and(dropped)
    }

    /// The arguments, if they were encoded for exactly these types.
    fn arguments<F: 'static, A: DeserializeOwned + 'static, T: 'static>(&mut self) -> Result<A> {
        if self.fingerprint != fingerprint::<F, A, T>() {
            let what = type_name::<F>();
            let why = format!("the arguments were encoded for another function than {what}: not the same build");
            return Err(Error::new(ErrorKind::Decode, why).explained_by(Topic::NotTheSameBuild));
        }
        let arguments = self.arguments.take().ok_or_else(malformed)?;
        self.reader.decode(arguments)
    }
}

/// The entry at this place. Most are called again and again.
fn entry_at(place: u64) -> Result<image::Entry> {
    FOUND.with_borrow_mut(|found| match found.entry(place) {
        Entry::Occupied(entry) => Ok(*entry.get()),
        Entry::Vacant(free) => match image::entry_at(place) {
            Some(entry) => Ok(*free.insert(entry)),
            None => Err(image::unknown(place)),
        },
    })
}

/// Functions that clients may call, for [`ManagerBuilder::expose`](crate::ManagerBuilder::expose).
///
/// ```
/// use multiprocess::{self as mp, ErrorKind, Exposed, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let exposed = [Exposed::maker(|| 0u32), Exposed::method(|n: &mut u32| *n)];
///         let manager = Manager::builder().expose(exposed).start().await?;
///         let error = manager.list::<u32>().await.unwrap_err();
///         assert!(error.to_string().contains("not exposed"));
///         manager.shutdown().await
///     })
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Exposed(pub(crate) Vec<u64>);

impl Exposed {
    /// Exposes a function that creates objects.
    pub fn maker<F, A>(f: F) -> Self
    where
        F: Maker<A>,
        A: DeserializeOwned + 'static,
    {
        const { captures_nothing::<F>() };
        Self(vec![make_op(f).entry])
    }

    /// Exposes a function that is called on objects.
    pub fn method<F, T, A>(f: F) -> Self
    where
        F: Method<T, A>,
        T: Send + 'static,
        A: DeserializeOwned + Send + 'static,
    {
        const { captures_nothing::<F>() };
        Self(vec![call_op::<F, T, A, Owned>(0, f).entry])
    }
}
