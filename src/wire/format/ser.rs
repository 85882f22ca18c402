//! Writing a value.

use super::names::{self, List, Names};
use super::parts::{self, LARGE, Part};
use super::rows::{self, Template};
use super::{Error, HAS_PARTS, HAS_TABLE, IS_DEEP, Result, SHALLOW, STACK_TO_GO_ON, VERSION, fail, no_stack, run, tag};
use crate::os::stack;
use crate::wire::buffers;
use crate::wire::limits::{self, Limit};
use serde::ser::{
    Serialize, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple,
    SerializeTupleStruct, SerializeTupleVariant, Serializer,
};
use std::cell::Cell;
use std::fmt::{self, Write as _};

thread_local! {
    static KEPT: Cell<Option<Box<Kept>>> = const { Cell::new(None) };
}

/// State that one message leaves for the next of its thread.
#[derive(Default)]
struct Kept {
    names: Names,
    /// The template of the rows of the sequence that is being written.
    template: Template,
    parts: Vec<Part>,
}

/// Appends `value` to `out`. After an error, or a panic of the value's own code, half of it may be there.
pub(crate) fn append<T: Serialize + ?Sized>(value: &T, out: &mut Vec<u8>) -> Result<()> {
    // At the end of a thread, and inside the value that is being written, there are none to be had.
    let mut kept = KEPT.try_with(Cell::take).ok().flatten().unwrap_or_default();
    kept.names.begin();
    kept.parts.clear();
    let start = out.len();
    out.push(VERSION);
    let limit = limits::depth();
    let Kept { names, template, parts } = &mut *kept;
    let mut writer = Writer { out, names, template, parts, start, depth: 0, deepest: 0, limit, is_broken: false };
    let written = value.serialize(&mut writer).and_then(|()| writer.finish());
    if kept.names.are_few() {
        let _ = KEPT.try_with(|cell| cell.set(Some(kept)));
    }
    written
}

/// Returns `true` if this thread keeps names for its next message.
#[cfg(test)]
pub(super) fn has_kept() -> bool {
    let kept = KEPT.take();
    let has_kept = kept.is_some();
    KEPT.set(kept);
    has_kept
}

/// serde's `Serializer`, by reference.
pub(super) struct Writer<'a> {
    out: &'a mut Vec<u8>,
    names: &'a mut Names,
    template: &'a mut Template,
    /// The large ones so far.
    parts: &'a mut Vec<Part>,
    /// Where the message begins.
    start: usize,
    depth: u32,
    deepest: u32,
    limit: u32,
    /// A part of it was not written whole.
    is_broken: bool,
}

