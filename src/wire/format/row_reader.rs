//! Reading rows whose type asks for just the parts that were written.
//!
//! The first row is read by its template, part by part, which shows whether that is so. The others are read by [`RowReader`]: it
//! hands out the numbers as they are asked for, and compares all that was asked for with the template's parts in one word. Which
//! parts a type asks for is known when the program is compiled, so little more than the copies is left of it. Where a
//! type asks for something else in a later row, that is an error here, and the row is read again by the template.

use super::rows::{self, with_part};
use super::visitors::is_derived;
use super::{Error, Result, fail, tag};
use crate::os::identity;
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use std::any::TypeId;

/// The requests of the type of a row, as long as they are exactly the written parts.
#[derive(Default)]
pub(super) struct Asked {
    /// A 1, and then the codes of the parts; something else if the type asked otherwise.
    parts: u64,
    /// The visitors that read structs, and where the names of their fields are.
    structs: Vec<(TypeId, usize)>,
}

impl Asked {
    pub(super) fn for_nothing_yet() -> Box<Self> {
        Box::new(Self { parts: 1, structs: Vec::new() })
    }

    pub(super) fn for_part(&mut self, code: u8) {
        self.parts = with_part(self.parts, code);
    }

    pub(super) fn for_struct(&mut self, visitor: TypeId, fields: &'static [&'static str]) {
        self.for_part(rows::STRUCT);
        self.structs.push((visitor, fields.as_ptr() as usize));
    }

    pub(super) fn for_something_else(&mut self) {
        self.parts = 0;
    }

    /// Returns `true` if it asked for just the parts of this layout.
    pub(super) fn is_exactly(&self, layout: &rows::Layout) -> bool {
        layout.parts != 0 && self.parts == layout.parts
    }
}

/// serde's `Deserializer` for one row.
pub(super) struct RowReader<'de, 'b> {
    rest: &'de [u8],
    parts: u64,
    structs: &'b [(TypeId, usize)],
}

impl<'de, 'b> RowReader<'de, 'b> {
    #[inline(always)]
    pub(super) fn new(row: &'de [u8], asked: &'b Asked) -> Self {
        Self { rest: row, parts: 1, structs: &asked.structs }
    }

    /// The value, if its type asked for the same again.
    #[inline(always)]
    pub(super) fn finish<T>(self, value: T, asked: &Asked) -> Result<T> {
        // Were there more than 16 parts, then there would not be bytes enough for them: see `rows::Template::write`.
        let is_same = self.parts == asked.parts && self.rest.is_empty() && self.structs.is_empty();
        if is_same { Ok(value) } else { other() }
    }

    #[inline(always)]
    fn take<const N: usize>(&mut self, code: u8) -> Result<[u8; N]> {
        let Some((number, rest)) = self.rest.split_first_chunk() else { return other() };
        self.rest = rest;
        self.parts = with_part(self.parts, code);
        Ok(*number)
    }

    #[inline(always)]
    fn elements<V: Visitor<'de>>(&mut self, code: u8, count: usize, visitor: V) -> Result<V::Value> {
        self.parts = with_part(self.parts, code);
        let mut elements = Parts { reader: self, left: count };
        let value = visitor.visit_seq(&mut elements)?;
        if elements.left != 0 {
            return other();
        }
        self.parts = with_part(self.parts, rows::END);
        Ok(value)
    }
}

#[cold]
#[inline(never)]
fn other<T>() -> Result<T> {
    fail("an element of a list of rows asks for other parts than the first one")
}

macro_rules! numbers {
    ($($deserialize:ident $visit:ident $number:ident $kind:ident),*) => {$(
        #[inline(always)]
        fn $deserialize<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
            visitor.$visit($number::from_le_bytes(self.take(tag::$kind - tag::U8)?))
        }
    )*};
}

macro_rules! others {
    ($($deserialize:ident($($type:ty),*))*) => {$(
        fn $deserialize<V: Visitor<'de>>(self, $(_: $type,)* _: V) -> Result<V::Value> {
            other()
        }
    )*};
}

impl<'de> Deserializer<'de> for &mut RowReader<'de, '_> {
    type Error = Error;

    numbers! {
        deserialize_u8 visit_u8 u8 U8, deserialize_u16 visit_u16 u16 U16, deserialize_u32 visit_u32 u32 U32,
        deserialize_u64 visit_u64 u64 U64, deserialize_u128 visit_u128 u128 U128, deserialize_i8 visit_i8 i8 I8,
        deserialize_i16 visit_i16 i16 I16, deserialize_i32 visit_i32 i32 I32, deserialize_i64 visit_i64 i64 I64,
        deserialize_i128 visit_i128 i128 I128, deserialize_f32 visit_f32 f32 F32, deserialize_f64 visit_f64 f64 F64
    }

    others! {
        deserialize_any()
        deserialize_char()
        deserialize_str()
        deserialize_string()
        deserialize_bytes()
        deserialize_byte_buf()
        deserialize_option()
        deserialize_unit()
        deserialize_unit_struct(&'static str)
        deserialize_seq()
        deserialize_map()
        deserialize_enum(&'static str, &'static [&'static str])
        deserialize_identifier()
        deserialize_ignored_any()
    }

    #[inline(always)]
    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self.take(rows::BOOL)? {
            [0] => visitor.visit_bool(false),
            [1] => visitor.visit_bool(true),
            _ => fail("a bool that is none"),
        }
    }

    #[inline(always)]
    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value> {
        if name.starts_with('$') && !is_derived::<V>() { other() } else { visitor.visit_newtype_struct(self) }
    }

    #[inline(always)]
    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value> {
        self.elements(rows::SEQ, len, visitor)
    }

    #[inline(always)]
    fn deserialize_tuple_struct<V: Visitor<'de>>(self, _: &'static str, len: usize, visitor: V) -> Result<V::Value> {
        self.elements(rows::SEQ, len, visitor)
    }

    #[inline(always)]
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        match self.structs.split_first() {
            Some((wanted, rest)) if *wanted == (identity::id_of::<V>(), fields.as_ptr() as usize) => {
                self.structs = rest;
                self.elements(rows::STRUCT, fields.len(), visitor)
            }
            _ => other(),
        }
    }
}

/// The parts of a tuple or struct within a row.
struct Parts<'a, 'de, 'b> {
    reader: &'a mut RowReader<'de, 'b>,
    left: usize,
}

impl<'de> SeqAccess<'de> for Parts<'_, 'de, '_> {
    type Error = Error;

    #[inline(always)]
    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        seed.deserialize(&mut *self.reader).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left)
    }
}
