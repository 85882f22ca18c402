//! Reading a value.

use super::names::WIDE;
use super::parts::{self, Apart, Parted};
use super::row_reader::{Asked, RowReader};
use super::rows::{self, Layout};
use super::run::{self, Arrays, MOST_OPTIONS, Run, all_taken, one_less};
use super::visitors::{is_buffer, is_derived};
use super::{
    Error, HAS_PARTS, HAS_TABLE, IS_DEEP, Result, SHALLOW, STACK_OF_LEVEL, STACK_TO_GO_ON, VERSION, fail, no_stack, tag,
};
use crate::os::{identity, stack};
use crate::wire::limits::DEEPEST;
use crate::wire::list::List;
use serde::de::value::{BorrowedStrDeserializer, MapAccessDeserializer};
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess, VariantAccess,
    Visitor,
};
use std::any::TypeId;
use std::cell::Cell;

/// The value that `message` is. It may borrow from it.
pub(crate) fn from_slice<'de, T: Deserialize<'de>>(message: &'de [u8]) -> Result<T> {
    read(message, &mut [])
}

/// The same for a message whose large parts are by themselves. The value takes them over where it can.
pub(crate) fn from_parted<'de, T: Deserialize<'de>>(message: &'de mut Parted) -> Result<T> {
    read(&message.rest, &mut message.apart)
}

fn read<'de, T: Deserialize<'de>>(message: &'de [u8], apart: &'de mut [Apart]) -> Result<T> {
    let (&head, rest) = message.split_first().ok_or_else(|| Error::new("the message is empty"))?;
    if head & !(HAS_TABLE | IS_DEEP | HAS_PARTS) != VERSION {
        return fail("the message is of another version of the format");
    }
    let mut reader = Reader::<false>::new(rest);
    let others = reader.take_trailer(message.len(), head, apart)?;
    let (flat, depth) = (is_flat(reader.rest), reader.depth);
    let value = match depth {
        SHALLOW if size_of::<T>() <= LARGE && (flat || others <= SMALL) => T::deserialize(&mut reader),
        _ => {
            let levels = if depth == SHALLOW { stack_of_value::<T>() } else { stack_of_levels::<T>(depth) };
            let least = STACK_TO_GO_ON.saturating_add(levels);
            // In a `Box`, and in serde's own buffer, there may be values that take as much memory as the message. Where there
            // is no such stack, the least has to do.
            let of_values = others.saturating_mul(COPIES).min(MOST_STACK_OF_VALUES);
            // The value itself needs memory, too.
            let whole = least.saturating_add(of_values);
            let of_values = if stack::has_room(whole, whole) { of_values } else { 0 };
            let mut read = || T::deserialize(&mut reader);
            let read = stack::with_room(least.saturating_add(of_values), &mut read)
                .or_else(|_| stack::with_room(least, &mut read));
            read.unwrap_or_else(no_stack)
        }
    };
    let (value, left) = (value?, reader.rest.len() + reader.apart.len());
    reader.keep_shapes();
    if left == 0 { Ok(value) } else { fail("there are more bytes than the value has") }
}

/// A message of so many bytes holds no values that are large.
const SMALL: usize = 4 << 10;

/// Whether a value is one list of numbers, or of rows of numbers.
fn is_flat(value: &[u8]) -> bool {
    matches!(value, [tag::RUN | tag::ROWS, ..])
}

/// Larger values are reckoned with where there must be stack enough: without optimisation, each level of code that reads one
/// keeps some copies of it there.
const LARGE: usize = 1 << 10;
const COPIES: usize = if cfg!(debug_assertions) { 24 } else { 8 };
const MOST_STACK_OF_VALUES: usize = 1 << 30;

/// Stack that the copies of a value may take.
const fn stack_of_value<T>() -> usize {
    if size_of::<T>() > LARGE { COPIES.saturating_mul(size_of::<T>()) } else { 0 }
}

/// Stack that so many levels of `T` may take. Where serde's own buffer is read, the values in it are not seen here: they may be
/// as large as the whole.
fn stack_of_levels<T>(depth: u32) -> usize {
    let of_values = (depth as usize).saturating_mul(stack_of_value::<T>()).min(MOST_STACK_OF_VALUES);
    depth as usize * STACK_OF_LEVEL + of_values
}

/// Returns `true` if `D` reads each part of a message once, from the message itself. Rows may be read a second time, so there are
/// no handles in them: see `rows::is_attempt`.
pub(crate) fn reads_once<D>() -> bool {
    identity::id_of::<D>() == identity::id_of::<&mut Reader<'_>>()
}

