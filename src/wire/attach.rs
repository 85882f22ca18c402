//! Descriptors that ride along with a value.
//!
//! serde has no place for a descriptor, so encoding and decoding open a context on this thread; a handle's
//! serde impl leaves its descriptors there and writes their index. Outside a context a handle refuses to be
//! serialised. A value that fails to encode drops the context and with it everything attached.

use super::format;
use crate::error::{Error, Topic};
use crate::os::{image, refuse};
use serde::de::{DeserializeOwned, Error as _};
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// A descriptor on its way: the sender's own, or one that it goes on using.
#[derive(Clone)]
pub(crate) enum Attachment {
    Shared(Arc<OwnedFd>),
    /// The same, of a handle whose kind has this name.
    Of(&'static str, Arc<OwnedFd>),
}

impl Attachment {
    pub(crate) fn owned(fd: OwnedFd) -> Self {
        Self::Shared(Arc::new(fd))
    }

    /// The same, which belongs to a handle of this kind.
    pub(crate) fn of(self, kind: &'static str) -> Self {
        Self::Of(kind, self.into_shared())
    }

    /// The kind of handle that it belongs to, with its article.
    pub(crate) fn kind(&self) -> String {
        match self {
            Self::Of(kind, _) => {
                let is_vowel = kind.trim_start_matches('`').starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O']);
                format!("{} {kind}", if is_vowel { "an" } else { "a" })
            }
            Self::Shared(_) => "a handle".into(),
        }
    }

    fn into_shared(self) -> Arc<OwnedFd> {
        match self {
            Self::Shared(fd) | Self::Of(_, fd) => fd,
        }
    }

    /// The descriptor itself, or a copy if somebody else has it too.
    pub(crate) fn into_owned(self) -> std::io::Result<OwnedFd> {
        Arc::try_unwrap(self.into_shared()).or_else(|shared| {
            refuse::at("dup")?;
            shared.try_clone()
        })
    }
}

impl AsFd for Attachment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Shared(fd) | Self::Of(_, fd) => fd.as_fd(),
        }
    }
}

/// The purpose of encoding or decoding on this thread. Kept apart from the lists, so that the usual value, without
/// a handle in it, touches two plain words.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Context {
    None,
    /// Attachments of the value being encoded begin here in `LEAVING`.
    Encoding(usize),
    /// Whether anything arrived in `ARRIVED`.
    Decoding(bool),
}

thread_local! {
    static CONTEXT: Cell<Context> = const { Cell::new(Context::None) };
    static ATTACHED: Cell<usize> = const { Cell::new(0) };
    /// How many values are being encoded or decoded on this thread, each by the code of the one around it.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static LEAVING: RefCell<Vec<Attachment>> = const { RefCell::new(Vec::new()) };
    static ARRIVED: RefCell<Vec<Option<OwnedFd>>> = const { RefCell::new(Vec::new()) };
    /// Objects that handles of one value share; those of the current value begin at `SHARED_FROM`.
    static SHARED: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
    static SHARED_LEN: Cell<usize> = const { Cell::new(0) };
    static SHARED_FROM: Cell<usize> = const { Cell::new(0) };
}

/// Restores the outer context, also when user code panics.
struct Inside {
    outer: Context,
    outer_shared: usize,
}

impl Inside {
    fn enter(context: Context) -> Self {
        DEPTH.set(DEPTH.get() + 1);
        Self { outer: CONTEXT.replace(context), outer_shared: SHARED_FROM.replace(SHARED_LEN.get()) }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
        if let Context::Encoding(from) = CONTEXT.replace(self.outer)
            && ATTACHED.replace(from) > from
        {
            LEAVING.with_borrow_mut(|leaving| leaving.truncate(from));
        }
        let from = SHARED_FROM.replace(self.outer_shared);
        if SHARED_LEN.replace(from) > from {
            // Dropped when the list is free again: what goes may encode messages of its own.
            drop(SHARED.with_borrow_mut(|shared| shared.split_off(from)));
        }
    }
}

/// How deep the current value lies in others: the code of a value may encode or decode one of its own, such as an item of a queue.
pub(crate) fn depth() -> u32 {
    DEPTH.get()
}

