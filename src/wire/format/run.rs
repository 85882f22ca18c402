//! Numbers that lie in a message as they lie in memory: which types do so, and how they are read one by one.

use super::{Error, Result, fail, tag};
use crate::os::identity;
use crate::wire::list::List;
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde::forward_to_deserialize_any as forward;
use std::any::TypeId;

/// Does `$case!(type KIND, ..)` for every number that lies in runs.
macro_rules! each_number {
    ($case:ident) => {
        $case! {
            u8 U8, u16 U16, u32 U32, u64 U64, i8 I8, i16 I16, i32 I32, i64 I64, f32 F32, f64 F64
        }
    };
}

/// A list of numbers, or of arrays of `width` numbers; 0 for numbers by themselves.
pub(super) struct Seen<'a> {
    pub(super) kind: u8,
    pub(super) width: u8,
    pub(super) count: usize,
    pub(super) bytes: &'a [u8],
}

/// Returns the slice behind `iter`, if it is a `Vec` or slice that can be copied as it lies in memory.
#[inline(always)]
pub(super) fn see<I>(iter: &I) -> Option<Seen<'_>> {
    macro_rules! case {
        ($number:ty, $kind:ident, $width:literal) => {
            if let Some(list) = identity::elements::<I, $number>(iter) {
                let bytes = bytemuck::cast_slice(list);
                return Some(Seen { kind: tag::$kind, width: $width, count: list.len(), bytes });
            }
        };
    }
    macro_rules! cases {
        ($($number:ident $kind:ident),*) => {$(
            case!($number, $kind, 0);
            case!([$number; 2], $kind, 2);
            case!([$number; 3], $kind, 3);
            case!([$number; 4], $kind, 4);
        )*};
    }
    each_number!(cases);
    #[cfg(target_pointer_width = "64")]
    {
        case!(usize, U64, 0);
        case!(isize, I64, 0);
    }
    None
}

/// The numbers of a run, as bytes of the message or by themselves.
pub(super) enum Run<'de> {
    Here(&'de [u8]),
    Apart(&'de mut List),
}

impl<'de> Run<'de> {
    pub(super) fn bytes(self) -> &'de [u8] {
        match self {
            Self::Here(bytes) => bytes,
            Self::Apart(list) => list.bytes(),
        }
    }

    /// As a list: itself, if its memory can be that of one.
    pub(super) fn take_list<P: identity::Element>(&mut self) -> Vec<P> {
        match self {
            Self::Here(bytes) => identity::list_of(bytes),
            Self::Apart(list) => list.take().unwrap_or_else(|| identity::list_of(list.bytes())),
        }
    }
}

/// The tag of `T`, if it is a number that lies in runs, or a reference to one.
#[inline(always)]
pub(super) fn kind<T: ?Sized>() -> Option<u8> {
    let id = identity::id_of::<T>();
    macro_rules! cases {
        ($($number:ident $kind:ident),*) => {$(
            if id == TypeId::of::<$number>() || id == TypeId::of::<&'static $number>() {
                return Some(tag::$kind);
            }
        )*};
    }
    each_number!(cases);
    None
}

/// Appends the number that `value` is, without a tag.
#[inline(always)]
pub(super) fn append<T: ?Sized>(value: &T, to: &mut Vec<u8>) {
    macro_rules! cases {
        ($($number:ident $kind:ident),*) => {$(
            if let Some(number) = identity::number::<T, $number>(value) {
                to.extend_from_slice(&number.to_ne_bytes());
            }
        )*};
    }
    each_number!(cases);
}

/// Returns how many bytes a number takes.
pub(super) fn size(kind: u8) -> Result<usize> {
    match kind {
        tag::U8 | tag::I8 => Ok(1),
        tag::U16 | tag::I16 => Ok(2),
        tag::U32 | tag::I32 | tag::F32 => Ok(4),
        tag::U64 | tag::I64 | tag::F64 => Ok(8),
        _ => fail("a run of what is no number"),
    }
}

/// The whole run as the value of `V`, if that is serde's own visitor of a `Vec` of just these: it would but push the
/// elements. Another visitor, which may do as it likes, is given them one by one.
#[inline(always)]
pub(super) fn list<'de, V: Visitor<'de>>(numbers: &mut Numbers<'de>) -> Option<V::Value> {
    // Told from the layout, so that the code below is compiled only for what may be such a list.
    if const { size_of::<V::Value>() != size_of::<Vec<u8>>() || !std::mem::needs_drop::<V::Value>() } {
        return None;
    }
    list_of_same_layout::<V>(numbers)
}

#[inline(never)]
fn list_of_same_layout<'de, V: Visitor<'de>>(numbers: &mut Numbers<'de>) -> Option<V::Value> {
    let (kind, width, run) = (numbers.kind, numbers.width, &mut numbers.run);
    let visitor = identity::id_of::<V>();
    macro_rules! case {
        ($number:ty) => {
            if visitor == visitor_of::<Vec<$number>>() {
                return identity::list::<V::Value, $number>(run.take_list());
            }
        };
    }
    macro_rules! cases {
        ($($number:ident $kind:ident),*) => {
            match (kind, width) {
                $((tag::$kind, 0) => case!($number),
                (tag::$kind, 2) => case!([$number; 2]),
                (tag::$kind, 3) => case!([$number; 3]),
                (tag::$kind, 4) => case!([$number; 4]),)*
                _ => {}
            }
        };
    }
    each_number!(cases);
    #[cfg(target_pointer_width = "64")]
    match (kind, width) {
        (tag::U64, 0) => case!(usize),
        (tag::I64, 0) => case!(isize),
        _ => {}
    }
    None
}