/// A row of the table.
struct Shape {
    /// Where its names are in the table, and how many bytes they take.
    at: usize,
    len: usize,
    count: usize,
    /// The visitor that was seen to want just these names in this order, and where its names are.
    matched: Option<(TypeId, usize)>,
}

thread_local! {
    /// Room for the next message's shapes.
    static SHAPES: Cell<Vec<Shape>> = const { Cell::new(Vec::new()) };
}

/// So many shapes are kept room for.
const SHAPES_KEPT: usize = 1 << 10;

/// serde's `Deserializer`, by reference. Within rows, tags come from their template.
pub(super) struct Reader<'de, const ROW: bool = false> {
    rest: &'de [u8],
    /// The rest of the template of a row.
    template: &'de [u8],
    table: &'de [u8],
    shapes: Vec<Shape>,
    /// Large parts that are still to come, by themselves.
    apart: std::slice::IterMut<'de, Apart>,
    /// How many bytes the value has, the version and the rest of the message included.
    end: usize,
    /// Levels that may still follow.
    depth: u32,
    /// How many bytes were left where a value was last read as an option, and how often it may still be.
    bare: (usize, u32),
    /// The requests of the type of the first row so far, while that is read.
    asked: Option<Box<Asked>>,
}

fn cut<'de>(bytes: &mut &'de [u8], len: usize) -> Result<&'de [u8]> {
    let Some((cut, rest)) = bytes.split_at_checked(len) else { return fail("the message ends too early") };
    *bytes = rest;
    Ok(cut)
}

#[inline(always)]
fn cut_array<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N]> {
    let Some((cut, rest)) = bytes.split_first_chunk::<N>() else { return fail("the message ends too early") };
    *bytes = rest;
    Ok(*cut)
}

/// The last `N` bytes.
fn cut_end<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N]> {
    let Some((rest, cut)) = bytes.split_last_chunk::<N>() else { return fail("the message ends too early") };
    *bytes = rest;
    Ok(*cut)
}

/// The name that `names`, part of a table, begin with.
#[inline]
fn cut_name<'de>(names: &mut &'de [u8]) -> Result<&'de str> {
    let len = u16::from_le_bytes(cut_array(names)?);
    let name = cut(names, usize::from(len))?;
    std::str::from_utf8(name).or_else(|_| fail("the name of a field is not UTF-8"))
}

/// Returns `true` if the name that `names` begin with is this one. It is taken off then.
#[inline(always)]
fn cut_if(names: &mut &[u8], name: &[u8]) -> bool {
    let Some((len, rest)) = names.split_first_chunk() else { return false };
    let rest = (usize::from(u16::from_le_bytes(*len)) == name.len()).then(|| rest.strip_prefix(name)).flatten();
    rest.inspect(|rest| *names = rest).is_some()
}

impl<'de, const ROW: bool> Reader<'de, ROW> {
    fn new(rest: &'de [u8]) -> Self {
        Self {
            rest,
            template: &[],
            table: &[],
            shapes: Vec::new(),
            apart: Default::default(),
            end: 0,
            depth: SHALLOW,
            bare: (0, 0),
            asked: None,
        }
    }
}

impl<'de> Reader<'de> {
    /// Takes what follows the value off the end, and returns how many bytes there are beside large parts.
    fn take_trailer(&mut self, len: usize, head: u8, apart: &'de mut [Apart]) -> Result<usize> {
        let large: usize = apart.iter().map(|part| part.list.bytes().len()).sum();
        let mut listed = 0;
        if head & HAS_PARTS != 0 {
            listed = parts::cut(&mut self.rest, large)?;
            self.apart = apart.iter_mut();
        }
        self.take_table(len + large, large, head)?;
        self.end = 1 + self.rest.len();
        Ok((self.rest.len() + large).saturating_sub(listed))
    }

    /// `large`: how many bytes of the `len` are by themselves.
    fn take_table(&mut self, len: usize, large: usize, head: u8) -> Result<()> {
        let mut table_at = None;
        if head & HAS_TABLE != 0 {
            table_at = Some(u64::from_le_bytes(cut_end(&mut self.rest)?));
        }
        if head & IS_DEEP != 0 {
            self.depth = u32::from_le_bytes(cut_end(&mut self.rest)?);
            // Each level takes a byte.
            if self.depth > DEEPEST || self.depth as usize > len {
                return fail("the message says that it is nested deeper than it can be");
            }
        }
        let Some(table_at) = table_at else { return Ok(()) };
        // Counted from the version on.
        let at = usize::try_from(table_at).ok().and_then(|at| at.checked_sub(1 + large));
        let Some((value, table)) = at.and_then(|at| self.rest.split_at_checked(at)) else {
            return fail("the table of names is beyond the message");
        };
        (self.rest, self.table) = (value, table);
        self.read_table()
    }

