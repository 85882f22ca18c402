//! Reading a value.
//!
//! Everything here that has a visitor for a parameter is compiled for each type of each message, so what can be done without the visitor is:
//! [`Reader::scan`] reads the next part, and [`Reader::any`] hands it to the visitor. A type that asks for
//! just the written form is read in fewer steps before that.

use super::names::WIDE;
use super::parts::{self, Apart, Parted};
use super::row_reader::{Asked, RowReader};
use super::rows::{self, Layout};
use super::run::{self, MOST_OPTIONS, Numbers, Run, all_taken, one_less};
use super::visitors::{is_buffer, is_derived};
use super::{
    Error, HAS_PARTS, HAS_TABLE, IS_DEEP, Result, SHALLOW, STACK_OF_LEVEL, STACK_TO_GO_ON, VERSION, fail, no_stack, tag,
};
use crate::os::{identity, stack};
use crate::wire::limits::DEEPEST;
use crate::wire::list::List;
use serde::de::value::BorrowedStrDeserializer;
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
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
    let mut reader = Reader::new(rest);
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
            read.unwrap_or_else(|error| Err(no_stack(error)))
        }
    };
    let (value, left) = (value?, reader.rest.len() + reader.apart.len());
    reader.keep_table();
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
const COPIES: usize = if cfg!(debug_assertions) { 64 } else { 12 };
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

/// Returns `true` if `D` reads each part of a message for the last time. serde's own buffer and `RowReader` do not: a part that they have
/// read may be read again.
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

/// A table of names, its shapes, and the visitors that are known to fit them.
#[derive(Default)]
struct Table {
    /// A copy of its bytes, if it is small.
    copy: Vec<u8>,
    shapes: Vec<Shape>,
}

thread_local! {
    /// That of the last message: the next one is often of the same type.
    static LAST: Cell<Table> = const { Cell::new(Table { copy: Vec::new(), shapes: Vec::new() }) };
}

/// Room for so many shapes is kept.
const SHAPES_KEPT: usize = 1 << 10;
/// A larger table is not kept.
const TABLE_KEPT: usize = 1 << 10;

/// serde's `Deserializer`, by reference.
pub(super) struct Reader<'de> {
    /// Empty within a row, so that a read in few steps finds nothing there and takes the long way.
    rest: &'de [u8],
    row: Option<Row<'de>>,
    table: &'de [u8],
    /// A copy of the table, if one is kept for the next message.
    copy: Vec<u8>,
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

/// What is left of a row, and of the template its tags come from.
struct Row<'de> {
    template: &'de [u8],
    numbers: &'de [u8],
}