/// The type of the visitor with which `T` deserialises a sequence: found by asking it to.
#[inline(always)]
fn visitor_of<'de, T: serde::Deserialize<'de>>() -> TypeId {
    match T::deserialize(Probe) {
        Err(Found(visitor)) => visitor,
        Ok(_) => TypeId::of::<()>(),
    }
}

/// A deserializer that only finds out the type of its visitor.
struct Probe;

struct Found(TypeId);

impl<'de> Deserializer<'de> for Probe {
    type Error = Found;
    #[inline(always)]
    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Found> {
        Err(Found(identity::id_of::<V>()))
    }
    forward! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl std::fmt::Debug for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

impl std::error::Error for Found {}

impl serde::de::Error for Found {
    fn custom<T: std::fmt::Display>(_: T) -> Self {
        Self(TypeId::of::<()>())
    }
}

/// How often what is no option may be read as one, all at the same place: a type that is an option of itself would ask
/// for ever.
pub(super) const MOST_OPTIONS: u32 = 16;

/// Counts one option less: it may be read as an option once more.
pub(super) fn one_less(options: u32) -> Result<u32> {
    options.checked_sub(1).map_or_else(|| fail("there is a value where options are expected without end"), Ok)
}

/// A list of numbers of one kind, or of arrays of them.
pub(super) struct Numbers<'de> {
    kind: u8,
    /// How many numbers an array has; 0 for numbers by themselves.
    width: u8,
    /// How many bytes an element takes.
    size: usize,
    run: Run<'de>,
}

impl<'de> Numbers<'de> {
    pub(super) fn new(kind: u8, width: u8, size: usize, run: Run<'de>) -> Self {
        Self { kind, width, size, run }
    }

    pub(super) fn of_bytes(bytes: &'de [u8]) -> Self {
        Self::new(tag::U8, 0, 1, Run::Here(bytes))
    }

    /// Numbers, or arrays, one by one.
    pub(super) fn visit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        let mut elements =
            Elements { kind: self.kind, is_array: self.width > 0, size: self.size, rest: self.run.bytes() };
        let value = visitor.visit_seq(&mut elements)?;
        all_taken(elements.rest.is_empty(), value)
    }
}

/// What is left of a list of numbers.
struct Elements<'de> {
    kind: u8,
    is_array: bool,
    size: usize,
    rest: &'de [u8],
}

impl<'de> SeqAccess<'de> for Elements<'de> {
    type Error = Error;

    #[inline]
    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>> {
        let Some((bytes, rest)) = self.rest.split_at_checked(self.size).filter(|(element, _)| !element.is_empty())
        else {
            return Ok(None);
        };
        self.rest = rest;
        seed.deserialize(Element { kind: self.kind, is_array: self.is_array, options: MOST_OPTIONS, bytes }).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        self.rest.len().checked_div(self.size)
    }
}

/// One number out of a run, or one array.
struct Element<'de> {
    kind: u8,
    is_array: bool,
    /// How often it may still be read as an option.
    options: u32,
    bytes: &'de [u8],
}

impl Element<'_> {
    /// The bytes of one number.
    fn number<const N: usize>(&self) -> Result<[u8; N]> {
        self.bytes.try_into().or_else(|_| fail("a number of another size"))
    }
}

macro_rules! numbers {
    ($($number:ident $kind:ident $deserialize:ident $visit:ident),*) => {
        impl<'de> Deserializer<'de> for Element<'de> {
            type Error = Error;

            #[inline(never)]
            fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
                if self.is_array {
                    let size = size(self.kind)?;
                    let mut numbers = Elements { kind: self.kind, is_array: false, size, rest: self.bytes };
                    let value = visitor.visit_seq(&mut numbers)?;
                    return all_taken(numbers.rest.is_empty(), value);
                }
                match self.kind {
                    $(tag::$kind => visitor.$visit(<$number>::from_ne_bytes(self.number()?)),)*
                    _ => fail("a run of what is no number"),
                }
            }

            $(#[inline(always)]
            fn $deserialize<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
                match self.bytes.try_into() {
                    Ok(number) if self.kind == tag::$kind && !self.is_array => {
                        visitor.$visit(<$number>::from_ne_bytes(number))
                    }
                    _ => self.deserialize_any(visitor),
                }
            })*

            fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
                let options = one_less(self.options)?;
                visitor.visit_some(Self { options, ..self })
            }

            #[inline(always)]
            fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value> {
                visitor.visit_newtype_struct(self)
            }

            forward! {
                bool i128 u128 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct enum
                identifier ignored_any
            }
        }
    };
}

numbers! {
    u8 U8 deserialize_u8 visit_u8, u16 U16 deserialize_u16 visit_u16, u32 U32 deserialize_u32 visit_u32,
    u64 U64 deserialize_u64 visit_u64, i8 I8 deserialize_i8 visit_i8, i16 I16 deserialize_i16 visit_i16,
    i32 I32 deserialize_i32 visit_i32, i64 I64 deserialize_i64 visit_i64, f32 F32 deserialize_f32 visit_f32,
    f64 F64 deserialize_f64 visit_f64
}

/// A value, if its visitor has taken all elements: one that wants fewer was meant for something else.
#[inline(always)]
pub(super) fn all_taken<T>(is_so: bool, value: T) -> Result<T> {
    if is_so { Ok(value) } else { fail("there are more elements than the type has place for") }
}