    fn read_table(&mut self) -> Result<()> {
        let mut rest = self.table;
        let count = u32::from_le_bytes(cut_array(&mut rest)?) as usize;
        if count > rest.len() / 6 {
            return fail("the table of names ends too early");
        }
        self.shapes = SHAPES.try_with(Cell::take).unwrap_or_default();
        self.shapes.clear();
        self.shapes.reserve(count);
        for _ in 0..count {
            let count = usize::from(u16::from_le_bytes(cut_array(&mut rest)?));
            let len = u32::from_le_bytes(cut_array(&mut rest)?) as usize;
            let at = self.table.len() - rest.len();
            cut(&mut rest, len)?;
            self.shapes.push(Shape { at, len, count, matched: None });
        }
        Ok(())
    }

    fn keep_shapes(&mut self) {
        if (1..=SHAPES_KEPT).contains(&self.shapes.capacity()) {
            let shapes = std::mem::take(&mut self.shapes);
            let _ = SHAPES.try_with(|kept| kept.set(shapes));
        }
    }
}

impl<'de, const ROW: bool> Reader<'de, ROW> {
    /// Where tags come from.
    #[inline(always)]
    fn tags(&mut self) -> &mut &'de [u8] {
        if ROW { &mut self.template } else { &mut self.rest }
    }

    #[inline(always)]
    fn peek(&mut self) -> Result<u8> {
        match self.tags().first() {
            Some(tag) => Ok(*tag),
            None => fail("the message ends too early"),
        }
    }

    /// Takes the tag, if it is this one.
    #[inline(always)]
    fn is_next(&mut self, tag: u8) -> bool {
        let Some((next, rest)) = self.tags().split_first() else { return false };
        let is_it = *next == tag;
        if is_it {
            *self.tags() = rest;
        }
        is_it
    }

    #[inline(always)]
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        cut_array(&mut self.rest)
    }

    /// A tag, or what belongs to one.
    #[inline(always)]
    fn head<const N: usize>(&mut self) -> Result<[u8; N]> {
        cut_array(self.tags())
    }

    /// Returns how many elements follow, of which each takes a byte at least.
    #[inline(always)]
    fn count(&mut self) -> Result<usize> {
        let count = u64::from_le_bytes(self.array()?);
        match usize::try_from(count) {
            Ok(count) if count <= self.rest.len() => Ok(count),
            _ => fail("the message ends too early: it has fewer bytes than elements"),
        }
    }

    #[inline]
    fn blob(&mut self) -> Result<&'de [u8]> {
        let [len] = self.array()?;
        if len < 255 {
            return cut(&mut self.rest, usize::from(len));
        }
        self.long()
    }

    /// Bytes with a length before them.
    fn long(&mut self) -> Result<&'de [u8]> {
        let len = usize::try_from(u64::from_le_bytes(self.array()?)).unwrap_or(usize::MAX);
        self.cut_or_take(len).map(Run::bytes)
    }

    /// The next `len` bytes, which may be by themselves.
    #[inline(always)]
    fn cut_or_take(&mut self, len: usize) -> Result<Run<'de>> {
        if !ROW
            && self.apart.len() > 0
            && len >= parts::LARGE
            && let Some(list) = self.next_apart(len)
        {
            return Ok(Run::Apart(list));
        }
        cut(&mut self.rest, len).map(Run::Here)
    }

    /// The next large part, if it belongs here.
    #[cold]
    fn next_apart(&mut self, len: usize) -> Option<&'de mut List> {
        let at = self.end.checked_sub(self.rest.len())?;
        let next = self.apart.as_slice().first()?;
        if next.at != at || next.list.bytes().len() != len {
            return None;
        }
        self.apart.next().map(|part| &mut part.list)
    }

    /// Whether a long text, or long bytes, come next in a message whose large parts are by themselves.
    #[inline(always)]
    fn has_part(&self, tag: u8) -> bool {
        !ROW && self.apart.len() > 0 && self.rest.starts_with(&[tag, 255])
    }

    /// Takes it over.
    #[cold]
    fn take_part(&mut self) -> Result<Vec<u8>> {
        cut(&mut self.rest, 2)?;
        let len = usize::try_from(u64::from_le_bytes(self.array()?)).unwrap_or(usize::MAX);
        Ok(self.cut_or_take(len)?.take_list())
    }

    #[inline]
    fn text(&mut self) -> Result<&'de str> {
        std::str::from_utf8(self.blob()?).or_else(|_| fail("a text is not UTF-8"))
    }

    /// Counts what is no option and is read as one.
    fn count_bare(&mut self) -> Result<()> {
        let left = self.rest.len() + self.template.len();
        let options = if self.bare.0 == left { self.bare.1 } else { MOST_OPTIONS };
        self.asked.iter_mut().for_each(|asked| asked.for_something_else());
        self.bare = (left, one_less(options)?);
        Ok(())
    }

    /// Skips `Some`: a reader that asks for something other than an option gets the content.
    #[inline]
    fn skip_some(&mut self) {
        while self.is_next(tag::SOME) {}
    }

    #[inline(always)]
    fn down<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if ROW {
            // A template is nested no deeper than `LEVELS`.
            return read(self);
        }
        if self.depth == 0 {
            return fail("it is nested deeper than it says");
        }
        self.depth -= 1;
        let is_far = self.depth > 0 && self.depth.is_multiple_of(SHALLOW);
        let read = if is_far || size_of::<T>() > LARGE { self.with_room(read) } else { read(self) };
        self.depth += 1;
        read
    }

    /// Reads a part of the value.
    #[inline(always)]
    fn part<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value> {
        if ROW || size_of::<S::Value>() <= LARGE {
            return seed.deserialize(self);
        }
        self.large_part(seed)
    }

    /// Reads a part that is large, and may be read from serde's own buffer, level by level.
    #[cold]
    #[inline(never)]
    fn large_part<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value> {
        let room = STACK_TO_GO_ON + stack_of_levels::<S::Value>(self.depth + 1);
        stack::with_room(room, || seed.deserialize(self)).unwrap_or_else(no_stack)
    }

    /// Code of users, and a large value, may need more stack than was reckoned with at the start.
    #[cold]
    #[inline(never)]
    fn with_room<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let room = STACK_TO_GO_ON.saturating_add(stack_of_value::<T>());
        stack::with_room(room, || read(self)).unwrap_or_else(no_stack)
    }

    #[inline(always)]
    fn shape(&mut self) -> Result<usize> {
        let narrow = u16::from_le_bytes(self.head()?);
        let shape = if narrow == WIDE { u32::from_le_bytes(self.head()?) as usize } else { usize::from(narrow) };
        if shape < self.shapes.len() { Ok(shape) } else { fail("there is no such shape of a struct in the message") }
    }

    fn names(&self, shape: usize) -> (&'de [u8], usize) {
        match self.shapes.get(shape) {
            Some(shape) => (self.table.get(shape.at..shape.at + shape.len).unwrap_or_default(), shape.count),
            None => (&[], 0),
        }
    }

    /// The name of a variant.
    fn variant_name(&self, shape: usize) -> Result<&'de str> {
        let (mut names, count) = self.names(shape);
        if count == 1 { cut_name(&mut names) } else { fail("a variant that has no name") }
    }

    /// Returns `true` if `V` can read the fields by position: whether it wants just the fields that are there.
    #[inline(always)]
    fn is_positional<V>(&mut self, shape: usize, fields: &'static [&'static str]) -> bool {
        let wanted = Some((identity::id_of::<V>(), fields.as_ptr() as usize));
        self.shapes.get(shape).is_some_and(|shape| shape.matched == wanted && shape.count == fields.len())
            || self.is_positional_at_first::<V>(shape, fields)
    }

    #[inline(never)]
    fn is_positional_at_first<V>(&mut self, shape: usize, fields: &'static [&'static str]) -> bool {
        let (mut names, count) = self.names(shape);
        let is_same = is_derived::<V>()
            && count == fields.len()
            && fields.iter().all(|field| cut_if(&mut names, field.as_bytes()));
        if is_same && let Some(shape) = self.shapes.get_mut(shape) {
            shape.matched = Some((identity::id_of::<V>(), fields.as_ptr() as usize));
        }
        is_same
    }

    #[inline(always)]
    fn elements<V: Visitor<'de>>(&mut self, count: usize, visitor: V) -> Result<V::Value> {
        self.down(|reader| {
            let mut elements = Elements { reader, left: count };
            let value = visitor.visit_seq(&mut elements)?;
            all_taken(elements.left == 0, value)
        })
    }

    fn entries<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        let count = self.count()?;
        self.down(|reader| {
            let mut entries = Elements { reader, left: count };
            let value = visitor.visit_map(&mut entries)?;
            all_taken(entries.left == 0, value)
        })
    }

    fn by_names<V: Visitor<'de>>(&mut self, shape: usize, visitor: V) -> Result<V::Value> {
        let (names, left) = self.names(shape);
        self.down(|reader| {
            let mut fields = Fields { reader, names, left };
            let value = visitor.visit_map(&mut fields)?;
            all_taken(fields.left == 0, value)
        })
    }

    #[inline(always)]
    fn run<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        let [kind, width] = self.array()?;
        let count = usize::try_from(u64::from_le_bytes(self.array()?)).unwrap_or(usize::MAX);
        let size = run::size(kind)? * usize::from(width.max(1));
        let len = count.saturating_mul(size);
        let mut run = self.cut_or_take(len)?;
        if let Some(list) = run::list::<V>(kind, width, &mut run) {
            return Ok(list);
        }
        let bytes = run.bytes();
        if width == 0 {
            return run::visit(kind, bytes, visitor);
        }
        let mut arrays = Arrays { bytes, kind, size };
        let value = visitor.visit_seq(&mut arrays)?;
        all_taken(arrays.bytes.is_empty(), value)
    }

    fn rows<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        let count = self.count()?;
        let [len] = self.array()?;
        let template = cut(&mut self.rest, usize::from(len))?;
        let mut left = template;
        let fields = |shape: u16| if shape < WIDE { self.names(usize::from(shape)).1 } else { 0 };
        let layout = Layout::read(&mut left, &fields)?;
        let rest = cut(&mut self.rest, count.saturating_mul(layout.size))?;
        let value = self.down(|reader| reader.each_row(template, rest, layout, visitor))?;
        all_taken(left.is_empty(), value)
    }

    #[inline]
    fn each_row<V: Visitor<'de>>(
        &mut self,
        template: &'de [u8],
        rest: &'de [u8],
        layout: Layout,
        visitor: V,
    ) -> Result<V::Value> {
        let mut reader = Reader { table: self.table, shapes: std::mem::take(&mut self.shapes), ..Reader::new(&[]) };
        reader.depth = self.depth;
        let mut rows = Rows { reader: &mut reader, template, rest, layout, is_first: true, exact: None };
        let value = visitor.visit_seq(&mut rows);
        let is_all = rows.rest.is_empty();
        self.shapes = reader.shapes;
        all_taken(is_all, value?)
    }

    /// Notes a part that was asked for just as it was written.
    #[inline(always)]
    fn note(&mut self, code: u8) {
        if ROW && let Some(asked) = &mut self.asked {
            asked.for_part(code);
        }
    }

    fn bool_of_row(&mut self) -> Result<bool> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => fail("a bool that is none"),
        }
    }

    /// A value for a visitor that asked for another type than the usual, or for any.
    #[inline(never)]
    fn unusual<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        self.skip_some();
        self.any(visitor)
    }

    /// The key of a map that is read as a struct, where the key is an option. serde's buffer of keys keeps what is in the
    /// option, but not the option: one of nothing would become nothing.
    #[cold]
    fn identifier_in_option<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        match self.peek()? {
            tag::NONE | tag::UNIT | tag::SOME => fail("a key of a flattened map is `Some` of nothing, or of an option"),
            _ => self.deserialize_str(visitor),
        }
    }

    #[inline(never)]
    fn any<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        let [tag] = self.head()?;
        macro_rules! number {
            ($number:ty, $visit:ident) => {
                visitor.$visit(<$number>::from_le_bytes(self.array()?))
            };
        }
        match tag {
            tag::NONE => visitor.visit_none(),
            tag::SOME => self.down(|reader| visitor.visit_some(reader)),
            tag::UNIT => visitor.visit_unit(),
            tag::TRUE if ROW => visitor.visit_bool(self.bool_of_row()?),
            tag::FALSE => visitor.visit_bool(false),
            tag::TRUE => visitor.visit_bool(true),
            tag::U8 => number!(u8, visit_u8),
            tag::U16 => number!(u16, visit_u16),
            tag::U32 => number!(u32, visit_u32),
            tag::U64 => number!(u64, visit_u64),
            tag::I8 => number!(i8, visit_i8),
            tag::I16 => number!(i16, visit_i16),
            tag::I32 => number!(i32, visit_i32),
            tag::I64 => number!(i64, visit_i64),
            tag::F32 => number!(f32, visit_f32),
            tag::F64 => number!(f64, visit_f64),
            // serde's own buffer has no place for 128 bits.
            tag::U128 => match u128::from_le_bytes(self.array()?) {
                small if u64::try_from(small).is_ok() => visitor.visit_u64(small as u64),
                large => visitor.visit_u128(large),
            },
            tag::I128 => match i128::from_le_bytes(self.array()?) {
                small if i64::try_from(small).is_ok() => visitor.visit_i64(small as i64),
                large => visitor.visit_i128(large),
            },
            tag::CHAR => match char::from_u32(u32::from_le_bytes(self.array()?)) {
                Some(char) => visitor.visit_char(char),
                None => fail("a character that is none"),
            },
            tag::STR => visitor.visit_borrowed_str(self.text()?),
            // As a sequence they cannot be taken for a text by an untagged enum.
            tag::BYTES => match self.blob()? {
                text if is_buffer::<V>() && std::str::from_utf8(text).is_ok() => run::visit(tag::U8, text, visitor),
                bytes => visitor.visit_borrowed_bytes(bytes),
            },
            tag::SEQ8 => {
                let [count] = self.head()?;
                self.elements(usize::from(count), visitor)
            }
            tag::SEQ => {
                let count = self.count()?;
                self.elements(count, visitor)
            }
            tag::RUN => self.run(visitor),
            tag::ROWS => self.rows(visitor),
            tag::MAP => self.entries(visitor),
            tag::STRUCT => {
                let shape = self.shape()?;
                self.by_names(shape, visitor)
            }
            tag::UNIT_VARIANT => {
                let shape = self.shape()?;
                visitor.visit_borrowed_str(self.variant_name(shape)?)
            }
            tag::VARIANT => {
                let shape = self.shape()?;
                self.variant_name(shape)?;
                self.by_names(shape, visitor)
            }
            _ => fail("there is a tag that is none"),
        }
    }
}

