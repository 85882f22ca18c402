//! What serde's attributes, and those of serde_with, do to fields and variants.

use super::{Ways, equal};
use serde::de::{Deserializer, EnumAccess, Error, IgnoredAny, MapAccess, VariantAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_with::skip_serializing_none;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Unit;
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Empty {}
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Newtype<T>(T);
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Pair(u8, String);
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Point {
    x: i32,
    y: i32,
}
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
struct Transparent<T> {
    inner: T,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Tree {
    name: String,
    children: Vec<Tree>,
    left: Option<Box<Tree>>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Wide {
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    e: u64,
    f: u64,
    g: u64,
    h: u64,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Holds {
    n: i32,
    bytes: Vec<u8>,
    numbers: Vec<f64>,
    option: Option<()>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum External {
    Unit,
    Newtype(u8),
    Option(Option<()>),
    Tuple(u8, String),
    Struct { x: i32, y: Option<i32> },
    EmptyTuple(),
    EmptyStruct {},
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Renamed {
    FirstKind,
    #[serde(rename = "other")]
    Second {
        #[serde(rename = "type")]
        kind: u8,
    },
    #[serde(alias = "old")]
    OldThird(u8),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Skips {
    #[serde(skip)]
    #[allow(dead_code)]
    Never,
    A(u8),
    #[serde(skip)]
    #[allow(dead_code)]
    NeverEither,
    B(u8),
    C,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct SkipIf {
    #[serde(skip_serializing_if = "Option::is_none", default)]
    a: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    b: Option<u8>,
    c: u8,
}
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct SkipIfAlone {
    first: u8,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    list: Vec<u8>,
    last: String,
}
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct ContainerDefault {
    #[serde(skip_serializing_if = "String::is_empty")]
    a: String,
    b: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    c: Option<Option<()>>,
}
#[skip_serializing_none]
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct SkipNone {
    a: Option<u8>,
    b: Option<String>,
    c: u8,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SkipSerializing {
    a: u8,
    #[serde(skip_serializing, default = "seven")]
    b: u8,
    c: u8,
}
fn seven() -> u8 {
    7
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Skipped {
    a: u8,
    #[serde(skip)]
    b: u8,
    #[serde(skip_deserializing)]
    c: u8,
    d: u8,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Denies {
    a: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    b: Option<u8>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Aliased {
    #[serde(alias = "n", alias = "count")]
    number: u8,
    other: u8,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RenamedFields {
    first_field: u8,
    #[serde(rename = "2nd")]
    second_field: u8,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Circle {
    r: u8,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Square {
    a: u8,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Shape {
    Circle(Circle),
    Square(Square),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum ListOrPoint {
    List(Vec<i32>),
    Pt { x: i32, y: i32 },
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum AnyScalar {
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(String),
    List(Vec<AnyScalar>),
    Map(BTreeMap<String, AnyScalar>),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum TextOrBytes {
    Text(String),
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum AddressOrName {
    Address(IpAddr),
    Name(String),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
struct TaggedStruct {
    a: u8,
    b: Option<u8>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Internal {
    Unit,
    Struct { x: i32, list: Vec<f64> },
    Newtype(Point),
    Address { ip: IpAddr },
    Nested { inner: Box<Internal> },
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", content = "c")]
enum Adjacent {
    Unit,
    Newtype(u8),
    Option(Option<()>),
    Tuple(u8, String),
    Struct { x: i32, y: i32 },
    Address(IpAddr),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Flat {
    name: String,
    #[serde(flatten)]
    point: Point,
    #[serde(flatten)]
    rest: BTreeMap<String, u64>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FlatAddress {
    port: u16,
    #[serde(flatten)]
    host: Host,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Host {
    ip: IpAddr,
    name: Option<String>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FlatOption {
    a: u8,
    #[serde(flatten)]
    point: Option<Point>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FlatEnum {
    id: u8,
    #[serde(flatten)]
    event: Internal,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FlatJson {
    id: u8,
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
struct ByText(u32);
impl From<ByText> for String {
    fn from(ByText(n): ByText) -> Self {
        format!("#{n}")
    }
}
impl TryFrom<String> for ByText {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.trim_start_matches('#').parse().map(Self).map_err(|_| format!("{text} is no number"))
    }
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct WithBytes {
    before: u8,
    #[serde(with = "serde_bytes")]
    bytes: Vec<u8>,
    #[serde(with = "hex")]
    number: u32,
    after: u8,
}
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    pub(super) fn serialize<S: Serializer>(n: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{n:x}"))
    }
    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        u32::from_str_radix(&String::deserialize(deserializer)?, 16).map_err(D::Error::custom)
    }
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct WithEachApart {
    before: u8,
    #[serde(serialize_with = "hex::serialize", deserialize_with = "hex::deserialize")]
    number: u32,
    after: u8,
}
/// Of a type that serde knows nothing of: without `bound` this does not compile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound(serialize = "T: Display", deserialize = "T: FromStr<Err: Display>"))]
struct Bounded<T> {
    #[serde(with = "text")]
    value: T,
    n: u8,
}
mod text {
    use super::{Display, FromStr};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }
    pub(super) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
#[derive(Clone, Debug, PartialEq)]
struct OnlyText(u32);
impl Display for OnlyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "only {}", self.0)
    }
}
impl FromStr for OnlyText {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.strip_prefix("only ").and_then(|n| n.parse().ok()).map(Self).ok_or_else(|| format!("{text:?} is another"))
    }
}
/// What borrows is no value by itself, as it is not owned. It is on the way here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct ByBorrowing {
    #[serde(with = "borrowing")]
    text: String,
}
mod borrowing {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::borrow::Cow;
    #[derive(Serialize, Deserialize)]
    struct Borrowed<'a> {
        #[serde(borrow)]
        text: Cow<'a, str>,
    }
    pub(super) fn serialize<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
        Borrowed { text: text.into() }.serialize(serializer)
    }
    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
        Borrowed::deserialize(deserializer).map(|borrowed| borrowed.text.into_owned())
    }
}
mod elsewhere {
    pub(super) use serde as renamed;
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(crate = "elsewhere::renamed")]
struct ByAnotherPath {
    x: i32,
    list: Vec<u8>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(expecting = "the corner of a house")]
struct Expected {
    x: i32,
    y: i32,
}
/// Written as a number, and so never what is expected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "u8", expecting = "the corner of a house")]
struct Unexpected {
    x: u8,
}
impl From<Unexpected> for u8 {
    fn from(Unexpected { x }: Unexpected) -> Self {
        x
    }
}

/// Read by hand, field by field in any order.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct ByFields {
    first: u64,
    unread: Vec<String>,
    second: Option<()>,
}
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "lowercase")]
enum Field {
    First,
    Second,
    Other(String),
}
impl<'de> Deserialize<'de> for ByFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = ByFields;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("fields")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ByFields, A::Error> {
                let (mut first, mut second, mut others) = (None, None, Vec::new());
                while let Some(field) = map.next_key()? {
                    match field {
                        Field::First => first = Some(map.next_value()?),
                        Field::Second => second = Some(map.next_value()?),
                        Field::Other(name) => {
                            others.push(name);
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                let first = first.ok_or_else(|| A::Error::missing_field("first"))?;
                Ok(ByFields { first, unread: others, second: second.ok_or_else(|| A::Error::missing_field("second"))? })
            }
        }
        deserializer.deserialize_struct("ByFields", &["first", "unread", "second"], Fields)
    }
}
/// Read by hand, variant by variant.
#[derive(Clone, Debug, PartialEq, Serialize)]
enum ByVariants {
    Nothing,
    Number(u64),
}
#[derive(Deserialize)]
#[serde(variant_identifier)]
enum Variant {
    Nothing,
    Number,
}
impl<'de> Deserialize<'de> for ByVariants {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Variants;
        impl<'de> Visitor<'de> for Variants {
            type Value = ByVariants;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a variant")
            }
            fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<ByVariants, A::Error> {
                match access.variant()? {
                    (Variant::Nothing, content) => content.unit_variant().map(|()| ByVariants::Nothing),
                    (Variant::Number, content) => content.newtype_variant().map(ByVariants::Number),
                }
            }
        }
        deserializer.deserialize_enum("ByVariants", &["Nothing", "Number"], Variants)
    }
}
#[serde_with::serde_as]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SerdeAs {
    #[serde_as(as = "serde_with::DisplayFromStr")]
    number: u64,
    #[serde_as(as = "Vec<(_, _)>")]
    map: BTreeMap<(u8, u8), String>,
    #[serde_as(as = "Option<serde_with::DurationSecondsWithFrac<f64>>")]
    time: Option<std::time::Duration>,
}
/// Its values go through the buffer of `serde_with`, and then through serde's.
#[serde_with::serde_as]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct OneOrMany {
    #[serde_as(as = "serde_with::OneOrMany<_>")]
    values: Vec<TextOrBytes>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct DoubleOptionSkipped {
    #[serde(default, skip_serializing_if = "Option::is_none", with = "serde_with::rust::double_option")]
    value: Option<Option<u8>>,
    n: u8,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct WithGetter {
    #[serde(with = "RemoteDuration")]
    time: Remote,
}
#[derive(Clone, Debug, PartialEq)]
struct Remote {
    seconds: u64,
}
#[derive(Serialize, Deserialize)]
#[serde(remote = "Remote")]
struct RemoteDuration {
    seconds: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all_fields = "camelCase")]
enum LastUntagged {
    Unit,
    Named {
        first_field: u8,
    },
    #[serde(untagged)]
    Other {
        first_field: u8,
        second: Option<()>,
    },
}

pub(super) fn send(ways: &mut Ways) {
    shapes(ways);
    left_out(ways);
    variants(ways);
    tags(ways);
    conversions(ways);
    by_hand(ways);
}

fn shapes(ways: &mut Ways) {
    let leaf = |name: &str| Tree { name: name.into(), children: vec![], left: None };
    let tree = Tree { name: "root".into(), children: vec![leaf("a"), leaf("b")], left: Some(Box::new(leaf("c"))) };
    equal! { ways:
        Unit; Empty {}; Newtype(1_u8); Newtype(()); Newtype(Some(())); Newtype(None::<Option<u8>>); Some(Newtype(()));
        Newtype(Newtype(Some(None::<u8>))); Some(Unit); Some(Empty {}); vec![Unit; 3]; Pair(1, "b".into()); Point { x: -1, y: 1 };
        vec![Point { x: 1, y: 2 }; 5]; Transparent { inner: Some(()) }; Transparent { inner: Some(None::<u8>) };
        Some(Transparent { inner: () }); Transparent { inner: vec![1_u8, 2] }; tree.clone(); vec![tree.clone(), tree.clone()]; Some(Box::new(tree));
        Wide { a: 1, b: 2, c: 3, d: 4, e: 5, f: 6, g: 7, h: u64::MAX };
        Holds { n: -1, bytes: vec![1, 2], numbers: vec![0.5], option: Some(()) };
        BTreeMap::from([(Newtype(1_u8), Point { x: 1, y: 1 })]);
        BTreeMap::from([(Newtype(Some(())), 1_u8), (Newtype(None), 2)]);
    }
}

fn left_out(ways: &mut Ways) {
    let some = SkipIf { a: Some(1), b: None, c: 3 };
    equal! { ways:
        SkipIf::default(); some.clone(); SkipIf { a: None, b: Some(2), c: 3 }; SkipIf { a: Some(1), b: Some(2), c: 3 };
        vec![some, SkipIf { a: None, b: Some(9), c: 1 }, SkipIf::default()];
        SkipIfAlone::default(); SkipIfAlone { first: 1, list: vec![], last: "z".into() }; SkipIfAlone { first: 1, list: vec![2], last: "z".into() };
        ContainerDefault::default(); ContainerDefault { a: "a".into(), b: 1, c: None }; ContainerDefault { a: String::new(), b: 1, c: Some(Some(())) };
        ContainerDefault { a: String::new(), b: 2, c: Some(None) };
        SkipNone::default(); SkipNone { a: None, b: Some("b".into()), c: 1 }; SkipNone { a: Some(1), b: None, c: 1 };
        SkipSerializing { a: 1, b: 7, c: 3 }; Skipped { a: 1, b: 0, c: 0, d: 4 };
        Denies { a: 1, b: None }; Denies { a: 1, b: Some(2) }; Aliased { number: 1, other: 2 }; RenamedFields { first_field: 1, second_field: 2 };
        DoubleOptionSkipped { value: None, n: 1 }; DoubleOptionSkipped { value: Some(None), n: 1 }; DoubleOptionSkipped { value: Some(Some(2)), n: 1 };
    }
}

fn variants(ways: &mut Ways) {
    equal! { ways:
        External::Unit; External::Newtype(1); External::Option(Some(())); External::Option(None); External::Tuple(1, "b".into());
        External::Struct { x: 1, y: None }; External::Struct { x: 1, y: Some(2) }; External::EmptyTuple(); External::EmptyStruct {};
        vec![External::Unit, External::Newtype(1)]; Some(External::Unit);
        Renamed::FirstKind; Renamed::Second { kind: 1 }; Renamed::OldThird(2); Skips::A(1); Skips::B(2); Skips::C; vec![Skips::B(1), Skips::A(2)];
        Shape::Circle(Circle { r: 1 }); Shape::Square(Square { a: 1 }); vec![Shape::Square(Square { a: 1 }), Shape::Circle(Circle { r: 2 })];
        ListOrPoint::List(vec![1, 2]); ListOrPoint::Pt { x: 1, y: 2 };
        AnyScalar::Bool(true); AnyScalar::Unsigned(1); AnyScalar::Signed(-1); AnyScalar::Float(0.5); AnyScalar::Text("t".into());
        AnyScalar::List(vec![AnyScalar::Signed(-1), AnyScalar::Text("x".into())]); AnyScalar::Map(BTreeMap::from([("k".into(), AnyScalar::Float(1.5))]));
        TextOrBytes::Text("text".into()); TextOrBytes::Bytes(vec![0xff, 0]); TextOrBytes::Bytes(b"also a text".to_vec()); TextOrBytes::Bytes(vec![]);
        AddressOrName::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)); AddressOrName::Name("host".into());
        LastUntagged::Unit; LastUntagged::Named { first_field: 1 }; LastUntagged::Other { first_field: 1, second: None };
        vec![LastUntagged::Other { first_field: 1, second: Some(()) }, LastUntagged::Unit, LastUntagged::Named { first_field: 2 }];
    }
}

fn tags(ways: &mut Ways) {
    let nested = Internal::Nested { inner: Box::new(Internal::Struct { x: 1, list: vec![1.5, 2.5] }) };
    let json = serde_json::json!({"a": null, "b": [1, -1, 1.5, "x"]});
    equal! { ways:
        TaggedStruct { a: 1, b: None }; TaggedStruct { a: 1, b: Some(2) };
        Internal::Unit; Internal::Struct { x: 1, list: vec![0.5] }; Internal::Newtype(Point { x: 1, y: 2 });
        Internal::Address { ip: IpAddr::V4(Ipv4Addr::LOCALHOST) }; nested.clone(); vec![nested, Internal::Unit];
        Adjacent::Unit; Adjacent::Newtype(1); Adjacent::Option(Some(())); Adjacent::Tuple(1, "b".into()); Adjacent::Struct { x: 1, y: 2 };
        Adjacent::Address("::1".parse().unwrap()); vec![Adjacent::Unit, Adjacent::Newtype(9)];
        Flat { name: "n".into(), point: Point { x: 1, y: 2 }, rest: BTreeMap::from([("z".into(), u64::MAX)]) };
        FlatAddress { port: 1, host: Host { ip: "10.0.0.1".parse().unwrap(), name: None } };
        FlatAddress { port: 1, host: Host { ip: "::1".parse().unwrap(), name: Some("n".into()) } };
        FlatOption { a: 1, point: None }; FlatOption { a: 1, point: Some(Point { x: 1, y: 2 }) };
        FlatEnum { id: 1, event: Internal::Struct { x: 2, list: vec![] } }; FlatEnum { id: 1, event: Internal::Unit };
        FlatJson { id: 1, rest: json.as_object().unwrap().clone() };
    }
}

fn conversions(ways: &mut Ways) {
    equal! { ways:
        ByText(42); vec![ByText(1), ByText(2)]; WithBytes { before: 1, bytes: vec![1, 2, 3], number: 0xbeef, after: 2 };
        SerdeAs { number: u64::MAX, map: BTreeMap::from([((1, 2), "x".into())]), time: Some(std::time::Duration::from_millis(1500)) };
        SerdeAs { number: 0, map: BTreeMap::new(), time: None };
        OneOrMany { values: vec![TextOrBytes::Bytes(b"also a text".to_vec())] }; OneOrMany { values: vec![TextOrBytes::Text("text".into())] };
        OneOrMany { values: vec![TextOrBytes::Bytes(b"two".to_vec()), TextOrBytes::Text("texts".into())] };
        WithGetter { time: Remote { seconds: 5 } };
    }
}

fn by_hand(ways: &mut Ways) {
    let fields = |second| ByFields { first: 1, unread: vec!["unread".into()], second };
    equal! { ways:
        WithEachApart { before: 1, number: 0xbeef, after: 2 }; Bounded { value: OnlyText(7), n: 1 }; Some(Bounded { value: 7_u8, n: 2 });
        ByBorrowing { text: "borrowed".into() }; ByAnotherPath { x: -1, list: vec![1, 2] }; Expected { x: 1, y: -1 };
        fields(Some(())); vec![fields(None), fields(Some(()))]; ByVariants::Nothing; vec![ByVariants::Number(u64::MAX), ByVariants::Nothing];
    }
    ways.beyond("a number for a struct", Unexpected { x: 1 }, Some("expected the corner of a house"));
}

#[test]
fn each_attribute_of_the_page_on_values_is_sent() {
    let page = include_str!("../../docs/guide/values.md");
    let table = page.split("## What each attribute does").nth(1).unwrap().split("\n## ").next().unwrap();
    let files = std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).unwrap().map(|entry| entry.unwrap().path());
    let sources = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let sources: String = sources.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let of_serde = sources.split("#[serde(").skip(1).filter_map(|rest| rest.split(")]").next());
    let used: BTreeSet<_> = of_serde.flat_map(|text| text.split(|c: char| !c.is_alphanumeric() && c != '_')).collect();
    let cells = table.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    // A feature is none, and `serde_with` has attributes of its own.
    let cells = cells.filter(|cell| !cell.contains("(a feature of serde)") && !cell.contains("(serde_with)"));
    let names: Vec<_> = cells.flat_map(|cell| cell.split('`').step_by(2)).collect();
    let missing: Vec<_> = names.iter().filter(|name| !used.contains(name.split(['(', ' ']).next().unwrap())).collect();
    assert!(names.len() > 30 && missing.is_empty(), "in no test: {missing:?}");
}