/// What comes next in a message.
enum Next<'de> {
    None,
    Unit,
    Bool(bool),
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    U128(u128),
    I8(i8),
    I16(i16),
    I32(i32),
    I64(i64),
    I128(i128),
    F32(f32),
    F64(f64),
    Char(char),
    Text(&'de str),
    Bytes(&'de [u8]),
    Numbers(Numbers<'de>),
    Inner(Inner<'de>),
}

/// What is read a level deeper.
enum Inner<'de> {
    Some,
    /// So many elements.
    Elements(usize),
    /// So many keys, each with its value.
    Entries(usize),
    /// The fields of a struct, by names.
    Fields {
        names: &'de [u8],
        left: usize,
    },
    Rows {
        template: &'de [u8],
        rest: &'de [u8],
        layout: Layout,
    },
    Variant(Variants<'de>),
}

/// Where the name of a variant is, and its content.
enum Variants<'de> {
    /// A name without content.
    Unit(&'de str),
    /// The content follows.
    Named(&'de str),
    /// A map of one entry, or of so many.
    Entry(usize),
    /// A struct of one field, or of so many.
    Field { names: &'de [u8], left: usize },
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

impl<'de> Reader<'de> {
    fn new(rest: &'de [u8]) -> Self {
        Self {
            rest,
            row: None,
            table: &[],
            copy: Vec::new(),
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
        let last = LAST.try_with(Cell::take).unwrap_or_default();
        (self.copy, self.shapes) = (last.copy, last.shapes);
        if !self.table.is_empty() && self.copy == self.table {
            return Ok(());
        }
        self.copy.clear();
        self.shapes.clear();
        let mut rest = self.table;
        let count = u32::from_le_bytes(cut_array(&mut rest)?) as usize;
        if count > rest.len() / 6 {
            return fail("the table of names ends too early");
        }
        self.shapes.reserve(count);
        for _ in 0..count {
            let count = usize::from(u16::from_le_bytes(cut_array(&mut rest)?));
            let len = u32::from_le_bytes(cut_array(&mut rest)?) as usize;
            let at = self.table.len() - rest.len();
            cut(&mut rest, len)?;
            self.shapes.push(Shape { at, len, count, matched: None });
        }
        if self.table.len() <= TABLE_KEPT {
            self.copy.extend_from_slice(self.table);
        }
        Ok(())
    }

    fn keep_table(&mut self) {
        if (1..=SHAPES_KEPT).contains(&self.shapes.capacity()) {
            let table = Table { copy: std::mem::take(&mut self.copy), shapes: std::mem::take(&mut self.shapes) };
            let _ = LAST.try_with(|last| last.set(table));
        }
    }
}

impl<'de> Reader<'de> {
    /// Where tags come from.
    fn tags(&mut self) -> &mut &'de [u8] {
        match &mut self.row {
            Some(row) => &mut row.template,
            None => &mut self.rest,
        }
    }

    /// Where numbers come from.
    fn numbers(&mut self) -> &mut &'de [u8] {
        match &mut self.row {
            Some(row) => &mut row.numbers,
            None => &mut self.rest,
        }
    }

    /// How many bytes are left, in a row or not.
    fn left(&self) -> usize {
        self.row.as_ref().map_or(self.rest.len(), |row| row.numbers.len())
    }

    /// A tag, or what belongs to one.
    fn head<const N: usize>(&mut self) -> Result<[u8; N]> {
        cut_array(self.tags())
    }

    /// A number, in a row or not.
    fn number<const N: usize>(&mut self) -> Result<[u8; N]> {
        cut_array(self.numbers())
    }

    fn peek(&mut self) -> Result<u8> {
        match self.tags().first() {
            Some(tag) => Ok(*tag),
            None => fail("the message ends too early"),
        }
    }

    /// Takes the tag, if it is this one; no tag of a template.
    #[inline(always)]
    fn is_next(&mut self, tag: u8) -> bool {
        let Some((next, rest)) = self.rest.split_first() else { return false };
        let is_it = *next == tag;
        if is_it {
            self.rest = rest;
        }
        is_it
    }

    #[inline(always)]
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        cut_array(&mut self.rest)
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
        if self.apart.len() > 0
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
        self.apart.len() > 0 && self.rest.starts_with(&[tag, 255])
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
        let left = self.row.as_ref().map_or(self.rest.len(), |row| row.numbers.len() + row.template.len());
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

    /// Reads a part of the value.
    #[inline(always)]
    fn part<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value> {
        if size_of::<S::Value>() <= LARGE {
            return seed.deserialize(self);
        }
        self.large_part(seed)
    }

    /// Reads a part that is large, and may be read from serde's own buffer, level by level.
    #[cold]
    #[inline(never)]
    fn large_part<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value> {
        let room = STACK_TO_GO_ON + stack_of_levels::<S::Value>(self.depth + 1);
        stack::with_room(room, || seed.deserialize(self)).unwrap_or_else(|error| Err(no_stack(error)))
    }

    /// Whether a `T` can be read a level deeper on the stack that there is.
    #[inline(always)]
    fn has_level_for<T>(&self) -> bool {
        size_of::<T>() <= LARGE && self.depth > 0 && (self.depth == 1 || self.depth % SHALLOW != 1)
    }

    /// Reads what is a level deeper.
    fn down<V: Visitor<'de>>(&mut self, inner: Inner<'de>, visitor: V) -> Result<V::Value> {
        if self.row.is_some() {
            // A template is nested no deeper than `LEVELS`.
            return self.inner(inner, visitor);
        }
        if self.depth == 0 {
            return fail("it is nested deeper than it says");
        }
        let has_level = self.has_level_for::<V::Value>();
        self.depth -= 1;
        let value = if has_level { self.inner(inner, visitor) } else { self.with_room(inner, visitor) };
        self.depth += 1;
        value
    }

    /// Code of users, and a large value, may need more stack than was reckoned with at the start.
    #[cold]
    #[inline(never)]
    fn with_room<V: Visitor<'de>>(&mut self, inner: Inner<'de>, visitor: V) -> Result<V::Value> {
        let room = STACK_TO_GO_ON.saturating_add(stack_of_value::<V::Value>());
        stack::with_room(room, || self.inner(inner, visitor)).unwrap_or_else(|error| Err(no_stack(error)))
    }

    /// Each way has a function of its own, for one that has all would need the stack of all.
    #[inline(never)]
    fn inner<V: Visitor<'de>>(&mut self, inner: Inner<'de>, visitor: V) -> Result<V::Value> {
        match inner {
            Inner::Some => self.visit_some(visitor),
            Inner::Elements(left) => self.visit_inner_elements(left, visitor),
            Inner::Entries(left) => self.visit_entries(left, visitor),
            Inner::Fields { names, left } => self.visit_fields(names, left, visitor),
            Inner::Rows { template, rest, layout } => self.each_row(template, rest, layout, visitor),
            Inner::Variant(variant) => self.visit_inner_variant(variant, visitor),
        }
    }

    #[inline(never)]
    fn visit_some<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        visitor.visit_some(self)
    }

    #[inline(never)]
    fn visit_inner_elements<V: Visitor<'de>>(&mut self, left: usize, visitor: V) -> Result<V::Value> {
        self.visit_elements(left, visitor)
    }

    #[inline(never)]
    fn visit_entries<V: Visitor<'de>>(&mut self, left: usize, visitor: V) -> Result<V::Value> {
        let mut entries = Elements { reader: self, left };
        let value = visitor.visit_map(&mut entries)?;
        all_taken(entries.left == 0, value)
    }

    #[inline(never)]
    fn visit_fields<V: Visitor<'de>>(&mut self, names: &'de [u8], left: usize, visitor: V) -> Result<V::Value> {
        let mut fields = Fields { reader: self, names, left };
        let value = visitor.visit_map(&mut fields)?;
        all_taken(fields.left == 0, value)
    }

    #[inline(never)]
    fn visit_inner_variant<V: Visitor<'de>>(&mut self, variant: Variants<'de>, visitor: V) -> Result<V::Value> {
        self.visit_variant(variant, visitor)
    }

    #[inline(always)]
    fn visit_elements<V: Visitor<'de>>(&mut self, left: usize, visitor: V) -> Result<V::Value> {
        let mut elements = Elements { reader: self, left };
        let value = visitor.visit_seq(&mut elements)?;
        all_taken(elements.left == 0, value)
    }

    #[inline(always)]
    fn visit_variant<V: Visitor<'de>>(&mut self, variant: Variants<'de>, visitor: V) -> Result<V::Value> {
        let mut left = match variant {
            Variants::Unit(_) | Variants::Named(_) => 0,
            Variants::Entry(left) | Variants::Field { left, .. } => left,
        };
        let value = visitor.visit_enum(Variant { reader: self, variant, left: &mut left })?;
        all_taken(left == 0, value)
    }

    /// [`down`](Self::down) in fewer steps.
    #[inline(always)]
    fn elements<V: Visitor<'de>>(&mut self, count: usize, visitor: V) -> Result<V::Value> {
        if !self.has_level_for::<V::Value>() {
            return self.down(Inner::Elements(count), visitor);
        }
        self.depth -= 1;
        let value = self.visit_elements(count, visitor);
        self.depth += 1;
        value
    }

    #[inline(always)]
    fn shape(&mut self) -> Result<usize> {
        let narrow = u16::from_le_bytes(self.array()?);
        let shape = if narrow == WIDE { u32::from_le_bytes(self.array()?) as usize } else { usize::from(narrow) };
        self.known(shape)
    }

    /// The shape of a struct, in a row or not.
    fn shape_of_any(&mut self) -> Result<usize> {
        match &mut self.row {
            Some(row) => {
                let shape = u16::from_le_bytes(cut_array(&mut row.template)?);
                self.known(usize::from(shape))
            }
            None => self.shape(),
        }
    }

    #[inline(always)]
    fn known(&self, shape: usize) -> Result<usize> {
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

    fn by_names<V: Visitor<'de>>(&mut self, shape: usize, visitor: V) -> Result<V::Value> {
        let (names, left) = self.names(shape);
        self.down(Inner::Fields { names, left }, visitor)
    }

    /// A list of numbers, without its tag.
    fn run<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        let numbers = self.scan_run()?;
        self.visit_numbers(numbers, visitor)
    }

    fn visit_numbers<V: Visitor<'de>>(&mut self, mut numbers: Numbers<'de>, visitor: V) -> Result<V::Value> {
        match run::list::<V>(&mut numbers) {
            Some(list) => Ok(list),
            None => numbers.visit(visitor),
        }
    }

    fn scan_run(&mut self) -> Result<Numbers<'de>> {
        let [kind, width] = self.array()?;
        let count = usize::try_from(u64::from_le_bytes(self.array()?)).unwrap_or(usize::MAX);
        let size = run::size(kind)? * usize::from(width.max(1));
        let run = self.cut_or_take(count.saturating_mul(size))?;
        Ok(Numbers::new(kind, width, size, run))
    }

    fn scan_rows(&mut self) -> Result<Inner<'de>> {
        let count = self.count()?;
        let [len] = self.array()?;
        let template = cut(&mut self.rest, usize::from(len))?;
        let mut left = template;
        let fields = |shape: u16| if shape < WIDE { self.names(usize::from(shape)).1 } else { 0 };
        let layout = Layout::read(&mut left, &fields)?;
        let rest = cut(&mut self.rest, count.saturating_mul(layout.size))?;
        all_taken(left.is_empty(), Inner::Rows { template, rest, layout })
    }

    #[inline(never)]
    fn each_row<V: Visitor<'de>>(
        &mut self,
        template: &'de [u8],
        rest: &'de [u8],
        layout: Layout,
        visitor: V,
    ) -> Result<V::Value> {
        let outer = (std::mem::take(&mut self.rest), self.bare);
        let mut rows = Rows { reader: self, outer, template, rest, layout, is_first: true, exact: None };
        let value = visitor.visit_seq(&mut rows)?;
        all_taken(rows.rest.is_empty(), value)
    }

    /// Notes a part that is asked for just as it is written in the first row.
    fn note(&mut self, wanted: u8) {
        if let (Some(row), Some(asked)) = (&self.row, &mut self.asked)
            && row.template.first() == Some(&wanted)
        {
            asked.for_part(rows::code(wanted));
        }
    }

    /// Notes the end of a tuple or struct of the first row.
    fn note_end(&mut self) {
        self.asked.iter_mut().for_each(|asked| asked.for_part(rows::END));
    }

    fn bool_of_row(&mut self) -> Result<bool> {
        match self.number()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => fail("a bool that is none"),
        }
    }

    /// A value for a visitor that asked for another type than the usual, or for any.
    #[inline(never)]
    fn unusual<V: Visitor<'de>>(&mut self, wanted: u8, visitor: V) -> Result<V::Value> {
        self.note(wanted);
        self.skip_some();
        self.any(visitor)
    }

    /// A number of 128 bits in a row, if its kind is the wanted one.
    #[cold]
    fn wide_number_of_row(&mut self, wanted: u8) -> Result<Option<u128>> {
        if self.row.as_ref().is_none_or(|row| row.template.first() != Some(&wanted)) {
            return Ok(None);
        }
        self.note(wanted);
        self.head::<1>()?;
        Ok(Some(u128::from_le_bytes(self.number()?)))
    }

    /// A tuple in a row, or written as another sequence.
    #[inline(never)]
    fn unusual_tuple<V: Visitor<'de>>(&mut self, len: usize, visitor: V) -> Result<V::Value> {
        if let Some(row) = &mut self.row
            && let [tag::SEQ8, count, ..] = *row.template
            && usize::from(count) == len
        {
            self.note(tag::SEQ8);
            self.head::<2>()?;
            let value = self.inner(Inner::Elements(len), visitor)?;
            self.note_end();
            return Ok(value);
        }
        self.deserialize_seq(visitor)
    }

    /// A struct in a row, in an option, or written as something else.
    #[inline(never)]
    fn unusual_struct<V: Visitor<'de>>(&mut self, fields: &'static [&'static str], visitor: V) -> Result<V::Value> {
        self.skip_some();
        if self.peek()? != tag::STRUCT {
            return self.any(visitor);
        }
        self.head::<1>()?;
        let shape = self.shape_of_any()?;
        if !self.is_positional::<V>(shape, fields) {
            return self.by_names(shape, visitor);
        }
        if let Some(asked) = &mut self.asked {
            asked.for_struct(identity::id_of::<V>(), fields);
        }
        let value = self.down(Inner::Elements(fields.len()), visitor)?;
        self.note_end();
        Ok(value)
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

    /// Whatever comes next.
    #[inline(never)]
    fn any<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value> {
        match self.scan()? {
            Next::None => visitor.visit_none(),
            Next::Unit => visitor.visit_unit(),
            Next::Bool(bool) => visitor.visit_bool(bool),
            Next::U8(number) => visitor.visit_u8(number),
            Next::U16(number) => visitor.visit_u16(number),
            Next::U32(number) => visitor.visit_u32(number),
            Next::U64(number) => visitor.visit_u64(number),
            Next::U128(number) => visitor.visit_u128(number),
            Next::I8(number) => visitor.visit_i8(number),
            Next::I16(number) => visitor.visit_i16(number),
            Next::I32(number) => visitor.visit_i32(number),
            Next::I64(number) => visitor.visit_i64(number),
            Next::I128(number) => visitor.visit_i128(number),
            Next::F32(number) => visitor.visit_f32(number),
            Next::F64(number) => visitor.visit_f64(number),
            Next::Char(char) => visitor.visit_char(char),
            Next::Text(text) => visitor.visit_borrowed_str(text),
            // As a sequence they cannot be taken for a text by an untagged enum.
            Next::Bytes(text) if is_buffer::<V>() && std::str::from_utf8(text).is_ok() => {
                Numbers::of_bytes(text).visit(visitor)
            }
            Next::Bytes(bytes) => visitor.visit_borrowed_bytes(bytes),
            Next::Numbers(numbers) => self.visit_numbers(numbers, visitor),
            Next::Inner(inner) => self.down(inner, visitor),
        }
    }

    fn scan(&mut self) -> Result<Next<'de>> {
        let [tag] = self.head()?;
        macro_rules! number {
            ($number:ty) => {
                <$number>::from_le_bytes(self.number()?)
            };
        }
        Ok(match tag {
            tag::NONE => Next::None,
            tag::SOME => Next::Inner(Inner::Some),
            tag::UNIT => Next::Unit,
            tag::TRUE if self.row.is_some() => Next::Bool(self.bool_of_row()?),
            tag::FALSE => Next::Bool(false),
            tag::TRUE => Next::Bool(true),
            tag::U8 => Next::U8(number!(u8)),
            tag::U16 => Next::U16(number!(u16)),
            tag::U32 => Next::U32(number!(u32)),
            tag::U64 => Next::U64(number!(u64)),
            tag::I8 => Next::I8(number!(i8)),
            tag::I16 => Next::I16(number!(i16)),
            tag::I32 => Next::I32(number!(i32)),
            tag::I64 => Next::I64(number!(i64)),
            tag::F32 => Next::F32(number!(f32)),
            tag::F64 => Next::F64(number!(f64)),
            // serde's own buffer has no place for 128 bits.
            tag::U128 => match number!(u128) {
                small if u64::try_from(small).is_ok() => Next::U64(small as u64),
                large => Next::U128(large),
            },
            tag::I128 => match number!(i128) {
                small if i64::try_from(small).is_ok() => Next::I64(small as i64),
                large => Next::I128(large),
            },
            tag::CHAR => match char::from_u32(number!(u32)) {
                Some(char) => Next::Char(char),
                None => return fail("a character that is none"),
            },
            tag::STR => Next::Text(self.text()?),
            tag::BYTES => Next::Bytes(self.blob()?),
            tag::SEQ8 => {
                let [count] = self.head()?;
                Next::Inner(Inner::Elements(count.into()))
            }
            tag::SEQ => Next::Inner(Inner::Elements(self.count()?)),
            tag::RUN => Next::Numbers(self.scan_run()?),
            tag::ROWS => Next::Inner(self.scan_rows()?),
            tag::MAP => Next::Inner(Inner::Entries(self.count()?)),
            tag::STRUCT => {
                let shape = self.shape_of_any()?;
                Next::Inner(self.fields(shape))
            }
            tag::UNIT_VARIANT => {
                let shape = self.shape()?;
                Next::Text(self.variant_name(shape)?)
            }
            tag::VARIANT => {
                let shape = self.shape()?;
                self.variant_name(shape)?;
                Next::Inner(self.fields(shape))
            }
            _ => return fail("there is a tag that is none"),
        })
    }

    fn fields(&self, shape: usize) -> Inner<'de> {
        let (names, left) = self.names(shape);
        Inner::Fields { names, left }
    }

    /// A struct in a row that is read as a variant.
    #[cold]
    fn scan_variant_of_row(&mut self) -> Result<Variants<'de>> {
        self.head::<1>()?;
        let shape = self.shape_of_any()?;
        let (names, left) = self.names(shape);
        Ok(Variants::Field { names, left })
    }

    /// A variant, if one comes next in any form.
    fn scan_variant(&mut self) -> Result<Option<Variants<'de>>> {
        if let Some(row) = &self.row {
            let is_struct = row.template.first() == Some(&tag::STRUCT);
            return if is_struct { self.scan_variant_of_row().map(Some) } else { Ok(None) };
        }
        self.skip_some();
        let Some((&tag, rest)) = self.rest.split_first() else { return Ok(None) };
        let outer = std::mem::replace(&mut self.rest, rest);
        Ok(Some(match tag {
            tag::UNIT_VARIANT | tag::VARIANT => {
                let shape = self.shape()?;
                let name = self.variant_name(shape)?;
                if tag == tag::VARIANT { Variants::Named(name) } else { Variants::Unit(name) }
            }
            // As other formats write variants, and types that are written by hand.
            tag::STR => Variants::Unit(self.text()?),
            tag::MAP => Variants::Entry(self.count()?),
            tag::STRUCT => {
                let shape = self.shape()?;
                let (names, left) = self.names(shape);
                Variants::Field { names, left }
            }
            _ => {
                self.rest = outer;
                return Ok(None);
            }
        }))
    }
}