impl Writer<'_> {
    /// The tables that follow the value.
    fn finish(&mut self) -> Result<()> {
        if self.is_broken {
            return fail("its own code went on after a part of it could not be written");
        }
        let start = self.start;
        let end = self.out.len() - start;
        let has_table = !self.names.is_unused();
        if has_table {
            self.out[start] |= HAS_TABLE;
            self.names.write_table(self.out)?;
        }
        if self.deepest > SHALLOW {
            self.out[start] |= IS_DEEP;
            self.out.extend_from_slice(&self.deepest.to_le_bytes());
        }
        if has_table {
            self.out.extend_from_slice(&(end as u64).to_le_bytes());
        }
        if (1..=parts::MOST).contains(&self.parts.len()) {
            self.out[start] |= HAS_PARTS;
            parts::append(self.parts, self.out);
        }
        self.check_size(0)
    }

    /// A tag and the lowest bytes of a number: `N` bytes in all, in one piece, so that there is one look for room.
    #[inline(always)]
    fn put<const N: usize>(&mut self, tag: u8, bits: u64) -> Result<()> {
        let bytes = (u128::from(bits) << 8 | u128::from(tag)).to_le_bytes();
        self.out.extend_from_slice(&bytes[..N]);
        Ok(())
    }

    /// Refuses a message that is going to be too large, before memory is taken for `more` bytes of it.
    #[inline]
    fn check_size(&self, more: usize) -> Result<()> {
        limits::check_size(self.out.len() - self.start + more).map_err(|why| Error::beyond(Limit::Size, why))
    }

    #[inline]
    fn blob(&mut self, tag: u8, bytes: &[u8]) -> Result<()> {
        self.check_size(bytes.len())?;
        self.make_room(10 + bytes.len());
        match u8::try_from(bytes.len()) {
            Ok(len) if len < 255 => self.out.extend_from_slice(&[tag, len]),
            _ => {
                self.out.extend_from_slice(&[tag, 255]);
                self.out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
                self.note_part(bytes.len(), 1);
            }
        }
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    /// One level down; returns the depth before.
    #[inline]
    fn down(&mut self) -> Result<u32> {
        let outer = self.depth;
        if outer >= self.limit {
            self.look_for_more()?;
        }
        self.depth = outer + 1;
        self.deepest = self.deepest.max(self.depth);
        Ok(outer)
    }

    /// The value may have raised the limit itself, for a part of it.
    #[cold]
    #[inline(never)]
    fn look_for_more(&mut self) -> Result<()> {
        self.limit = limits::depth();
        if self.depth < self.limit {
            return Ok(());
        }
        let levels = self.limit;
        Err(Error::beyond(
            Limit::Depth,
            format_args!(
                "it is nested deeper than {levels} levels; `multiprocess::with_depth_limit` or `Deep` raises this limit"
            ),
        ))
    }

    /// Writes what is part of the value that is being written.
    #[inline(always)]
    fn part<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        if run::kind::<T>().is_none() && self.depth >= SHALLOW && self.depth.is_multiple_of(SHALLOW) {
            return self.part_with_room(value);
        }
        value.serialize(&mut *self).inspect_err(|_| self.is_broken = true)
    }

    #[cold]
    #[inline(never)]
    fn part_with_room<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        let written = stack::with_room(STACK_TO_GO_ON, || value.serialize(&mut *self));
        written.unwrap_or_else(|error| Err(no_stack(error))).inspect_err(|_| self.is_broken = true)
    }

    #[inline]
    fn part_below<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        let outer = self.down()?;
        self.part(value)?;
        self.depth = outer;
        Ok(())
    }

    #[inline]
    fn variant(&mut self, tag: u8, name: &'static str) -> Result<()> {
        let list = self.names.root(name);
        let shape = self.names.shape(list)?;
        match u16::try_from(shape) {
            Ok(shape) if shape < names::WIDE => self.put::<3>(tag, shape.into()),
            _ => {
                self.put::<3>(tag, names::WIDE.into())?;
                self.out.extend_from_slice(&shape.to_le_bytes());
                Ok(())
            }
        }
    }

    fn run(&mut self, kind: u8, width: u8, count: usize, bytes: &[u8]) -> Result<()> {
        self.check_size(bytes.len())?;
        self.make_room(RUN_HEAD + bytes.len());
        self.out.extend_from_slice(&[tag::RUN, kind, width]);
        self.out.extend_from_slice(&(count as u64).to_le_bytes());
        self.note_part(bytes.len(), run::size(kind)?);
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    /// Makes room for `len` bytes. Behind something large there is some more, for what usually follows it: other fields, names,
    /// the end of a record. The whole would be copied to make room for that.
    #[inline]
    fn make_room(&mut self, len: usize) {
        if len < LARGE { self.out.reserve(len) } else { buffers::make_room(self.out, len + LEAST_ROOM) }
    }

    /// Notes a part that is about to be written, if it is large.
    #[inline]
    fn note_part(&mut self, len: usize, size: usize) {
        // One more than are listed tells that there are too many.
        if len >= LARGE && self.parts.len() <= parts::MOST {
            self.parts.push(Part { at: (self.out.len() - self.start) as u64, len: len as u64, size: size as u8 });
        }
    }

    /// What lies beyond `at` is about to move.
    #[cold]
    fn forget_parts(&mut self, at: usize) {
        let at = (at - self.start) as u64;
        self.parts.retain(|part| part.at < at);
    }
}

