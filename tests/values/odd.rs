//! Odd corners: attributes that few use, bits that get lost easily, keys of maps that are no texts, and large parts wherever a
//! value can have them.

use super::{Ways, equal};
use bytes::Bytes;
use ndarray::Array2;
use serde::{Deserialize, Serialize};
use serde_with::formats::CommaSeparator;
use serde_with::{
    BoolFromInt, DefaultOnNull, DisplayFromStr, DurationMilliSeconds, EnumMap, FromInto, IfIsHumanReadable,
    KeyValueMap, Map, NoneAsEmptyString, PickFirst, Seq, StringWithSeparator, TryFromInto, VecSkipError, serde_as,
};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ffi::{CString, OsString};
use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Rgb(u8, u8, u8);
impl From<Rgb> for (u8, u16, u8) {
    fn from(Rgb(r, g, b): Rgb) -> Self {
        (r, g.into(), b)
    }
}
impl From<(u8, u16, u8)> for Rgb {
    fn from((r, g, b): (u8, u16, u8)) -> Self {
        Self(r, g as u8, b)
    }
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Entry {
    Number(i32),
    Text { text: String },
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Keyed {
    #[serde(rename = "$key$")]
    key: String,
    value: Vec<u16>,
}
#[serde_as]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct ManyForms {
    #[serde_as(as = "NoneAsEmptyString")]
    none: Option<String>,
    #[serde_as(as = "DefaultOnNull")]
    default: u8,
    #[serde_as(as = "PickFirst<(_, DisplayFromStr)>")]
    first: u32,
    #[serde_as(as = "FromInto<(u8, u16, u8)>")]
    other: Rgb,
    #[serde_as(as = "TryFromInto<u64>")]
    tried: u8,
    #[serde_as(as = "serde_with::Bytes")]
    bytes: [u8; 70],
    #[serde_as(as = "Option<serde_with::Bytes>")]
    maybe: Option<Vec<u8>>,
    #[serde_as(as = "[_; 40]")]
    long: [u16; 40],
    #[serde_as(as = "Seq<(_, _)>")]
    seq: BTreeMap<u8, String>,
    #[serde_as(as = "Map<_, _>")]
    map: Vec<(u8, String)>,
    #[serde_as(as = "EnumMap")]
    entries: Vec<Entry>,
    #[serde_as(as = "KeyValueMap<_>")]
    keyed: Vec<Keyed>,
    #[serde_as(as = "BoolFromInt")]
    bool: bool,
    #[serde_as(as = "StringWithSeparator::<CommaSeparator, u8>")]
    separated: Vec<u8>,
    #[serde_as(as = "VecSkipError<_>")]
    skips: Vec<Entry>,
    #[serde_as(as = "IfIsHumanReadable<DisplayFromStr>")]
    readable: u128,
    #[serde_as(as = "DurationMilliSeconds<String>")]
    time: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
struct Key {
    a: u8,
    b: Option<String>,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
enum EnumKey {
    Unit,
    Newtype(Option<()>),
    Tuple(u8, u8),
    Struct { a: u8 },
}
serde_with::with_prefix!(prefix_left "left_");
serde_with::with_prefix!(prefix_right "right_");
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Prefixed {
    #[serde(flatten, with = "prefix_left")]
    left: Size,
    #[serde(flatten, with = "prefix_right")]
    right: Option<Size>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Size {
    width: u16,
    unit: Option<()>,
}
/// A flattened map whose keys are numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FlatNumbers<K: Ord> {
    name: String,
    #[serde(flatten)]
    rest: BTreeMap<K, Option<Option<u8>>>,
}

mod hidden {
    #[derive(Clone, Debug, PartialEq)]
    pub(super) struct Hidden {
        n: u32,
        list: Vec<u16>,
    }
    impl Hidden {
        pub(super) fn new(n: u32, list: Vec<u16>) -> Self {
            Self { n, list }
        }
        pub(super) fn n(&self) -> u32 {
            self.n
        }
        pub(super) fn list(&self) -> &Vec<u16> {
            &self.list
        }
    }
}
#[derive(Serialize, Deserialize)]
#[serde(remote = "hidden::Hidden")]
struct HiddenForm {
    #[serde(getter = "hidden::Hidden::n")]
    n: u32,
    #[serde(getter = "hidden::Hidden::list")]
    list: Vec<u16>,
}
impl From<HiddenForm> for hidden::Hidden {
    fn from(form: HiddenForm) -> Self {
        Self::new(form.n, form.list)
    }
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct WithHidden {
    before: u8,
    #[serde(with = "HiddenForm")]
    hidden: hidden::Hidden,
    after: u8,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Known {
    A {
        n: u8,
    },
    #[serde(other)]
    Unknown,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum KnownOutside {
    A(u8),
    #[serde(other)]
    Unknown,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "(u8, u8)", into = "(u8, u8)")]
struct Swapped {
    a: u8,
    b: u8,
}
impl From<(u8, u8)> for Swapped {
    fn from((b, a): (u8, u8)) -> Self {
        Self { a, b }
    }
}
impl From<Swapped> for (u8, u8) {
    fn from(swapped: Swapped) -> Self {
        (swapped.b, swapped.a)
    }
}
type N = u8;
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Wide17(N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N);
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Wide18(N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, String, u64);
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Rows16(f32, N, i16, bool, u64, N, N, N, N, N, N, N, N, u128, N, (N, [i8; 3]));
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum WideVariant {
    Many(N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, Option<()>),
}
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Nothing;
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Phantom<T> {
    nothing: PhantomData<T>,
    unit: (),
    none: [Nothing; 2],
}
/// The elements of lists have up to three forms of number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Number {
    Small(u8, u8),
    Signed(i8, f32),
    Large { a: u64 },
}

/// Any of them may be left out: 131,072 shapes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Shapes {
    #[serde(skip_serializing_if = "Option::is_none")]
    a: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    b: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    c: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    d: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    e: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    f: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    g: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    h: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    i: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    j: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    k: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    l: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    m: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    n: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    o: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    p: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    q: Option<()>,
}

impl Shapes {
    fn of(bits: u32) -> Self {
        let bit = |n: u32| (bits >> n & 1 == 1).then_some(());
        Self {
            a: bit(0),
            b: bit(1),
            c: bit(2),
            d: bit(3),
            e: bit(4),
            f: bit(5),
            g: bit(6),
            h: bit(7),
            i: bit(8),
            j: bit(9),
            k: bit(10),
            l: bit(11),
            m: bit(12),
            n: bit(13),
            o: bit(14),
            p: bit(15),
            q: bit(16),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Large {
    Bytes(Vec<u8>),
    Named {
        numbers: Vec<f32>,
        text: String,
    },
    Tuple(String, Vec<[u8; 4]>, Option<Box<Large>>),
    Blob(#[serde(with = "serde_bytes")] Vec<u8>),
    Inside(LargeTagged),
    #[serde(untagged)]
    Other(LargeUntagged),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum LargeTagged {
    Unit,
    Named { numbers: Vec<f64>, text: String, maybe: Option<Vec<u16>>, next: Option<Box<LargeTagged>> },
    Flat(LargeFlat),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum LargeUntagged {
    One {
        #[serde(with = "serde_bytes")]
        blob: Vec<u8>,
        end: u8,
    },
    Two {
        #[serde(with = "serde_bytes")]
        blob: Vec<u8>,
        text: String,
    },
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct LargeFlat {
    id: u8,
    #[serde(flatten)]
    inner: LargeInner,
    #[serde(flatten)]
    rest: BTreeMap<String, Vec<i16>>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct LargeInner {
    numbers: Vec<u64>,
    text: Box<str>,
    bytes: Bytes,
}
#[serde_as]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct LargeDisplayed {
    before: Vec<u8>,
    #[serde_as(as = "DisplayFromStr")]
    text: String,
    after: Vec<f64>,
}

/// Sends each value by every way, and within others.
macro_rules! odd {
    ($ways:ident: $($value:expr;)*) => {
        $( $ways.around(stringify!($value), &$value); )*
        equal!($ways: $($value;)*);
    };
}

pub(super) fn send(ways: &mut Ways) {
    attributes(ways);
    bits(ways);
    keys(ways);
    lists(ways);
}

/// Those that take long are two parts, which run at the same time.
pub(super) fn send_large(ways: &mut Ways) {
    large(ways, true);
}

pub(super) fn send_other_large(ways: &mut Ways) {
    large(ways, false);
}

fn attributes(ways: &mut Ways) {
    let forms = ManyForms {
        none: None,
        default: 7,
        first: 9,
        other: Rgb(1, 2, 3),
        tried: 200,
        bytes: [0xfe; 70],
        maybe: Some(b"a text".to_vec()),
        long: [40; 40],
        seq: BTreeMap::from([(1, "a".into()), (2, "b".into())]),
        map: vec![(2, "b".into()), (1, "a".into())],
        entries: vec![Entry::Number(-1), Entry::Text { text: "t".into() }],
        keyed: vec![Keyed { key: "k".into(), value: vec![1, 2] }, Keyed { key: "l".into(), value: vec![] }],
        bool: true,
        separated: vec![1, 2, 3],
        skips: vec![Entry::Number(1); 3],
        readable: u128::MAX,
        time: Duration::from_millis(1234),
    };
    let sized = |width| Size { width, unit: Some(()) };
    odd! { ways:
        forms.clone(); ManyForms { none: Some("some".into()), maybe: None, bool: false, separated: vec![], ..forms.clone() };
        WithHidden { before: 1, hidden: hidden::Hidden::new(2, vec![3, 4]), after: 5 };
        Known::A { n: 1 }; Known::Unknown; KnownOutside::A(1); KnownOutside::Unknown; Swapped { a: 1, b: 2 }; vec![Swapped { a: 1, b: 2 }; 20];
        Prefixed { left: sized(1), right: Some(sized(2)) }; Prefixed { left: Size { width: 1, unit: None }, right: None };
        FlatNumbers { name: "n".into(), rest: BTreeMap::from([(1_u8, Some(None)), (200, None), (3, Some(Some(1)))]) };
    }
}

fn bits(ways: &mut Ways) {
    let bits: Vec<_> = [0x7fa0_0001, 0xffc0_1234, 0x8000_0000, 1, 0x807f_ffff].map(f32::from_bits).to_vec();
    let show = |list: &[f32]| format!("{:x?}", list.iter().map(|float| float.to_bits()).collect::<Vec<_>>());
    ways.alike("f32 by their bits", bits.clone(), |list| show(list));
    let rows: Vec<_> = bits.iter().cycle().take(20).map(|float| (*float, 1_u8)).collect();
    ways.alike("f32 by their bits, in rows", rows, |rows| show(&rows.iter().map(|row| row.0).collect::<Vec<_>>()));
    let map: BTreeMap<_, _> = bits.iter().copied().enumerate().collect();
    ways.alike("f32 by their bits, in a map", map, |map| show(&map.values().copied().collect::<Vec<_>>()));
    let untagged: Vec<_> = bits.iter().map(|float| Number::Signed(-1, *float)).collect();
    ways.alike("f32 by their bits, in an untagged enum", untagged, |list| {
        let floats = list.iter().map(|number| match number {
            Number::Signed(_, float) => *float,
            _ => 0.0,
        });
        show(&floats.collect::<Vec<_>>())
    });
    odd! { ways:
        '\u{d7ff}'; '\u{e000}'; vec!['\u{10ffff}'; 20]; OsString::from_vec(vec![0xff, 0x80, 0]); CString::new([0xff, 1]).unwrap();
        Phantom::<String> { nothing: PhantomData, unit: (), none: [Nothing; 2] }; vec![Nothing; 20]; vec![((), [(); 2]); 20]; vec![[0_u8; 0]; 20];
        [(); 32]; vec![PhantomData::<u8>; 9]; HashMap::from([((), Nothing)]); Duration::new(u64::MAX, 999_999_999); vec![Duration::new(1, 2); 20];
    }
}

fn keys(ways: &mut Ways) {
    let key = |a, b: Option<&str>| Key { a, b: b.map(Into::into) };
    odd! { ways:
        BTreeMap::from([(key(1, None), 1_u8), (key(1, Some("b")), 2)]); HashMap::from([(key(1, Some("")), vec![1_u8])]);
        BTreeMap::from([(EnumKey::Unit, 1_u8), (EnumKey::Newtype(Some(())), 2), (EnumKey::Newtype(None), 3), (EnumKey::Tuple(1, 2), 4), (EnumKey::Struct { a: 1 }, 5)]);
        BTreeMap::from([(u128::MAX, 1_u8), (0, 2)]); HashMap::from([(i128::MIN, i128::MAX)]); BTreeMap::from([(vec![Some(()), None], 1_u8)]);
        BTreeMap::from([([u128::MAX; 2], ())]); BTreeMap::from([(BTreeMap::from([(1_u8, 2_u8)]), BTreeSet::from([3_u8]))]); HashMap::from([("k".repeat(70_000), 1_u8)]);
        BTreeMap::from([(NonZeroU32::MAX, Some(NonZeroU32::MIN))]); BTreeMap::from([(Duration::MAX, 'x')]);
    }
}

fn lists(ways: &mut Ways) {
    let rows = Rows16(-0.5, 1, -2, true, u64::MAX, 5, 6, 7, 8, 9, 10, 11, 12, u128::MAX, 14, (15, [-1; 3]));
    let numbers = |n: u8| match n % 3 {
        0 => Number::Small(n, 1),
        1 => Number::Signed(-1, n.into()),
        _ => Number::Large { a: u64::MAX },
    };
    odd! { ways:
        Wide17(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17); Wide18(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, "x".into(), 18);
        rows.clone(); vec![rows.clone(); 20]; WideVariant::Many(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, Some(()));
        (0..30).map(numbers).collect::<Vec<_>>(); vec![u128::MAX; 20]; (0..20_i128).map(|n| (n, -n)).collect::<Vec<_>>();
        vec![NonZeroU32::MAX; 20]; vec![Some(NonZeroU32::MIN); 20]; vec![true; 20]; vec![(true, false, 'x'); 20];
        (0..70_000).map(Shapes::of).collect::<Vec<_>>(); ((0..66_000).map(Shapes::of).collect::<Vec<_>>(), vec![1_u64; 10_000], "x".repeat(70_000));
    }
}

fn large(ways: &mut Ways, are_first: bool) {
    let (bytes, text) = (vec![0xee_u8; 70_000], "é".repeat(40_000));
    let ascii = vec![b'a'; 70_000];
    let (floats, singles) = (vec![-0.5_f64; 9_000], vec![1.5_f32; 17_000]);
    let flat = LargeFlat {
        id: 1,
        inner: LargeInner { numbers: vec![7; 9_000], text: text.clone().into(), bytes: ascii.clone().into() },
        rest: BTreeMap::from([("a".into(), vec![-1; 40_000]), ("b".into(), vec![])]),
    };
    let named = |next| LargeTagged::Named {
        numbers: floats.clone(),
        text: text.clone(),
        maybe: Some(vec![3; 40_000]),
        next: Some(Box::new(next)),
    };
    let tagged = named(named(LargeTagged::Flat(flat.clone())));
    let one = LargeUntagged::One { blob: bytes.clone(), end: 1 };
    let two = LargeUntagged::Two { blob: ascii.clone(), text: text.clone() };
    let all = vec![
        Large::Bytes(bytes.clone()),
        Large::Named { numbers: singles.clone(), text: text.clone() },
        Large::Tuple(text.clone(), vec![[1; 4]; 20_000], Some(Box::new(Large::Blob(ascii.clone())))),
        Large::Blob(bytes.clone()),
        Large::Inside(tagged.clone()),
        Large::Other(one.clone()),
        Large::Other(two.clone()),
    ];
    let json =
        serde_json::json!({"text": text.clone(), "list": vec![1.5; 9_000], "deep": [{"a": [text.clone(), null]}]});
    if are_first {
        odd! { ways:
            Some(bytes.clone()); Some(Some(text.clone())); (1_u8, Some(floats.clone()), None::<Vec<u8>>, text.clone()); Ok::<Vec<u8>, ()>(bytes.clone());
            Err::<(), _>((text.clone(), bytes.clone())); BTreeMap::from([(text.clone(), floats.clone())]); HashMap::from([(1_u64, Some(bytes.clone())), (2, None)]);
            flat.clone(); tagged.clone(); one.clone(); two.clone(); all.clone(); vec![all.clone(); 3]; vec![bytes.clone(); 40]; vec![Some(text.clone()), None, Some(String::new())];
            (1_u8, floats.clone().into_boxed_slice()); (1_u8, Arc::<[f64]>::from(floats.clone())); VecDeque::from(floats.clone()); (0..20_000_u64).collect::<BTreeSet<_>>();
        }
        return;
    }
    odd! { ways:
        (1_u8, Cow::<'static, [u8]>::from(ascii.clone())); (1_u8, Bytes::from(ascii.clone()), serde_bytes::ByteBuf::from(ascii.clone())); json.clone();
        LargeDisplayed { before: bytes.clone(), text: text.clone(), after: floats.clone() }; (OsString::from_vec(bytes.clone()), CString::new(bytes.clone()).unwrap());
        (Box::<str>::from(&*text), vec![(1_u32, 2.5_f32); 20_000], singles.clone()); vec![(1_u8, bytes.clone(), ()); 3]; (1_u8, vec![[1.5_f32; 3]; 9_000], vec![7_usize; 9_000]);
        (1_u8, Array2::from_elem((100, 100), 0.5_f64)); nalgebra::DMatrix::from_element(100, 100, 1.5_f64); (vec![0_u8; 65_535], vec![1_u8; 65_536], vec![2_u8; 65_537]);
        vec![vec![i128::MIN; 5_000]; 2]; (0..8_u8).map(|n| (n, vec![n; 70_000])).collect::<BTreeMap<_, _>>(); Some(Box::new(Some(bytes.clone())));
    }
}