macro_rules! leaves {
    ($($deserialize:ident $visit:ident $number:ty, $kind:ident;)*) => {$(
        #[inline(always)]
        fn $deserialize<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
            if ROW {
                if self.is_next(tag::$kind) {
                    self.note(tag::$kind - tag::U8);
                    return visitor.$visit(<$number>::from_le_bytes(self.array()?));
                }
            } else if let Some((head, rest)) = self.rest.split_first_chunk::<{ 1 + size_of::<$number>() }>()
                && let [tag::$kind, number @ ..] = head
            {
                self.rest = rest;
                return visitor.$visit(<$number>::from_le_bytes(*number));
            }
            self.unusual(visitor)
        }
    )*};
}

impl<'de, const ROW: bool> Deserializer<'de> for &mut Reader<'de, ROW> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.any(visitor)
    }

    leaves! {
        deserialize_u8 visit_u8 u8, U8;
        deserialize_u16 visit_u16 u16, U16;
        deserialize_u32 visit_u32 u32, U32;
        deserialize_u64 visit_u64 u64, U64;
        deserialize_u128 visit_u128 u128, U128;
        deserialize_i8 visit_i8 i8, I8;
        deserialize_i16 visit_i16 i16, I16;
        deserialize_i32 visit_i32 i32, I32;
        deserialize_i64 visit_i64 i64, I64;
        deserialize_i128 visit_i128 i128, I128;
        deserialize_f32 visit_f32 f32, F32;
        deserialize_f64 visit_f64 f64, F64;
    }

    #[inline]
    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if ROW && self.is_next(tag::TRUE) {
            self.note(rows::BOOL);
            return visitor.visit_bool(self.bool_of_row()?);
        }
        match self.rest {
            [tag @ (tag::TRUE | tag::FALSE), rest @ ..] if !ROW => {
                self.rest = rest;
                visitor.visit_bool(*tag == tag::TRUE)
            }
            _ => self.unusual(visitor),
        }
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.unusual(visitor)
    }

    #[inline]
    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.is_next(tag::STR) {
            return visitor.visit_borrowed_str(self.text()?);
        }
        self.unusual(visitor)
    }

    #[inline]
    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.has_part(tag::STR) {
            let bytes = self.take_part()?;
            return visitor.visit_string(String::from_utf8(bytes).or_else(|_| fail("a text is not UTF-8"))?);
        }
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.skip_some();
        if self.is_next(tag::BYTES) {
            return visitor.visit_borrowed_bytes(self.blob()?);
        }
        if let [tag::RUN, tag::U8, 0, rest @ ..] = self.rest
            && !ROW
        {
            self.rest = rest;
            return visitor.visit_borrowed_bytes(self.long()?);
        }
        self.any(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.has_part(tag::BYTES) {
            return visitor.visit_byte_buf(self.take_part()?);
        }
        self.deserialize_bytes(visitor)
    }

    #[inline]
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.is_next(tag::SOME) {
            return self.down(|reader| visitor.visit_some(reader));
        }
        match self.peek()? {
            tag::NONE | tag::UNIT => self.any(visitor),
            _ => {
                self.count_bare()?;
                visitor.visit_some(self)
            }
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.skip_some();
        if self.is_next(tag::NONE) {
            return visitor.visit_unit();
        }
        self.any(visitor)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value> {
        self.deserialize_unit(visitor)
    }

    #[inline]
    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value> {
        // Names of serde_json and others that mean something else, which only their visitors know.
        if name.starts_with('$') && !is_derived::<V>() { self.any(visitor) } else { visitor.visit_newtype_struct(self) }
    }

    #[inline]
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.is_next(tag::RUN) {
            return self.run(visitor);
        }
        if self.is_next(tag::SEQ) {
            let count = self.count()?;
            return self.elements(count, visitor);
        }
        if self.is_next(tag::SEQ8) {
            let [count] = self.head()?;
            return self.elements(usize::from(count), visitor);
        }
        if self.is_next(tag::ROWS) {
            return self.rows(visitor);
        }
        self.skip_some();
        if self.is_next(tag::BYTES) {
            return run::visit(tag::U8, self.blob()?, visitor);
        }
        self.any(visitor)
    }

    #[inline(always)]
    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value> {
        if let [tag::SEQ8, count, rest @ ..] = *self.tags()
            && usize::from(*count) == len
        {
            *self.tags() = rest;
            self.note(rows::SEQ);
            let value = self.elements(len, visitor)?;
            self.note(rows::END);
            return Ok(value);
        }
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(self, _: &'static str, len: usize, visitor: V) -> Result<V::Value> {
        self.deserialize_tuple(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.is_next(tag::MAP) {
            return self.entries(visitor);
        }
        self.unusual(visitor)
    }

    #[inline(always)]
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        if !self.is_next(tag::STRUCT) {
            self.skip_some();
            if !self.is_next(tag::STRUCT) {
                return self.any(visitor);
            }
        }
        let shape = self.shape()?;
        if self.is_positional::<V>(shape, fields) {
            if ROW && let Some(asked) = &mut self.asked {
                asked.for_struct(identity::id_of::<V>(), fields);
            }
            let value = self.elements(fields.len(), visitor)?;
            self.note(rows::END);
            return Ok(value);
        }
        self.by_names(shape, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        self.skip_some();
        let tag = self.peek()?;
        match tag {
            tag::UNIT_VARIANT | tag::VARIANT => {
                self.head::<1>()?;
                let shape = self.shape()?;
                let name = self.variant_name(shape)?;
                match tag {
                    tag::VARIANT => self.down(|reader| visitor.visit_enum(Variant { reader, name })),
                    _ => visitor.visit_enum(BorrowedStrDeserializer::new(name)),
                }
            }
            // As other formats write variants, and types that are written by hand.
            tag::STR => {
                self.head::<1>()?;
                visitor.visit_enum(self.text()?.into_deserializer())
            }
            tag::MAP => {
                self.head::<1>()?;
                let left = self.count()?;
                self.down(|reader| {
                    let mut entries = Elements { reader, left };
                    let value = visitor.visit_enum(MapAccessDeserializer::new(&mut entries))?;
                    all_taken(entries.left == 0, value)
                })
            }
            tag::STRUCT => {
                self.head::<1>()?;
                let shape = self.shape()?;
                let (names, left) = self.names(shape);
                self.down(|reader| {
                    let mut fields = Fields { reader, names, left };
                    let value = visitor.visit_enum(MapAccessDeserializer::new(&mut fields))?;
                    all_taken(fields.left == 0, value)
                })
            }
            _ => self.any(visitor),
        }
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.is_next(tag::SOME) {
            return self.identifier_in_option(visitor);
        }
        // serde's buffer of keys takes nothing in this form only.
        if self.is_next(tag::NONE) { visitor.visit_unit() } else { self.deserialize_str(visitor) }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.any(visitor)
    }
}

/// The elements of a sequence, or keys and values in turn.
struct Elements<'b, 'de, const ROW: bool> {
    reader: &'b mut Reader<'de, ROW>,
    left: usize,
}

impl<'de, const ROW: bool> SeqAccess<'de> for Elements<'_, 'de, ROW> {
    type Error = Error;

    #[inline(always)]
    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        self.reader.part(seed).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.min(self.reader.rest.len()))
    }
}