/// Tag, kind, width and count.
const RUN_HEAD: usize = 11;
/// Where the count of a run or a sequence stands, from its tag on.
const RUN_COUNT: usize = 3;
const SEQ_COUNT: usize = 1;
/// Tag and count.
const SEQ_HEAD: usize = 9;
/// So many bytes are made room for at once.
const LEAST_ROOM: usize = 4 << 10;
/// A tuple of more elements may be an array that is worth a run.
const LONGEST_TUPLE: usize = 16;

/// How a sequence is being written.
#[derive(Clone, Copy)]
enum Form {
    /// Not known before its first element.
    Open,
    /// `SEQ8` with this count.
    Short(u8),
    /// `SEQ` of one element so far, which decides whether these are rows.
    Second,
    /// `SEQ`; the count is written last.
    Long,
    /// `ROWS`; the count is written last.
    Rows,
    /// `RUN` of this kind; the count is written last.
    Run(u8),
}

pub(super) struct Elements<'b, 'a> {
    writer: &'b mut Writer<'a>,
    start: usize,
    count: u64,
    form: Form,
    /// The lower bound of the elements, by the value.
    expected: usize,
    /// The depth outside.
    outer: u32,
}

impl<'b, 'a> Elements<'b, 'a> {
    /// `len`: the number of elements that the value announces.
    #[inline(always)]
    fn short(writer: &'b mut Writer<'a>, len: u8) -> Result<Self> {
        let (outer, start) = (writer.down()?, writer.out.len());
        writer.out.extend_from_slice(&[tag::SEQ8, len]);
        Ok(Self { writer, start, count: 0, form: Form::Short(len), expected: 0, outer })
    }

    #[inline(always)]
    fn open(writer: &'b mut Writer<'a>, expected: usize) -> Result<Self> {
        let (outer, start) = (writer.down()?, writer.out.len());
        Ok(Self { writer, start, count: 0, form: Form::Open, expected, outer })
    }

