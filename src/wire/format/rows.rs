//! Rows: elements of a sequence that have the same fields, all of them numbers. What they have in common, the template,
//! is written once, and then the numbers alone.
//!
//! The first element is written as usual and shows the template. The others are written by [`Row`], which takes nothing
//! but numbers. It compares the parts of a row with the template's in one word; which parts the rows of a type have is
//! known when the program is compiled, so that little more than the copies is left of it. An element that is no such
//! row is written as usual, and so are those before it, once more.

use super::names::Names;
use super::{fail, run, tag};
use crate::os::identity;
use serde::ser::{Impossible, Serialize, Serializer};
use std::fmt;

/// Sequences of fewer elements are not worth a template.
pub(super) const FEWEST: usize = 8;
/// Rows may be nested so deep.
pub(super) const LEVELS: u8 = 4;

/// Codes of parts beside those of numbers, which are their tags' distances from `U8`.
pub(super) const SEQ: u8 = 12;
pub(super) const STRUCT: u8 = 13;
pub(super) const END: u8 = 14;
pub(super) const BOOL: u8 = 15;
const BITS: u32 = 4;

/// The common form of the rows of one sequence.
#[derive(Default)]
pub(super) struct Template {
    /// A 1, and then the codes of the parts, four bits each.
    parts: u64,
    /// The names of all fields, in the order in which they are written.
    names: Vec<&'static str>,
    /// Its bytes in the message: a value without its numbers.
    written: Vec<u8>,
    /// How many bytes a row takes.
    pub(super) size: usize,
    /// Where the next row goes.
    pub(super) end: usize,
}

impl Template {
    /// Learns from a value that has been written, and appends its numbers to `row`; `None` if it is no row.
    pub(super) fn learn(&mut self, element: &[u8], names: &Names, row: &mut Vec<u8>) -> Option<()> {
        self.parts = 1;
        self.names.clear();
        self.written.clear();
        let mut rest = element;
        self.learn_part(&mut rest, names, row, LEVELS)?;
        self.size = row.len();
        (rest.is_empty() && self.written.len() <= usize::from(u8::MAX)).then_some(())
    }

    fn learn_part(&mut self, rest: &mut &[u8], names: &Names, row: &mut Vec<u8>, levels: u8) -> Option<()> {
        let [tag] = take(rest)?;
        match tag {
            tag::SEQ8 => {
                let [count] = take(rest)?;
                self.add(SEQ, &[tag, count])?;
                let levels = levels.checked_sub(1).filter(|_| count > 0)?;
                (0..count).try_for_each(|_| self.learn_part(rest, names, row, levels))?;
                self.add(END, &[])
            }
            tag::STRUCT => {
                let [low, high] = take(rest)?;
                let fields = names.of_shape(u16::from_le_bytes([low, high]))?;
                self.add(STRUCT, &[tag, low, high])?;
                let levels = levels.checked_sub(1).filter(|_| !fields.is_empty())?;
                for name in fields {
                    self.names.push(name);
                    self.learn_part(rest, names, row, levels)?;
                }
                self.add(END, &[])
            }
            tag::FALSE | tag::TRUE => {
                row.push(u8::from(tag == tag::TRUE));
                self.add(BOOL, &[tag::TRUE])
            }
            _ => {
                let (number, after) = rest.split_at_checked(size(tag)?)?;
                row.extend_from_slice(number);
                *rest = after;
                self.add(tag - tag::U8, &[tag])
            }
        }
    }

    fn add(&mut self, code: u8, written: &[u8]) -> Option<()> {
        self.written.extend_from_slice(written);
        let is_full = self.parts >> (u64::BITS - BITS) != 0;
        self.parts = with_part(self.parts, code);
        (!is_full).then_some(())
    }

    /// Its length and itself.
    pub(super) fn append(&self, to: &mut Vec<u8>) {
        to.push(self.written.len() as u8);
        to.extend_from_slice(&self.written);
    }

    /// Writes `value`, if it is a row like the others.
    #[inline(always)]
    pub(super) fn write<T: Serialize + ?Sized>(&mut self, value: &T, room: &mut [u8]) -> bool {
        let mut row = Row { room, parts: 1, names: &mut self.names, levels: LEVELS };
        // Only the last 16 parts are compared. Were there more, then one of them would be the number `U16` in place of
        // the 1, for which there is no room beside the numbers of the template.
        value.serialize(&mut row).is_ok() && row.parts == self.parts && row.room.is_empty()
    }