impl<'de, const ROW: bool> MapAccess<'de> for Elements<'_, 'de, ROW> {
    type Error = Error;

    #[inline]
    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>> {
        self.next_element_seed(seed)
    }

    #[inline]
    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value> {
        self.reader.part(seed)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.min(self.reader.rest.len() / 2))
    }
}

/// Rows, each with the same template.
struct Rows<'b, 'de> {
    reader: &'b mut Reader<'de, true>,
    template: &'de [u8],
    rest: &'de [u8],
    layout: Layout,
    is_first: bool,
    /// The requests of the type of the elements, if they are exactly the written parts: the first element shows it.
    exact: Option<Box<Asked>>,
}

impl<'de> Rows<'_, 'de> {
    /// Reads a row whose type asks for something else than the first row's did: it may look at one part before it asks for
    /// the next. From here on, all rows are read by the template.
    #[cold]
    #[inline(never)]
    fn otherwise<S: DeserializeSeed<'de>>(&mut self, row: &'de [u8], seed: S) -> Result<S::Value> {
        self.exact = None;
        self.by_template(row, seed)
    }

    /// Reads a row part by part, by its template.
    #[inline(never)]
    fn by_template<S: DeserializeSeed<'de>>(&mut self, row: &'de [u8], seed: S) -> Result<S::Value> {
        (self.reader.rest, self.reader.template, self.reader.bare) = (row, self.template, (0, 0));
        self.reader.asked = std::mem::take(&mut self.is_first).then(Asked::for_nothing_yet);
        let value = seed.deserialize(&mut *self.reader)?;
        self.exact = self.reader.asked.take().filter(|asked| asked.is_exactly(&self.layout));
        all_taken(self.reader.template.is_empty(), value)
    }
}

