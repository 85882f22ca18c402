//! Types of the crates that people use.

use super::{Ways, equal};
use bytes::{Bytes, BytesMut};
use chrono::{DateTime, FixedOffset, NaiveDate, NaiveTime, TimeZone, Utc};
use either::Either;
use glam::{Mat4, Quat, Vec2, Vec3, Vec4};
use half::{bf16, f16};
use indexmap::{IndexMap, IndexSet};
use nalgebra::{DMatrix, Matrix3, Vector3};
use ndarray::{Array1, Array2, Array3, array};
use num_bigint::{BigInt, BigUint};
use rust_decimal::Decimal;
use semver::{Version, VersionReq};
use serde::{Deserialize, Serialize};
use serde_json::json;
use smallvec::{SmallVec, smallvec};
use std::collections::BTreeMap;
use std::fmt::Debug;
use time::macros::{date, datetime, offset, time as clock};
use url::Url;
use uuid::Uuid;

bitflags::bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
    struct Flags: u8 {
        const A = 1;
        const B = 2;
        const C = 4;
    }
}

#[typetag::serde(tag = "type")]
trait Draw: Debug + Send + Sync {
    fn area(&self) -> u32;
    fn again(&self) -> Box<dyn Draw>;
}
impl Clone for Box<dyn Draw> {
    fn clone(&self) -> Self {
        self.again()
    }
}
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Square {
    side: u32,
}
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Rectangle {
    sides: (u32, u32),
    name: Option<String>,
}
#[typetag::serde]
impl Draw for Square {
    fn area(&self) -> u32 {
        self.side * self.side
    }
    fn again(&self) -> Box<dyn Draw> {
        Box::new(self.clone())
    }
}
#[typetag::serde]
impl Draw for Rectangle {
    fn area(&self) -> u32 {
        self.sides.0 * self.sides.1
    }
    fn again(&self) -> Box<dyn Draw> {
        Box::new(self.clone())
    }
}
#[typetag::serde]
trait Outside: Debug + Send + Sync {
    fn again(&self) -> Box<dyn Outside>;
}
impl Clone for Box<dyn Outside> {
    fn clone(&self) -> Self {
        self.again()
    }
}
#[typetag::serde]
impl Outside for Square {
    fn again(&self) -> Box<dyn Outside> {
        Box::new(self.clone())
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct EitherUntagged {
    #[serde(with = "either::serde_untagged")]
    value: Either<Vec<String>, i32>,
    after: u8,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Stamps {
    #[serde(with = "chrono::serde::ts_nanoseconds")]
    nanoseconds: DateTime<Utc>,
    #[serde(with = "chrono::serde::ts_seconds_option")]
    seconds: Option<DateTime<Utc>>,
    #[serde(with = "time::serde::rfc3339")]
    text: time::OffsetDateTime,
    #[serde(with = "time::serde::timestamp")]
    number: time::OffsetDateTime,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Decimals {
    #[serde(with = "rust_decimal::serde::str")]
    text: Decimal,
    plain: Decimal,
}

/// As the crate serde-untagged reads it.
#[derive(Clone, Debug, PartialEq)]
enum TextOrBytes {
    Text(String),
    Bytes(Vec<u8>),
}
impl Serialize for TextOrBytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Bytes(bytes) => serializer.serialize_bytes(bytes),
        }
    }
}
impl<'de> Deserialize<'de> for TextOrBytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        serde_untagged::UntaggedEnumVisitor::new()
            .string(|text| Ok(Self::Text(text.to_string())))
            .bytes(|bytes| Ok(Self::Bytes(bytes.to_vec())))
            .deserialize(deserializer)
    }
}
/// Bytes that serde's buffer could take for a text, behind a tag of typetag.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Named {
    name: DerivedTextOrBytes,
}
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum DerivedTextOrBytes {
    Text(String),
    #[serde(with = "serde_bytes")]
    Bytes(Vec<u8>),
}
#[typetag::serde]
impl Draw for Named {
    fn area(&self) -> u32 {
        0
    }
    fn again(&self) -> Box<dyn Draw> {
        Box::new(self.clone())
    }
}

pub(super) fn send(ways: &mut Ways) {
    documents(ways);
    times(ways);
    names(ways);
    numbers(ways);
    collections(ways);
    others(ways);
}