/// An object that handles of the value being encoded or decoded on this thread share: made by the first of them,
/// dropped after the last.
pub(crate) fn in_common<S: Any, E>(
    is_it: impl Fn(&S) -> bool,
    make: impl FnOnce() -> Result<S, E>,
) -> Result<Arc<S>, E> {
    let find = |shared: &RefCell<Vec<Box<dyn Any>>>| {
        let shared = shared.borrow();
        let ours = shared[SHARED_FROM.get()..].iter();
        ours.filter_map(|any| any.downcast_ref::<Arc<S>>()).find(|common| is_it(common)).cloned()
    };
    // At the end of a thread each has its own.
    if let Ok(Some(found)) = SHARED.try_with(find) {
        return Ok(found);
    }
    let made = Arc::new(make()?);
    if CONTEXT.get() != Context::None {
        let _ = SHARED.try_with(|shared| {
            let mut shared = shared.borrow_mut();
            shared.push(Box::new(made.clone()));
            SHARED_LEN.set(shared.len());
        });
    }
    Ok(made)
}

/// Runs `encode` and returns what the handles in it attached.
pub(crate) fn collect<R>(encode: impl FnOnce() -> R) -> (R, Vec<Attachment>) {
    let from = ATTACHED.get();
    let _inside = Inside::enter(Context::Encoding(from));
    let result = encode();
    if ATTACHED.get() == from {
        return (result, Vec::new());
    }
    ATTACHED.set(from);
    (result, LEAVING.with_borrow_mut(|leaving| leaving.split_off(from)))
}

/// Runs `decode` with these descriptors to take; what it does not take is closed.
pub(crate) fn supply<R>(fds: Vec<OwnedFd>, decode: impl FnOnce() -> R) -> R {
    let _inside = Inside::enter(Context::Decoding(!fds.is_empty()));
    if fds.is_empty() {
        return decode();
    }
    match ARRIVED.try_with(|arrived| arrived.replace(fds.into_iter().map(Some).collect())) {
        Ok(outer) => {
            let _arrived = Arrived { outer };
            decode()
        }
        // The thread ends and has no place for them any more.
        Err(_) => {
            CONTEXT.set(Context::Decoding(false));
            decode()
        }
    }
}

/// Closes what was not taken and puts the outer value's descriptors back, also when a value's own code panics.
struct Arrived {
    outer: Vec<Option<OwnedFd>>,
}

impl Drop for Arrived {
    fn drop(&mut self) {
        drop(ARRIVED.replace(std::mem::take(&mut self.outer)));
    }
}

/// Attaches a descriptor to the value being encoded on this thread.
pub(crate) fn leave<E: serde::ser::Error>(attachment: Attachment) -> Result<u32, E> {
    refuse_attempt::<E>()?;
    let Context::Encoding(from) = CONTEXT.get() else {
        return Err(E::custom(format_args!(
            "a handle can only be serialised on its way to another process: as an argument, a result, or through a \
             queue or pipe{} {}",
            image::copies_as_cause(),
            image::copies_or(Topic::HandleOutsideAMessage)
        )));
    };
    let pushed = LEAVING.try_with(|leaving| {
        let mut leaving = leaving.borrow_mut();
        leaving.push(attachment);
        ATTACHED.set(leaving.len());
        (leaving.len() - from) as u32 - 1
    });
    pushed.map_err(|_| E::custom("a thread that ends has no place for what rides along with a value"))
}

/// Fails in a serializer that may be followed by another, which writes the same value again. Handles ask before they do anything
/// that must not be done twice.
pub(crate) fn refuse_attempt<E: serde::ser::Error>() -> Result<(), E> {
    if format::is_attempt::<E>() { Err(E::custom("a handle is no row of numbers")) } else { Ok(()) }
}

/// Returns `true` if `D` reads the message itself, so that each part of it is read once.
pub(crate) fn reads_once<D>() -> bool {
    format::reads_once::<D>()
}

/// Takes a descriptor that arrived with the value being decoded on this thread. `D` reads the value: if that is a buffer
/// of serde's, of which untagged enums read the same part for one variant after the other, the taker gets a copy.
pub(crate) fn take<'de, D: Deserializer<'de>>(index: u32) -> Result<OwnedFd, D::Error> {
    let custom = D::Error::custom::<&str>;
    match CONTEXT.get() {
        Context::Decoding(true) => ARRIVED.with_borrow_mut(|arrived| {
            let slot = arrived.get_mut(index as usize).ok_or_else(|| custom("no descriptor of this index arrived"))?;
            let taken = || custom("this descriptor was already taken");
            if format::reads_once::<D>() {
                return slot.take().ok_or_else(taken);
            }
            let copy = |fd: &OwnedFd| refuse::at("dup").map_err(std::io::Error::from).and_then(|()| fd.try_clone());
            copy(slot.as_ref().ok_or_else(taken)?)
                .map_err(|error| D::Error::custom(Error::io("a descriptor that arrived cannot be copied", error)))
        }),
        Context::Decoding(false) => Err(custom("no descriptor of this index arrived")),
        _ => Err(D::Error::custom(format_args!(
            "a handle can only be deserialised as it arrives from another process of the same family {}",
            Topic::HandleOutsideAMessage
        ))),
    }
}