    #[inline(always)]
    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        self.count += 1;
        if matches!(self.form, Form::Second) {
            self.begin_rows();
        }
        match self.form {
            Form::Short(_) | Form::Long | Form::Second => {}
            Form::Rows => {
                if self.row(value)? {
                    return Ok(());
                }
                self.untie_rows();
            }
            Form::Run(kind) if run::kind::<T>() == Some(kind) => {
                run::append(value, self.writer.out);
                return Ok(());
            }
            Form::Run(kind) => self.untie(kind)?,
            Form::Open => {
                if let Some(kind) = run::kind::<T>() {
                    self.form = Form::Run(kind);
                    self.writer.run(kind, 0, 0, &[])?;
                    run::append(value, self.writer.out);
                    return Ok(());
                }
                self.form = if self.expected >= rows::FEWEST { Form::Second } else { Form::Long };
                self.writer.put::<9>(tag::SEQ, 0)?;
            }
        }
        self.writer.part(value)
    }

    /// If the first element is a row, the others may be.
    #[inline(never)]
    fn begin_rows(&mut self) {
        self.form = Form::Long;
        let (out, names) = (&mut *self.writer.out, &mut *self.writer.names);
        let (template, mut row) = (&mut *self.writer.template, Vec::new());
        let is_row = template.learn(&out[self.start + SEQ_HEAD..], names, &mut row).is_some();
        if is_row {
            out.truncate(self.start);
            out.push(tag::ROWS);
            out.extend_from_slice(&[0; 8]);
            template.append(out);
            out.extend_from_slice(&row);
            template.end = out.len();
            self.form = Form::Rows;
        }
    }

    /// Writes `value`, if it is a row like the others.
    #[inline(always)]
    fn row<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<bool> {
        let end = self.writer.template.end + self.writer.template.size;
        if end > self.writer.out.len() {
            self.make_room(end)?;
        }
        let template = &mut *self.writer.template;
        let is_row = template.write(value, &mut self.writer.out[template.end..end]);
        if is_row {
            template.end = end;
        }
        Ok(is_row)
    }

    /// Makes room for rows: for one, and as many as are expected, but for no more than twice of what is there.
    #[cold]
    #[inline(never)]
    fn make_room(&mut self, end: usize) -> Result<()> {
        let expected = (self.expected as u64).saturating_sub(self.count) as usize;
        let wanted = expected.saturating_mul(self.writer.template.size);
        let len = end + wanted.min((end - self.start).max(LEAST_ROOM));
        self.writer.check_size(end - self.writer.out.len())?;
        self.writer.out.resize(len, 0);
        Ok(())
    }

    /// An element turned out to be no row: those so far are written again, as usual.
    #[cold]
    #[inline(never)]
    fn untie_rows(&mut self) {
        let (out, template) = (&mut *self.writer.out, &*self.writer.template);
        out.truncate(template.end);
        let rows = (self.count - 1) as usize * template.size;
        let rows = out.split_off(template.end - rows);
        out.truncate(self.start);
        out.push(tag::SEQ);
        out.extend_from_slice(&[0; 8]);
        rows.chunks(template.size).for_each(|row| template.expand(row, out));
        self.form = Form::Long;
    }

    /// The run turned out to be none: its elements so far are written again, each with its tag.
    #[cold]
    #[inline(never)]
    fn untie(&mut self, kind: u8) -> Result<()> {
        let size = run::size(kind)?;
        let numbers = self.writer.out.split_off(self.start + RUN_HEAD);
        self.writer.out.truncate(self.start);
        self.writer.put::<9>(tag::SEQ, 0)?;
        for number in numbers.chunks(size) {
            self.writer.out.push(kind);
            let start = self.writer.out.len();
            self.writer.out.extend_from_slice(number);
            if cfg!(target_endian = "big") {
                self.writer.out[start..].reverse();
            }
        }
        self.form = Form::Long;
        Ok(())
    }

    #[inline]
    fn finish(self) -> Result<()> {
        self.writer.depth = self.outer;
        let (out, start) = (&mut *self.writer.out, self.start);
        let mut write_count = |at: usize| out[start + at..start + at + 8].copy_from_slice(&self.count.to_le_bytes());
        match self.form {
            Form::Open => out.extend_from_slice(&[tag::SEQ8, 0]),
            Form::Short(len) if u64::from(len) == self.count => {}
            Form::Short(_) => {
                self.writer.forget_parts(start);
                lengthen(self.writer.out, start, self.count);
            }
            Form::Long | Form::Second => write_count(SEQ_COUNT),
            Form::Rows => {
                write_count(SEQ_COUNT);
                out.truncate(self.writer.template.end);
            }
            Form::Run(_) => write_count(RUN_COUNT),
        }
        Ok(())
    }
}

/// Turns the `SEQ8` at `start`, which has another count, into a `SEQ`.
#[cold]
#[inline(never)]
fn lengthen(out: &mut Vec<u8>, start: usize, count: u64) {
    out.splice(start..start + 2, std::iter::once(tag::SEQ).chain(count.to_le_bytes()));
}

pub(super) struct Entries<'b, 'a> {
    writer: &'b mut Writer<'a>,
    start: usize,
    count: u64,
    outer: u32,
}

pub(super) struct Fields<'b, 'a> {
    writer: &'b mut Writer<'a>,
    start: usize,
    list: List,
    outer: u32,
}

macro_rules! leaves {
    ($($serialize:ident $number:ident, $kind:ident $bits:expr;)*) => {$(
        #[inline(always)]
        fn $serialize(self, $number: $number) -> Result<()> {
            self.put::<{ 1 + size_of::<$number>() }>(tag::$kind, $bits)
        }
    )*};
}