fn documents(ways: &mut Ways) {
    let toml: toml::Table =
        "a = 1979-05-27T07:32:00Z\nb = 07:32:00\nc = [1.5, 2.5]\n[d]\ne = 'x'\nf = true".parse().unwrap();
    let raw = |text: &str| serde_json::value::RawValue::from_string(text.into()).unwrap();
    equal! { ways:
        json!(null); json!({}); json!([]); json!(0); json!(-1); json!(u64::MAX); json!(1.5); json!("text"); json!([null, [null], {"a": null}]);
        json!({"a": {"b": [1, -1, 1.5, true, "x", null]}}); vec![json!(null), json!(1)]; BTreeMap::from([("k".to_string(), json!(null))]);
        Some(json!({"a": 1})); serde_json::Map::from_iter([("k".to_string(), json!(null))]); (json!([1]), json!(null), 7_u8);
        toml.clone(); toml::Value::Table(toml); toml::Value::Float(0.5); toml::Value::Datetime("1979-05-27".parse().unwrap());
        "1979-05-27T00:32:00.999999-07:00".parse::<toml::value::Datetime>().unwrap();
    }
    ways.alike("RawValue", raw("{\"a\": [1,  2]}"), ToString::to_string);
    others_formats(ways);
    ways.alike("RawValue between others", (1_u8, raw("  null "), 2_u8), |value| format!("{value:?}"));
}

/// What crates of other formats, which tell bytes from lists, take for a value of any kind.
fn others_formats(ways: &mut Ways) {
    use serde_value::Value as Any;
    let packed = |bytes: &[u8]| rmpv::Value::Binary(bytes.to_vec());
    let concise = |bytes: &[u8]| ciborium::Value::Bytes(bytes.to_vec());
    equal! { ways:
        packed(b"abc"); packed(b""); packed(&[255]); rmpv::Value::from("abc"); rmpv::Value::F32(0.1); rmpv::Value::Nil;
        rmpv::Value::Map(vec![(rmpv::Value::Nil, packed(b"v")), (packed(b"k"), rmpv::Value::Array(vec![1_u8.into()]))]);
        concise(b"abc"); concise(b""); concise(&[255]); ciborium::Value::Text("abc".into()); ciborium::Value::Null;
        ciborium::Value::Map(vec![(concise(b"k"), ciborium::Value::Array(vec![concise(b"v"), u64::MAX.into()]))]);
        Any::Bytes(b"abc".to_vec()); Any::Bytes(vec![255]); Any::String("abc".into()); Any::Char('x'); Any::Seq(vec![Any::U8(97)]);
        Any::Option(Some(Box::new(Any::Unit))); Any::Option(None);
        TextOrBytes::Bytes(b"abc".to_vec()); TextOrBytes::Bytes(vec![255]); TextOrBytes::Text("abc".into()); vec![TextOrBytes::Bytes(vec![]); 9];
    }
}

fn times(ways: &mut Ways) {
    let utc = Utc.with_ymd_and_hms(2024, 2, 29, 23, 59, 59).unwrap() + chrono::Duration::nanoseconds(123_456_789);
    let east = FixedOffset::east_opt(5 * 3600 + 1800).unwrap();
    equal! { ways:
        utc; utc.with_timezone(&east); utc.naive_utc(); NaiveDate::from_ymd_opt(-1, 1, 1).unwrap();
        NaiveTime::from_hms_nano_opt(23, 59, 59, 1_999_999_999).unwrap(); Some(utc); vec![utc; 3];
        chrono::Weekday::Sun; chrono::Month::May; chrono::TimeDelta::nanoseconds(-1_500_000_001); DateTime::<Utc>::MIN_UTC;
        datetime!(2024-02-29 12:00:00.000000001 +01:00); datetime!(2024-02-29 12:00); date!(-1-01-01); clock!(23:59:59.999999999);
        offset!(-11:30); time::Duration::new(-1, -1); time::Month::March; time::Weekday::Friday; vec![date!(2000-01-01); 2];
        Stamps { nanoseconds: utc, seconds: None, text: datetime!(2024-02-29 12:00 UTC), number: datetime!(1969-12-31 23:59:59 UTC) };
    }
}

fn names(ways: &mut Ways) {
    equal! { ways:
        Uuid::nil(); Uuid::from_u128(u128::MAX); vec![Uuid::from_u128(1); 4]; BTreeMap::from([(Uuid::nil(), 1_u8)]); Some(Uuid::nil());
        Url::parse("https://user:pw@host:8080/a%20b?q=1#f").unwrap(); vec![Url::parse("file:///x").unwrap()];
        Version::parse("1.2.3-beta.1+build.5").unwrap(); VersionReq::parse(">=1.2, <2").unwrap();
    }
}