macro_rules! leaves {
    ($($deserialize:ident $visit:ident $number:ty, $kind:ident;)*) => {$(
        #[inline(always)]
        fn $deserialize<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
            if let Some((head, rest)) = self.rest.split_first_chunk::<{ 1 + size_of::<$number>() }>()
                && let [tag::$kind, number @ ..] = head
            {
                self.rest = rest;
                return visitor.$visit(<$number>::from_le_bytes(*number));
            }
            if size_of::<$number>() == 16
                && let Some(number) = self.wide_number_of_row(tag::$kind)?
            {
                return visitor.$visit(number as $number);
            }
            self.unusual(tag::$kind, visitor)
        }
    )*};
}

impl<'de> Deserializer<'de> for &mut Reader<'de> {
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
        match self.rest {
            [tag @ (tag::TRUE | tag::FALSE), rest @ ..] => {
                self.rest = rest;
                visitor.visit_bool(*tag == tag::TRUE)
            }
            _ => self.unusual(tag::TRUE, visitor),
        }
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.unusual(tag::CHAR, visitor)
    }

    #[inline]
    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if let [tag::STR, len @ ..=254, rest @ ..] = self.rest
            && let Some((text, rest)) = rest.split_at_checked(usize::from(*len))
            && let Ok(text) = std::str::from_utf8(text)
        {
            self.rest = rest;
            return visitor.visit_borrowed_str(text);
        }
        self.unusual(tag::STR, visitor)
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
        if let [tag::RUN, tag::U8, 0, rest @ ..] = self.rest {
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
            if !self.has_level_for::<V::Value>() {
                return self.down(Inner::Some, visitor);
            }
            self.depth -= 1;
            let value = visitor.visit_some(&mut *self);
            self.depth += 1;
            return value;
        }
        if self.is_next(tag::NONE) {
            return visitor.visit_none();
        }
        match self.peek()? {
            tag::UNIT => self.any(visitor),
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
            let [count] = self.array()?;
            return self.elements(usize::from(count), visitor);
        }
        self.skip_some();
        if self.is_next(tag::BYTES) {
            return Numbers::of_bytes(self.blob()?).visit(visitor);
        }
        self.any(visitor)
    }

    #[inline(always)]
    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value> {
        if let [tag::SEQ8, count, rest @ ..] = self.rest
            && usize::from(*count) == len
        {
            self.rest = rest;
            return self.elements(len, visitor);
        }
        self.unusual_tuple(len, visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(self, _: &'static str, len: usize, visitor: V) -> Result<V::Value> {
        self.deserialize_tuple(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.skip_some();
        self.any(visitor)
    }

    #[inline(always)]
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        if !self.is_next(tag::STRUCT) {
            return self.unusual_struct(fields, visitor);
        }
        let shape = self.shape()?;
        if self.is_positional::<V>(shape, fields) {
            return self.elements(fields.len(), visitor);
        }
        self.by_names(shape, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        match self.scan_variant()? {
            Some(variant @ Variants::Unit(_)) => self.visit_variant(variant, visitor),
            Some(variant) if self.row.is_none() && self.has_level_for::<V::Value>() => {
                self.depth -= 1;
                let value = self.visit_variant(variant, visitor);
                self.depth += 1;
                value
            }
            Some(variant) => self.down(Inner::Variant(variant), visitor),
            None => self.any(visitor),
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
struct Elements<'b, 'de> {
    reader: &'b mut Reader<'de>,
    left: usize,
}

impl<'de> SeqAccess<'de> for Elements<'_, 'de> {
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
        Some(self.left.min(self.reader.left()))
    }
}

impl<'de> MapAccess<'de> for Elements<'_, 'de> {
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
        Some(self.left.min(self.reader.left() / 2))
    }
}

/// Rows, each with the same template.
struct Rows<'b, 'de> {
    reader: &'b mut Reader<'de>,
    /// What the reader has left behind the rows, and of its counts.
    outer: (&'de [u8], (usize, u32)),
    template: &'de [u8],
    rest: &'de [u8],
    layout: Layout,
    is_first: bool,
    /// The requests of the type of the elements, if they are exactly the written parts: the first element shows it.
    exact: Option<Box<Asked>>,
}

/// Also where a visitor panics, and its caller goes on.
impl Drop for Rows<'_, '_> {
    fn drop(&mut self) {
        (self.reader.rest, self.reader.bare) = self.outer;
        (self.reader.row, self.reader.asked) = (None, None);
    }
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
        self.reader.row = Some(Row { template: self.template, numbers: row });
        self.reader.bare = (0, 0);
        self.reader.asked = std::mem::take(&mut self.is_first).then(Asked::for_nothing_yet);
        let value = seed.deserialize(&mut *self.reader)?;
        self.exact = self.reader.asked.take().filter(|asked| asked.is_exactly(&self.layout));
        all_taken(self.reader.row.take().is_some_and(|row| row.template.is_empty()), value)
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
struct Fields<'b, 'de> {
    reader: &'b mut Reader<'de>,
    names: &'de [u8],
    left: usize,
}

impl<'de> MapAccess<'de> for Fields<'_, 'de> {
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
        Some(self.left.min(self.reader.left()))
    }
}

/// A variant, and how many entries of its map or struct are left once it has been read.
struct Variant<'b, 'de> {
    reader: &'b mut Reader<'de>,
    variant: Variants<'de>,
    left: &'b mut usize,
}

impl<'de> EnumAccess<'de> for Variant<'_, 'de> {
    type Error = Error;
    type Variant = Self;

    #[inline]
    fn variant_seed<S: DeserializeSeed<'de>>(mut self, seed: S) -> Result<(S::Value, Self)> {
        let one_of = |left: usize| left.checked_sub(1).map_or_else(|| fail("a variant that has no name"), Ok);
        let name = match &mut self.variant {
            Variants::Unit(name) | Variants::Named(name) => name,
            Variants::Entry(left) => {
                *self.left = one_of(*left)?;
                return Ok((self.reader.part(seed)?, self));
            }
            Variants::Field { names, left } => {
                *self.left = one_of(*left)?;
                cut_name(names)?
            }
        };
        Ok((seed.deserialize(BorrowedStrDeserializer::new(name))?, self))
    }
}

impl Variant<'_, '_> {
    /// Its content, if it has some.
    fn content(&self, wanted: &dyn serde::de::Expected) -> Result<()> {
        match self.variant {
            Variants::Unit(_) => Err(serde::de::Error::invalid_type(Unexpected::UnitVariant, wanted)),
            _ => Ok(()),
        }
    }
}

impl<'de> VariantAccess<'de> for Variant<'_, 'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<()> {
        match self.variant {
            Variants::Unit(_) => Ok(()),
            _ => Deserialize::deserialize(self.reader),
        }
    }

    #[inline]
    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value> {
        self.content(&"newtype variant")?;
        self.reader.part(seed)
    }

    #[inline]
    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value> {
        self.content(&"tuple variant")?;
        self.reader.deserialize_tuple(len, visitor)
    }

    #[inline]
    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value> {
        self.content(&"struct variant")?;
        self.reader.deserialize_struct("", fields, visitor)
    }
}
