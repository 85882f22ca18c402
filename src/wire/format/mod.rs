//! How a value that is not plain lies in a message: a format of our own for serde, lossless and self-describing.
//!
//! ```text
//! message  version, value, [table], [depth u32], [where the table begins u64], [parts]
//! value    NONE | SOME value | UNIT | FALSE | TRUE | CHAR u32 | U8 .. F64 and the number, its lowest byte first
//!          STR length text | BYTES length bytes                    length: one byte, or 255 and a u64
//!          SEQ8 n value*n | SEQ n value*n | MAP n (value value)*n  n: one byte in SEQ8, else a u64
//!          ROWS n template row*n                                   n: a u64; the template: its length in a byte, and a value
//!                                                                  without its numbers; a row: those numbers. A bool is
//!                                                                  TRUE in the template and 0 or 1 in a row
//!          RUN kind width n bytes                                  n numbers as in memory, or n arrays of `width` numbers
//!          STRUCT shape value*                                     as many as the shape has names
//!          UNIT_VARIANT shape | VARIANT shape value                the shape has one name: the variant's
//! shape    u16, or 65535 and a u32: an index into the table
//! table    count u32, then for each shape: names u16, bytes u32, then for each name its length u16 and its text
//! parts    where the large runs, texts and bytes lie: see `parts`
//! ```
//!
//! - `Some` is always marked, so an option keeps its content apart from nothing, whatever the content is.
//! - The fields of a struct lie in their order, and their names stand once for each message in the table. A reader that
//!   asks for a struct of the same names gets the fields by position (only code that serde derived: see
//!   `visitors::is_derived`); any other reader gets a map from names to values. A field that was skipped makes another shape.
//! - Variants go by name, for `skip` shifts their indices.
//! - Both sides are human-readable, because serde's own buffer (behind `flatten`, `tag` and `untagged`) is.
//! - The sender writes how deep the value is nested, if that is more than [`SHALLOW`], so that the receiver can see to
//!   it that there is enough stack before it begins.
//!
//! Bytes that are damaged are an error: nothing is allocated that the bytes which are there do not justify, and
//! nothing is nested deeper than the message announces.

mod de;
mod names;
mod parts;
mod row_reader;
mod rows;
mod run;
mod ser;
mod visitors;

pub(super) use de::{from_parted, from_slice, reads_once};
pub(super) use parts::Parted;
pub(super) use rows::is_attempt;
pub(super) use ser::append;

use crate::wire::limits::Limit;
use std::fmt;

/// The first byte of a message, less its three flags.
const VERSION: u8 = 1;
/// Flag: there is a table of names.
const HAS_TABLE: u8 = 0x80;
/// Flag: the value is deeper than [`SHALLOW`].
const IS_DEEP: u8 = 0x40;
/// Flag: there is a list of large parts.
const HAS_PARTS: u8 = 0x20;

/// Values nested so deep are read on whatever stack there is, as the usual ones are.
const SHALLOW: u32 = 16;
/// Stack that one level may take, in code of serde and of users. Without optimisation an internally tagged struct was seen
/// to take 13 KiB.
const STACK_OF_LEVEL: usize = if cfg!(debug_assertions) { 32 << 10 } else { 8 << 10 };
/// Stack that must be left where encoding goes deeper by another [`SHALLOW`] levels.
const STACK_TO_GO_ON: usize = SHALLOW as usize * STACK_OF_LEVEL;
/// The tag that a value begins with.
mod tag {
    macro_rules! tags {
        ($($name:ident)*) => {
            #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
            #[repr(u8)]
            enum Tag { $($name),* }
            $(pub(super) const $name: u8 = Tag::$name as u8;)*
        };
    }
    tags! {
        NONE SOME UNIT FALSE TRUE CHAR U8 U16 U32 U64 U128 I8 I16 I32 I64 I128 F32 F64
        STR BYTES SEQ8 SEQ MAP RUN STRUCT UNIT_VARIANT VARIANT ROWS
    }
}

/// Why a value cannot be written or read.
pub(super) struct Error(Box<Why>);

struct Why {
    text: Box<str>,
    limit: Option<Limit>,
}

type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    #[cold]
    #[inline(never)]
    fn new(why: impl fmt::Display) -> Self {
        Self(Box::new(Why { text: why.to_string().into_boxed_str(), limit: None }))
    }

    fn beyond(limit: Limit, why: impl fmt::Display) -> Self {
        let mut error = Self::new(why);
        error.0.limit = Some(limit);
        error
    }

    /// The limit that the value exceeds, if that is why.
    pub(super) fn limit(&self) -> Option<Limit> {
        self.0.limit
    }
}

/// No memory for a stack.
#[cold]
fn no_stack(error: std::io::Error) -> Error {
    let why = "it is nested so deeply that it needs a stack of its own, which is not to be had";
    Error::new(format_args!("{why}: {error}"))
}

/// An error, as a result.
#[cold]
#[inline(never)]
fn fail<T>(why: &str) -> Result<T> {
    Err(Error::new(why))
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.text)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.text)
    }
}

impl std::error::Error for Error {}

impl serde::ser::Error for Error {
    fn custom<T: fmt::Display>(why: T) -> Self {
        Self::new(why)
    }
}

impl serde::de::Error for Error {
    fn custom<T: fmt::Display>(why: T) -> Self {
        Self::new(why)
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