    /// Appends a row as a value of the usual kind.
    pub(super) fn expand(&self, mut row: &[u8], to: &mut Vec<u8>) {
        let mut written = &self.written[..];
        while let Some((&tag, after)) = written.split_first() {
            let head = match tag {
                tag::SEQ8 => 2,
                tag::STRUCT => 3,
                _ => 1,
            };
            let numbers = size(tag).unwrap_or(usize::from(tag == tag::TRUE)).min(row.len());
            match (tag, row.first()) {
                (tag::TRUE, Some(bool)) => to.push(if *bool == 0 { tag::FALSE } else { tag::TRUE }),
                _ => {
                    to.extend_from_slice(&written[..head]);
                    to.extend_from_slice(&row[..numbers]);
                }
            }
            row = &row[numbers..];
            written = &after[head - 1..];
        }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*taken)
}

/// Returns how many bytes the number of this tag takes.
fn size(tag: u8) -> Option<usize> {
    match tag {
        tag::U128 | tag::I128 => Some(16),
        tag::U8..=tag::F64 => run::size(tag).ok(),
        _ => None,
    }
}

/// The common form of the rows of a template, as its reader needs it.
#[derive(Default)]
pub(super) struct Layout {
    /// How many bytes a row takes.
    pub(super) size: usize,
    /// A 1, and then the codes of the parts; 0 if there are too many of them.
    pub(super) parts: u64,
}

impl Layout {
    /// The layout of the template that `rest` begins with, which is taken off. `fields`: how many a shape has.
    pub(super) fn read(rest: &mut &[u8], fields: &impl Fn(u16) -> usize) -> super::Result<Self> {
        let mut layout = Self { size: 0, parts: 1 };
        layout.read_part(rest, fields, LEVELS)?;
        Ok(layout)
    }

    fn read_part(&mut self, rest: &mut &[u8], fields: &impl Fn(u16) -> usize, levels: u8) -> super::Result<()> {
        let (code, count) = match *rest {
            [tag::SEQ8, count, after @ ..] => {
                *rest = after;
                (SEQ, usize::from(*count))
            }
            [tag::STRUCT, low, high, after @ ..] => {
                *rest = after;
                (STRUCT, fields(u16::from_le_bytes([*low, *high])))
            }
            [tag::TRUE, after @ ..] => {
                *rest = after;
                self.add(BOOL, 1);
                return Ok(());
            }
            [tag, after @ ..] => {
                *rest = after;
                let Some(size) = size(*tag) else { return fail("the template of rows has a part that is none") };
                self.add(*tag - tag::U8, size);
                return Ok(());
            }
            [] => return fail("the template of rows ends too early"),
        };
        if count == 0 || levels == 0 {
            return fail("the template of rows has a part that is none");
        }
        self.add(code, 0);
        (0..count).try_for_each(|_| self.read_part(rest, fields, levels - 1))?;
        self.add(END, 0);
        Ok(())
    }

    fn add(&mut self, code: u8, size: usize) {
        self.size += size;
        let is_full = self.parts == 0 || self.parts >> (u64::BITS - BITS) != 0;
        self.parts = if is_full { 0 } else { with_part(self.parts, code) };
    }
}

/// The code of a part that begins with this tag.
pub(super) fn code(tag: u8) -> u8 {
    match tag {
        tag::SEQ8 => SEQ,
        tag::STRUCT => STRUCT,
        tag::TRUE => BOOL,
        // Only these stand in templates.
        number => number.wrapping_sub(tag::U8),
    }
}

/// The codes of `parts` and one more.
#[inline(always)]
pub(super) fn with_part(parts: u64, code: u8) -> u64 {
    parts << BITS | u64::from(code)
}

/// A value is no row like the others.
#[derive(Debug)]
pub(super) struct Other;

/// Returns `true` if `E` is the error of a serializer that only tries whether a value is a row, and may be followed by another:
/// what serialising the value brings about besides its bytes must not happen twice, so handles fail there.
pub(crate) fn is_attempt<E>() -> bool {
    identity::id_of::<E>() == identity::id_of::<Other>()
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is no row like the others")
    }
}

impl std::error::Error for Other {}

impl serde::ser::Error for Other {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

/// serde's `Serializer` for one row.
pub(super) struct Row<'a> {
    room: &'a mut [u8],
    parts: u64,
    names: &'a mut [&'static str],
    levels: u8,
}

impl Row<'_> {
    #[inline(always)]
    fn put<const N: usize>(&mut self, code: u8, bytes: [u8; N]) -> Result<(), Other> {
        let Some((room, rest)) = std::mem::take(&mut self.room).split_first_chunk_mut() else { return Err(Other) };
        (*room, self.room) = (bytes, rest);
        self.add(code);
        Ok(())
    }

    #[inline(always)]
    fn add(&mut self, code: u8) {
        self.parts = with_part(self.parts, code);
    }

    #[inline(always)]
    fn down(&mut self, code: u8) -> Result<(), Other> {
        self.levels = self.levels.checked_sub(1).ok_or(Other)?;
        self.add(code);
        Ok(())
    }

    /// Takes the next name, if it is this one.
    #[inline(always)]
    fn name(&mut self, name: &'static str) -> Result<(), Other> {
        let Some((next, rest)) = std::mem::take(&mut self.names).split_first_mut() else { return Err(Other) };
        self.names = rest;
        if std::ptr::eq(*next, name) || is_same(next, name) { Ok(()) } else { Err(Other) }
    }
}