/// Lets anything made of one descriptor travel: `OwnedFd`, `File`, `TcpStream`, `UnixStream` and their like.
///
/// The handles of this crate need none: they are values themselves.
///
/// The receiver gets a descriptor of its own for the same open file. The sender's stays open until dropped;
/// a value that is moved away (an argument, a `put`) drops it once it is sent. tokio's types travel as their
/// std twins (`into_std`, `from_std`); both processes then share one file status, such as O_NONBLOCK.
///
/// ```
/// use multiprocess::{self as mp, Fd, Process};
/// use std::io::Read;
///
/// fn read(mut file: Fd<std::fs::File>) -> String {
///     let mut text = String::new();
///     file.read_to_string(&mut text).expect("readable");
///     text
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let file = std::fs::File::open("/proc/self/comm")?;
///         let mut child = Process::spawn(read, (Fd::new(file),))?;
///         assert!(!child.join().await?.is_empty());
///         Ok(())
///     })
/// }
/// ```
#[derive(Debug)]
pub struct Fd<T>(T);

impl<T> Fd<T> {
    /// Wraps `inner` for its journey.
    pub fn new(inner: T) -> Self {
        Self(inner)
    }

    /// Returns the wrapped value.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> From<T> for Fd<T> {
    fn from(inner: T) -> Self {
        Self(inner)
    }
}

impl<T> std::ops::Deref for Fd<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> std::ops::DerefMut for Fd<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: AsFd> Serialize for Fd<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let copy = refuse::at("dup")
            .map_err(std::io::Error::from)
            .and_then(|()| self.0.as_fd().try_clone_to_owned())
            .map_err(|error| S::Error::custom(Error::io("a descriptor cannot be attached", error)))?;
        leave::<S::Error>(Attachment::owned(copy).of("`Fd`"))?.serialize(serializer)
    }
}

impl<'de, T: From<OwnedFd>> Deserialize<'de> for Fd<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(take::<D>(u32::deserialize(deserializer)?)?.into()))
    }
}

/// Serde for a handle made of `N` descriptors and some plain `facts`.
pub(crate) fn serialize_handle<S: Serializer, F: Serialize>(
    serializer: S,
    attachments: impl IntoIterator<Item = Attachment>,
    facts: F,
) -> Result<S::Ok, S::Error> {
    let indices = attachments.into_iter().map(leave::<S::Error>).collect::<Result<Vec<u32>, _>>()?;
    (indices, facts).serialize(serializer)
}