fn numbers(ways: &mut Ways) {
    equal! { ways:
        Decimal::MAX; Decimal::new(-12_345, 4); Decimal::new(100, 2); vec![Decimal::ONE; 3]; Decimals { text: Decimal::new(1, 28), plain: Decimal::MIN };
        BigInt::from(-1) << 200; BigInt::from(0); BigUint::from(u128::MAX) * 7_u8; vec![BigInt::from(1), BigInt::from(-1)];
        f16::from_f32(1.5); bf16::from_f32(-2.0); vec![f16::from_f32(0.5); 10]; f16::INFINITY;
        Vec2::new(1.0, 2.0); Vec3::new(1.0, 2.0, 3.0); Vec4::ONE; Mat4::IDENTITY; Quat::from_rotation_x(1.0); vec![Vec3::Y; 100]; glam::IVec3::new(-1, 0, 1);
        glam::DMat3::IDENTITY; glam::BVec3::new(true, false, true);
        Vector3::new(1.0_f64, 2.0, 3.0); Matrix3::<f32>::identity(); DMatrix::from_row_slice(2, 3, &[1, 2, 3, 4, 5, 6_i32]); nalgebra::Point3::new(1_u8, 2, 3);
        nalgebra::UnitQuaternion::<f64>::identity(); vec![Vector3::new(1.0_f32, 0.0, 0.5); 9];
        array![1.0_f64, 2.0]; array![[1_i32, 2], [3, 4]]; Array3::<u8>::zeros((2, 3, 4)); Array1::<f32>::from_vec(vec![]); Array2::from_elem((1, 2), "x".to_string());
        Array1::from_vec(vec![Some(()), None]);
    }
}

fn collections(ways: &mut Ways) {
    let small: SmallVec<[u8; 4]> = smallvec![1, 2];
    let spilled: SmallVec<[u32; 2]> = smallvec![1, 2, 3, 4];
    let names: SmallVec<[String; 2]> = smallvec!["a".into()];
    equal! { ways:
        Bytes::from_static(b"bytes"); Bytes::new(); BytesMut::from(&b"mut"[..]); vec![Bytes::from_static(b"x"); 2]; (1_u8, Bytes::from_static(&[0xff; 300]));
        small.clone(); spilled; names; (small, 1_u8); serde_bytes::ByteBuf::from(vec![1, 2]); serde_bytes::ByteArray::new([1, 2, 3]);
        IndexMap::<String, u8>::from_iter([("z".into(), 1), ("a".into(), 2)]); IndexSet::<u8>::from_iter([3, 1, 2]); IndexMap::<Option<()>, ()>::from_iter([(None, ()), (Some(()), ())]);
    }
    let ordered = IndexMap::<u8, u8>::from_iter([(9, 0), (1, 0), (5, 0)]);
    ways.alike("the order of an IndexMap", ordered, |map| format!("{:?}", map.keys().collect::<Vec<_>>()));
}

fn others(ways: &mut Ways) {
    equal! { ways:
        Either::<u8, String>::Left(1); Either::<u8, String>::Right("r".into());
        EitherUntagged { value: Either::Left(vec!["a".into()]), after: 1 }; EitherUntagged { value: Either::Right(-1), after: 1 };
        Flags::A | Flags::C; Flags::empty(); Flags::all(); vec![Flags::B; 2];
    }
    let shapes: Vec<Box<dyn Draw>> = vec![
        Box::new(Square { side: 3 }),
        Box::new(Rectangle { sides: (2, 3), name: None }),
        Box::new(Rectangle { sides: (4, 5), name: Some("r".into()) }),
        Box::new(Named { name: DerivedTextOrBytes::Bytes(b"abc".to_vec()) }),
        Box::new(Named { name: DerivedTextOrBytes::Text("abc".into()) }),
    ];
    let show = |shapes: &Vec<Box<dyn Draw>>| {
        format!("{shapes:?}, {:?}", shapes.iter().map(|shape| shape.area()).collect::<Vec<_>>())
    };
    ways.alike("typetag, with a tag inside", shapes, show);
    let outside: Vec<Box<dyn Outside>> = vec![Box::new(Square { side: 3 })];
    ways.alike("typetag, with a tag outside", outside, |value| format!("{value:?}"));
}