impl<'de> SeqAccess<'de> for Rows<'_, 'de> {
    type Error = Error;

    #[inline(always)]
    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>> {
        let Some((row, rest)) = self.rest.split_at_checked(self.layout.size) else { return Ok(None) };
        self.rest = rest;
        if let Some(again) = identity::again(&seed)
            && let Some(asked) = &self.exact
        {
            let mut reader = RowReader::new(row, asked);
            let read = seed.deserialize(&mut reader).and_then(|value| reader.finish(value, asked));
            return read.or_else(|_| self.otherwise(row, again)).map(Some);
        }
        self.by_template(row, seed).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        self.rest.len().checked_div(self.layout.size)
    }
}

/// The fields of a struct, as a map from their names.
struct Fields<'b, 'de, const ROW: bool> {
    reader: &'b mut Reader<'de, ROW>,
    names: &'de [u8],
    left: usize,
}

impl<'de, const ROW: bool> MapAccess<'de> for Fields<'_, 'de, ROW> {
    type Error = Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        seed.deserialize(BorrowedStrDeserializer::new(cut_name(&mut self.names)?)).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value> {
        self.reader.part(seed)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left.min(self.reader.rest.len()))
    }
}

/// A variant that has content.
struct Variant<'b, 'de, const ROW: bool> {
    reader: &'b mut Reader<'de, ROW>,
    name: &'de str,
}

impl<'de, const ROW: bool> EnumAccess<'de> for Variant<'_, 'de, ROW> {
    type Error = Error;
    type Variant = Self;

    #[inline]
    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self)> {
        Ok((seed.deserialize(BorrowedStrDeserializer::new(self.name))?, self))
    }
}

impl<'de, const ROW: bool> VariantAccess<'de> for Variant<'_, 'de, ROW> {
    type Error = Error;

    fn unit_variant(self) -> Result<()> {
        Deserialize::deserialize(self.reader)
    }

    #[inline]
    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value> {
        seed.deserialize(self.reader)
    }

    #[inline]
    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value> {
        self.reader.deserialize_tuple(len, visitor)
    }

    #[inline]
    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value> {
        self.reader.deserialize_struct("", fields, visitor)
    }
}