impl<'b, 'a> Serializer for &'b mut Writer<'a> {
    type Ok = ();
    type Error = Error;
    type SerializeSeq = Elements<'b, 'a>;
    type SerializeTuple = Elements<'b, 'a>;
    type SerializeTupleStruct = Elements<'b, 'a>;
    type SerializeTupleVariant = Elements<'b, 'a>;
    type SerializeMap = Entries<'b, 'a>;
    type SerializeStruct = Fields<'b, 'a>;
    type SerializeStructVariant = Fields<'b, 'a>;

    leaves! {
        serialize_u8 u8, U8 u8.into();
        serialize_u16 u16, U16 u16.into();
        serialize_u32 u32, U32 u32.into();
        serialize_u64 u64, U64 u64;
        serialize_i8 i8, I8 i8.cast_unsigned().into();
        serialize_i16 i16, I16 i16.cast_unsigned().into();
        serialize_i32 i32, I32 i32.cast_unsigned().into();
        serialize_i64 i64, I64 i64.cast_unsigned();
        serialize_f32 f32, F32 f32.to_bits().into();
        serialize_f64 f64, F64 f64.to_bits();
    }

    fn serialize_u128(self, value: u128) -> Result<()> {
        self.out.push(tag::U128);
        self.out.extend_from_slice(&value.to_le_bytes());
        Ok(())
    }

    fn serialize_i128(self, value: i128) -> Result<()> {
        self.out.push(tag::I128);
        self.out.extend_from_slice(&value.to_le_bytes());
        Ok(())
    }

    #[inline]
    fn serialize_bool(self, value: bool) -> Result<()> {
        self.out.push(if value { tag::TRUE } else { tag::FALSE });
        Ok(())
    }

    #[inline]
    fn serialize_char(self, value: char) -> Result<()> {
        self.put::<5>(tag::CHAR, u32::from(value).into())
    }

    #[inline]
    fn serialize_str(self, value: &str) -> Result<()> {
        self.blob(tag::STR, value.as_bytes())
    }

    fn collect_str<T: fmt::Display + ?Sized>(self, value: &T) -> Result<()> {
        let start = self.out.len();
        self.out.extend_from_slice(&[tag::STR, 0]);
        if write!(Text(self.out), "{value}").is_err() {
            return fail("a value's own Display failed");
        }
        match self.out.len() - start - 2 {
            len @ ..255 => self.out[start + 1] = len as u8,
            len => {
                self.out[start + 1] = 255;
                self.out.splice(start + 2..start + 2, (len as u64).to_le_bytes());
            }
        }
        Ok(())
    }

    #[inline]
    fn serialize_bytes(self, value: &[u8]) -> Result<()> {
        self.blob(tag::BYTES, value)
    }

    #[inline]
    fn serialize_none(self) -> Result<()> {
        self.out.push(tag::NONE);
        Ok(())
    }

    #[inline]
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<()> {
        self.out.push(tag::SOME);
        self.part_below(value)
    }

    #[inline]
    fn serialize_unit(self) -> Result<()> {
        self.out.push(tag::UNIT);
        Ok(())
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<()> {
        self.serialize_unit()
    }

    #[inline]
    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<()> {
        value.serialize(self)
    }

    #[inline]
    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<()> {
        self.variant(tag::UNIT_VARIANT, variant)
    }

    #[inline]
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<()> {
        self.variant(tag::VARIANT, variant)?;
        self.part_below(value)
    }

    #[inline]
    fn serialize_seq(self, len: Option<usize>) -> Result<Elements<'b, 'a>> {
        Elements::open(self, len.unwrap_or(0))
    }

    #[inline]
    fn serialize_tuple(self, len: usize) -> Result<Elements<'b, 'a>> {
        if len <= LONGEST_TUPLE { Elements::short(self, len as u8) } else { Elements::open(self, len) }
    }

    #[inline]
    fn serialize_tuple_struct(self, _: &'static str, len: usize) -> Result<Elements<'b, 'a>> {
        self.serialize_tuple(len)
    }

    #[inline]
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        len: usize,
    ) -> Result<Elements<'b, 'a>> {
        self.variant(tag::VARIANT, variant)?;
        let outer = self.down()?;
        Ok(Elements { outer, ..self.serialize_tuple(len)? })
    }