/// The other half of [`serialize_handle`].
pub(crate) fn deserialize_handle<'de, D: Deserializer<'de>, F: DeserializeOwned, const N: usize>(
    deserializer: D,
) -> Result<([OwnedFd; N], F), D::Error> {
    let (indices, facts) = <(Vec<u32>, F)>::deserialize(deserializer)?;
    let fds = indices.into_iter().map(take::<D>).collect::<Result<Vec<OwnedFd>, _>>()?;
    let fds = fds.try_into().map_err(|_| D::Error::custom("a handle of another kind"))?;
    Ok((fds, facts))
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_fd().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::super::encode::{EncodedMessage, decode};
    use super::*;
    use std::io::{PipeReader, PipeWriter, Read, Write};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Untagged {
        Named { end: Fd<PipeWriter>, name: String },
        Numbered { end: Fd<PipeWriter>, number: u8 },
        Several(Vec<Fd<PipeWriter>>),
    }

    #[derive(Serialize, Deserialize)]
    #[serde(tag = "tag")]
    enum Tagged {
        Some { end: Fd<PipeWriter> },
    }

    #[derive(Serialize, Deserialize)]
    struct Flat {
        other: u8,
        #[serde(flatten)]
        tagged: Tagged,
    }

    fn back<T: Serialize + DeserializeOwned + 'static>(value: T) -> T {
        let encoded = EncodedMessage::of(&value).unwrap();
        drop(value);
        decode(encoded.open().unwrap()).unwrap()
    }

    fn pipe() -> (PipeReader, Fd<PipeWriter>) {
        let (reader, writer) = std::io::pipe().unwrap();
        (reader, Fd::new(writer))
    }

    /// Ends only if there is no other copy of `end`.
    fn check(mut reader: PipeReader, end: Fd<PipeWriter>) {
        end.into_inner().write_all(b"it").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "it");
    }

    #[test]
    fn a_descriptor_in_any_variant_of_any_enum_arrives_and_no_copy_stays() {
        let (reader, end) = pipe();
        let Untagged::Named { end, .. } = back(Untagged::Named { end, name: "a".into() }) else { panic!() };
        check(reader, end);
        let (reader, end) = pipe();
        let Untagged::Numbered { end, number: 7 } = back(Untagged::Numbered { end, number: 7 }) else { panic!() };
        check(reader, end);
        let (readers, ends): (Vec<_>, Vec<_>) = (0..3).map(|_| pipe()).unzip();
        let Untagged::Several(ends) = back(Untagged::Several(ends)) else { panic!() };
        readers.into_iter().zip(ends).for_each(|(reader, end)| check(reader, end));
        let (reader, end) = pipe();
        let Flat { other: 1, tagged: Tagged::Some { end } } = back(Flat { other: 1, tagged: Tagged::Some { end } })
        else {
            panic!()
        };
        check(reader, end);
    }

    /// Three numbers in a message. The type of the last one is asked for by the first.
    struct ByValue(bool, Fd<PipeWriter>, u64);

    impl Serialize for ByValue {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            (self.0, &self.1, self.2 as u32).serialize(serializer)
        }
    }

    impl<'de> Deserialize<'de> for ByValue {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Parts;
            impl<'de> serde::de::Visitor<'de> for Parts {
                type Value = ByValue;
                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("three parts")
                }
                fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<ByValue, A::Error> {
                    let (is_wide, end) = (seq.next_element()?.unwrap(), seq.next_element()?.unwrap());
                    let number = match is_wide {
                        true => seq.next_element::<u64>()?,
                        false => seq.next_element::<u32>()?.map(u64::from),
                    };
                    Ok(ByValue(is_wide, end, number.unwrap()))
                }
            }
            deserializer.deserialize_tuple(3, Parts)
        }
    }

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum RowOrEnd {
        Row(bool, u32),
        End(Fd<PipeWriter>, u32),
    }

    #[test]
    fn descriptor_in_a_list_of_numbers_is_attached_once() {
        let (_reader, end) = pipe();
        let mut list: Vec<_> = (0..12).map(|n| RowOrEnd::Row(true, n)).collect();
        list.insert(9, RowOrEnd::End(end, 7));
        let encoded = EncodedMessage::of(&list).unwrap();
        assert_eq!(encoded.attachments().len(), 1);
        let list: Vec<RowOrEnd> = decode(encoded.open().unwrap()).unwrap();
        assert!(matches!(list[9], RowOrEnd::End(_, 7)) && list.len() == 13);
    }

    #[test]
    fn descriptors_in_rows_arrive_whatever_the_type_of_a_row_asks_for() {
        for wide in [&[][..], &[0], &[1], &[11], &[3, 7]] {
            let (readers, ends): (Vec<_>, Vec<_>) = (0..12).map(|_| pipe()).unzip();
            let rows = ends.into_iter().enumerate().map(|(n, end)| ByValue(wide.contains(&n), end, n as u64));
            let arrived = back(rows.collect::<Vec<_>>());
            assert_eq!(arrived.iter().map(|row| row.2).collect::<Vec<_>>(), (0..12).collect::<Vec<_>>());
            readers.into_iter().zip(arrived).for_each(|(reader, ByValue(_, end, _))| check(reader, end));
        }
    }

    #[test]
    fn descriptor_is_taken_once_by_a_reader_of_the_message_itself() {
        let (reader, end) = pipe();
        let encoded = EncodedMessage::of(&(end, 0u32)).unwrap();
        // Two handles that name the same descriptor: damage.
        let twice = decode::<(Fd<PipeWriter>, Fd<PipeWriter>)>(encoded.open().unwrap());
        assert!(twice.unwrap_err().to_string().contains("already taken"));
        drop(reader);
    }
}