/// The same name may lie in several places. The one seen last is remembered.
#[cold]
#[inline(never)]
fn is_same(known: &mut &'static str, name: &'static str) -> bool {
    let is_same = *known == name;
    if is_same {
        *known = name;
    }
    is_same
}

/// A tuple or struct within a row.
pub(super) struct Parts<'b, 'a>(&'b mut Row<'a>);

impl Parts<'_, '_> {
    #[inline(always)]
    fn finish(self) -> Result<(), Other> {
        self.0.levels += 1;
        self.0.add(END);
        Ok(())
    }
}

macro_rules! numbers {
    ($($serialize:ident $number:ident $kind:ident),*) => {$(
        #[inline(always)]
        fn $serialize(self, number: $number) -> Result<(), Other> {
            self.put(tag::$kind - tag::U8, number.to_le_bytes())
        }
    )*};
}

macro_rules! others {
    ($($serialize:ident($($type:ty),*) -> $result:ty;)*) => {$(
        #[inline(always)]
        fn $serialize(self, $(_: $type),*) -> Result<$result, Other> {
            Err(Other)
        }
    )*};
}

type Never = Impossible<(), Other>;

impl<'b, 'a> Serializer for &'b mut Row<'a> {
    type Ok = ();
    type Error = Other;
    type SerializeSeq = Never;
    type SerializeTuple = Parts<'b, 'a>;
    type SerializeTupleStruct = Parts<'b, 'a>;
    type SerializeTupleVariant = Never;
    type SerializeMap = Never;
    type SerializeStruct = Parts<'b, 'a>;
    type SerializeStructVariant = Never;

    numbers! {
        serialize_u8 u8 U8, serialize_u16 u16 U16, serialize_u32 u32 U32, serialize_u64 u64 U64, serialize_u128 u128 U128,
        serialize_i8 i8 I8, serialize_i16 i16 I16, serialize_i32 i32 I32, serialize_i64 i64 I64, serialize_i128 i128 I128,
        serialize_f32 f32 F32, serialize_f64 f64 F64
    }

    others! {
        serialize_char(char) -> ();
        serialize_str(&str) -> ();
        serialize_bytes(&[u8]) -> ();
        serialize_none() -> ();
        serialize_unit() -> ();
        serialize_unit_struct(&'static str) -> ();
        serialize_unit_variant(&'static str, u32, &'static str) -> ();
        serialize_seq(Option<usize>) -> Never;
        serialize_map(Option<usize>) -> Never;
        serialize_tuple_variant(&'static str, u32, &'static str, usize) -> Never;
        serialize_struct_variant(&'static str, u32, &'static str, usize) -> Never;
    }

    #[inline(always)]
    fn serialize_bool(self, value: bool) -> Result<(), Other> {
        self.put(BOOL, [value.into()])
    }

    #[inline(always)]
    fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<(), Other> {
        Err(Other)
    }

    #[inline(always)]
    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<(), Other> {
        value.serialize(self)
    }

    #[inline(always)]
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<(), Other> {
        Err(Other)
    }

    #[inline(always)]
    fn serialize_tuple(self, _: usize) -> Result<Parts<'b, 'a>, Other> {
        self.down(SEQ)?;
        Ok(Parts(self))
    }

    #[inline(always)]
    fn serialize_tuple_struct(self, _: &'static str, len: usize) -> Result<Parts<'b, 'a>, Other> {
        self.serialize_tuple(len)
    }

    #[inline(always)]
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Parts<'b, 'a>, Other> {
        self.down(STRUCT)?;
        Ok(Parts(self))
    }

    fn collect_str<T: fmt::Display + ?Sized>(self, _: &T) -> Result<(), Other> {
        Err(Other)
    }
}

macro_rules! parts {
    ($($compound:ident $serialize:ident),*) => {$(
        impl serde::ser::$compound for Parts<'_, '_> {
            type Ok = ();
            type Error = Other;
            #[inline(always)]
            fn $serialize<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Other> {
                value.serialize(&mut *self.0)
            }
            #[inline(always)]
            fn end(self) -> Result<(), Other> {
                self.finish()
            }
        }
    )*};
}

parts! { SerializeTuple serialize_element, SerializeTupleStruct serialize_field }

impl serde::ser::SerializeStruct for Parts<'_, '_> {
    type Ok = ();
    type Error = Other;

    #[inline(always)]
    fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), Other> {
        self.0.name(name)?;
        value.serialize(&mut *self.0)
    }

    #[inline(always)]
    fn end(self) -> Result<(), Other> {
        self.finish()
    }
}