    #[inline]
    fn serialize_map(self, _: Option<usize>) -> Result<Entries<'b, 'a>> {
        let (outer, start) = (self.down()?, self.out.len());
        self.put::<9>(tag::MAP, 0)?;
        Ok(Entries { writer: self, start, count: 0, outer })
    }

    #[inline(always)]
    fn serialize_struct(self, name: &'static str, _: usize) -> Result<Fields<'b, 'a>> {
        let (outer, start, list) = (self.down()?, self.out.len(), self.names.root(name));
        self.put::<3>(tag::STRUCT, 0)?;
        Ok(Fields { writer: self, start, list, outer })
    }

    #[inline]
    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        len: usize,
    ) -> Result<Fields<'b, 'a>> {
        self.variant(tag::VARIANT, variant)?;
        let outer = self.down()?;
        Ok(Fields { outer, ..self.serialize_struct(variant, len)? })
    }

    #[inline]
    fn collect_seq<I>(self, iter: I) -> Result<()>
    where
        I: IntoIterator<Item: Serialize>,
    {
        if let Some(seen) = run::see(&iter) {
            return self.run(seen.kind, seen.width, seen.count, seen.bytes);
        }
        let mut iter = iter.into_iter();
        let mut elements = Elements::open(self, iter.size_hint().0)?;
        iter.try_for_each(|element| elements.element(&element))?;
        elements.finish()
    }
}

/// Text that is appended where it belongs.
struct Text<'a>(&'a mut Vec<u8>);

impl fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

macro_rules! elements {
    ($($compound:ident $serialize:ident),*) => {$(
        impl $compound for Elements<'_, '_> {
            type Ok = ();
            type Error = Error;
            #[inline(always)]
            fn $serialize<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
                self.element(value)
            }
            #[inline]
            fn end(self) -> Result<()> {
                self.finish()
            }
        }
    )*};
}

elements! {
    SerializeSeq serialize_element, SerializeTuple serialize_element, SerializeTupleStruct serialize_field,
    SerializeTupleVariant serialize_field
}

impl SerializeMap for Entries<'_, '_> {
    type Ok = ();
    type Error = Error;

    #[inline]
    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<()> {
        self.count += 1;
        self.writer.part(key)
    }

    #[inline]
    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        self.writer.part(value)
    }

    #[inline]
    fn end(self) -> Result<()> {
        self.writer.depth = self.outer;
        let at = self.start + SEQ_COUNT;
        self.writer.out[at..at + 8].copy_from_slice(&self.count.to_le_bytes());
        Ok(())
    }
}

macro_rules! fields {
    ($($compound:ident),*) => {$(
        impl $compound for Fields<'_, '_> {
            type Ok = ();
            type Error = Error;
            #[inline(always)]
            fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<()> {
                self.list = self.writer.names.longer(self.list, name);
                self.writer.part(value)
            }
            #[inline]
            fn end(self) -> Result<()> {
                self.finish()
            }
        }
    )*};
}

fields! { SerializeStruct, SerializeStructVariant }

impl Fields<'_, '_> {
    #[inline(always)]
    fn finish(self) -> Result<()> {
        self.writer.depth = self.outer;
        let shape = self.writer.names.shape_of_struct(self.list)?;
        let at = self.start + 1;
        match u16::try_from(shape) {
            Ok(shape) if shape < names::WIDE => self.writer.out[at..at + 2].copy_from_slice(&shape.to_le_bytes()),
            _ => {
                self.writer.forget_parts(at);
                widen(self.writer.out, at, shape);
            }
        }
        Ok(())
    }
}

/// Puts a shape of many in the place of two bytes.
#[cold]
#[inline(never)]
fn widen(out: &mut Vec<u8>, at: usize, shape: u32) {
    let wide = names::WIDE.to_le_bytes().into_iter().chain(shape.to_le_bytes());
    out.splice(at..at + 2, wide);
}
